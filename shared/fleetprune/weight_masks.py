"""Which single weights stay, so that a file is within its bytes: exact, and the same every time.

All blocks of all layers stand in one order; a class keeps as many of the first as its bytes allow.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetprune.budgets import Allocation
from fleetprune.errors import BudgetError
from fleetprune.patterns import SINGLE, Pattern, Shape

Weights = Mapping[str, NDArray[np.float32]]
Masks = dict[str, NDArray[np.bool_]]

DECODER_BYTES, BLOCK_BYTES = 380, 120
"""Most bytes of a file that say how one pruned weight is unpacked, and how blocks are put in
place."""
LONGEST_GAP = 255
"""Blocks that one byte can skip."""


def decoder_bytes(block: int) -> int:
    """Most bytes of a file that say how a weight pruned in blocks of so many is unpacked."""
    return DECODER_BYTES + BLOCK_BYTES * (block > 1)


def packed_bytes(pattern: Pattern, marks: NDArray[np.bool_], item: int) -> int:
    """Most bytes of a file that a pruned weight takes.

    Args:
        pattern: What goes together.
        marks: Which of its blocks stay, of the shape of `Pattern.grid`.
        item: Bytes of one weight.
    """
    kept, block = int(np.count_nonzero(marks)), pattern.block * item
    marked = -(-marks.size // 8) + (kept + 1) * block
    # A file may hold a matrix as it is, or what multiplies from the other side.
    ways = [marks.ravel(), marks.T.ravel()] if marks.ndim == 2 else [marks.ravel()]
    skipped = max(kept + _fillers(way) for way in ways) * (1 + block)
    return min(marks.size * block, decoder_bytes(pattern.block) + min(marked, skipped))


def _fillers(marks: NDArray[np.bool_]) -> int:
    """Blocks of zeros that have to be stored because more than 255 are skipped."""
    gaps = np.diff(np.flatnonzero(marks), prepend=0)
    return int((np.maximum(gaps - 1, 0) // LONGEST_GAP).sum())


@dataclass(frozen=True)
class Layer:
    """A weight that is pruned."""

    shape: Shape
    item: int
    """Bytes of one weight in the file."""

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return self.item * prod(self.shape)


def solve_masks(
    layers: Mapping[str, Layer],
    scores: Weights,
    limit: int,
    *,
    pattern: Pattern = SINGLE,
    allocation: Allocation = Allocation.GLOBAL,
) -> Masks:
    """The blocks with which the layers are within a limit of bytes, as many as fit.

    Args:
        layers: Weights by name.
        scores: By the same names, of the same shapes, finite and not negative; a block is worth
            the sum.
        limit: Bytes of all of them together.
        pattern: What goes together; not N:M.
        allocation: `UNIFORM` leaves every layer the same share. `GLOBAL` compares blocks over
            layers by `lamp`.

    Returns:
        By name, of the layers' shapes; at least one block of each layer stays, and all of a layer
        of which fewer would save no byte. Ties go to the lower index, and to the layer named first.

    Raises:
        BudgetError: Not even one block of each layer fits, or scores are not as described.
    """
    ranked = _ranked(layers, scores, pattern, allocation)
    sizes = [pattern.blocks(layer.shape) for layer in layers.values()]
    ends = np.cumsum(sizes)[:-1]

    def chosen(count: int) -> list[tuple[NDArray[np.bool_], int]]:
        """Marks of each layer's blocks, and its bytes."""
        keep = np.zeros(ranked.size, np.bool_)
        keep[ranked[:count]] = True
        parts = [
            (part.reshape(pattern.grid(layer.shape)), layer.item)
            for part, layer in zip(np.split(keep, ends), layers.values(), strict=True)
        ]
        return [(marks, packed_bytes(pattern, marks, item)) for marks, item in parts]

    def cost(count: int) -> int:
        return sum(size for _, size in chosen(count))

    least = len(sizes)
    if cost(least) > limit:
        raise BudgetError(
            f"{max(0, limit)} bytes for the weights of {len(sizes)} layers, which take at least "
            f"{cost(least)}: raise flash_bytes"
        )
    count = bisect_right(range(least, ranked.size + 1), limit, key=cost) + least - 1
    return {
        name: pattern.spread(marks if size < layer.size else np.ones_like(marks))
        for (name, layer), (marks, size) in zip(layers.items(), chosen(count), strict=True)
    }


def _ranked(
    layers: Mapping[str, Layer], scores: Weights, pattern: Pattern, allocation: Allocation
) -> NDArray[np.intp]:
    """All blocks, numbered layer by layer, in the order in which they stay.

    The best of each layer come first.
    """
    keys = []
    for name, layer in layers.items():
        values = checked(name, scores[name], layer.shape)
        worth = pattern.pooled(values).ravel()
        rank = np.empty(worth.size, np.intp)
        rank[np.argsort(-worth, kind="stable")] = np.arange(worth.size)
        key = -lamp(worth) if allocation is Allocation.GLOBAL else (rank + 1) / rank.size
        key[rank == 0] = -np.inf
        keys.append(key)
    return np.argsort(np.concatenate(keys), kind="stable")


def checked(name: str, values: NDArray[Any], shape: Shape) -> NDArray[Any]:
    """Scores of a layer's weights; BudgetError if their shape or a value is not as expected."""
    if values.shape != shape:
        raise BudgetError(f"scores of {name}: shape {values.shape}, expected {shape}")
    if not np.isfinite(values).all() or values.min(initial=0) < 0:
        raise BudgetError(f"scores of {name}: expected finite numbers of at least 0")
    return values


def lamp(worth: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much of what is left of its layer each block is: comparable over layers.

    `s_i² / sum of s_j² over all j worth at least as much as i` (Lee et al., "Layer-Adaptive
    Sparsity for the Magnitude-Based Pruning", ICLR 2021, with `|w|` for `s`). The best of a layer
    has 1, so that none is emptied.

    Args:
        worth: (n,) finite, not negative.

    Returns:
        (n,) in 0..1, in the order of `worth` (equal ones: higher for the lower index).
    """
    order = np.argsort(-worth, kind="stable")
    top = float(worth.max(initial=0.0)) or 1.0
    squares = np.square(worth[order] / top)
    left = np.cumsum(squares)
    shares = np.divide(squares, left, out=np.zeros_like(squares), where=left > 0)
    out: NDArray[np.float64] = np.empty_like(shares)
    out[order] = shares
    return out


def pattern_masks(
    layers: Mapping[str, Layer], scores: Weights, pattern: Pattern, slack: float
) -> Masks:
    """The N highest of every M weights.

    Args:
        layers: Weights by name.
        scores: By the same names, of the same shapes, finite and not negative.
        pattern: N:M.
        slack: What a schedule leaves of the way from N to M, 0..1; rounded down to whole weights.

    Returns:
        By name, of the layers' shapes.
    """
    n = pattern.n + int(slack * (pattern.m - pattern.n))
    return {
        name: pattern.best_of_each(checked(name, scores[name], layer.shape), n)
        for name, layer in layers.items()
    }
