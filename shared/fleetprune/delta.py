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
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.deflate import inflate
from fleetprune.delta_tensors import (
    HAS_BASE,
    MAPS_INPUTS,
    MAPS_OUTPUTS,
    RECORD,
    Hole,
    Kind,
    Side,
    Tensor,
    remainder,
    sorted_apart,
)
from fleetprune.errors import WireError

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
LZMA: Final = {"id": lzma.FILTER_LZMA2, "dict_size": 2**16}


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
