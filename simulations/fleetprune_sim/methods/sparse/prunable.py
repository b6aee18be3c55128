"""Which weights a mask is over, and where they lie in the flat parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import BudgetError
from fleetprune.layout import Architecture, FlatLayout, Role

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Prunable:
    """The weights that may be pruned, tensor by tensor; all others always stay.

    A mask is one (n,) vector over all of them, in the order of the flat parameters.
    """

    parameters: int
    """P, the length of the flat parameters."""
    runs: tuple[tuple[int, int], ...]
    """Per tensor its first place in the flat parameters, and its size."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Weights per tensor."""
        return tuple(size for _, size in self.runs)

    @property
    def n(self) -> int:
        """Weights of all tensors."""
        return sum(self.sizes)

    @cached_property
    def index(self) -> NDArray[np.intp]:
        """(n,) places of the weights in the flat parameters."""
        if not self.runs:
            return np.empty(0, np.intp)
        return np.concatenate([np.arange(start, start + size) for start, size in self.runs])

    def split(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """Views of a (n,) vector, one per tensor."""
        return np.split(values, np.cumsum(self.sizes)[:-1]) if self.runs else []

    def kept(self, mask: Bools) -> tuple[int, ...]:
        """Weights that a (n,) mask keeps, per tensor."""
        return tuple(int(np.count_nonzero(part)) for part in self.split(mask))

    def support(self, mask: Bools) -> Bools:
        """(P,): where the flat parameters may be other than zero under a (n,) mask."""
        full = np.ones(self.parameters, np.bool_)
        full[self.index] = mask
        return full


@dataclass(frozen=True)
class SparseLayout:
    """The prunable weights of an architecture and what each of them costs."""

    prunable: Prunable
    shapes: tuple[tuple[int, ...], ...]
    """Per prunable tensor."""
    costs: tuple[int, ...]
    """Multiply-accumulates of one weight, per prunable tensor."""
    fixed: int
    """Multiply-accumulates of the weights that always stay."""

    def macs(self, kept: Sequence[int]) -> int:
        """Multiply-accumulates of the weights that are not zero.

        Args:
            kept: Weights kept, per prunable tensor.
        """
        return self.fixed + sum(k * c for k, c in zip(kept, self.costs, strict=True))


def sparse_layout(architecture: Architecture, *, spare_ends: bool = False) -> SparseLayout:
    """The weights of convolutions and linear layers; biases and norms always stay.

    Args:
        architecture: The model.
        spare_ends: Keep the first and the last such tensor whole, where there are others.
    """
    flat = FlatLayout(architecture, architecture.groups, Role.PARAMETER)
    weights = [i for i, spec in enumerate(flat.specs) if spec.positions and len(spec.axes) > 1]
    if spare_ends and len(weights) > 2:
        weights = weights[1:-1]
    sizes = [flat.offsets[i + 1] - flat.offsets[i] for i in range(len(flat.specs))]
    return SparseLayout(
        Prunable(flat.size, tuple((flat.offsets[i], sizes[i]) for i in weights)),
        tuple(flat.shapes[i] for i in weights),
        tuple(flat.specs[i].positions for i in weights),
        sum(
            sizes[i] * spec.positions for i, spec in enumerate(flat.specs) if i not in set(weights)
        ),
    )


def best_of(scores: NDArray[Any], allowed: Bools, count: int) -> Bools:
    """Mark the `count` highest scores among the allowed ones; ties go to the lower index.

    Args:
        scores: (n,).
        allowed: (n,).
        count: How many to mark, at most as many as are allowed.

    Returns:
        (n,) with exactly `count` true.

    Raises:
        BudgetError: There are not so many.
    """
    places = np.flatnonzero(allowed)
    if not 0 <= count <= places.size:
        raise BudgetError(f"{count} of {places.size} weights, expected 0..{places.size}")
    chosen = np.zeros(scores.size, np.bool_)
    chosen[places[np.argsort(-scores[places], kind="stable")[:count]]] = True
    return chosen


def best_per_tensor(
    prunable: Prunable, scores: NDArray[Any], allowed: Bools, counts: Sequence[int]
) -> Bools:
    """`best_of` for each tensor by itself.

    Args:
        prunable: The tensors.
        scores: (n,).
        allowed: (n,).
        counts: Per tensor how many to mark.

    Returns:
        (n,).
    """
    parts = zip(prunable.split(scores), prunable.split(allowed), counts, strict=True)
    return np.concatenate([best_of(*part) for part in parts] or [np.zeros(0, np.bool_)])
