"""Sums, means, extremes, variances and softmax along axes."""
# ruff: noqa: PLR0917  (a rule takes the operator's arguments in the order of its schema)

from collections.abc import Sequence
from math import prod
from typing import Any

from fleetprune_coordinator.graphs.lowering import Call, Lowering, lowers
from fleetprune_coordinator.graphs.values import Value
from fleetprune_coordinator.graphs.writer import NCHWC

Axes = int | Sequence[int] | None


def _axes(axes: Axes, rank: int) -> list[int]:
    """Axes as non-negative numbers; None or empty: all."""
    if isinstance(axes, int):
        return [axes % rank] if rank else []
    return [a % rank for a in axes] if axes else list(range(rank))


def _reduce(low: Lowering, call: Call, op_type: str, x: Value, axes: Axes, keepdim: bool) -> Value:
    over = _axes(axes, len(x.shape))
    name = low.plain(x)
    if not over:
        return x
    if x.dtype != call.dtype:
        name = low.cast(name, call.dtype)
    return low.result(call, low.op(op_type, name, low.ints(*over), keepdims=int(keepdim)))


def _blocked_mean(low: Lowering, call: Call, x: Value, axes: Axes, scale: float) -> Value | None:
    """`scale` times the mean over (H, W) of a blocked tensor, or None where it is not that."""
    if not (x.only_blocked and len(x.shape) == 4 and _axes(axes, 4) == [2, 3]):
        return None
    n, c = x.shape[:2]
    name = low.op("GlobalAveragePool", low.blocked(x), domain=NCHWC)
    if scale != 1:
        name = low.op("Mul", name, low.scalar(scale))
    small = Value((n, c, 1, 1), call.dtype, blocked=name)
    if call.shape == small.shape:
        return small
    return low.result(call, low.reshape(low.plain(small), call.shape))


def _pooled_mean(low: Lowering, call: Call, x: Value, axes: Axes) -> Value | None:
    """The mean over all positions in an inference graph, or None where it is not that.

    onnxruntime has a blocked and an integer kernel for GlobalAveragePool, and neither for
    ReduceMean; a training graph's blocked mean is `_blocked_mean`.
    """
    rank = len(x.shape)
    if low.batch_size is None or rank < 3 or x.dtype != call.dtype:
        return None
    if sorted(_axes(axes, rank)) != list(range(2, rank)):
        return None
    name = low.op("GlobalAveragePool", low.plain(x))
    return low.result(call, name if len(call.shape) == rank else low.reshape(name, call.shape))


def _no_axes(call: Call) -> bool:
    """Whether this is the overload without a `dim` argument."""
    return str(call.node.target).endswith(".default") and not any(
        a.name == "dim"
        for a in call.node.target._schema.arguments  # type: ignore[union-attr]
    )


@lowers("aten.sum")
def sum_(
    low: Lowering, call: Call, x: Value, axes: Axes = None, keepdim: bool = False, *_: Any
) -> Value:
    """Sum."""
    if _no_axes(call):
        axes, keepdim = None, False
    pooled = _blocked_mean(low, call, x, axes, float(prod(x.shape[2:])))
    return pooled or _reduce(low, call, "ReduceSum", x, axes, keepdim)


@lowers("aten.mean")
def mean(
    low: Lowering, call: Call, x: Value, axes: Axes = None, keepdim: bool = False, *_: Any
) -> Value:
    """Mean."""
    if _no_axes(call):
        axes, keepdim = None, False
    pooled = _blocked_mean(low, call, x, axes, 1.0) or _pooled_mean(low, call, x, axes)
    return pooled or _reduce(low, call, "ReduceMean", x, axes, keepdim)


@lowers("aten.amax")
def amax(low: Lowering, call: Call, x: Value, axes: Axes, keepdim: bool) -> Value:
    """Largest element."""
    return _reduce(low, call, "ReduceMax", x, axes, keepdim)


@lowers("aten.amin")
def amin(low: Lowering, call: Call, x: Value, axes: Axes, keepdim: bool) -> Value:
    """Smallest element."""
    return _reduce(low, call, "ReduceMin", x, axes, keepdim)


@lowers("aten.any")
def any_(low: Lowering, call: Call, x: Value, axes: Axes = None, keepdim: bool = False) -> Value:
    """Whether any element is true."""
    over = low.ints(*_axes(axes, len(x.shape)))
    largest = low.op("ReduceMax", low.cast(low.plain(x), "float32"), over, keepdims=int(keepdim))
    return low.result(call, low.cast(largest, "bool"))


@lowers("aten.var_mean")
def var_mean(
    low: Lowering,
    call: Call,
    x: Value,
    axes: Axes = None,
    correction: float | None = None,
    keepdim: bool = False,
) -> list[Value]:
    """sum((x - mean)**2) / (n - correction), and the mean; two passes, which keeps digits."""
    over = _axes(axes, len(x.shape))
    count = prod(x.shape[a] for a in over) - (1 if correction is None else correction)
    name, at = low.plain(x), low.ints(*over)
    centre = low.op("ReduceMean", name, at, keepdims=1)
    off = low.op("Sub", name, centre)
    total = low.op("ReduceSum", low.op("Mul", off, off), at, keepdims=int(keepdim))
    (_, dtype), (mean_shape, _) = call.outputs
    variance = low.op("Mul", total, low.scalar(1.0 / count, dtype))
    if not keepdim:
        centre = low.reshape(centre, mean_shape)
    return [low.result(call, variance), Value(mean_shape, dtype, plain=centre)]


@lowers("aten._softmax")
def softmax(low: Lowering, call: Call, x: Value, axis: int, _half: bool) -> Value:
    """exp(x) / sum(exp(x))."""
    return low.result(call, low.op("Softmax", low.plain(x), axis=axis))


@lowers("aten._safe_softmax")
def safe_softmax(low: Lowering, call: Call, x: Value, axis: int, _dtype: Any) -> Value:
    """Softmax of attention scores. A row that is masked altogether gives NaN, where torch has 0."""
    return low.result(call, low.op("Softmax", low.plain(x), axis=axis))


@lowers("aten._log_softmax")
def log_softmax(low: Lowering, call: Call, x: Value, axis: int, _half: bool) -> Value:
    """X - log(sum(exp(x)))."""
    return low.result(call, low.op("LogSoftmax", low.plain(x), axis=axis))


@lowers("aten._softmax_backward_data")
def softmax_backward(low: Lowering, call: Call, g: Value, y: Value, axis: int, _: Any) -> Value:
    """Y * (g - sum(g*y))."""
    gy = low.op("Mul", low.plain(g), low.plain(y))
    total = low.op("ReduceSum", gy, low.ints(axis % len(y.shape)), keepdims=1)
    return low.result(call, low.op("Sub", gy, low.op("Mul", low.plain(y), total)))


@lowers("aten._log_softmax_backward_data")
def log_softmax_backward(low: Lowering, call: Call, g: Value, y: Value, axis: int, _: Any) -> Value:
    """G - exp(y) * sum(g)."""
    total = low.op("ReduceSum", low.plain(g), low.ints(axis % len(y.shape)), keepdims=1)
    spread = low.op("Mul", low.op("Exp", low.plain(y)), total)
    return low.result(call, low.op("Sub", low.plain(g), spread))
