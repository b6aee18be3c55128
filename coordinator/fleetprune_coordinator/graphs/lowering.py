"""Walks a traced torch graph and lowers each ATen operator to ONNX nodes.

A lowering rule is a function registered for one ATen operator:

    @lowers("aten.relu")
    def relu(low: Lowering, call: Call, x: Value) -> Value: ...

It gets the operator's arguments in the order of its schema, defaults filled in, tensors as
`Value`s; it returns a `Value`, or a list of them where the operator has several outputs.
"""

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import fx

from fleetprune_coordinator.graphs.values import Layouts, Value, four_axes
from fleetprune_coordinator.graphs.writer import GraphWriter, onnx_type

BATCH = 7919
"""Stands for the batch size while a graph with a variable batch is traced.

A prime that no layer has as a size: an axis whose length it divides runs over the batch.
"""

Lowered = Value | Sequence[Value | None]
Rule = Callable[..., Lowered]
RuleT = TypeVar("RuleT", bound=Rule)
RULES: dict[str, Rule] = {}


class NotLoweredError(Exception):
    """An operator has no lowering, or not for these arguments."""

    def __init__(self, target: str, reason: str = "has no lowering") -> None:
        super().__init__(f"{target} {reason}")
        self.target = target
        self.occurrence = 0
        """How many calls of the same operator stand before this one in the graph."""


def lowers(*targets: str) -> Callable[[RuleT], RuleT]:
    """Register a rule for ATen operators such as "aten.relu" (all overloads, and in place)."""

    def register(rule: RuleT) -> RuleT:
        for target in targets:
            if target in RULES:
                raise ValueError(f"two lowering rules for {target}")
            RULES[target] = rule
        return rule

    return register


@dataclass(frozen=True)
class Call:
    """The operator being lowered: its node, and what torch says of its outputs."""

    node: fx.Node
    target: str
    outputs: tuple[tuple[tuple[int, ...], str], ...]
    """Shape and dtype of each output; an absent output is left out."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return self.outputs[0][0]

    @property
    def dtype(self) -> str:
        """Dtype of the first output."""
        return self.outputs[0][1]

    def unsupported(self, reason: str) -> NotLoweredError:
        """The error for arguments that the rule does not cover."""
        return NotLoweredError(self.target, reason)


def dtype_name(dtype: torch.dtype) -> str:
    """Numpy's name of a torch dtype."""
    return str(dtype).removeprefix("torch.")


def target_name(node: fx.Node) -> str:
    """The key of `RULES` for a node: "aten.relu" where it calls aten.relu_.default."""
    name: str = node.target._schema.name.replace("::", ".")  # type: ignore[union-attr]
    return name.removesuffix("_")


