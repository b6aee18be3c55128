"""Which `k` of `n` values are sent, as bytes (docs/wire-format.md, "Positions").

What is coded is the rarer kind, called *marked*: the sent positions, or, where more than half are
sent, the missing ones. It is laid out as a bitmap or as gaps, each of them plain or deflated, and
the shortest of the four is taken. The bound for positions without structure is `n * H(k / n)`
bits: gaps under Huffman codes come within about 4 % of it for shares from 1 % to 50 %. Positions
of real updates cluster in layers and units, where both deflated forms go well below it.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.deflate import deflate, inflate
from fleetprune.errors import UsageError, WireError

# Bits of the first byte. All four combinations exist.
_GAPS: Final = 1  # else a bitmap
_DEFLATED: Final = 2  # else plain
_MORE: Final = 255  # gap byte: 255 unmarked, and the gap goes on


def encode_positions(positions: NDArray[np.intp], n: int) -> bytes:
    """Encode which of `n` values are sent.

    The same zlib build gives the same bytes for the same positions; another build may deflate
    differently and is decoded all the same.

    Args:
        positions: (k,) intp, strictly increasing, 0 <= positions < n.
        n: Number of values to choose from.

    Returns:
        The shortest of the four forms; nothing if k is 0 or n.

    Raises:
        UsageError: `positions` is not as described.
    """
    check_positions(positions, n)
    marked = positions if 2 * positions.size <= n else _others(positions, n)
    if not marked.size:
        return b""
    bitmap = _bitmap(marked, n)
    gaps = _gaps(marked)
    forms = (
        (0, bitmap),
        (_GAPS, gaps),
        (_DEFLATED, deflate(bitmap, match=True)),
        (_GAPS | _DEFLATED, deflate(gaps, match=False)),
    )
    form, body = min(forms, key=lambda f: len(f[1]))  # the first of equals
    return bytes([form]) + body


def decode_positions(data: bytes, n: int, k: int) -> NDArray[np.intp]:
    """Decode unverified bytes.

    Never inflates more than one byte beyond what `k` of `n` positions can take.

    Args:
        data: What `encode_positions` made.
        n: Number of values to choose from.
        k: Number of positions expected.

    Returns:
        (k,) intp, strictly increasing, in 0..n-1.

    Raises:
        WireError: The bytes are not exactly `k` of `n` positions.
    """
    if not 0 <= k <= n:
        raise WireError(f"{k} positions, expected 0..{n}")
    marks = min(k, n - k)
    if marks == 0:
        if data:
            raise WireError(f"positions of {k} of {n} values in {len(data)} bytes, expected 0")
        return np.arange(k, dtype=np.intp)
    if not data:
        raise WireError(f"positions of {k} of {n} values in 0 bytes, expected at least 1")
    form, body = data[0], data[1:]
    if form > _GAPS | _DEFLATED:
        raise WireError(f"positions in form {form}, expected 0..{_GAPS | _DEFLATED}")
    longest = marks + (n - marks) // _MORE if form & _GAPS else (n + 7) // 8
    if form & _DEFLATED:
        body = inflate(body, longest, "positions")
    elif len(body) > longest:
        raise WireError(f"positions of {len(body)} bytes, expected at most {longest}")
    marked = _read_gaps(body, n) if form & _GAPS else _read_bitmap(body, n)
    if marked.size != marks:
        raise WireError(f"{marked.size} marked positions, expected {marks}")
    return marked if 2 * k <= n else _others(marked, n)


def check_positions(positions: NDArray[np.intp], n: int) -> None:
    """Refuse positions that do not choose among `n` values.

    Args:
        positions: (k,) intp.
        n: Number of values to choose from.

    Raises:
        UsageError: Not an intp vector, not strictly increasing, or out of 0..n-1.
    """
    if positions.ndim != 1 or positions.dtype != np.intp:
        raise UsageError(
            f"positions of shape {positions.shape} and dtype {positions.dtype}, "
            "expected an intp vector"
        )
    if not positions.size:
        return
    rising = positions[1:] > positions[:-1]
    if not rising.all():
        at = int(np.argmin(rising)) + 1
        raise UsageError(
            f"positions[{at}] is {positions[at]} after {positions[at - 1]}, "
            "expected strictly increasing"
        )
    if positions[0] < 0 or positions[-1] >= n:
        raise UsageError(f"positions {positions[0]}..{positions[-1]}, expected 0..{n - 1}")


def _others(positions: NDArray[np.intp], n: int) -> NDArray[np.intp]:
    rest = np.ones(n, np.bool_)
    rest[positions] = False
    return np.flatnonzero(rest)


def _bitmap(marked: NDArray[np.intp], n: int) -> bytes:
    bits = np.zeros(n, np.bool_)
    bits[marked] = True
    return np.packbits(bits, bitorder="little").tobytes()


def _read_bitmap(body: bytes, n: int) -> NDArray[np.intp]:
    if len(body) != (n + 7) // 8:
        raise WireError(f"bitmap of {len(body)} bytes, expected {(n + 7) // 8}")
    marked = np.flatnonzero(np.unpackbits(np.frombuffer(body, np.uint8), bitorder="little"))
    if marked.size and marked[-1] >= n:
        raise WireError(f"bitmap marks position {marked[-1]}, expected 0..{n - 1}")
    return marked


def _gaps(marked: NDArray[np.intp]) -> bytes:
    """Per mark, how many unmarked come before it: bytes of 255 and one lower byte, summed."""
    gaps = np.diff(marked, prepend=-1) - 1
    long = gaps // _MORE
    out = np.full(marked.size + int(long.sum()), _MORE, np.uint8)
    out[np.cumsum(long + 1) - 1] = gaps % _MORE
    return out.tobytes()


def _read_gaps(body: bytes, n: int) -> NDArray[np.intp]:
    """Strictly increasing by construction: every gap ends in a mark, which takes a position."""
    gaps = np.frombuffer(body, np.uint8)
    if gaps.size and gaps[-1] == _MORE:
        raise WireError("the last gap does not end")
    ends = gaps != _MORE
    steps = gaps + ends.astype(np.intp)
    marked: NDArray[np.intp] = (np.cumsum(steps) - 1)[ends]
    if marked.size and marked[-1] >= n:
        raise WireError(f"gaps reach position {marked[-1]}, expected 0..{n - 1}")
    return marked
