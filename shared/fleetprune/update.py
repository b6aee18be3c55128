"""A change of the values on a mask's support, and its bytes (docs/wire-format.md, "Update").

Both sides know the support from the mask version, so a full update carries values only; where the
device picks the largest changes itself, their positions travel too. Values are Huffman-coded where
that makes them shorter: changes crowd around zero, which at int4 saves a tenth to a third.
"""

import math
import struct
import zlib
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.deflate import deflate, inflate
from fleetprune.errors import UsageError, WireError
from fleetprune.messages import Codec
from fleetprune.positions import check_positions, decode_positions, encode_positions
from fleetprune.values import check_vector, decode_values, encode_values, value_bytes

MAGIC: Final = b"FPUP"
VERSION: Final = 1
MAX_U32: Final = 2**32 - 1  # mask versions, sizes and counts are 32-bit on the wire

# magic, version, codec, flags, mask version, size, count, bytes of positions, bytes of values
_HEAD: Final = struct.Struct("<4sHBBIIIII")
_CHOSEN: Final = 1  # flag: positions travel; else all values are sent
_DEFLATED: Final = 2  # flag: the values are deflated; else plain
_CRC: Final = struct.Struct("<I")
_CODES: Final = {Codec.FP32: 0, Codec.FP16: 1, Codec.INT8: 2, Codec.INT4: 3}
_CODECS: Final = {code: codec for codec, code in _CODES.items()}


@dataclass(frozen=True, eq=False, slots=True)
class SparseUpdate:
    """Some or all of the `size` values on the support of a mask.

    Attributes:
        mask_version: The mask whose support this is, 0..2**32-1.
        size: Number of values on the support, 0..2**32-1.
        values: (k,) float32.
        positions: (k,) intp, strictly increasing, where the values go; None: k == size.

    Raises:
        UsageError: The fields do not fit each other.
    """

    mask_version: int
    size: int
    values: NDArray[np.float32]
    positions: NDArray[np.intp] | None

    def __post_init__(self) -> None:
        """Check that the fields fit each other."""
        for what, number in (("mask version", self.mask_version), ("size", self.size)):
            if not 0 <= number <= MAX_U32:
                raise UsageError(f"{what} {number}, expected 0..{MAX_U32}")
        k = self.size if self.positions is None else self.positions.size
        if self.values.shape != (k,) or self.values.dtype != np.float32:
            raise UsageError(
                f"values of shape {self.values.shape} and dtype {self.values.dtype}, "
                f"expected ({k},) float32"
            )
        if self.positions is not None:
            check_positions(self.positions, self.size)

    def dense(self) -> NDArray[np.float32]:
        """All values of the support, zero where none was sent.

        Returns:
            (size,) float32, a copy.
        """
        if self.positions is None:
            return self.values.copy()
        out = np.zeros(self.size, np.float32)
        out[self.positions] = self.values
        return out

    def encode(self, codec: Codec, rng: np.random.Generator | None = None) -> bytes:
        """Encode with the values in `codec`, stochastically rounded if `rng` is given.

        Raises:
            WireError: A value is NaN or infinite.
        """
        plain = encode_values(self.values, codec, rng)
        packed = deflate(plain, match=False)
        values = min(plain, packed, key=len)  # plain, if equally long
        flags = _CHOSEN * (self.positions is not None) | _DEFLATED * (values is not plain)
        where = b"" if self.positions is None else encode_positions(self.positions, self.size)
        head = _HEAD.pack(
            MAGIC,
            VERSION,
            _CODES[codec],
            flags,
            self.mask_version,
            self.size,
            self.values.size,
            len(where),
            len(values),
        )
        content = head + where + values
        return content + _CRC.pack(zlib.crc32(content))


def decode_update(data: bytes, *, mask_version: int, size: int) -> SparseUpdate:
    """Decode an unverified update for a known support.

    Args:
        data: What `SparseUpdate.encode` made.
        mask_version: The mask version that the task named.
        size: Number of values on that mask's support.

    Returns:
        The update: finite values, positions strictly increasing and below `size`.

    Raises:
        WireError: `data` is not exactly one update for that mask version and size.
    """
    least = _HEAD.size + _CRC.size
    if len(data) < least:
        raise WireError(f"update of {len(data)} bytes, expected at least {least}")
    magic, version, code, flags, got_mask, got_size, count, where, body = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise WireError(f"update starts with {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise WireError(f"update version {version}, expected {VERSION}")
    codec = _CODECS.get(code)
    if codec is None:
        raise WireError(f"update codec {code}, expected 0..{len(_CODECS) - 1}")
    expected = least + where + body
    if len(data) != expected:
        raise WireError(f"update of {len(data)} bytes, expected {expected}")
    got, expected = zlib.crc32(memoryview(data)[: -_CRC.size]), *_CRC.unpack(data[-_CRC.size :])
    if got != expected:
        raise WireError(f"update checksum {got:08x}, expected {expected:08x}")
    if got_mask != mask_version:
        raise WireError(f"update for mask version {got_mask}, expected {mask_version}")
    if got_size != size:
        raise WireError(f"update of a support of {got_size} values, expected {size}")
    if flags > _CHOSEN | _DEFLATED:
        raise WireError(f"update flags {flags}, expected 0..{_CHOSEN | _DEFLATED}")
    chosen = bool(flags & _CHOSEN)
    if not chosen and (count != size or where):
        raise WireError(
            f"full update of {count} values and {where} bytes of positions, "
            f"expected {size} values and none"
        )
    start = _HEAD.size + where
    positions = decode_positions(data[_HEAD.size : start], size, count) if chosen else None
    values = data[start : -_CRC.size]
    if flags & _DEFLATED:  # `count` is at most `size` by now, so the bound is the task's
        plain = value_bytes(count, codec)
        if body >= plain:
            raise WireError(f"deflated values of {body} bytes, expected fewer than {plain}")
        values = inflate(values, plain, "values")
    return SparseUpdate(mask_version, size, decode_values(values, count, codec), positions)


def top_k(values: NDArray[np.float32], share: float) -> NDArray[np.intp]:
    """Positions of the largest `|v|`; ties go to the lower position.

    The count is exactly `ceil(share * n)` for the share as written in decimals: 0.07 of 100 is 7,
    although the nearest binary number to 0.07 lies a little above it.

    Args:
        values: (n,) float32, finite.
        share: 0 < share <= 1.

    Returns:
        (ceil(share * n),) intp, strictly increasing.

    Raises:
        UsageError: `share` is out of range.
        WireError: A value is NaN or infinite.
    """
    if not 0 < share <= 1:
        raise UsageError(f"share {share}, expected 0 < share <= 1")
    check_vector(values)
    keep = math.ceil(Fraction(str(share)) * values.size)
    if keep == values.size:
        return np.arange(keep)
    size = np.abs(values)
    least = np.partition(size, values.size - keep)[values.size - keep]
    chosen = size > least
    ties = np.flatnonzero(size == least)
    chosen[ties[: keep - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)
