"""One inference of a torch model, written down operator by operator.

For one sample, in evaluation mode. On shapes alone (meta tensors) a branch on values cannot hide,
because there are none; with values the same takes a third of the time.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fleetprune.errors import TraceError

SUPPORTED = (
    "Conv1d/2d/3d (plain or depthwise), Linear, BatchNorm, LayerNorm, PReLU, pooling, concat, "
    "elementwise operators and per-channel parameters"
)

# fmt: off
VIEWS = frozenset({
    "view", "_unsafe_view", "_reshape_alias", "reshape", "flatten", "squeeze", "unsqueeze",
    "alias", "detach", "clone", "contiguous", "lift_fresh",
})
ELEMENTWISE = frozenset({
    "relu", "hardtanh", "clamp", "clamp_min", "clamp_max", "sigmoid", "tanh", "hardsigmoid",
    "leaky_relu", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "square", "erf",
    "sin", "cos", "pow",
    "add", "sub", "rsub", "mul", "div", "maximum", "minimum",
})
NORMS = frozenset({
    "native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
})
PRODUCTS = frozenset({"convolution", "addmm", "mm"})
UNCOUNTED_PRODUCTS = frozenset({
    "bmm", "baddbmm", "mv", "addmv", "dot", "einsum", "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
})
TEMPORARIES = {
    "silu": 1, "hardswish": 1, "mish": 1, "gelu": 2, "elu": 2, "softplus": 2,
    "_prelu_kernel": 2, "_softmax": 2, "_log_softmax": 2, "native_layer_norm": 2,
}
"""Operators that export writes as several nodes, and how many tensors of their output's size are in
memory besides input and output (for those with 2, an upper bound)."""
# fmt: on
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

    def calls(self) -> Counter[str]:
        """Per convolution, linear and BatchNorm layer how often it runs."""
        return Counter(op.layer for op in self.operators if op.kind in (Kind.PRODUCT, Kind.NORM))

    def folded(self) -> dict[int, str]:
        """Which operators are BatchNorms that alone follow a convolution or linear layer.

        Returns:
            Per such operator's index, the path of the layer that export folds it into.
        """
        uses = self.uses()
        makers = {v: op for op in self.operators for v in op.outputs}
        return {
            i: makers[op.inputs[0]].layer
            for i, op in enumerate(self.operators)
            if op.kind is Kind.NORM
            and op.inputs[0] in makers
            and makers[op.inputs[0]].kind is Kind.PRODUCT
            and uses[op.inputs[0]] == 1
        }

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
        layer = self.stack[-1]
        if count := TEMPORARIES.get(name, 0):
            extra = tuple(self._new_value(torch.empty_like(made[0])) for _ in range(count))
            self.recording.operators.append(Operator(name, layer, Kind.OTHER, inputs, extra))
            inputs += extra
        outputs = tuple(self._new_value(x) for x in made)
        self.recording.operators.append(Operator(name, layer, kind, inputs, outputs))
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


def describe(path: str, layer: nn.Module) -> str:
    """A layer as error messages name it."""
    return f"{path or 'the model'} ({type(layer).__name__})"


def on_shapes(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose tensors have shapes but no values."""
    return copy.deepcopy(model).eval().to("meta")


def record(model: nn.Module, example: Tensor) -> Recording:
    """Write down one inference.

    Args:
        model: In evaluation mode; with values or on shapes alone (see `on_shapes`).
        example: (1, ...) on the model's device.

    Raises:
        TraceError: The model does not run, or multiplies outside a layer; names the layer.
    """
    example = example.detach().clone()  # the model may work in place
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
            where = ""
            if example.is_meta:
                where = " on shapes alone, expected no branch on values"
                if "meta" not in reason:  # it is not about values that are not there
                    where = f" on an input of shape {tuple(example.shape)}"
            reason = f"does not run{where}: {reason}"
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
