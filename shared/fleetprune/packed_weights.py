"""How a file stores a weight: as it is, or without its zeros (docs/decisions/0015).

A weight is seen here as (o, i, k): outputs, inputs, and the places of a kernel. Without zeros,
the blocks of `rows` outputs and `columns` inputs that have any number other than zero are stored,
and where they belong, in one of two ways:

    marks   one bit per block; the stored blocks follow a block of zeros
    skips   one byte per stored block, how far it is behind the last one; where more than 255 have
            to be skipped, a block of zeros stands in between
"""

from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

LONGEST_SKIP: Final = 255


class Form(IntEnum):
    """How a weight is stored; the numbers are those of the wire format."""

    DENSE = 0
    MARKS = 1
    SKIPS = 2


def blocks(weight: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    """The blocks of a weight, outputs first, then inputs, then places.

    Args:
        weight: (o, i, k)
        rows: Outputs of a block; divides o.
        columns: Inputs of a block; divides i.

    Returns:
        (blocks, rows * columns)
    """
    o, i, k = weight.shape
    parts = weight.reshape(o // rows, rows, i // columns, columns, k)
    return np.ascontiguousarray(parts.transpose(0, 2, 4, 1, 3)).reshape(-1, rows * columns)


def unblocked(
    parts: NDArray[Any], shape: tuple[int, int, int], rows: int, columns: int
) -> NDArray[Any]:
    """Inverse of `blocks`: (o, i, k) of (blocks, rows * columns)."""
    o, i, k = shape
    grid = parts.reshape(o // rows, i // columns, k, rows, columns)
    return np.ascontiguousarray(grid.transpose(0, 3, 1, 4, 2)).reshape(shape)


def marked(parts: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Blocks (n, size) stored by marks: ceil(n / 8) bytes, and 1 + stored blocks."""
    marks = parts.any(axis=1)
    return np.packbits(marks), np.concatenate([np.zeros_like(parts[:1]), parts[marks]])


def skipping(parts: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Blocks (n, size) stored by skips: (m,) bytes, and the m blocks that they stand before."""
    places = np.flatnonzero(parts.any(axis=1))
    gaps = np.diff(places, prepend=0)
    between = np.maximum(gaps - 1, 0) // LONGEST_SKIP
    ends = np.cumsum(between + 1) - 1
    skips = np.full(places.size + int(between.sum()), LONGEST_SKIP, np.uint8)
    skips[ends] = gaps - between * LONGEST_SKIP
    values = np.zeros((skips.size, parts.shape[1]), parts.dtype)
    values[ends] = parts[places]
    return skips, values


def from_marks(bits: NDArray[np.uint8], values: NDArray[Any], count: int) -> NDArray[Any] | None:
    """Blocks (count, size) that `marked` stored; None where bits and values do not fit."""
    marks = np.unpackbits(bits)[:count].astype(np.bool_)
    if np.count_nonzero(marks) + 1 != len(values):
        return None
    parts = np.zeros((count, values.shape[1]), values.dtype)
    parts[marks] = values[1:]
    return parts


def from_skips(skips: NDArray[np.uint8], values: NDArray[Any], count: int) -> NDArray[Any] | None:
    """Blocks (count, size) that `skipping` stored; None where a skip leads out of them."""
    places = np.cumsum(skips, dtype=np.int64)
    if places.size and places[-1] >= count:
        return None
    parts = np.zeros((count, values.shape[1]), values.dtype)
    parts[places] = values
    return parts
