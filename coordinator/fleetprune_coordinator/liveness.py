"""What a model's inference executes, operator by operator, and what is in memory at each one.

The model runs once on shapes alone (meta tensors) for one sample, in evaluation mode, and every
operator is written down. An inference runtime works in place where it can, so views, elementwise
operators on a tensor that nobody needs any more, and BatchNorm that export folds into the layer
before it share the buffer of their input.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fleetprune.errors import TraceError
from fleetprune.layout import Activation, Architecture, KeepCounts
from fleetprune_coordinator.resize import resize

FLOAT_BYTES = 4  # the shipped model computes in float32

VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "_reshape_alias",
        "reshape",
        "flatten",
        "squeeze",
        "unsqueeze",
        "alias",
        "detach",
        "clone",
        "contiguous",
        "lift_fresh",
    ]
)
ELEMENTWISE = frozenset(
    [
        "relu",
        "hardtanh",
        "clamp",
        "clamp_min",
        "clamp_max",
        "sigmoid",
        "tanh",
        "gelu",
        "silu",
        "mish",
        "hardswish",
        "hardsigmoid",
        "leaky_relu",
        "elu",
        "softplus",
        "neg",
        "abs",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "square",
        "erf",
        "sin",
        "cos",
        "pow",
        "_prelu_kernel",
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "maximum",
        "minimum",
    ]
)
NORMS = frozenset(["native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"])
PRODUCTS = frozenset(["convolution", "addmm", "mm"])
UNCOUNTED_PRODUCTS = frozenset(
    [
        "bmm",
        "baddbmm",
        "mv",
        "addmv",
        "dot",
        "einsum",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_attention_math",
        "_scaled_dot_product_efficient_attention",
    ]
)
FIRST_RESULT_ONLY = NORMS | {"native_layer_norm"}


class Kind(Enum):
    """How an operator treats memory."""

    VIEW = auto()
    """Always shares its input's buffer."""
    ELEMENTWISE = auto()
    """Of one tensor; shares its buffer where that is not needed afterwards."""
    NORM = auto()
    """BatchNorm: elementwise where it is folded."""
    PRODUCT = auto()
    """Convolution or linear layer."""
    OTHER = auto()
    """Writes to a buffer of its own."""


