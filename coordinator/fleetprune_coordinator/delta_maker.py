"""Deltas between the files of two releases (`fleetprune.delta`)."""

import hashlib
import lzma
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.deflate import deflate
from fleetprune.delta import (
    HEAD,
    LZMA,
    MAGIC,
    NO_UNIT,
    PLANES,
    VERSION,
    Axes,
    Kind,
    Tensor,
    apply,
    default_map,
    predict,
    remainder,
)
from fleetprune.errors import GraphError, WireError
from fleetprune_coordinator.tensor_places import Place, places
from fleetprune_coordinator.unit_match import match_units

_TOP: Final = 1 << (8 * PLANES - 1)
_LZMA: Final = LZMA | {"preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}
_WHOLE: Final = 24
"""Bits of a float32's significand."""


def make(base: bytes, target: bytes) -> bytes:
    """Make the delta from one file to another; it may be larger than the target.

    Args:
        base: An ONNX file with its weights inside.
        target: Another one, of the same network in any shape and order of units.

    Returns:
        What `fleetprune.delta.apply` makes `target` of, which was tried.

    Raises:
        GraphError: There is none: applying it made something else.
    """
    before, _ = places(base)
    after, followers = places(target)
    chosen = _told(base, {place.name: place for place in before}, after, followers)
    delta = _encoded(base, target, chosen)
    try:
        made = apply(base, delta, len(target))
    except WireError as e:
        raise GraphError(f"no delta between these two files: {e}") from e
    if made != target:
        raise GraphError("no delta between these two files: applying it makes another one")
    return delta


class _Told:
    """A tensor, and the streams' parts that tell it."""

    def __init__(self, tensor: Tensor, axes: Axes, steps: NDArray[np.int64], marks: bytes) -> None:
        self.tensor, self.axes, self.steps, self.marks = tensor, axes, steps, marks

    def about(self) -> bytes:
        """Maps and exponents."""
        parts = []
        if self.tensor.maps_outputs:
            parts.append(_jumps(self.axes.outputs))
        if self.tensor.maps_inputs:
            parts.append(_jumps(self.axes.inputs))
        if self.axes.exponents is not None:
            parts.append(self.axes.exponents.tobytes())
        return b"".join(parts)


def _told(
    base: bytes,
    before: Mapping[str, Place],
    after: list[Place],
    followers: Mapping[str, str],
) -> list[_Told]:
    """The tensors that a delta tells by steps; weights first, since others follow their units."""
    found: list[_Told] = []
    maps: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
    for place in sorted(after, key=lambda p: p.name in followers):
        old = before.get(place.name)
        if old is not None and (
            old.kind is not place.kind or old.side.shape[2] != place.side.shape[2]
        ):
            old = None
        o, i, _ = place.side.shape
        o_before, i_before, _ = (0, 0, 0) if old is None else old.side.shape
        plain = default_map(o, o_before), default_map(i, i_before)
        own = plain
        if old is not None:
            leader = maps.get(followers.get(place.name, ""))
            if leader is not None:
                own = _following(plain, leader)
            elif o * i > max(o, i):
                own = match_units(old.array, place.array)
            maps[place.name] = own
        tensor = Tensor(
            place.kind,
            None if old is None else old.side,
            place.side,
            not np.array_equal(own[0], plain[0]),
            not np.array_equal(own[1], plain[1]),
        )
        one = _one(base, tensor, place.array, own)
        if one is not None:
            found.append(one)
    return found


def _following(
    plain: tuple[NDArray[np.int64], NDArray[np.int64]],
    leader: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Maps of a tensor with one axis, which stands for the outputs or the inputs of a weight."""
    units = next((m for m in leader if m.size == plain[1].size), plain[1])
    return plain[0], units


def _one(
    base: bytes,
    tensor: Tensor,
    array: NDArray[Any],
    maps: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> _Told | None:
    """How a tensor is told; None where its numbers are not a few steps from the base's."""
    found = predict(tensor, base, Axes(*maps, None))
    kept, marks = np.ones(array.shape, np.bool_), b""
    if tensor.sparse:
        kept = array != 0
        marks = np.packbits((kept ^ (found != 0)).ravel()).tobytes()
    exponents = None
    away = array.astype(np.float64) - found
    if tensor.kind is Kind.FLOAT32:
        lowest = np.minimum(_lowest(found, kept), _lowest(array, kept))
        lowest = np.where(lowest == _NONE, 0, lowest)
        if (lowest < np.iinfo(np.int8).min).any() or (lowest > np.iinfo(np.int8).max).any():
            return None
        exponents = lowest.astype(np.int8)
        away = np.ldexp(away, -lowest.reshape(-1, 1, 1))
    steps = away[kept]
    if not (np.abs(steps) < _TOP).all() or np.signbit(array[array == 0]).any():
        return None
    return _Told(tensor, Axes(*maps, exponents), steps.astype(np.int64), marks)


_NONE: Final = 2**20


def _lowest(array: NDArray[np.float32], kept: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(o,) the largest power of two of which all kept numbers of an output are multiples."""
    fraction, exponent = np.frexp(array.astype(np.float64))
    whole = np.abs(np.ldexp(fraction, _WHOLE)).astype(np.int64)
    low = np.frexp((whole & -whole).astype(np.float64))[1] - 1
    power = np.where((whole == 0) | ~kept, _NONE, exponent - _WHOLE + low)
    return np.asarray(power.reshape(len(array), -1).min(axis=1), np.int64)


def _jumps(places_: NDArray[np.int64]) -> bytes:
    jumps = np.where(places_ < 0, NO_UNIT, places_ - np.arange(places_.size))
    return jumps.astype("<i4").tobytes()


def _encoded(base: bytes, target: bytes, told: list[_Told]) -> bytes:
    tensors = [one.tensor for one in told]
    before = [hole for t in tensors if t.base for hole in t.base.holes(t.kind)]
    after = [hole for t in tensors for hole in t.target.holes(t.kind)]
    steps = np.concatenate([np.zeros(0, np.int64), *(one.steps for one in told)])
    zigzag = (steps << 1) ^ (steps >> 63)
    planes = np.stack([zigzag >> 8 * p & 0xFF for p in range(PLANES)]).astype(np.uint8)
    about = b"".join([one.about() for one in told] + [one.marks for one in told])
    rest = remainder(base, sorted(before))
    streams = (
        deflate(b"".join(t.pack() for t in tensors), match=True),
        deflate(remainder(target, sorted(after)), match=True, dictionary=rest),
        deflate(about, match=True),
        lzma.compress(planes.tobytes(), lzma.FORMAT_RAW, filters=[_LZMA]),
    )
    hashes = (hashlib.sha256(file).digest() for file in (base, target))
    head = HEAD.pack(
        MAGIC, VERSION, len(tensors), len(base), len(target), *hashes, *map(len, streams)
    )
    return head + b"".join(streams)
