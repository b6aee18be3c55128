"""Static quantisation of a class's inference file: weights and activations in 8 bits.

Activations are unsigned, with one scale per tensor, whose range the fleet has measured
(`value_ranges`); weights are signed, with a scale per output channel; biases have 32 bits
(Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference"). onnxruntime's own quantiser writes the file, in QDQ form: float
operators between QuantizeLinear and DequantizeLinear, in whose place onnxruntime puts integer
kernels where it has them (`integer_kernels`).

Weights use 7 of their 8 bits. x86 processors without VNNI add products of two bytes in pairs of
16 bits, which saturate where a weight is larger than 64: other numbers, silently, than elsewhere.
With 7 bits every processor's sums are exact, and only their rounding differs.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from fleetprune.errors import GraphError
from fleetprune.layout import Activation, Architecture, Axis, Role, TensorSpec
from fleetprune_coordinator.integer_kernels import (
    CLAMPS,
    INTO,
    OUT_OF,
    PRODUCTS,
    VIEWS,
    WEIGHTED,
    Choice,
    choose,
    integers,
    left_in_float,
)

FLOAT_BYTES: Final = 4
CONVOLUTION_SCALES: Final = 8
"""Bytes per output channel beside weights and bias: the weights' scale and the bias's."""
LINEAR_SCALES: Final = 13
"""As above, and zero points, without which onnxruntime has no integer kernel: 1 and 4 bytes."""
SCALE_BITS: Final = 8
"""Significant bits of a scale: it is at most a 128th larger than it had to be."""
PIECES: Final = VIEWS | {"Split", "Slice"}
"""What makes of a weight another tensor with the same numbers, or some of them."""

Constants = dict[str, onnx.TensorProto]


def quantise(model: bytes, ranges: NDArray[np.float32]) -> bytes:
    """Quantise an inference file.

    Args:
        model: What `export_infer` made.
        ranges: (tensors, 2) lowest and highest value of each tensor that `prepared` chooses, in
            its order.

    Returns:
        An ONNX file in QDQ form with the same input, output and metadata.

    Raises:
        GraphError: The ranges are not those of this file, or its input is not float32.
    """
    proto, choice = prepared(model)
    graph = proto.graph
    x, y = graph.input[0].name, graph.output[0].name
    for place, node in enumerate(graph.node):
        node.name = f"n{place}"  # the quantiser tells nodes apart by name
    if ranges.shape != (len(choice.tensors), 2):
        raise GraphError(
            f"int8: ranges of shape {ranges.shape}, "
            f"expected ({len(choice.tensors)}, 2): one per tensor of the file"
        )
    chosen = [graph.node[i] for i in choice.nodes]
    limits = _limits(graph, dict(zip(choice.tensors, ranges.tolist(), strict=True)))
    # What a clamp reads takes on the range of what it makes, and the clamp goes.
    clamps = [node for node in chosen if node.op_type in CLAMPS]
    vanished = {name for node in clamps for name in (node.input[0], node.output[0])}
    limits |= {n.input[0]: limits[n.output[0]] for n in clamps}
    quantiser = QDQQuantizer(
        proto,
        per_channel=True,
        reduce_range=True,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(
            CalibrationMethod.MinMax,
            {
                name: TensorData(lowest=np.float32(low), highest=np.float32(high))
                for name, (low, high) in limits.items()
            },
        ),
        nodes_to_quantize=[node.name for node in chosen],
        nodes_to_exclude=[],
        op_types_to_quantize=sorted({node.op_type for node in chosen}),
        extra_options={"TensorQuantOverrides": _weight_ranges(graph, chosen)},
    )
    quantiser.quantize_model()
    quantiser.model.topological_sort()
    quantised = quantiser.model.model
    _keep_float(quantised.graph, y, vanished)
    _shorten(quantised.graph, x, y)
    data: bytes = quantised.SerializeToString(deterministic=True)
    return data


def _short(value: float) -> float:
    """The least number of `SCALE_BITS` significant bits that is not below a value from 0 up.

    Scales made of it seldom change from one release to the next, and with them stay most of the
    numbers that were divided by them: deltas between releases (`fleetprune.delta`) are small.
    """
    unit = math.frexp(value)[1] - SCALE_BITS
    return math.ldexp(math.ceil(math.ldexp(value, -unit)), unit)


def _weight_ranges(
    graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]
) -> dict[str, list[dict[str, Any]]]:
    """Per stored weight and output what the quantiser is to take for the largest number."""
    constants = {t.name: t for t in graph.initializer}
    found: dict[str, list[dict[str, Any]]] = {}
    for node in nodes:
        tensor = constants.get(node.input[1]) if node.op_type in WEIGHTED else None
        if tensor is None or len(tensor.dims) < 2:
            continue
        turned = any(a.name == "transB" and a.i for a in node.attribute)
        axis = 0 if node.op_type == "Conv" or turned else 1
        weight = np.moveaxis(np.abs(numpy_helper.to_array(tensor)), axis, 0)
        tops = [_short(float(top)) for top in weight.reshape(len(weight), -1).max(axis=1)]
        found[tensor.name] = [{"axis": axis, "rmin": -top, "rmax": top} for top in tops]
    return found


def no_ranges(model: bytes) -> NDArray[np.float32]:
    """Ranges (tensors, 2) to quantise a file with whose numbers do not matter."""
    _, choice = prepared(model)
    return np.tile(np.array([-1, 1], np.float32), (len(choice.tensors), 1))


def prepared(model: bytes) -> tuple[onnx.ModelProto, Choice]:
    """An inference file as it is quantised, and what of it is to run on integers.

    Args:
        model: What `export_infer` made.

    Returns:
        The file, in which weights that are cut out of others, turned or reshaped are stored as
        they are read; and the choice.

    Raises:
        GraphError: The file's input is not float32.
    """
    proto = onnx.load_from_string(model)
    graph = proto.graph
    if graph.input[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        raise GraphError("int8: the model's input is not float32")
    _drop_identity(graph, graph.output[0].name)
    _store_views(graph)
    constants = {t.name for t in graph.initializer}
    return proto, choose(graph.node, graph.input[0].name, [graph.output[0].name], constants)


def float_layers(model: bytes) -> str:
    """Which layers of an inference file `quantise` leaves in float32, and why; empty if none."""
    graph = prepared(model)[0].graph
    return left_in_float(graph.node, graph.input[0].name, {t.name for t in graph.initializer})


def float_weights(model: bytes, weights: Mapping[str, NDArray[np.float32]]) -> set[str]:
    """Names of the weights that a quantised file still has in float32.

    Args:
        model: The quantised file.
        weights: Of the network that it was made of, by name; numbers at random, none twice.
    """
    graph = onnx.load_from_string(model).graph
    stored = [
        numpy_helper.to_array(t).ravel()
        for t in graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT
    ]
    numbers = np.concatenate([np.zeros(0, np.float32), *stored])
    return {name for name, weight in weights.items() if np.isin(weight, numbers).all()}


def all_integer(model: bytes) -> bool:
    """Whether all of a file in QDQ form but its output runs on integers in onnxruntime."""
    graph = onnx.load_from_string(model).graph
    y = graph.output[0].name
    integer = integers(graph.node, [y]).nodes
    constants = {tensor.name for tensor in graph.initializer}
    return all(
        place in integer or node.op_type in (INTO, OUT_OF) or constants.issuperset(node.input)
        for place, node in enumerate(graph.node)
    )


def quantised(
    architecture: Architecture, *, integer: bool, floats: Collection[str] = ()
) -> Architecture:
    """What a model costs as a quantised file, for the budget solver alone.

    Weights of convolutions and linear layers take a byte, and per output channel what
    `CONVOLUTION_SCALES` or `LINEAR_SCALES` say; all else keeps its size. Activations take a byte,
    the input four and one more for its quantised copy, the output four.

    Args:
        architecture: Of the float32 model; `overhead_bytes` is to be measured anew.
        integer: Whether the file runs on integers throughout (`all_integer`). If not, every
            activation is counted with four bytes, and one more for a quantised copy.
        floats: Names of the weights that stay float32 (`float_weights`).
    """
    tensors: list[TensorSpec] = []
    for spec in architecture.tensors:
        if not spec.positions or not spec.artifact_bytes or spec.name in floats:
            tensors.append(spec)
            continue
        copies = spec.artifact_bytes // FLOAT_BYTES
        scales = LINEAR_SCALES if len(spec.axes) == 2 else CONVOLUTION_SCALES
        tensors += [
            spec.model_copy(update={"artifact_bytes": copies}),
            _scales(spec.name, spec.axes[0], copies * scales),
        ]
    return architecture.model_copy(
        update={"tensors": tuple(tensors)}
        | (_in_bytes(architecture) if integer else _with_copies(architecture))
    )


def _scales(name: str, outputs: Axis, size: int) -> TensorSpec:
    return TensorSpec(
        name=f"{name}/scales", role=Role.STATISTIC, axes=(outputs,), artifact_bytes=size
    )


def _in_bytes(architecture: Architecture) -> dict[str, object]:
    """Activations of a byte each.

    The input's buffer, the first, has a quantised copy, which is what the first operator reads; the
    output's, the last that is in memory at the end, stays float32.
    """
    floats = architecture.activations
    last = max(architecture.live[-1])
    narrow = [a if i == last else _scaled(a, 1, FLOAT_BYTES) for i, a in enumerate(floats)]
    copy = len(narrow)
    live = [tuple(copy if b == 0 else b for b in buffers) for buffers in architecture.live]
    return {
        "activations": (floats[0], *narrow[1:], narrow[0]),
        "live": ((0, copy), *live),
    }


def _with_copies(architecture: Architecture) -> dict[str, object]:
    wide = tuple(_scaled(a, FLOAT_BYTES + 1, FLOAT_BYTES) for a in architecture.activations)
    return {"activations": wide}


def _scaled(activation: Activation, times: int, by: int) -> Activation:
    return Activation(
        fixed=activation.fixed * times // by,
        per_unit={g: n * times // by for g, n in activation.per_unit.items()},
    )


def _drop_identity(graph: onnx.GraphProto, y: str) -> None:
    """Let the node before a closing Identity make the output itself."""
    last = graph.node[-1]
    made = {name for node in graph.node for name in node.output}
    if last.op_type != "Identity" or last.output[0] != y or last.input[0] not in made:
        return
    source = last.input[0]
    del graph.node[-1]
    _rename(graph.node, {source: y})


def _store_views(graph: onnx.GraphProto) -> None:
    """Compute what only cuts, turns or reshapes stored tensors, and store that.

    The integer kernels want their weights and biases stored; products of weights are left to the
    runtime, since they may have many more numbers than their factors.
    """
    stored = {t.name: t for t in graph.initializer}
    kept = []
    for node in graph.node:
        given = [name for name in node.input if name]
        if node.op_type not in PIECES or not stored.keys() >= set(given):
            kept.append(node)
            continue
        feeds = {name: numpy_helper.to_array(stored[name]) for name in given}
        for name, value in zip(node.output, ReferenceEvaluator(node).run(None, feeds), strict=True):
            stored[name] = numpy_helper.from_array(value, name)
            graph.initializer.append(stored[name])
    del graph.node[:]
    graph.node.extend(kept)


def _rename(nodes: Sequence[onnx.NodeProto], names: Mapping[str, str]) -> None:
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _limits(
    graph: onnx.GraphProto, ranges: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """The ranges, within the limits of the clamp that makes a tensor: it is left out for them."""
    constants = {t.name: t for t in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    limits = {}
    for name, (low, high) in ranges.items():
        node = makers.get(name)
        if node is not None and node.op_type in CLAMPS:
            least, most = _clamp(node, constants)
            low, high = max(low, least), min(high, most)  # noqa: PLW2901
        limits[name] = (min(low, 0.0), max(high, 0.0))
    return limits


def _clamp(node: onnx.NodeProto, constants: Constants) -> tuple[float, float]:
    if node.op_type == "Relu":
        return 0.0, np.inf
    bounds = [-np.inf, np.inf]
    for place, name in enumerate(node.input[1:3]):
        if name:
            bounds[place] = float(numpy_helper.to_array(constants[name]))
    return bounds[0], bounds[1]


def _keep_float(graph: onnx.GraphProto, y: str, clamped: Collection[str]) -> None:
    """Take away roundings that no integer kernel needs.

    They are of what a linear layer makes for float operators alone, or for the output: its kernel
    can as well write float32. Those of `clamped` values stay: they are all that is left of a clamp.
    """
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    integer = {id(graph.node[i]) for i in integers(graph.node, [y]).nodes}
    gone: set[int] = set()
    for node in graph.node:
        if node.op_type != OUT_OF or node.input[0] not in makers:
            continue
        into = makers[node.input[0]]
        source = makers.get(into.input[0])
        back, result = node.output[0], into.input[0]
        if source is None or source.op_type not in PRODUCTS or len(readers[into.output[0]]) > 1:
            continue
        if result in clamped:
            continue
        if any(id(reader) in integer for reader in readers.get(back, ())):
            continue
        gone |= {id(node), id(into)}
        if back == y:
            _rename([source], {result: y})
        else:
            _rename(readers.get(back, ()), {back: result})
    kept = [node for node in graph.node if id(node) not in gone]
    del graph.node[:]
    graph.node.extend(kept)


def _shorten(graph: onnx.GraphProto, x: str, y: str) -> None:
    """Give values short names, and leave out zero points of 0 where no kernel asks for them."""
    constants = {t.name: t for t in graph.initializer}
    linear = {name for node in graph.node if node.op_type in PRODUCTS for name in node.input}
    for node in graph.node:
        node.name = ""
        if (
            node.op_type == OUT_OF
            and node.input[0] in constants
            and node.output[0] not in linear
            and not numpy_helper.to_array(constants[node.input[2]]).any()
        ):
            del node.input[2]
    reads = Counter(name for node in graph.node for name in node.input)
    kept = [t for t in graph.initializer if reads[t.name]]
    del graph.initializer[:], graph.value_info[:]
    names = {x: x, y: y, "": ""}
    for name in (*(t.name for t in kept), *(n for node in graph.node for n in node.output)):
        names.setdefault(name, f"t{len(names)}")
    for tensor in kept:
        tensor.name = names[tensor.name]
    graph.initializer.extend(kept)
    _rename(graph.node, names)
