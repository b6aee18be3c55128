"""What a shipped ONNX file costs, measured on the file itself.

The same rules as for the torch model (see `liveness`), applied to the nodes that really are in the
file: this is the figure that a budget is held against before anything is signed.

In a quantised file (QDQ form) a value takes one byte where onnxruntime has integer kernels that
make it and read it (`integer_kernels`), and four wherever a float operator reads or makes it. For
some processors onnxruntime adds transposed copies, of a quantised file as of a float one; these
are in neither figure.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import prod

import onnx
import torch
from onnx import helper, numpy_helper, shape_inference
from torch import Tensor, nn

from fleetprune.costs import Costs
from fleetprune.errors import GraphError
from fleetprune.layout import Architecture
from fleetprune_coordinator.integer_kernels import INTO, OUT_OF, integers
from fleetprune_coordinator.liveness import memory
from fleetprune_coordinator.recording import Kind, Operator, Recording
from fleetprune_coordinator.resize import resize
from fleetprune_coordinator.selfcheck import randomised

SLACK_BYTES = 96  # the file's expected outputs: four numbers of 3 to 24 decimal digits each

# fmt: off
SHARED = frozenset({"Reshape", "Flatten", "Identity", "Squeeze", "Unsqueeze", "Dropout"})
ELEMENTWISE = frozenset({
    "Relu", "Clip", "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid", "Tanh", "HardSigmoid",
    "HardSwish", "Gelu", "Mish", "Swish", "Softplus", "Erf", "Exp", "Log", "Sqrt", "Reciprocal",
    "Neg", "Abs", "Sin", "Cos", "Pow", "PRelu", "Add", "Sub", "Mul", "Div", "Max", "Min",
})
UNCOUNTED = frozenset({
    "Einsum", "LSTM", "GRU", "RNN", "Attention", "If", "Loop", "Scan",
})
# fmt: on
CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}
"""Operator, and which of its inputs is the weight."""
PRODUCTS = {"Gemm": 0, "MatMul": 0, "MatMulInteger": 0, "QLinearMatMul": 0}
"""Operator, and which of its inputs is the left factor."""


@dataclass
class _File:
    """A graph with all shapes known."""

    graph: onnx.GraphProto
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    item_bytes: dict[str, int] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value; GraphError if the file does not settle it."""
        if name not in self.shapes:
            raise GraphError(f"onnx file: the shape of {name!r} is not known at batch 1")
        return self.shapes[name]


def file_costs(model: bytes) -> Costs:
    """Measure a shipped model.

    Args:
        model: A complete ONNX file, with its weights inside.

    Returns:
        Bytes of the file, multiply-accumulates and peak activation bytes at batch 1.

    Raises:
        GraphError: The file does not parse, a shape is not known at batch 1, or it has an
            operator whose multiplications are not counted.
    """
    file = _open(model)
    constants = _constants(file.graph)
    return Costs(
        artifact_bytes=len(model),
        macs=sum(_macs(file, node, constants) for node in file.graph.node),
        peak_activation_bytes=_peak(file, constants),
    )


def overhead_bytes(
    model: nn.Module,
    architecture: Architecture,
    example: Tensor,
    export: Callable[[nn.Module, Tensor], bytes],
    counted: Architecture | None = None,
) -> int:
    """Bytes of a shipped file that are not weights, for `Architecture.overhead_bytes`.

    Measured with random weights: a file stores equal constants once, so that the zero biases of a
    model before training would hide what a trained one takes. So it does with shapes: where some
    are read more than once, a model is measured, too, whose groups all have different widths.

    Args:
        model: The dense model; it is not changed.
        architecture: Its description.
        example: (1, *shape).
        export: Makes the file of a model in evaluation mode.
        counted: Has the bytes of the file's weights; None: as `architecture` says.

    Returns:
        An upper bound for every keep count, `SLACK_BYTES` above what was measured.
    """
    twin = randomised(model, torch.float32)
    dense, counted = architecture.groups, counted or architecture
    file = export(twin, example)
    found = len(file) - _weights(counted, dense)
    if _has_shared_sizes(file):
        keep = _widths_apart(architecture)
        other = export(resize(twin, architecture, keep), example)
        found = max(found, len(other) - _weights(counted, keep))
    return found + SLACK_BYTES


def _weights(architecture: Architecture, keep: Mapping[str, int]) -> int:
    return sum(t.artifact_bytes * t.size(keep) for t in architecture.tensors)


def _has_shared_sizes(file: bytes) -> bool:
    """Whether two operators of a file read the same constant that may be a shape."""
    graph = onnx.load_from_string(file).graph
    reads = Counter(name for node in graph.node for name in node.input)
    return any(
        reads[tensor.name] > 1 and int(numpy_helper.to_array(tensor).max(initial=0)) > 1
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.INT64
    )


