"""The running, coverage-weighted mean of the devices' weight changes.

Each element of the dense model is averaged over the devices whose model has it: dividing by the
number of clients would shrink what only the wide classes train.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import UsageError, WireError
from fleetprune.layout import Architecture, FlatLayout, KeepCounts, Role, tensor_index

Tensors = dict[str, NDArray[np.float32]]
Vector = NDArray[np.floating[Any]]


def check_weight(weight: float) -> None:
    """Refuse a weight that is not a positive finite number (UsageError)."""
    if not (isfinite(weight) and weight > 0):
        raise UsageError(f"weight {weight}, expected a positive finite number")


def check_vector(vector: Vector, size: int, what: str) -> None:
    """Refuse a vector that has another length or is not finite (WireError); never broadcast."""
    if vector.shape != (size,):
        raise WireError(f"{what} of shape {vector.shape}, expected ({size},)")
    if not np.isfinite(vector).all():
        raise WireError(f"{what}: element {int(np.argmin(np.isfinite(vector)))} is not finite")


class Aggregate:
    """Weighted mean of updates of several shapes, each element over the devices that cover it.

    Memory is one accumulator of the dense model, however many devices report: an update is added
    and forgotten. Coverage is constant on a shape's part of the model (less what is pruned of it),
    so it is kept as one number per shape and spread over the tensors once, at the end. The
    accumulator is float64: thousands of float32 updates then add up to the same float32 in
    whichever order they arrive (up to one rounding), for 8 bytes per parameter on the server.
    """

    def __init__(
        self,
        architecture: Architecture,
        shapes: Mapping[str, KeepCounts],
        supports: Mapping[str, NDArray[np.bool_]] | None = None,
    ) -> None:
        """Prepare for updates of some shapes.

        Args:
            architecture: The dense model.
            shapes: Keep counts per shape name (BudgetError if out of range).
            supports: Per shape whose weights are pruned one by one (P,), which are left.
        """
        self._supports = dict(supports or {})
        self._layouts = {
            name: FlatLayout(architecture, keep, Role.PARAMETER) for name, keep in shapes.items()
        }
        self._specs = architecture.role(Role.PARAMETER)
        self._places = {
            name: [tensor_index(s, architecture.groups, layout.keep) for s in self._specs]
            for name, layout in self._layouts.items()
        }
        self._sums = {s.name: np.zeros(s.shape(architecture.groups)) for s in self._specs}
        self._weights = dict.fromkeys(shapes, 0.0)
        self._counts = dict.fromkeys(shapes, 0)

    @property
    def counts(self) -> dict[str, int]:
        """Updates added so far, per shape name."""
        return dict(self._counts)

    def size(self, shape: str) -> int:
        """How many values an update of this shape has; UsageError if it is not one of them."""
        if shape not in self._layouts:
            raise UsageError(f"update of shape {shape!r}, expected one of {sorted(self._layouts)}")
        if (support := self._supports.get(shape)) is not None:
            return int(np.count_nonzero(support))
        return self._layouts[shape].size

    def full(self, shape: str, update: NDArray[np.float32]) -> NDArray[np.float32]:
        """An update of a shape's (k,) values as one of all (P,), 0 where they are pruned."""
        if (support := self._supports.get(shape)) is None:
            return update
        check_vector(update, self.size(shape), f"update of {shape}")
        values = np.zeros(support.size, np.float32)
        values[support] = update
        return values

    def add(self, shape: str, update: NDArray[np.float32], weight: float) -> None:
        """Add one device's change. Nothing is added when it raises.

        Args:
            shape: Name of the shape that the device trained.
            update: (k,) finite, the change of that shape's parameters that are not pruned, in
                `FlatLayout` order.
            weight: Positive, usually the number of samples.

        Raises:
            UsageError: Unknown shape, or `weight` is not positive and finite.
            WireError: `update` has another length, or is not finite.
        """
        check_vector(update, self.size(shape), f"update of {shape}")
        check_weight(weight)
        parts = self._layouts[shape].split(self.full(shape, update))
        for (name, part), index in zip(parts.items(), self._places[shape], strict=True):
            self._sums[name][index] += np.multiply(part, weight, dtype=np.float64)
        self._weights[shape] += weight
        self._counts[shape] += 1

    def result(self) -> tuple[Tensors, Tensors]:
        """The mean change so far, and who trained what.

        Returns:
            Per parameter tensor, in the dense shape: the mean `sum(w_i d_i) / sum(w_i)` over the
            devices that cover the element, 0 where nobody does (the old value stays); and the
            coverage `sum(w_i)`.
        """
        deltas: Tensors = {}
        coverage: Tensors = {}
        kept = {n: self._layouts[n].split(s) for n, s in self._supports.items()}
        for i, spec in enumerate(self._specs):
            total = self._sums[spec.name]
            weights = np.zeros_like(total)
            for shape, weight in self._weights.items():
                covers = kept[shape][spec.name] if shape in kept else True
                weights[self._places[shape][i]] += np.multiply(weight, covers)
            mean = np.divide(total, weights, out=np.zeros_like(total), where=weights > 0)
            deltas[spec.name] = mean.astype(np.float32)
            coverage[spec.name] = weights.astype(np.float32)
        return deltas, coverage


