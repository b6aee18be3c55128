"""Weights of an ONNX file without their zeros: the file follows density, and stays plain ONNX.

A pruned weight is stored as what is left of it and where that belongs; a few standard operators put
it together again. They read constants only, so onnxruntime runs them once, when it loads the file,
and works with dense weights from then on: nothing becomes faster or slower. Where the blocks stand
is written in the shorter of two forms:

    marks   one bit per block; block i is row `sum(marks[:i + 1]) * marks[i]` of the stored rows,
            of which row 0 is zeros
    skips   one byte per stored block, how far it is behind the last one; where more than 255 have
            to be skipped, a block of zeros stands in between
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from fleetprune.packed_weights import blocks, marked, skipping
from fleetprune.patterns import SINGLE, Pattern
from fleetprune.weight_masks import decoder_bytes

_INT32, _INT64 = onnx.TensorProto.INT32, onnx.TensorProto.INT64


def pack(model: bytes, pattern: Pattern = SINGLE) -> bytes:
    """Store weights without zeros where that makes the file smaller.

    Args:
        model: An ONNX file with its weights inside, of opset 13 or later.
        pattern: Blocks that were pruned together; a weight whose zeros lie otherwise is stored
            weight by weight.

    Returns:
        A file that computes the same; `model` itself if no weight is packed.
    """
    proto = onnx.load_from_string(model)
    graph = proto.graph
    kept: list[onnx.TensorProto] = []
    shared = _Shared()
    nodes: list[onnx.NodeProto] = []
    for i, tensor in enumerate(graph.initializer):
        array = numpy_helper.to_array(tensor)
        packed = _shortest(array, pattern)
        if packed is None:
            kept.append(tensor)
            continue
        made = _Unpacking(f"w{i}", tensor.name, array, packed, shared)
        nodes += made.nodes()
        kept += made.constants
    if not nodes:
        return model
    del graph.initializer[:]
    graph.initializer.extend([*kept, *shared.tensors()])
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    data: bytes = proto.SerializeToString(deterministic=True)
    return data if len(data) < len(model) else model


@dataclass(frozen=True)
class _Packed:
    """A weight's blocks that are not zero."""

    rows: int
    columns: int
    marks: NDArray[np.bool_]
    """(blocks,)"""
    skips: NDArray[np.uint8] | None
    """Instead of the marks, where they are shorter."""
    values: NDArray[Any]
    """(stored blocks, weights of a block)"""

    @property
    def nbytes(self) -> int:
        """Most bytes of a file that it takes."""
        where = -(-self.marks.size // 8) if self.skips is None else self.skips.size
        return decoder_bytes(self.rows * self.columns) + where + self.values.nbytes


def _shortest(array: NDArray[Any], pattern: Pattern) -> _Packed | None:
    """The shortest form of a weight; None if it is best left as it is."""
    sizes = {(1, 1)}
    if array.ndim >= 2 and not pattern.m:
        # As it was pruned, and as a file holds what it multiplies from the other side.
        sizes |= {(pattern.rows, pattern.columns), (pattern.columns, pattern.rows)}
    forms: list[_Packed] = []
    for rows, columns in sorted(sizes):
        if rows * columns > 1 and (array.shape[0] % rows or array.shape[1] % columns):
            continue
        forms += _forms(array, rows, columns)
    best = min(forms, key=lambda form: form.nbytes)
    return best if best.nbytes < array.nbytes else None


def _forms(array: NDArray[Any], rows: int, columns: int) -> Iterator[_Packed]:
    if rows * columns == 1:
        parts = array.reshape(-1, 1)
    else:
        parts = blocks(array.reshape(*array.shape[:2], -1), rows, columns)
    marks = np.asarray(parts.any(axis=1), np.bool_)
    yield _Packed(rows, columns, marks, None, marked(parts)[1])
    skips, values = skipping(parts)
    yield _Packed(rows, columns, marks, skips, values)


class _Shared:
    """Constants that all packed weights of a file read."""

    def __init__(self) -> None:
        self._used: dict[str, NDArray[Any]] = {}

    def __call__(self, name: str, values: list[int] | int, dtype: type) -> str:
        self._used[name] = np.array(values, dtype)
        return name

    def tensors(self) -> list[onnx.TensorProto]:
        return [numpy_helper.from_array(value, name) for name, value in self._used.items()]


class _Unpacking:
    """The operators that put one weight together."""

    def __init__(
        self, prefix: str, name: str, array: NDArray[Any], packed: _Packed, shared: _Shared
    ) -> None:
        self._prefix, self._name, self._array, self._packed = prefix, name, array, packed
        self._shared = shared
        self.constants: list[onnx.TensorProto] = []
        self._nodes: list[onnx.NodeProto] = []

    def nodes(self) -> list[onnx.NodeProto]:
        packed = self._packed
        single = packed.rows * packed.columns == 1
        values = self._constant(packed.values[:, 0] if single else packed.values)
        if packed.skips is None:
            dense = self._op("Gather", values, self._rows_of_marks())
        else:
            dense = self._scattered(values, packed.skips, single=single)
        if not single:
            dense = self._in_place(dense)
        self._op("Reshape", dense, self._ints(*self._array.shape), output=self._name)
        return self._nodes

    def _rows_of_marks(self) -> str:
        marks, shared = self._packed.marks, self._shared
        bits = self._constant(np.packbits(marks).reshape(-1, 1))
        whole = self._op("Cast", bits, to=_INT32)
        places = shared("s128", [128, 64, 32, 16, 8, 4, 2, 1], np.int32)
        shifted = self._op("Div", whole, places)
        bit = self._op("Mod", shifted, shared("s2", 2, np.int32))
        flat = self._op("Reshape", bit, shared("sall", [-1], np.int64))
        if marks.size % 8:
            flat = self._op("Slice", flat, shared("s0", [0], np.int64), self._ints(marks.size))
        count = self._op("CumSum", flat, shared("saxis", 0, np.int32))
        return self._op("Mul", count, flat)

    def _scattered(self, values: str, skips: NDArray[np.uint8], *, single: bool) -> str:
        shared = self._shared
        gaps = self._op("Cast", self._constant(skips), to=_INT64)
        places = self._op("CumSum", gaps, shared("saxis", 0, np.int32))
        column = self._op("Reshape", places, shared("scolumn", [-1, 1], np.int64))
        shape: tuple[int, ...] = (self._packed.marks.size,)
        if not single:
            shape = (*shape, self._packed.values.shape[1])
        zero = numpy_helper.from_array(np.zeros(1, self._array.dtype))
        zeros = self._op("ConstantOfShape", self._ints(*shape), value=zero)
        return self._op("ScatterND", zeros, column, values)

    def _in_place(self, dense: str) -> str:
        o, i, *rest = self._array.shape
        rows, columns = self._packed.rows, self._packed.columns
        grid = self._op("Reshape", dense, self._ints(o // rows, i // columns, *rest, rows, columns))
        n = len(rest)
        order = [0, n + 2, 1, n + 3, *range(2, n + 2)]
        return self._op("Transpose", grid, perm=order)

    def _constant(self, values: NDArray[Any]) -> str:
        name = f"{self._prefix}c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def _ints(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def _op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = output or f"{self._prefix}{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name