def _widths_apart(architecture: Architecture) -> dict[str, int]:
    """The widest keep counts with which no two groups' axes, and if possible none, are as long."""
    axes = [axis for spec in architecture.tensors for axis in spec.axes]
    fixed = {
        sum(s.units * s.block for s in axis) for axis in axes if not any(s.group for s in axis)
    }
    groups: set[int] = set()
    keep = {}
    for name, units in sorted(architecture.groups.items(), key=lambda group: group[1]):
        blocks = {s.block for axis in axes for s in axis if s.group == name}
        apart = (
            n
            for taken in (fixed | groups, groups)
            for n in range(units, 0, -1)
            if taken.isdisjoint(n * b for b in blocks)
        )
        keep[name] = next(apart, units)
        groups |= {keep[name] * b for b in blocks}
    return keep


def _open(model: bytes) -> _File:
    """Parse the file and work out all shapes at batch 1."""
    try:
        proto = onnx.load_from_string(model)
        weights = {i.name for i in proto.graph.initializer}
        for value in proto.graph.input:
            dims = value.type.tensor_type.shape.dim
            if value.name not in weights and dims and not dims[0].dim_value:
                dims[0].dim_value = 1
        del proto.graph.value_info[:]
        for value in proto.graph.output:
            value.type.tensor_type.ClearField("shape")
        proto = shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    except Exception as error:  # protobuf and onnx raise a dozen unrelated classes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise GraphError(f"onnx file of {len(model)} bytes cannot be read: {reason}") from error
    file = _File(proto.graph)
    for tensor in proto.graph.initializer:
        file.shapes[tensor.name] = tuple(tensor.dims)
    for value in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output):
        kind = value.type.tensor_type
        if kind.elem_type:
            file.item_bytes[value.name] = helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            file.shapes[value.name] = tuple(d.dim_value for d in kind.shape.dim)
    return file


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Values that do not depend on the sample: a runtime computes them when it loads the file."""
    constants = {tensor.name for tensor in graph.initializer} | {""}
    for node in graph.node:
        if node.op_type == "Shape" or all(name in constants for name in node.input):
            constants.update(node.output)
    return constants


def _macs(file: _File, node: onnx.NodeProto, constants: set[str]) -> int:
    if node.op_type in UNCOUNTED or any(a.HasField("g") for a in node.attribute):
        raise GraphError(
            f"onnx file: {node.op_type} {node.name!r} is not counted, "
            f"expected {', '.join([*CONVOLUTIONS, *PRODUCTS])}"
        )
    if node.output[0] in constants:
        return 0
    if node.op_type in CONVOLUTIONS:
        weight = file.shape(node.input[CONVOLUTIONS[node.op_type]])
        return prod(weight) * prod(file.shape(node.output[0])[2:])
    if node.op_type == "ConvTranspose":
        return prod(file.shape(node.input[1])[1:]) * prod(file.shape(node.input[0]))
    if node.op_type in PRODUCTS:
        left = file.shape(node.input[PRODUCTS[node.op_type]])
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return prod(file.shape(node.output[0])) * left[-2 if transposed else -1]
    return 0


def _peak(file: _File, constants: set[str]) -> int:
    """Most bytes of activations in memory at once."""
    inputs = [v.name for v in file.graph.input if v.name not in constants]
    if len(inputs) != 1 or len(file.graph.output) != 1:
        raise GraphError(
            f"onnx file: {len(inputs)} inputs and {len(file.graph.output)} outputs, expected one "
            f"of each"
        )
    reads = Counter(n for node in file.graph.node for n in node.input)
    reads.update(v.name for v in file.graph.output)
    bytes_alone = integers(file.graph.node, [v.name for v in file.graph.output]).values
    recording = Recording()
    values: dict[str, int] = {}

    def new(name: str) -> int:
        size = 1 if name in bytes_alone else file.item_bytes[name]
        recording.sizes.append(prod(file.shape(name)) * size)
        values[name] = len(values)
        return values[name]

    new(inputs[0])
    for node in file.graph.node:
        read = [n for n in node.input if n in values]
        made = [n for n in node.output if n and n not in constants and reads[n]]
        if read and made:
            kind = _kind(file, node, read, made, bytes_alone)
            source = tuple(values[n] for n in read)
            recording.operators.append(
                Operator(node.op_type, node.name, kind, source, tuple(new(n) for n in made))
            )
    if file.graph.output[0].name not in values:
        raise GraphError("onnx file: the output does not depend on the input")
    recording.result = values[file.graph.output[0].name]
    plan = memory(recording)
    sizes = [recording.sizes[members[0]] for members in plan.buffers]
    return max(sum(sizes[b] for b in live) for live in plan.live)


def _kind(
    file: _File,
    node: onnx.NodeProto,
    read: list[str],
    made: list[str],
    bytes_alone: Collection[str],
) -> Kind:
    """How a node treats memory."""
    same_size = prod(file.shape(read[0])) == prod(file.shape(made[0]))
    if node.op_type in SHARED:
        return Kind.VIEW
    if node.op_type in (INTO, OUT_OF):
        other = read[0] if node.op_type == INTO else made[0]
        return Kind.VIEW if other in bytes_alone else Kind.OTHER
    if node.op_type in ELEMENTWISE and len(read) == 1 and same_size:
        return Kind.ELEMENTWISE
    return Kind.OTHER
