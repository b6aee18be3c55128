"""A release as the difference from another one (docs/wire-format.md, "Delta").

Most of a file are numbers of a model's tensors, which training has moved a little and a new mask
has put in another order. A delta says for each tensor where it is in either file, which of the
base's units its units come from, and by how many steps each number differs from that one's; the
coordinator releases numbers that are whole multiples of a power of two, so steps are few and
exact. All else of the file is deflated, with all else of the base file as the dictionary.

What is made is a value or an error, never another file: its SHA-256 is part of the delta.
"""

import hashlib
import lzma
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleetprune.deflate import inflate
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

MAGIC: Final = b"FPDL"
VERSION: Final = 1
MAX_SPREAD: Final = 16
"""Numbers of all tensors of both files, zeros included, per byte of both files."""
PLANES: Final = 3
"""Bytes of a step: differences of up to 2^23 steps."""
NO_UNIT: Final = -(2**31)
"""In a map: the unit is new."""

HEAD: Final = struct.Struct("<4sHHII32s32sIIII")
# magic, version, tensors, bytes of base and target, their SHA-256, bytes of four streams
SIDE: Final = struct.Struct("<BBBIIIIII")
# form, rows and columns of a block, offsets of values and positions, stored blocks, o, i, k
RECORD: Final = struct.Struct(f"<BB{SIDE.size}s{SIDE.size}s")  # kind, flags, base, target
HAS_BASE: Final = 1
MAPS_OUTPUTS: Final = 2
MAPS_INPUTS: Final = 4
LZMA: Final = {"id": lzma.FILTER_LZMA2, "dict_size": 2**16}


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
    def unpack(cls, data: bytes, file_bytes: int, kind: Kind, most: int) -> "Side":
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


@dataclass(frozen=True)
class Axes:
    """Which units of the base a tensor's units are, and how large its steps are."""

    outputs: NDArray[np.int64]
    """(o,) places in the base, -1: new."""
    inputs: NDArray[np.int64]
    """(i,) likewise."""
    exponents: NDArray[np.int8] | None
    """(o,) of two, the step of each output's numbers; None: numbers are whole."""


def predict(tensor: Tensor, base: bytes, axes: Axes) -> NDArray[Any]:
    """A tensor (o, i, k) as the base has it, in the target's order; 0 for what it has not."""
    shape = tensor.target.shape
    found = np.zeros(shape, tensor.kind.dtype)
    if tensor.base is None:
        return found
    before = tensor.base.read(base, tensor.kind)
    outputs, inputs = axes.outputs >= 0, axes.inputs >= 0
    there = np.ix_(axes.outputs[outputs], axes.inputs[inputs])
    found[np.ix_(outputs, inputs)] = before[there]
    return found


def default_map(length: int, before: int) -> NDArray[np.int64]:
    """(length,): every unit where it was, further ones new."""
    places = np.arange(length)
    return np.where(places < before, places, -1)


def moved(
    tensor: Tensor, before: NDArray[Any], steps: NDArray[np.int32], axes: Axes
) -> NDArray[Any]:
    """A tensor (o, i, k) after so many steps from `before`, in IEEE arithmetic that is exact."""
    if axes.exponents is None:
        return (before.astype(np.int64) + steps).astype(tensor.kind.dtype)
    unit = np.ldexp(1.0, axes.exponents.astype(np.int32)).reshape(-1, 1, 1)
    with np.errstate(all="ignore"):  # of hostile numbers, which the hash tells
        return (before.astype(np.float64) + steps * unit).astype(tensor.kind.dtype)


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


