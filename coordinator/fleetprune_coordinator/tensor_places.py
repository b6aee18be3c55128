"""Where the tensors of a model file stand in its bytes, and which of them share their units."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from fleetprune.delta import Kind, Side
from fleetprune.packed_weights import Form
from fleetprune_coordinator.integer_kernels import OUT_OF

LEAST: Final = 4
"""Numbers of a tensor that is worth a record."""
_VALUES: Final = re.compile(r"w\d+c0")
_MADE: Final = re.compile(r"w\d+")
"""What `sparse_file.pack` calls a weight's numbers, and what its operators make of them."""
_KINDS: Final = {kind.dtype: kind for kind in Kind}


@dataclass(frozen=True)
class Place:
    """A tensor in a file."""

    name: str
    kind: Kind
    side: Side
    array: NDArray[Any]
    """(o, i, k), zeros included."""


def places(file: bytes) -> tuple[list[Place], dict[str, str]]:
    """The tensors of an ONNX file that a delta can change.

    Args:
        file: The file, its weights inside, packed by `sparse_file.pack` or not.

    Returns:
        The tensors; and by name of those with one axis the weight whose units these are.
    """
    graph = onnx.load_from_string(file).graph
    at = _offsets(file, graph)
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.name in at}
    packed = dict(_packed(graph, arrays, at))
    parts = {name for place, names in packed.values() for name in names}
    found = [place for place, _ in packed.values()]
    for name, array in arrays.items():
        kind = _KINDS.get(array.dtype)
        if kind is not None and array.size >= LEAST and name not in parts:
            shape = _three(array.shape)
            side = Side(Form.DENSE, (1, 1), at[name], 0, 0, shape)
            found.append(Place(name, kind, side, array.reshape(shape)))
    return found, dict(_followers(graph))


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) < 2:
        return 1, int(np.prod(shape)), 1
    return shape[0], shape[1], int(np.prod(shape[2:]))


def _offsets(file: bytes, graph: onnx.GraphProto) -> dict[str, int]:
    """Where the numbers of initializers begin, as far as they stand in the file as in memory.

    They stand there in the order of the graph. What is found earlier by chance has the same bytes
    and ends no later.
    """
    offsets: dict[str, int] = {}
    end = 0
    for tensor in graph.initializer:
        data = numpy_helper.to_array(tensor).tobytes()
        start = file.find(data, end) if data else -1
        if start >= 0:
            offsets[tensor.name] = start
            end = start + len(data)
    return offsets


def _packed(
    graph: onnx.GraphProto, arrays: Mapping[str, NDArray[Any]], at: Mapping[str, int]
) -> Iterator[tuple[str, tuple[Place, set[str]]]]:
    """By name the weights that `sparse_file.pack` has stored without zeros, and their parts."""
    makers = {name: node for node in graph.node for name in node.output}
    readers = {name: node for node in graph.node for name in node.input}
    for values_name in filter(_VALUES.fullmatch, arrays):
        positions_name = values_name.removesuffix("0") + "1"
        positions, values = arrays.get(positions_name), arrays[values_name]
        kind = _KINDS.get(values.dtype)
        last: onnx.NodeProto | None = readers[values_name]
        while last is not None and (last.op_type != "Reshape" or _MADE.fullmatch(last.output[0])):
            last = readers.get(last.output[0])
        if kind is None or positions is None or positions.dtype != np.uint8 or last is None:
            continue
        block = 1, 1
        if values.ndim == 2:  # the shape before the last transposition ends in the block's
            grid = arrays[makers[makers[last.input[0]].input[0]].input[1]]
            block = int(grid[-2]), int(grid[-1])
        form = Form.MARKS if positions.ndim == 2 else Form.SKIPS
        shape = _three(tuple(arrays[last.input[1]].tolist()))
        side = Side(form, block, at[values_name], at[positions_name], len(values), shape)
        alone = Side(form, block, 0, values.nbytes, len(values), shape)
        array = alone.read(values.tobytes() + positions.tobytes(), kind)
        name = last.output[0]
        yield name, (Place(name, kind, side, array), {values_name, positions_name})


def _followers(graph: onnx.GraphProto) -> Iterator[tuple[str, str]]:
    """(tensor with one axis, weight) of each layer: biases, scales, zero points."""
    scaled = {n.output[0]: list(n.input) for n in graph.node if n.op_type == OUT_OF}
    for node in graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        weight = scaled.get(node.input[1], [node.input[1]])
        for name in (*node.input[2:], *weight[1:]):
            for own in scaled.get(name, [name]):
                yield own, weight[0]
