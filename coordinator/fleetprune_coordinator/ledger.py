"""What the fleet has learned about the importance of each unit, round after round.

One round's scores are noisy and cover only what the chosen devices hold, so a new mask is decided
on a moving average. All scores are kept in the dense numbering of the present order of units.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fleetprune.criteria import Scores, Tensors, magnitude, wanda
from fleetprune.errors import BudgetError, UsageError, WireError
from fleetprune.layout import Architecture, KeepCounts, Order, axis_indices, unit_slices
from fleetprune_coordinator.aggregate import check_vector, check_weight

FloatArray = NDArray[np.float64]
MOST = 100.0
"""Largest Taylor score of a unit in one report, in means of the units that all classes have."""


class Criterion(StrEnum):
    """How the importance of a unit is measured."""

    NONE = "none"
    """The order in which the user's model has them: the control that any other must beat."""
    MAGNITUDE = "magnitude"
    """L2 norm of its weights: needs no device."""
    WANDA = "wanda"
    """Weights times activation norms: needs forward passes."""
    TAYLOR = "taylor"
    """Change of the loss when the unit goes: needs gradients."""
    RECONSTRUCTION = "reconstruction"
    """How well the layers behind can be rebuilt from it: needs forward passes, once, for the first
    masks of a trained model."""


MEASURED = frozenset({Criterion.TAYLOR, Criterion.WANDA})
"""Criteria that need devices to have looked at the model, round after round."""


class _Average:
    """A moving average per element, updated only where the round has seen the element."""

    def __init__(self, size: int) -> None:
        self.value = np.zeros(size)
        self.seen = np.zeros(size, np.bool_)
        self.sum = np.zeros(size)
        self.weight = np.zeros(size)

    def add(self, index: NDArray[np.intp] | slice, values: FloatArray, weight: float) -> None:
        self.sum[index] += values
        self.weight[index] += weight

    def close(self, decay: float) -> None:
        now = self.weight > 0
        mean = np.divide(self.sum, self.weight, out=np.zeros_like(self.sum), where=now)
        mixed = np.where(self.seen, decay * self.value + (1 - decay) * mean, mean)
        self.value = np.where(now, mixed, self.value)
        self.seen |= now
        self.sum[:] = 0
        self.weight[:] = 0

    def reorder(self, index: NDArray[np.intp]) -> None:
        for name in ("value", "seen", "sum", "weight"):
            setattr(self, name, getattr(self, name)[index])


