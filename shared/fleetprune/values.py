"""Float vectors as bytes: fp32, fp16, int8 and int4 (docs/wire-format.md, "Values").

int8 and int4 are symmetric and blockwise: the scales of all blocks (fp16) come first, then the
codes of all values. A scale is rounded *up* to fp16, so that the largest value of a block never
has to be clipped and stochastic rounding stays unbiased. `code * scale` needs 18 significant
bits, so it is exact in float32 and both sides compute the very same values.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import UsageError, WireError
from fleetprune.messages import Codec

BLOCK: Final = 64  # values per scale: a quarter of a bit per value, and outliers stay local
TOP: Final = {Codec.INT8: 127, Codec.INT4: 7}  # largest code; its negative is the smallest
_CHUNK: Final = 1024 * BLOCK  # values quantised at a time, so that temporaries stay in the cache
_MAX_FP16: Final = 65504.0
_MAX_FP16_BITS: Final = np.uint16(0x7BFF)  # bits of 65504; all above are inf, NaN or negative


def value_bytes(n: int, codec: Codec) -> int:
    """Bytes that `n` values take, exactly."""
    if codec is Codec.FP32:
        return 4 * n
    if codec is Codec.FP16:
        return 2 * n
    codes = n if codec is Codec.INT8 else (n + 1) // 2
    return 2 * _blocks(n) + codes


def check_vector(values: NDArray[np.float32], what: str = "values") -> None:
    """Refuse what is not a vector of finite numbers.

    Args:
        values: (n,) float32.
        what: How the message calls them.

    Raises:
        UsageError: Not a float32 vector.
        WireError: A value is NaN or infinite; the message names the first.
    """
    if values.ndim != 1 or values.dtype != np.float32:
        raise UsageError(
            f"{what} of shape {values.shape} and dtype {values.dtype}, expected a float32 vector"
        )
    finite = np.isfinite(values)
    if not finite.all():
        first = int(np.argmin(finite))
        raise WireError(f"{what}[{first}] is {values[first]}, expected finite numbers")


def encode_values(
    values: NDArray[np.float32], codec: Codec, rng: np.random.Generator | None = None
) -> bytes:
    """Encode a vector.

    fp16 rounds to nearest and saturates at 65504; int8 and int4 saturate at 65504 times their
    largest code. What saturation cuts off is an error like that of rounding: a sender with error
    feedback sends it later.

    Args:
        values: (n,) float32, finite.
        codec: How to encode.
        rng: int8 and int4 only: round stochastically, so that every decoded value's expectation
            is the value itself. Draws one float32 per value of each started block of 64. None:
            round to nearest, ties to even.

    Returns:
        `value_bytes(n, codec)` bytes.

    Raises:
        UsageError: `values` is not a float32 vector.
        WireError: A value is NaN or infinite.
    """
    check_vector(values)
    if codec is Codec.FP32:
        return values.astype("<f4", copy=False).tobytes()
    if codec is Codec.FP16:
        return np.clip(values, -_MAX_FP16, _MAX_FP16).astype("<f2").tobytes()
    scales, codes = _quantise(values, TOP[codec], rng)
    packed = codes if codec is Codec.INT8 else _pack(codes)
    return scales.astype("<u2", copy=False).tobytes() + packed.tobytes()


def decode_values(data: bytes, n: int, codec: Codec) -> NDArray[np.float32]:
    """Decode unverified bytes.

    Args:
        data: What `encode_values` made.
        n: Number of values expected.
        codec: How they are encoded.

    Returns:
        (n,) float32, finite, writable.

    Raises:
        WireError: The length is wrong, a number or scale is not finite, a scale is negative, a
            code is the reserved -128 or -8, a code under a zero scale or the padding is not zero.
    """
    expected = value_bytes(n, codec)
    if len(data) != expected:
        raise WireError(f"{n} {codec} values in {len(data)} bytes, expected {expected}")
    if codec in TOP:
        return _dequantise(data, n, codec)
    values = np.frombuffer(data, "<f4" if codec is Codec.FP32 else "<f2").astype(np.float32)
    check_vector(values)
    return values


def _blocks(n: int) -> int:
    return -(-n // BLOCK)


def _quantise(
    values: NDArray[np.float32], top: int, rng: np.random.Generator | None
) -> tuple[NDArray[np.uint16], NDArray[np.int8]]:
    """Bits of the (blocks,) fp16 scales, and the (n,) codes in -top..top."""
    n = values.size
    scales = np.empty(_blocks(n), np.uint16)
    codes = np.empty(len(scales) * BLOCK, np.int8)
    for start in range(0, n, _CHUNK):
        part = values[start : start + _CHUNK]
        if part.size % BLOCK:
            part = np.concatenate([part, np.zeros(-part.size % BLOCK, np.float32)])
        block = part.reshape(-1, BLOCK)
        bits = _scale_bits(np.abs(block).max(axis=1), top)
        scale = bits.view(np.float16).astype(np.float32)
        scale[scale == 0] = 1
        ratio = block / scale[:, None]
        if rng is None:
            rounded = np.rint(ratio)
        else:
            rounded = np.floor(ratio)
            ratio -= rounded  # exact: the share of the step above the lower code
            rounded += rng.random(ratio.shape, np.float32) < ratio
        np.clip(rounded, -top, top, out=rounded)  # acts only where the scale is at its maximum
        first = start // BLOCK
        scales[first : first + len(bits)] = bits
        codes[start : start + part.size] = rounded.astype(np.int8).ravel()
    return scales, codes[:n]


def _scale_bits(peak: NDArray[np.float32], top: int) -> NDArray[np.uint16]:
    """Bits of the least fp16 `s` with `s * top >= peak`, at most 65504; 0 where peak is 0."""
    nearest = np.minimum(peak / np.float32(top), np.float32(_MAX_FP16)).astype(np.float16)
    bits: NDArray[np.uint16] = nearest.view(np.uint16)
    too_low = nearest.astype(np.float32) * np.float32(top) < peak  # an exact product
    bits += too_low  # the next fp16 upwards
    return np.minimum(bits, _MAX_FP16_BITS)


def _pack(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two 4-bit codes per byte, the earlier one in the low half; odd n: the last half is 0."""
    nibbles = codes.view(np.uint8) & np.uint8(15)
    packed = nibbles[0::2].copy()
    packed[: codes.size // 2] |= nibbles[1::2] << 4
    return packed


def _unpack(packed: NDArray[np.uint8], n: int) -> NDArray[np.int8]:
    """Inverse of `_pack`; WireError if the padding is not zero."""
    codes = np.empty(2 * packed.size, np.int8)
    codes[0::2] = (packed << 4).view(np.int8) >> 4
    codes[1::2] = packed.view(np.int8) >> 4
    if codes[n:].any():
        raise WireError(f"padding after {n} int4 values is {int(codes[n])}, expected 0")
    return codes[:n]


def _dequantise(data: bytes, n: int, codec: Codec) -> NDArray[np.float32]:
    blocks = _blocks(n)
    bits = np.frombuffer(data, "<u2", count=blocks).astype(np.uint16)
    if (bad := np.flatnonzero(bits > _MAX_FP16_BITS)).size:
        scale = bits.view(np.float16)[bad[0]]
        raise WireError(f"scale of block {bad[0]} is {scale}, expected finite and not negative")
    rest = np.frombuffer(data, np.uint8, offset=2 * blocks)
    codes = rest.view(np.int8) if codec is Codec.INT8 else _unpack(rest, n)
    reserved = -TOP[codec] - 1
    if (bad := np.flatnonzero(codes == reserved)).size:
        raise WireError(f"{codec} code [{bad[0]}] is {reserved}, which is reserved")
    values = np.zeros(blocks * BLOCK, np.float32)
    values[:n] = codes
    block = values.reshape(-1, BLOCK)
    empty = np.flatnonzero(bits == 0)
    if empty.size and block[empty].any():
        raise WireError("codes under a zero scale are not zero")
    block *= bits.view(np.float16).astype(np.float32)[:, None]
    return values[:n]