class StatisticsMean:
    """Weighted mean of one class's BatchNorm statistics after training.

    Statistics of one width are wrong for another, so there is one of these per class.
    """

    def __init__(self, architecture: Architecture, keep: KeepCounts) -> None:
        """Prepare for a class with `keep` units per group (BudgetError if out of range)."""
        self._layout = FlatLayout(architecture, keep, Role.STATISTIC)
        self._sum = np.zeros(self._layout.size)
        self._weight = 0.0

    def check(self, stats: NDArray[np.float32]) -> None:
        """Refuse another length, a value that is not finite, or a negative variance (WireError)."""
        check_vector(stats, self._layout.size, "statistics")
        for name, values in self._layout.split(stats).items():
            if name.endswith("running_var") and values.size and values.min() < 0:
                raise WireError(f"statistics: {name} has a negative variance {values.min()}")

    def add(self, stats: NDArray[np.float32], weight: float) -> None:
        """Add one device's (S,) statistics.

        Raises:
            UsageError: `weight` is not positive and finite.
            WireError: What `check` refuses.
        """
        check_weight(weight)
        self.check(stats)
        self._sum += np.multiply(stats, weight, dtype=np.float64)
        self._weight += weight

    def result(self) -> Tensors | None:
        """The mean per statistic tensor, in this class's shape; None if nothing was added."""
        if self._weight == 0:
            return None
        return self._layout.split((self._sum / self._weight).astype(np.float32))


def moments(
    total: Vector, squares: Vector, count: Vector
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Exact mean and variance per channel from sums that devices can add up.

    `mean = s / n`, `biased = q / n - mean**2`, `unbiased = biased * n / (n - 1)`. torch trains
    with the biased variance of the batch and stores the unbiased one as `running_var`; the
    unbiased is the one to ship. Rounding can make `q / n - mean**2` slightly negative: it is
    raised to 0. One single value has no unbiased variance: the biased one, 0, is returned.

    Args:
        total: (C,) `s`, the sum of each channel's values over samples and positions.
        squares: (C,) `q`, the sum of their squares.
        count: (C,) `n`, how many values each channel had, at least 1.

    Returns:
        (C,) mean, (C,) unbiased variance, (C,) biased variance.

    Raises:
        WireError: The shapes differ, a value is not finite, a square sum is negative or a count
            is below 1.
    """
    for vector, what in ((total, "sums"), (squares, "square sums"), (count, "counts")):
        check_vector(vector, total.size, what)
    if count.size and count.min() < 1:
        raise WireError(f"counts: {count.min()}, expected at least 1")
    if squares.size and squares.min() < 0:
        raise WireError(f"square sums: {squares.min()}, expected at least 0")
    n = count.astype(np.float64)
    mean = total / n
    biased = np.maximum(squares / n - np.square(mean), 0.0)
    unbiased = biased * n / np.maximum(n - 1.0, 1.0)
    return mean.astype(np.float32), unbiased.astype(np.float32), biased.astype(np.float32)


class MomentSums:
    """BatchNorm sums of one class over many devices, turned into exact statistics.

    Sums are additive: the result is that of the pooled samples, whatever the devices' sizes.
    """

    def __init__(self, architecture: Architecture, keep: KeepCounts) -> None:
        """Prepare for a class; WireError if its statistics are not (mean, variance) pairs."""
        self._layout = FlatLayout(architecture, keep, Role.STATISTIC)
        means, variances = self._layout.shapes[0::2], self._layout.shapes[1::2]
        if means != variances:
            raise WireError(
                f"statistics of shapes {self._layout.shapes}, expected means and variances in turn"
            )
        self._channels = tuple(shape[0] for shape in means)
        width = sum(self._channels)
        self._sum, self._squares, self._count = np.zeros(width), np.zeros(width), np.zeros(width)

    def check(
        self,
        bn_sum: NDArray[np.float32],
        bn_sumsq: NDArray[np.float32],
        bn_count: NDArray[np.float32],
    ) -> None:
        """Refuse another length, or values that no samples can have (WireError)."""
        check_vector(bn_sum, self._sum.size, "bn_sum")
        check_vector(bn_sumsq, self._sum.size, "bn_sumsq")
        check_vector(bn_count, len(self._channels), "bn_count")
        if bn_count.size and bn_count.min() < 1:
            raise WireError(f"bn_count: {bn_count.min()}, expected at least 1")
        if bn_sumsq.size and bn_sumsq.min() < 0:
            raise WireError(f"bn_sumsq: {bn_sumsq.min()}, expected at least 0")

    def add(
        self,
        bn_sum: NDArray[np.float32],
        bn_sumsq: NDArray[np.float32],
        bn_count: NDArray[np.float32],
    ) -> None:
        """Add one device's sums.

        Args:
            bn_sum: (S/2,) sums of each BatchNorm's input, channel by channel.
            bn_sumsq: (S/2,) sums of its square.
            bn_count: (number of BatchNorms,) values per channel, at least 1.

        Raises:
            WireError: What `check` refuses.
        """
        self.check(bn_sum, bn_sumsq, bn_count)
        self._sum += bn_sum
        self._squares += bn_sumsq
        self._count += np.repeat(bn_count, self._channels)

    def result(self) -> Tensors | None:
        """Means and unbiased variances per statistic tensor; None if nothing was added."""
        if not self._count.any():
            return None
        mean, variance, _ = moments(self._sum, self._squares, self._count)
        starts = np.cumsum(self._channels)[:-1]
        pairs = zip(np.split(mean, starts), np.split(variance, starts), strict=True)
        values = [vector for pair in pairs for vector in pair]
        return {spec.name: v for spec, v in zip(self._layout.specs, values, strict=True)}