@dataclass(frozen=True)
class Operator:
    """One executed operator; values are numbered in the order in which they are made."""

    name: str
    layer: str
    """Path of the innermost module that ran it."""
    kind: Kind
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass
class Recording:
    """Every operator of one inference of one sample."""

    operators: list[Operator] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Elements per value; value 0 is the model's input."""
    result: int = 0
    """The value that is the model's output."""
    output_shape: tuple[int, ...] = ()

    def layers(self) -> list[str]:
        """Paths of the layers in the order in which they first ran."""
        return list(dict.fromkeys(op.layer for op in self.operators))

    def positions(self, rows: Mapping[str, int]) -> Counter[str]:
        """Per layer how often each weight is multiplied, given its output channels."""
        counted: Counter[str] = Counter()
        for op in self.operators:
            if op.kind is Kind.PRODUCT:
                counted[op.layer] += self.sizes[op.outputs[0]] // rows[op.layer]
        return counted

    def uses(self) -> Counter[int]:
        """Per value how often it is read; the model's output is read once more."""
        return Counter([*(v for op in self.operators for v in op.inputs), self.result])

    def folded(self) -> dict[str, str]:
        """Per BatchNorm layer that alone follows a convolution or linear layer, that layer."""
        uses = self.uses()
        calls = Counter(op.layer for op in self.operators if op.kind in (Kind.PRODUCT, Kind.NORM))
        makers = {v: op for op in self.operators for v in op.outputs}
        found: dict[str, str] = {}
        for op in self.operators:
            maker = makers.get(op.inputs[0]) if op.kind is Kind.NORM else None
            if (
                maker is not None
                and maker.kind is Kind.PRODUCT
                and uses[op.inputs[0]] == 1
                and calls[op.layer] == calls[maker.layer] == 1
            ):
                found[op.layer] = maker.layer
        return found

    def structure(self) -> list[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
        """Everything but sizes: the same for every keep count of a model that can be traced."""
        return [(op.name, op.layer, op.inputs, op.outputs) for op in self.operators]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operator that reads the model's input or what was made of it."""

    def __init__(self, example: Tensor, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self.stack: list[str] = [""]
        self.layers = layers
        self._values: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no id is given twice
        self._new_value(example)

    def _new_value(self, tensor: Tensor) -> int:
        self._alive.append(tensor)
        self._values[id(tensor)] = len(self.recording.sizes)
        self.recording.sizes.append(tensor.numel())
        return len(self.recording.sizes) - 1

    def value_of(self, tensor: Tensor) -> int | None:
        """The number of a value that was recorded."""
        return self._values.get(id(tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        inputs = tuple(self._values[id(x)] for x in tensors if id(x) in self._values)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if not inputs or not made:
            return result
        name = func.overloadpacket.__name__.rstrip("_")
        if name in FIRST_RESULT_ONLY or "pool" in name:
            made = made[:1]
        kind = self._kind(name, inputs, made)
        if kind is Kind.PRODUCT:
            self._check_product(name, tensors)
        self.recording.operators.append(
            Operator(name, self.stack[-1], kind, inputs, tuple(self._new_value(x) for x in made))
        )
        return result

    def _kind(self, name: str, inputs: tuple[int, ...], made: list[Tensor]) -> Kind:
        same_size = self.recording.sizes[inputs[0]] == made[0].numel()
        if name in UNCOUNTED_PRODUCTS:
            raise TraceError(f"a product of activations ({name}), supported are {SUPPORTED}")
        if name in PRODUCTS:
            return Kind.PRODUCT
        if name in NORMS:
            return Kind.NORM
        if name in VIEWS and same_size:
            return Kind.VIEW
        if name in ELEMENTWISE and len(inputs) == 1 and same_size:
            return Kind.ELEMENTWISE
        return Kind.OTHER

    def _check_product(self, name: str, tensors: Sequence[Tensor]) -> None:
        layer = self.layers.get(self.stack[-1])
        weight = getattr(layer, "weight", None)
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or not any(
            x is weight or x._base is weight for x in tensors
        ):
            raise TraceError(f"a product ({name}) outside a layer, supported are {SUPPORTED}")


SUPPORTED = (
    "Conv1d/2d/3d (plain or depthwise), Linear, BatchNorm, LayerNorm, PReLU, pooling, concat, "
    "elementwise operators and per-channel parameters"
)


def describe(path: str, layer: nn.Module) -> str:
    """A layer as error messages name it."""
    return f"{path or 'the model'} ({type(layer).__name__})"


def on_shapes(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose tensors have shapes but no values."""
    return copy.deepcopy(model).eval().to("meta")


def record(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Recording:
    """Write down one inference.

    Args:
        model: On shapes alone (see `on_shapes`).
        shape: The input's, (1, ...).
        dtype: The input's.

    Raises:
        TraceError: The model does not run on shapes alone, or multiplies outside a layer.
    """
    example = torch.empty(shape, dtype=dtype, device="meta")
    recorder = _Recorder(example, dict(model.named_modules()))
    hooks = [
        hook
        for path, layer in recorder.layers.items()
        for hook in (
            layer.register_forward_pre_hook(lambda *_, path=path: recorder.stack.append(path)),
            layer.register_forward_hook(lambda *_: (recorder.stack.pop(), None)[1]),
        )
    ]
    try:
        with torch.no_grad(), recorder:
            out = model(example)
    except Exception as error:
        path = recorder.stack[-1]
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if not isinstance(error, TraceError):
            reason = f"does not run on shapes alone, expected no branch on values: {reason}"
        raise TraceError(f"{describe(path, recorder.layers[path])}: {reason}") from error
    finally:
        for hook in hooks:
            hook.remove()
    result = recorder.value_of(out) if isinstance(out, Tensor) else None
    if result is None or out.dim() != 2 or out.shape[0] != 1:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise TraceError(
            f"{describe('', model)}: output {got}, expected a tensor (1, classes) that is "
            f"computed from the input"
        )
    recorder.recording.result = result
    recorder.recording.output_shape = tuple(out.shape)
    return recorder.recording


@dataclass(frozen=True)
class Memory:
    """Which values share a buffer, and which buffers are in memory at each operator."""

    buffers: tuple[tuple[int, ...], ...]
    """Per buffer its values; it was made for the first."""
    live: tuple[tuple[int, ...], ...]
    """Per operator the buffers in memory while it runs."""


def memory(recording: Recording) -> Memory:
    """Lay the values of a recording out in buffers.

    A buffer lives from the operator that writes it first to the last one that reads it. The
    model's input is a buffer like any other; its output lives to the end.
    """
    operators, end = recording.operators, len(recording.operators)
    last_read = {v: i for i, op in enumerate(operators) for v in op.inputs}
    last_read[recording.result] = end
    folded = recording.folded()
    buffer_of = {0: 0}
    members: list[list[int]] = [[0]]
    born = [0]

    def free_after(buffer: int, step: int) -> bool:
        return all(last_read.get(v, -1) <= step for v in members[buffer])

    for i, op in enumerate(operators):
        source = buffer_of[op.inputs[0]]
        in_place = op.kind is Kind.ELEMENTWISE or (op.kind is Kind.NORM and op.layer in folded)
        shares = op.kind is Kind.VIEW or (in_place and free_after(source, i))
        for value in op.outputs:
            if not shares:
                members.append([])
                born.append(i)
            buffer_of[value] = source if shares else len(members) - 1
            members[buffer_of[value]].append(value)
    dies = [
        max(birth, *(last_read.get(v, -1) for v in values))
        for birth, values in zip(born, members, strict=True)
    ]
    return Memory(
        buffers=tuple(tuple(values) for values in members),
        live=tuple(
            tuple(b for b in range(len(members)) if born[b] <= i <= dies[b])
            for i, op in enumerate(operators)
            if op.kind is not Kind.VIEW
        ),
    )


def _probes(groups: Mapping[str, int]) -> Iterator[tuple[str, dict[str, int]]]:
    """Each group with one unit less than the dense model."""
    for group, units in groups.items():
        yield group, {**groups, group: units - 1}


def activations(
    model: nn.Module, architecture: Architecture, dense: Recording, dtype: torch.dtype
) -> tuple[tuple[Activation, ...], tuple[tuple[int, ...], ...]]:
    """Each buffer's bytes as a linear function of the keep counts, and which are live when.

    Args:
        model: The dense model, on shapes alone.
        architecture: Its groups, tensors and input shape.
        dense: The dense model's recording.
        dtype: The input's.

    Returns:
        `Architecture.activations` and `Architecture.live`.

    Raises:
        TraceError: The model executes other operators when it is narrower, or a buffer does not
            grow linearly; names the group.
    """
    plan = memory(dense)
    shape = (1, *architecture.input_shape)

    def bytes_at(keep: KeepCounts, group: str) -> list[int]:
        narrow = record(resize(model, architecture, keep), shape, dtype)
        if narrow.structure() != dense.structure() or narrow.output_shape != dense.output_shape:
            raise TraceError(
                f"group {group}: a narrower model executes other operators, expected control "
                f"flow that does not depend on channel counts"
            )
        return [FLOAT_BYTES * narrow.sizes[values[0]] for values in plan.buffers]

    full = [FLOAT_BYTES * dense.sizes[values[0]] for values in plan.buffers]
    slopes: list[dict[str, int]] = [{} for _ in full]
    for group, keep in _probes(architecture.groups):
        for slope, wide, narrow in zip(slopes, full, bytes_at(keep, group), strict=True):
            if wide != narrow:
                slope[group] = wide - narrow
    found = [
        (size - sum(b * architecture.groups[g] for g, b in slope.items()), slope)
        for size, slope in zip(full, slopes, strict=True)
    ]
    half = {g: max(1, n // 2) for g, n in architecture.groups.items()}
    for (fixed, slope), size in zip(found, bytes_at(half, min(half)), strict=True):
        linear = fixed + sum(b * half[g] for g, b in slope.items())
        if fixed < 0 or min(slope.values(), default=0) < 0 or linear != size:
            raise TraceError(
                f"group {min(slope, default='')}: an intermediate tensor has {size} bytes at half "
                f"the units, expected {linear}: its size must grow linearly with each group"
            )
    return tuple(Activation(fixed=f, per_unit=s) for f, s in found), plan.live