class Ledger:
    """Running importance of every unit, comparable across device classes.

    Taylor scores scale with the loss, and a narrow model's loss is larger: each report is divided
    by its mean over the units that the smallest class has, which every report contains, and cut
    at `MOST`, so that one device's word about a unit fades within a few rounds.
    Activation sums are not rescaled: with all devices of one shape, the score is exactly that of
    the pooled samples.
    """

    def __init__(
        self, architecture: Architecture, smallest: KeepCounts, decay: float = 0.8
    ) -> None:
        """Start empty.

        Args:
            architecture: The dense model.
            smallest: Keep counts that every shape has at least (BudgetError if out of range).
            decay: Share of the old average that stays when a unit is seen again, 0 <= decay < 1.
        """
        if not 0 <= decay < 1:
            raise UsageError(f"decay {decay}, expected 0 <= decay < 1")
        architecture.check_keep(smallest)
        self._architecture = architecture
        self._smallest = dict(smallest)
        self._decay = decay
        self._taylor = {g: _Average(n) for g, n in architecture.groups.items()}
        self._sumsq = {
            name: _Average(architecture.tensor(name).shape(architecture.groups)[1])
            for name in architecture.observed
        }

    def add_taylor(
        self, keep: KeepCounts, taylor: NDArray[np.float32], steps: int, weight: float
    ) -> None:
        """Add one training device's scores.

        Args:
            keep: Keep counts of the device's shape, at least the smallest class's.
            taylor: (U,) finite, not negative: sums over steps, in `unit_slices` order.
            steps: Steps summed over, at least 1.
            weight: Positive, usually the number of samples.

        Raises:
            UsageError: `weight` or `steps` is not positive, or `keep` lacks a common unit.
            WireError: Another length, or a value that is negative or not finite.
        """
        check_weight(weight)
        if steps < 1:
            raise UsageError(f"{steps} steps, expected at least 1")
        self._check_keep(keep)
        check_vector(taylor, sum(keep[g] for g in self._architecture.groups), "taylor")
        if taylor.size and taylor.min() < 0:
            raise WireError(f"taylor: {taylor.min()}, expected at least 0")
        parts = {
            group: taylor[where].astype(np.float64) / steps
            for group, where in unit_slices(self._architecture, keep)
        }
        common = [parts[g][:n] for g, n in self._smallest.items()]
        scale = float(np.concatenate(common).mean()) if common else 0.0
        if not scale > 0:
            return  # dead gradients say nothing about which unit matters
        for group, scores in parts.items():
            worth = np.minimum(scores / scale, MOST)
            self._taylor[group].add(slice(0, scores.size), worth * weight, weight)

    def add_sumsq(self, keep: KeepCounts, sumsq: NDArray[np.float32], samples: int) -> None:
        """Add one device's activation sums.

        Args:
            keep: Keep counts of the device's shape.
            sumsq: (Q,) finite, not negative: per observed weight, one sum of squares per input.
            samples: Samples summed over, at least 1.

        Raises:
            UsageError: `samples` is below 1, or `keep` lacks a common unit.
            WireError: Another length, or a value that is negative or not finite.
        """
        if samples < 1:
            raise UsageError(f"{samples} samples, expected at least 1")
        self._check_keep(keep)
        axes = {name: self._architecture.tensor(name).axes[1] for name in self._sumsq}
        index = {n: axis_indices(a, self._architecture.groups, keep) for n, a in axes.items()}
        check_vector(sumsq, sum(i.size for i in index.values()), "sumsq")
        if sumsq.size and sumsq.min() < 0:
            raise WireError(f"sumsq: {sumsq.min()}, expected at least 0")
        start = 0
        for name, where in index.items():
            part = sumsq[start : start + where.size].astype(np.float64)
            self._sumsq[name].add(where, part, float(samples))
            start += where.size

    def _check_keep(self, keep: KeepCounts) -> None:
        self._architecture.check_keep(keep)
        for group, least in self._smallest.items():
            if keep[group] < least:
                raise UsageError(
                    f"group {group}: keep {keep[group]}, expected at least the smallest "
                    f"class's {least}"
                )

    def close_round(self) -> None:
        """Fold the round's means into the averages; a unit nobody reported keeps its value."""
        for average in (*self._taylor.values(), *self._sumsq.values()):
            average.close(self._decay)

    def ready(self, criterion: Criterion) -> bool:
        """Whether closed rounds hold anything that `scores` can use."""
        needs = {Criterion.TAYLOR: self._taylor, Criterion.WANDA: self._sumsq}.get(criterion)
        return needs is None or any(average.seen.any() for average in needs.values())

    def scores(self, criterion: Criterion, params: Tensors) -> Scores:
        """Importance of every unit.

        Args:
            criterion: Which.
            params: Dense parameters by name, in the present order of units.

        Returns:
            Per group (units,), the high ones stay; a unit that nobody has reported scores 0.

        Raises:
            BudgetError: No device has reported what the criterion needs.
        """
        if not self.ready(criterion):
            raise BudgetError(
                f"criterion {criterion}: no device has reported yet; "
                f"close a round first, or start with magnitude"
            )
        if criterion is Criterion.NONE:
            return {
                g: -np.arange(n, dtype=np.float32) for g, n in self._architecture.groups.items()
            }
        if criterion is Criterion.TAYLOR:
            return {g: a.value.astype(np.float32) for g, a in self._taylor.items()}
        if criterion is Criterion.WANDA:
            sumsq = {n: a.value.astype(np.float32) for n, a in self._sumsq.items()}
            return wanda(self._architecture, params, sumsq)
        return magnitude(self._architecture, params)

    def reorder(self, order: Order, smallest: KeepCounts) -> None:
        """Follow a new mask.

        Args:
            order: Per group, a permutation of the present order of units.
            smallest: The new keep counts that every shape has at least.
        """
        self._architecture.check_keep(smallest)
        for group, average in self._taylor.items():
            average.reorder(order[group])
        wide = self._architecture.groups
        for name, average in self._sumsq.items():
            axis = self._architecture.tensor(name).axes[1]
            average.reorder(axis_indices(axis, wide, wide, order))
        self._smallest = dict(smallest)

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """The averages of closed rounds, for a snapshot; an open round's reports are not in it.

        Returns:
            `taylor/<group>` (units,) and `sumsq/<tensor>` (inputs,) float64; NaN where unseen.
        """
        named = {f"taylor/{g}": a for g, a in self._taylor.items()}
        named |= {f"sumsq/{n}": a for n, a in self._sumsq.items()}
        return {name: np.where(a.seen, a.value, np.nan) for name, a in named.items()}

    @classmethod
    def from_arrays(
        cls,
        architecture: Architecture,
        smallest: KeepCounts,
        arrays: Mapping[str, NDArray[np.float64]],
        decay: float = 0.8,
    ) -> Self:
        """The ledger that `arrays` was made from; UsageError if names or shapes differ."""
        ledger = cls(architecture, smallest, decay)
        expected = ledger.arrays()
        if set(arrays) != set(expected):
            raise UsageError(f"ledger arrays {sorted(arrays)}, expected {sorted(expected)}")
        for name, values in arrays.items():
            if values.shape != expected[name].shape:
                raise UsageError(
                    f"ledger array {name} of shape {values.shape}, expected {expected[name].shape}"
                )
            kind, key = name.split("/", 1)
            average = (ledger._taylor if kind == "taylor" else ledger._sumsq)[key]
            average.seen = ~np.isnan(values)
            average.value = np.where(average.seen, values, 0.0)
        return ledger