def apply(base: bytes, delta: bytes, max_bytes: int) -> bytes:
    """Make the target file from the base file.

    Args:
        base: The file that is there, whole.
        delta: Unverified.
        max_bytes: The longest file to make; memory is bounded by it and the base.

    Returns:
        The target, byte for byte: its SHA-256 is the one that the delta names.

    Raises:
        WireError: The delta is broken, is of another base, or makes something else than it says.
    """
    if len(delta) < HEAD.size:
        raise WireError(f"delta of {len(delta)} bytes, expected at least {HEAD.size}")
    magic, version, count, base_bytes, size, of_base, of_target, *lengths = HEAD.unpack_from(delta)
    if magic != MAGIC:
        raise WireError(f"delta starts with {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise WireError(f"delta version {version}, expected {VERSION}")
    if len(delta) != HEAD.size + sum(lengths):
        raise WireError(f"delta of {len(delta)} bytes, expected {HEAD.size + sum(lengths)}")
    if size > max_bytes:
        raise WireError(f"delta makes {size} bytes, expected at most {max_bytes}")
    digest = hashlib.sha256(base).digest()
    if base_bytes != len(base) or digest != of_base:
        raise WireError(
            f"delta is of a base file {of_base.hex()[:12]}, this one is {digest.hex()[:12]}: "
            "take the full artifact"
        )
    streams = list(_split(delta[HEAD.size :], lengths))
    tensors = _records(streams[0], count, len(base), size, MAX_SPREAD * (len(base) + size))
    before = [h for t in tensors if t.base for h in t.base.holes(t.kind)]
    after = sorted_apart([h for t in tensors for h in t.target.holes(t.kind)])
    rest = inflate(
        streams[1],
        size - sum(hole.size for hole in after),
        "bytes between tensors",
        remainder(base, sorted_apart(before)),
    )
    if len(rest) != size - sum(hole.size for hole in after):
        raise WireError(f"{len(rest)} bytes between tensors, expected those that none has")
    filled = _tensors(tensors, base, streams[2], streams[3])
    target = _assembled(rest, after, filled)
    if hashlib.sha256(target).digest() != of_target:
        raise WireError("delta makes another file than it says: take the full artifact")
    return target


def _split(data: bytes, lengths: Sequence[int]) -> Iterator[bytes]:
    at = 0
    for length in lengths:
        yield data[at : at + length]
        at += length


def _records(
    stream: bytes, count: int, base_bytes: int, target_bytes: int, most: int
) -> list[Tensor]:
    data = _inflate_exactly(stream, count * RECORD.size, "tensors")
    found = []
    for number, flags, base, target in RECORD.iter_unpack(data):
        if number > Kind.INT32 or flags > HAS_BASE | MAPS_OUTPUTS | MAPS_INPUTS:
            raise WireError(f"tensor of kind {number} and flags {flags}")
        kind = Kind(number)
        side = Side.unpack(base, base_bytes, kind, most) if flags & HAS_BASE else None
        tensor = Tensor(
            kind,
            side,
            Side.unpack(target, target_bytes, kind, most),
            bool(flags & MAPS_OUTPUTS),
            bool(flags & MAPS_INPUTS),
        )
        if side is None and flags:
            raise WireError(f"tensor without a base and flags {flags}, expected 0")
        if side is not None and side.shape[2] != tensor.target.shape[2]:
            raise WireError(
                f"tensor with {tensor.target.shape[2]} places, its base has {side.shape[2]}"
            )
        most -= tensor.target.size + (0 if side is None else side.size)
        if most < 0:
            raise WireError("tensors have more numbers than the files can hold")
        found.append(tensor)
    return found


def _tensors(
    tensors: Sequence[Tensor], base: bytes, about: bytes, steps: bytes
) -> dict[Hole, bytes]:
    """Per hole of the target what stands there."""
    marks = [-(-t.target.size // 8) if t.sparse else 0 for t in tensors]
    axis_bytes = sum(t.axis_bytes for t in tensors)
    data = _inflate_exactly(about, axis_bytes + sum(marks), "maps and positions")
    axes: list[Axes] = []
    support: list[NDArray[np.bool_] | None] = []
    at, mark_at = 0, axis_bytes
    for tensor, mark_bytes in zip(tensors, marks, strict=True):
        axes.append(_axes(tensor, data[at : at + tensor.axis_bytes]))
        at += tensor.axis_bytes
        support.append(None)
        if tensor.sparse:
            bits = np.frombuffer(data, np.uint8, mark_bytes, mark_at)
            changes = np.unpackbits(bits)[: tensor.target.size].astype(np.bool_)
            support[-1] = (predict(tensor, base, axes[-1]).ravel() != 0) ^ changes
            mark_at += mark_bytes
    counts = [
        tensor.target.size if kept is None else int(np.count_nonzero(kept))
        for tensor, kept in zip(tensors, support, strict=True)
    ]
    moves = _steps(steps, sum(counts))
    filled: dict[Hole, bytes] = {}
    at = 0
    for tensor, own, kept, count in zip(tensors, axes, support, counts, strict=True):
        before, told = predict(tensor, base, own), moves[at : at + count]
        at += count
        if kept is not None:
            told, some = np.zeros(kept.size, np.int32), told
            told[kept] = some
            before[~kept.reshape(before.shape)] = 0
        made = moved(tensor, before, told.reshape(before.shape), own)
        holes = tensor.target.holes(tensor.kind)
        for hole, content in zip(holes, tensor.target.write(made, tensor.kind), strict=True):
            if len(content) != hole.size:
                raise WireError(f"a tensor takes {len(content)} bytes, expected {hole.size}")
            filled[hole] = content
    return filled


def _axes(tensor: Tensor, data: bytes) -> Axes:
    o, i, _ = tensor.target.shape
    o_before, i_before, _ = (0, 0, 0) if tensor.base is None else tensor.base.shape
    at = 0
    maps = []
    for told, length, before in (
        (tensor.maps_outputs, o, o_before),
        (tensor.maps_inputs, i, i_before),
    ):
        if not told:
            maps.append(default_map(length, before))
            continue
        maps.append(_map(np.frombuffer(data, "<i4", length, at), before))
        at += 4 * length
    exponents = np.frombuffer(data, np.int8, o, at) if tensor.kind is Kind.FLOAT32 else None
    return Axes(maps[0], maps[1], exponents)


def _map(jumps: NDArray[np.int32], before: int) -> NDArray[np.int64]:
    """Places from how far each is from its own place; WireError if one is not in the base."""
    new = jumps == NO_UNIT
    places = np.where(new, -1, np.arange(jumps.size) + jumps)
    if places.size and (places.max() >= before or (places[~new] < 0).any()):
        raise WireError(f"a map leads out of the base's {before} units")
    return places


def _steps(stream: bytes, count: int) -> NDArray[np.int32]:
    """(count,) steps: planes of bytes of zigzag numbers, the low ones first."""
    inflater = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[LZMA])
    try:
        data = inflater.decompress(stream, PLANES * count + 1)
    except lzma.LZMAError as e:
        raise WireError("steps are not an LZMA2 stream") from e
    if len(data) != PLANES * count:
        raise WireError(f"{PLANES * count} bytes of steps expected, the stream has others")
    if not inflater.eof or inflater.unused_data:
        raise WireError("the stream of steps does not end where it should")
    steps = np.zeros(count, np.int32)
    for plane in np.frombuffer(data, np.uint8).reshape(PLANES, count)[::-1]:
        steps <<= 8
        steps |= plane
    odd = steps & 1
    steps >>= 1
    steps ^= -odd
    return steps


def _inflate_exactly(stream: bytes, size: int, what: str) -> bytes:
    data = inflate(stream, size, what)
    if len(data) != size:
        raise WireError(f"{what} of {len(data)} bytes, expected {size}")
    return data


def _assembled(rest: bytes, holes: Sequence[Hole], filled: dict[Hole, bytes]) -> bytes:
    parts, at, made = [], 0, 0
    for hole in holes:
        parts += [rest[at : at + hole.start - made], filled[hole]]
        at += hole.start - made
        made = hole.start + hole.size
    return b"".join([*parts, rest[at:]])
