"""One inference of a torch model as what it costs: values, memory, multiplications.

Only operators that read the model's input or what was made of it count: a runtime computes all
others when it loads the file.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from math import prod

from torch import Tensor, nn

from fleetprune.errors import TraceError
from fleetprune_coordinator.program import PRODUCTS, Call, Program, Ref, describe, run_program

FLOAT_BYTES = 4  # the shipped model computes in float32

# fmt: off
VIEWS = frozenset({
    "view", "_unsafe_view", "_reshape_alias", "reshape", "flatten", "squeeze", "unsqueeze",
    "alias", "detach", "clone", "contiguous", "lift_fresh", "expand", "slice",
})
ELEMENTWISE = frozenset({
    "relu", "hardtanh", "clamp", "clamp_min", "clamp_max", "sigmoid", "tanh", "hardsigmoid",
    "leaky_relu", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "square", "erf",
    "sin", "cos", "pow",
    "add", "sub", "rsub", "mul", "div", "maximum", "minimum",
})
NORMS = frozenset({
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
})
UNCOUNTED_PRODUCTS = frozenset({
    "einsum", "addbmm", "addr", "_trilinear", "_cdist_forward",
    "_scaled_dot_product_attention_math", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
})
TEMPORARIES = {
    "silu": 1, "hardswish": 1, "mish": 1, "gelu": 2, "elu": 2, "softplus": 2, "glu": 2,
    "_prelu_kernel": 2, "_softmax": 2, "_safe_softmax": 2, "_log_softmax": 2,
    "native_layer_norm": 2, "native_group_norm": 2,
}
"""Operators that export writes as several nodes, and how many tensors of their output's size are in
memory besides input and output (for those with 2, an upper bound)."""
# fmt: on
FIRST_RESULT_ONLY = NORMS | {"native_layer_norm", "native_group_norm"}


class Kind(Enum):
    """How an operator treats memory."""

    VIEW = auto()
    """Always shares its input's buffer."""
    ELEMENTWISE = auto()
    """Of one tensor; shares its buffer where that is not needed afterwards."""
    NORM = auto()
    """BatchNorm: elementwise where it is folded."""
    PRODUCT = auto()
    """Of an activation with a weight."""
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
    weight: str = ""
    """Of a product, the name of the parameter that it multiplies with, whole or in part."""
    bias: str = ""
    macs: int = 0
    folds: bool = False
    """Whether export can put a BatchNorm behind it into its weight."""


@dataclass
class Recording:
    """Every operator of one inference of one sample."""

    operators: list[Operator] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Elements per value; value 0 is the model's input."""
    item_bytes: list[int] = field(default_factory=list)
    """Bytes of an element of each value in the shipped file."""
    refs: list[int] = field(default_factory=list)
    """Per value the number of the tensor whose shape it has."""
    result: int = 0
    """The value that is the model's output."""
    output_shape: tuple[int, ...] = ()

    def weight_macs(self) -> Counter[str]:
        """Per parameter the multiplications of activations with it."""
        counted: Counter[str] = Counter()
        for op in self.operators:
            if op.weight:
                counted[op.weight] += op.macs
        return counted

    def macs(self) -> int:
        """All multiplications."""
        return sum(op.macs for op in self.operators)

    def uses(self) -> Counter[int]:
        """Per value how often it is read; the model's output is read once more."""
        return Counter([*(v for op in self.operators for v in op.inputs), self.result])

    def calls(self) -> Counter[str]:
        """How often each weight is multiplied with, and each BatchNorm layer runs."""
        return Counter(
            op.layer if op.kind is Kind.NORM else op.weight
            for op in self.operators
            if op.kind in (Kind.PRODUCT, Kind.NORM)
        )

    def folded(self) -> dict[int, Operator]:
        """Which operators are BatchNorms that alone follow a convolution or linear layer.

        Returns:
            Per such operator's index, the product that export folds it into.
        """
        uses = self.uses()
        makers = {v: op for op in self.operators for v in op.outputs}
        return {
            i: makers[op.inputs[0]]
            for i, op in enumerate(self.operators)
            if op.kind is Kind.NORM
            and op.inputs[0] in makers
            and makers[op.inputs[0]].folds
            and uses[op.inputs[0]] == 1
        }


