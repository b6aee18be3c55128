"""Gram matrices of layers' inputs, added up over devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import UsageError, WireError
from fleetprune.layout import Architecture, KeepCounts, Order, axis_indices
from fleetprune_coordinator.aggregate import check_vector

MOST_INPUTS: Final = 2048
"""Inputs of a layer that is still measured: its matrix is then 8 MB on the wire."""
_SLACK = 1e-4  # of float32 sums


@dataclass(frozen=True, eq=False)
class Gram:
    """Of one layer.

    Attributes:
        inputs: (n,) indices on the weight's axis 1, in the dense model.
        matrix: (n, n) `sum of x x^T` over samples and positions, divided by the samples.
    """

    inputs: NDArray[np.intp]
    matrix: NDArray[np.float64]


def measured(architecture: Architecture) -> tuple[str, ...]:
    """Weights whose inputs' Gram matrices are measured: those that are cut, unless very wide."""
    dense = architecture.groups
    return tuple(
        name
        for name in architecture.observed
        if architecture.tensor(name).shape(dense)[1] <= MOST_INPUTS
    )


class GramSums:
    """Adds up the matrices of devices of one shape; the result is that of the pooled samples."""

    def __init__(self, architecture: Architecture, keep: KeepCounts) -> None:
        """Prepare for a shape; BudgetError if it is out of range."""
        architecture.check_keep(keep)
        dense = architecture.groups
        self._inputs = {
            name: axis_indices(architecture.tensor(name).axes[1], dense, keep)
            for name in measured(architecture)
        }
        self._sums: dict[str, NDArray[np.float64]] = {}  # most rounds have none
        self._samples = 0

    @property
    def size(self) -> int:
        """Length of the vector that a device sends."""
        return sum(i.size * (i.size + 1) // 2 for i in self._inputs.values())

    def check(self, triangles: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
        """A device's matrices per weight.

        Args:
            triangles: (size,): of each measured weight the upper triangle, row by row.

        Raises:
            WireError: Another length, or numbers that no samples can have.
        """
        check_vector(triangles, self.size, "gram")
        start, matrices = 0, {}
        for name, inputs in self._inputs.items():
            stop = start + inputs.size * (inputs.size + 1) // 2
            matrices[name] = _whole(triangles[start:stop].astype(np.float64), inputs.size, name)
            start = stop
        return matrices

    def add(self, triangles: NDArray[np.float32], samples: int) -> None:
        """Add one device's sums over so many samples, at least 1.

        Raises:
            UsageError: `samples` is below 1.
            WireError: What `check` refuses.
        """
        if samples < 1:
            raise UsageError(f"{samples} samples, expected at least 1")
        self._add(self.check(triangles), samples)

    def _add(self, matrices: Mapping[str, NDArray[np.float64]], samples: int) -> None:
        for name, matrix in matrices.items():
            self._sums[name] = self._sums[name] + matrix if name in self._sums else matrix
        self._samples += samples

    def include(self, other: "GramSums") -> None:
        """Add what devices of another class of the same shape have sent."""
        self._add(other._sums, other._samples)

    def result(self) -> dict[str, Gram]:
        """The pooled matrices per weight; empty if nothing was added."""
        return {
            name: Gram(self._inputs[name], total / self._samples)
            for name, total in self._sums.items()
        }


def _whole(triangle: NDArray[np.float64], n: int, name: str) -> NDArray[np.float64]:
    """The symmetric matrix of an upper triangle; WireError if it is no Gram matrix."""
    matrix = np.zeros((n, n))
    matrix[np.triu_indices(n)] = triangle
    matrix += np.triu(matrix, 1).T
    squares = np.diag(matrix)
    if n and squares.min() < 0:
        raise WireError(f"gram: {name} has a sum of squares {squares.min()}, expected at least 0")
    bound = np.sqrt(np.outer(squares, squares))
    if (np.abs(matrix) > bound * (1 + _SLACK) + _SLACK * squares.max(initial=0.0)).any():
        raise WireError(f"gram: {name} has a product above what its squares allow")
    return matrix


def reordered(grams: dict[str, Gram], architecture: Architecture, order: Order) -> dict[str, Gram]:
    """The matrices after the units were put in another order."""
    dense = architecture.groups
    moved = {}
    for name, gram in grams.items():
        axis = architecture.tensor(name).axes[1]
        came_from = axis_indices(axis, dense, dense, order)
        place = {int(i): at for at, i in enumerate(gram.inputs)}
        kept = [(to, place[int(old)]) for to, old in enumerate(came_from) if int(old) in place]
        inputs = np.array([to for to, _ in kept], np.intp)
        at = [p for _, p in kept]
        moved[name] = Gram(inputs, gram.matrix[np.ix_(at, at)])
    return moved
