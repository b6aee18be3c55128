"""Where tensors stand in two files, and which of one are which of the other (see `delta`)."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import WireError
from fleetprune.packed_weights import (
    Form,
    blocks,
    from_marks,
    from_skips,
    marked,
    skipping,
    unblocked,
)

SIDE: Final = struct.Struct("<BBBIIIIII")
# form, rows and columns of a block, offsets of values and positions, stored blocks, o, i, k
RECORD: Final = struct.Struct(f"<BB{SIDE.size}s{SIDE.size}s")  # kind, flags, base, target
HAS_BASE: Final = 1
MAPS_OUTPUTS: Final = 2
MAPS_INPUTS: Final = 4


class Kind(IntEnum):
    """What numbers a tensor has; the values are those of the wire format."""

    FLOAT32 = 0
    INT8 = 1
    INT32 = 2

    @property
    def dtype(self) -> np.dtype[Any]:
        """As in the file."""
        return np.dtype(("<f4", "i1", "<i4")[self])


class Hole(NamedTuple):
    """Bytes of a file that belong to a tensor."""

    start: int
    size: int


@dataclass(frozen=True)
class Side:
    """Where a tensor is in one of the two files, and how it is stored there."""

    form: Form
    block: tuple[int, int]
    values_at: int
    positions_at: int
    stored: int
    """Blocks, with those of zeros."""
    shape: tuple[int, int, int]
    """Outputs, inputs, places."""

    @property
    def size(self) -> int:
        """Numbers, zeros included."""
        o, i, k = self.shape
        return o * i * k

    def holes(self, kind: Kind) -> tuple[Hole, ...]:
        """Of its values and, if it has them, of its positions."""
        per = kind.dtype.itemsize
        if self.form is Form.DENSE:
            return (Hole(self.values_at, self.size * per),)
        of_block = self.block[0] * self.block[1]
        marks = self.form is Form.MARKS
        size = -(-(self.size // of_block) // 8) if marks else self.stored
        return Hole(self.values_at, self.stored * of_block * per), Hole(self.positions_at, size)

    def pack(self) -> bytes:
        """As in a record."""
        where = (self.values_at, self.positions_at, self.stored)
        return SIDE.pack(self.form, *self.block, *where, *self.shape)

    @classmethod
    def unpack(cls, data: bytes, file_bytes: int, kind: Kind, most: int) -> Self:
        """Read an unverified side; WireError if it is not one of such a file."""
        form, rows, columns, values_at, positions_at, stored, o, i, k = SIDE.unpack(data)
        if form > Form.SKIPS or not rows or not columns or o % rows or i % columns:
            raise WireError(f"tensor in form {form} and blocks of {rows}x{columns} for {o}x{i}")
        side = cls(Form(form), (rows, columns), values_at, positions_at, stored, (o, i, k))
        if not 0 < side.size <= most:
            raise WireError(f"tensor of {side.size} numbers, expected 1..{most}")
        for hole in side.holes(kind):
            if hole.start + hole.size > file_bytes:
                raise WireError(f"tensor up to byte {hole.start + hole.size} of {file_bytes}")
        return side

    def read(self, file: bytes, kind: Kind) -> NDArray[Any]:
        """The tensor (o, i, k) of a file; WireError if its positions do not fit."""
        values, *positions = self.holes(kind)
        numbers = np.frombuffer(file, kind.dtype, values.size // kind.dtype.itemsize, values.start)
        if self.form is Form.DENSE:
            return numbers.reshape(self.shape)
        where = np.frombuffer(file, np.uint8, positions[0].size, positions[0].start)
        of_block = self.block[0] * self.block[1]
        unpacked = from_marks if self.form is Form.MARKS else from_skips
        parts = unpacked(where, numbers.reshape(-1, of_block), self.size // of_block)
        if parts is None:
            raise WireError("a tensor's positions do not fit its values")
        return unblocked(parts, self.shape, *self.block)

    def write(self, tensor: NDArray[Any], kind: Kind) -> tuple[bytes, ...]:
        """The contents of `holes` for a tensor (o, i, k)."""
        if self.form is Form.DENSE:
            return (tensor.astype(kind.dtype, copy=False).tobytes(),)
        parts = blocks(tensor.astype(kind.dtype, copy=False), *self.block)
        where, values = (marked if self.form is Form.MARKS else skipping)(parts)
        return values.tobytes(), where.tobytes()


@dataclass(frozen=True)
class Tensor:
    """A tensor of the target, and what it is told by."""

    kind: Kind
    base: Side | None
    target: Side
    maps_outputs: bool
    maps_inputs: bool

    @property
    def sparse(self) -> bool:
        """Whether the target stores it without zeros."""
        return self.target.form is not Form.DENSE

    @property
    def axis_bytes(self) -> int:
        """What it takes of the stream of maps and steps."""
        o, i, _ = self.target.shape
        maps = o * self.maps_outputs + i * self.maps_inputs
        return 4 * maps + o * (self.kind is Kind.FLOAT32)

    def pack(self) -> bytes:
        """As a record."""
        flags = HAS_BASE * (self.base is not None)
        flags |= MAPS_OUTPUTS * self.maps_outputs | MAPS_INPUTS * self.maps_inputs
        base = bytes(SIDE.size) if self.base is None else self.base.pack()
        return RECORD.pack(self.kind, flags, base, self.target.pack())


def remainder(file: bytes, holes: Sequence[Hole]) -> bytes:
    """A file without the holes, which are sorted and apart."""
    parts, at = [], 0
    for hole in holes:
        parts.append(file[at : hole.start])
        at = hole.start + hole.size
    return b"".join([*parts, file[at:]])


def sorted_apart(holes: Sequence[Hole]) -> list[Hole]:
    """Holes by their place; WireError if two overlap."""
    ordered = sorted(holes)
    at = 0
    for hole in ordered:
        if hole.start < at:
            raise WireError(f"two tensors have byte {hole.start}")
        at = hole.start + hole.size
    return ordered
