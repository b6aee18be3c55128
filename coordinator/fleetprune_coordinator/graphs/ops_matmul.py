"""Matrix products, embeddings and lookups, and random masks."""
# ruff: noqa: PLR0917  (a rule takes the operator's arguments in the order of its schema)

from typing import Any

import torch
from torch import fx

from fleetprune_coordinator.graphs.lowering import Call, Lowering, lowers
from fleetprune_coordinator.graphs.values import Value

_TRANSPOSES = (
    torch.ops.aten.t.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.permute.default,
)


_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def _matrix(low: Lowering, call: Call, index: int, value: Value) -> tuple[str, int]:
    """A factor's name, and 1 if it is to be read transposed.

    A product with a transposed matrix reads the original: no transposed copy is made, and an
    inference file stores the weight once.
    """
    node = call.node.args[index]
    if isinstance(node, fx.Node) and node.target in _TRANSPOSES and len(value.shape) == 2:
        source = low.values[node.args[0]]  # type: ignore[index]
        if isinstance(source, Value) and source.shape == value.shape[::-1]:
            order = node.args[1] if node.target is _TRANSPOSES[2] else [1, 0]
            if [a % 2 for a in order] == [1, 0]:  # type: ignore[union-attr, operator]
                return low.plain(source), 1
    return low.plain(value), 0


@lowers("aten.mm")
def mm(low: Lowering, call: Call, a: Value, b: Value) -> Value:
    """A @ b."""
    (left, turn_left), (right, turn_right) = _matrix(low, call, 0, a), _matrix(low, call, 1, b)
    return low.result(call, low.op("Gemm", left, right, transA=turn_left, transB=turn_right))


@lowers("aten.addmm")
def addmm(
    low: Lowering, call: Call, bias: Value, a: Value, b: Value, beta: float, alpha: float
) -> Value:
    """beta*bias + alpha * (a @ b)."""
    (left, turn_left), (right, turn_right) = _matrix(low, call, 1, a), _matrix(low, call, 2, b)
    name = low.op(
        "Gemm",
        left,
        right,
        low.plain(bias),
        alpha=float(alpha),
        beta=float(beta),
        transA=turn_left,
        transB=turn_right,
    )
    return low.result(call, name)


@lowers("aten.bmm")
def bmm(low: Lowering, call: Call, a: Value, b: Value) -> Value:
    """a[i] @ b[i]."""
    return low.result(call, low.op("MatMul", low.plain(a), _repeated(low, call, b)))


def _repeated(low: Lowering, call: Call, b: Value) -> str:
    """The right factor's name; of one matrix for all i, that of the matrix.

    So torch multiplies with a weight what does not lie in memory row by row.
    """
    node: Any = call.node.args[1]
    while node.target in _VIEWS:
        node = node.args[0]
    if node.target is torch.ops.aten.expand.default:
        source = low.values[node.args[0]]
        if isinstance(source, Value) and source.shape == b.shape[1:]:
            return low.plain(source)
    return low.plain(b)


@lowers("aten.baddbmm")
def baddbmm(
    low: Lowering, call: Call, c: Value, a: Value, b: Value, beta: float, alpha: float
) -> Value:
    """beta*c + alpha * (a[i] @ b[i])."""
    product = low.op("MatMul", low.plain(a), low.plain(b))
    if alpha != 1:
        product = low.op("Mul", product, low.scalar(alpha))
    name = low.plain(c)
    if beta != 1:
        name = low.op("Mul", name, low.scalar(beta))
    return low.result(call, low.op("Add", name, product))


@lowers("aten.embedding")
def embedding(low: Lowering, call: Call, table: Value, indices: Value, *_: Any) -> Value:
    """table[indices]."""
    return low.result(call, low.op("Gather", low.plain(table), low.plain(indices), axis=0))


@lowers("aten.embedding_dense_backward")
def embedding_dense_backward(
    low: Lowering,
    call: Call,
    g: Value,
    indices: Value,
    rows: int,
    padding: int,
    by_frequency: bool,
) -> Value:
    """Adds up, per row of the table, the gradients of all places that read it."""
    if by_frequency:
        raise call.unsupported("is not supported with scale_grad_by_freq=True")
    name, at = low.plain(g), low.plain(indices)
    if padding >= 0:
        other = low.op("Not", low.op("Equal", at, low.scalar(padding, "int64")))
        mask = low.op("Unsqueeze", low.cast(other, "float32"), low.ints(-1))
        name = low.op("Mul", name, mask)
    width = call.shape[1]
    name = low.op(
        "ScatterND",
        low.writer.zeros(rows, width),
        low.reshape(at, (-1, 1)),
        low.reshape(name, (-1, width)),
        reduction="add",
    )
    return low.result(call, name)


@lowers("aten.index_select")
def index_select(low: Lowering, call: Call, x: Value, axis: int, index: Value) -> Value:
    """x[index] along one axis."""
    axis %= len(x.shape)
    return low.result(call, low.op("Gather", low.plain(x), low.plain(index), axis=axis))


@lowers("aten.index_add")
def index_add(
    low: Lowering, call: Call, x: Value, axis: int, index: Value, g: Value, alpha: float
) -> Value:
    """x[index] += g along one axis."""
    axis %= len(x.shape)
    if alpha != 1:
        raise call.unsupported(f"is not supported with alpha={alpha}")
    column = [1] * len(g.shape)
    column[axis] = g.shape[axis]
    at = low.op("Expand", low.reshape(low.plain(index), column), low.ints(*g.shape))
    name = low.op("ScatterElements", low.plain(x), at, low.plain(g), axis=axis, reduction="add")
    return low.result(call, name)


@lowers("aten.gather")
def gather(low: Lowering, call: Call, x: Value, axis: int, index: Value, _sparse: bool) -> Value:
    """y[i][j] = x[i][index[i][j]], for axis 1."""
    name = low.op("GatherElements", low.plain(x), low.plain(index), axis=axis % len(x.shape))
    return low.result(call, name)


@lowers("aten.scatter")
def scatter(
    low: Lowering, call: Call, x: Value, axis: int, index: Value, source: Any, *_: Any
) -> Value:
    """A copy of x with x[i][index[i][j]] = source[i][j], for axis 1; source may be a number."""
    if isinstance(source, Value):
        updates = low.plain(source)
    else:
        updates = low.op("Expand", low.scalar(source, call.dtype), low.dims(index.shape))
    name = low.op(
        "ScatterElements", low.plain(x), low.plain(index), updates, axis=axis % len(x.shape)
    )
    return low.result(call, name)


@lowers("aten.scatter_add")
def scatter_add(
    low: Lowering, call: Call, x: Value, axis: int, index: Value, source: Value
) -> Value:
    """x[i][index[i][j]] += source[i][j], for axis 1."""
    name = low.op(
        "ScatterElements",
        low.plain(x),
        low.plain(index),
        low.plain(source),
        axis=axis % len(x.shape),
        reduction="add",
    )
    return low.result(call, name)


@lowers("aten.bernoulli")
def bernoulli(low: Lowering, call: Call, x: Value, p: Any, *_: Any) -> Value:
    """1 with probability p, else 0; new in every run."""
    if isinstance(p, Value) or p is None:
        raise call.unsupported("is supported only with one probability for all elements")
    uniform = low.op("RandomUniform", shape=list(call.shape), dtype=1)
    return low.result(call, low.cast(low.op("Less", uniform, low.scalar(p)), call.dtype))