class Lowering:
    """One graph being lowered: its writer, the values known so far, and the layout in use."""

    def __init__(self, writer: GraphWriter, block: int = 0, live: str | None = None) -> None:
        """Start a graph.

        Args:
            writer: Receives the nodes.
            block: Channels per block of the blocked layout; 0: plain layout only.
            live: Name of a (batch,) float32 tensor, 1 for samples that count in BatchNorm's
                statistics and 0 for padding; None: all count.
        """
        self.writer = writer
        self.block = block
        self.layouts = Layouts(writer, block)
        self.live = live
        self.batch = 0
        """Samples per call, as the model sees them; 0 where no rule needs to know."""
        self.values: dict[fx.Node, Value | Sequence[Value | None]] = {}
        self.updated: dict[Value, str] = {}
        """Running statistics after the step, by the value that they replace."""
        self.memo: dict[Any, Any] = {}
        """What a rule leaves for another one, such as BatchNorm for its backward rule."""
        self._calls: Counter[str] = Counter()
        self.batch_size: str | None = None
        """Name of a (1,) int64 tensor with the batch size, where that is variable."""

    # Short names for what every rule uses.

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node; see `GraphWriter.op`."""
        return self.writer.op(op_type, *inputs, domain=domain, **attributes)

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.writer.ints(*values)

    def scalar(self, value: float | bool, dtype: str = "float32") -> str:
        """A constant without axes."""
        return self.writer.scalar(value, dtype)

    def plain(self, value: Value) -> str:
        """A value's name in plain layout."""
        return self.layouts.plain(value)

    def blocked(self, value: Value) -> str:
        """A value's name in blocked layout."""
        return self.layouts.blocked(value)

    def cast(self, name: str, dtype: str) -> str:
        """Convert to a numpy dtype."""
        return self.op("Cast", name, to=onnx_type(dtype))

    def reshape(self, name: str, shape: Sequence[int]) -> str:
        """Give a tensor another shape; the axis over a variable batch becomes -1."""
        sizes = [-1 if _is_batch(s) and self.batch_size else s for s in shape]
        if sizes.count(-1) > 1:
            raise NotLoweredError("aten.view", "mixes the batch into several axes")
        return self.op("Reshape", name, self.ints(*sizes))

    def dims(self, shape: Sequence[int]) -> str:
        """A shape as an int64 vector, computed where it depends on a variable batch."""
        if self.batch_size is None or not any(_is_batch(s) for s in shape):
            return self.ints(*shape)
        parts = [
            self.op("Mul", self.batch_size, self.ints(s // BATCH)) if _is_batch(s) else self.ints(s)
            for s in shape
        ]
        return self.op("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]

    def result(self, call: Call, name: str) -> Value:
        """The first output of `call`, in plain layout."""
        return Value(call.shape, call.dtype, plain=name)

    def pointwise(
        self,
        call: Call,
        build: Callable[..., str],
        *operands: Value | float | bool,
        compute: str | None = None,
        zero_safe: bool = True,
    ) -> Value:
        """Lower an operator that treats all elements alike, in the operands' layout.

        Args:
            call: The operator.
            build: Makes the nodes from the operands' names.
            *operands: Tensors (broadcast as in numpy) and numbers.
            compute: Dtype in which to compute; None: that of the output.
            zero_safe: Whether zeros give a finite result. If not, padding channels keep the
                operator off the blocked layout.
        """
        compute = compute or call.dtype
        tensors = [v for v in operands if isinstance(v, Value)]
        blocked = self._fits_blocked(call.shape, tensors, zero_safe)
        spread = blocked and any(_per_channel(v.shape, call.shape) for v in tensors)
        names = []
        for v in operands:
            if not isinstance(v, Value):
                names.append(self.scalar(v, compute))
                continue
            name = self.blocked(v) if blocked and v.shape else self.plain(v)
            if spread and v.shape:
                n, c, h, w = four_axes(v.shape)
                b = self.block
                name = self.op("Reshape", name, self.ints(n, self.layouts.padded(c) // b, h * w, b))
            names.append(name if v.dtype == compute else self.cast(name, compute))
        out = build(*names)
        if not blocked:
            return self.result(call, out)
        if spread:
            n, c, h, w = four_axes(call.shape)
            out = self.op("Reshape", out, self.ints(n, self.layouts.padded(c), h, w))
        return Value(call.shape, call.dtype, blocked=out)

    def _fits_blocked(
        self, shape: tuple[int, ...], tensors: Sequence[Value], zero_safe: bool
    ) -> bool:
        if not self.block or len(shape) not in (3, 4):
            return False
        if not any(v.only_blocked and v.shape == shape for v in tensors):
            return False
        if not zero_safe and self.layouts.padded(shape[1]) != shape[1]:
            return False
        return all(v.shape in ((), shape) or _per_channel(v.shape, shape) for v in tensors)

    # The walk.

    def run(self, graph: fx.GraphModule) -> Any:
        """Lower all nodes; the placeholders' values must already be in `values`.

        Returns:
            The value that the traced function returned, or a list of them if it returned several.

        Raises:
            NotLoweredError: An operator cannot be lowered.
        """
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                tensor = getattr(graph, str(node.target)).detach()
                self.values[node] = Value(
                    tuple(tensor.shape), dtype_name(tensor.dtype), constant=tensor.numpy()
                )
            elif node.op == "call_function" and node.target is operator.getitem:
                source, index = node.args
                self.values[node] = self.values[source][index]  # type: ignore[index]
            elif node.op == "call_function":
                self.values[node] = self._lower(node)
            elif node.op == "output":
                return _replace(node.args[0], self.values)
        raise ValueError("traced graph without outputs")

    def _lower(self, node: fx.Node) -> Lowered:
        call = Call(node, target_name(node), _outputs(node))
        before = self._calls[call.target]
        self._calls[call.target] += 1
        try:
            rule: Rule = RULES.get(call.target, _no_rule)
            return rule(self, call, *self._arguments(node))
        except NotLoweredError as e:
            e.occurrence = before
            raise

    def _arguments(self, node: fx.Node) -> list[Any]:
        """The operator's arguments in schema order, nodes replaced by values."""
        values = []
        for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            if i < len(node.args):
                values.append(node.args[i])
            elif argument.name in node.kwargs:
                values.append(node.kwargs[argument.name])
            else:
                values.append(argument.default_value)
        return [_replace(v, self.values) for v in values]


def _no_rule(_low: Lowering, call: Call, *_: Any) -> Lowered:
    raise NotLoweredError(call.target)


def _replace(argument: Any, values: dict[fx.Node, Any]) -> Any:
    if isinstance(argument, fx.Node):
        return values[argument]
    if isinstance(argument, (list, tuple)):
        return [_replace(a, values) for a in argument]
    return argument


def _outputs(node: fx.Node) -> tuple[tuple[tuple[int, ...], str], ...]:
    meta = node.meta.get("val")
    tensors = meta if isinstance(meta, (list, tuple)) else [meta]
    return tuple(
        (tuple(int(s) for s in t.shape), dtype_name(t.dtype)) for t in tensors if t is not None
    )


def _is_batch(size: int) -> bool:
    return size > 0 and size % BATCH == 0


def _per_channel(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether `shape` is (N or 1, C, 1, ...) of the larger `full` = (N, C, ...)."""
    return (
        len(shape) == len(full)
        and shape[0] in (1, full[0])
        and shape[1] == full[1]
        and all(s == 1 for s in shape[2:])
        and shape != full
    )


def result_type(*operands: Value | float | bool) -> str:
    """Numpy dtype name in which torch would combine the operands."""
    tensors = [v for v in operands if isinstance(v, Value)]
    known = np.result_type(*(v.dtype for v in tensors))
    if known.kind != "f" and any(isinstance(v, float) for v in operands):
        return "float32"
    if known.kind == "b" and any(type(v) is int for v in operands):
        return "int64"
    return str(known)