def record(model: nn.Module, example: Tensor) -> Recording:
    """Write down what one inference costs.

    Args:
        model: In evaluation mode; with values or on shapes alone.
        example: (1, ...) on the model's device.

    Raises:
        TraceError: The model does not run, or multiplies in a way that is not counted; names the
            layer.
    """
    return recording_of(run_program(model, example), dict(model.named_modules()))


def recording_of(program: Program, layers: Mapping[str, nn.Module]) -> Recording:
    """What a program costs.

    Raises:
        TraceError: It multiplies in a way that is not counted; names the layer.
    """
    recording = Recording()
    values: dict[int, int] = {}

    def new(ref: Ref) -> int:
        values[ref.number] = len(recording.sizes)
        recording.sizes.append(prod(ref.shape))
        recording.item_bytes.append(FLOAT_BYTES if ref.real else ref.item_bytes)
        recording.refs.append(ref.number)
        return values[ref.number]

    new(program.input)
    for call in program.calls:
        made = [ref for ref in call.outputs if ref.depends]
        inputs = tuple(values[ref.number] for ref in call.inputs if ref.number in values)
        if not made or not inputs:  # what reads a pool's indices alone is no cost either
            continue
        if call.name in UNCOUNTED_PRODUCTS:
            named = describe(call.layer, layers[call.layer])
            raise TraceError(f"{named}: products of {call.name} are not counted, expected {PLAIN}")
        if call.name in FIRST_RESULT_ONLY or "pool" in call.name:
            made = made[:1]
        if count := _temporaries(call):
            extra = tuple(new(made[0]) for _ in range(count))
            recording.operators.append(Operator(call.name, call.layer, Kind.OTHER, inputs, extra))
            inputs += extra
        outputs = tuple(new(ref) for ref in made)
        recording.operators.append(_operator(call, recording.sizes, inputs, outputs))
    recording.result = values[program.output.number]
    recording.output_shape = program.output.shape
    return recording


def _temporaries(call: Call) -> int:
    if call.name in NORMS and call.arguments.get("training"):  # InstanceNorm
        return 2
    return TEMPORARIES.get(call.name, 0)


PLAIN = "matrix products and convolutions"


def _operator(
    call: Call, sizes: list[int], inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> Operator:
    if call.name in PRODUCTS:
        weight = call.weight
        kind = Kind.PRODUCT if weight else Kind.OTHER
        bias = call.arguments.get("bias" if call.name == "convolution" else "self")
        named = bias.name if isinstance(bias, Ref) and call.name in FOLDING else ""
        return Operator(
            call.name, call.layer, kind, inputs, outputs, weight, named, call.macs, _folds(call)
        )
    same_size = sizes[inputs[0]] == sizes[outputs[0]]
    kind = Kind.OTHER
    if call.name in NORMS and not call.arguments.get("training"):
        kind = Kind.NORM
    elif call.name in VIEWS and same_size:
        kind = Kind.VIEW
    elif call.name in ELEMENTWISE and len(inputs) == 1 and same_size:
        kind = Kind.ELEMENTWISE
    return Operator(call.name, call.layer, kind, inputs, outputs)


FOLDING = {"convolution": "weight", "addmm": "mat2", "mm": "mat2"}
"""Products that export folds a BatchNorm into, and the name of their weight."""


def _folds(call: Call) -> bool:
    """Whether the weight is a whole parameter, as it is or transposed."""
    if call.name not in FOLDING or call.arguments.get("transposed"):
        return False
    weight: Ref = call.arguments[FOLDING[call.name]]
    return bool(weight.whole)
