"""What the fleet has learned about the importance of each unit, round after round.

One round's scores are noisy and cover only what the chosen devices hold, so a new mask is decided
on a moving average. All scores are kept in the dense numbering of the present order of units.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from fleetprune import criteria
from fleetprune.criteria import CATALOGUE, MEASURED, Criterion, Needs, Scores, Tensors
from fleetprune.errors import BudgetError, UsageError, WireError
from fleetprune.layout import Architecture, KeepCounts, Order, axis_indices, unit_slices
from fleetprune_coordinator.aggregate import check_vector, check_weight
from fleetprune_coordinator.score_merge import Average, FloatArray, ScoreMerge

Flow = Callable[[Tensors], Tensors]
"""The gradient of SynFlow's R by the absolute parameters (`synflow.flow_gradients`)."""

MOST = 100.0
"""Largest score of a unit in one report, in means of the units that all classes have."""
_SLACK = 1e-4  # of float32 sums

_WEIGHTS_ALONE: Final[Mapping[Criterion, Callable[[Architecture, Tensors], Scores]]] = {
    Criterion.MAGNITUDE: criteria.magnitude,
    Criterion.L1: criteria.magnitude_l1,
    Criterion.GAMMA: criteria.gamma,
    Criterion.THRESHOLD: criteria.threshold,
    Criterion.FPGM: criteria.fpgm,
}
_INPUTS: Final = {c: CATALOGUE[c].section for c in (Criterion.WANDA, Criterion.APOZ)}
"""Criteria of sums over the inputs of layers, and how these sums are called."""


class Ledger:
    """Running importance of every unit, comparable across device classes.

    Scores scale with the loss, and a narrow model's loss is larger: each report is divided by
    the mean of its absolute values over the units that the smallest class has, which every report
    contains, and cut at `MOST`, so that one device's word about a unit fades within a few rounds.
    Activation sums are not rescaled: with all devices of one shape and `ScoreMerge.MEAN`, the
    score is exactly that of the pooled samples.

    Reports of different criteria are kept apart. Where all scores are equal, the present order
    stands (ties go to the lower index); a report in which the common units score 0 says nothing
    and is passed over; a report with a NaN is refused as a whole; a unit that nobody has covered
    scores 0, or as low as the lowest of its group where that is negative.
    """

    def __init__(
        self,
        architecture: Architecture,
        smallest: KeepCounts,
        decay: float = 0.8,
        *,
        merge: ScoreMerge = ScoreMerge.MEAN,
        flow: Flow | None = None,
    ) -> None:
        """Start empty.

        Args:
            architecture: The dense model.
            smallest: Keep counts that every shape has at least (BudgetError if out of range).
            decay: Share of the old average that stays when a unit is seen again, 0 <= decay < 1.
            merge: How the reports of one round become one.
            flow: For `synflow`, which needs the network itself.
        """
        if not 0 <= decay < 1:
            raise UsageError(f"decay {decay}, expected 0 <= decay < 1")
        architecture.check_keep(smallest)
        self._architecture = architecture
        self._smallest = dict(smallest)
        self._decay = decay
        self._merge = merge
        self._flow = flow
        self._averages: dict[str, Average] = {}  # by name, made when something is reported

    def add_scores(
        self,
        criterion: Criterion,
        keep: KeepCounts,
        scores: NDArray[np.floating[Any]],
        steps: int,
        weight: float,
    ) -> None:
        """Add one training device's scores, or what its update says of movement.

        Args:
            criterion: What they are; one that needs gradients or training.
            keep: Keep counts of the device's shape, at least the smallest class's.
            scores: (U,) finite, in `unit_slices` order: sums over steps; not negative but for
                movement.
            steps: Steps summed over, at least 1.
            weight: Positive, usually the number of samples.

        Raises:
            UsageError: `weight` or `steps` is not positive, `keep` lacks a common unit, or the
                criterion is no such one.
            WireError: Another length, or a value that is negative or not finite.
        """
        facts = CATALOGUE[criterion]
        if facts.needs not in (Needs.BACKWARD, Needs.TRAINING):
            raise UsageError(f"scores of {criterion}, which no training device reports")
        check_weight(weight)
        if steps < 1:
            raise UsageError(f"{steps} steps, expected at least 1")
        self._check_keep(keep)
        check_vector(scores, sum(keep[g] for g in self._architecture.groups), "scores")
        if not facts.signed and scores.size and scores.min() < 0:
            raise WireError(f"scores: {scores.min()}, expected at least 0")
        parts = {
            group: scores[where].astype(np.float64) / steps
            for group, where in unit_slices(self._architecture, keep)
        }
        common = [parts[g][:n] for g, n in self._smallest.items()]
        scale = float(np.abs(np.concatenate(common)).mean()) if common else 0.0
        if not scale > 0:
            return  # dead gradients say nothing about which unit matters
        for group, values in parts.items():
            with np.errstate(over="ignore"):  # beyond MOST in any case
                worth = np.clip(values / scale, -MOST, MOST)
            average = self._average(f"scores/{criterion}/{group}")
            average.add(slice(0, values.size), worth * weight, weight)

    def add_sumsq(self, keep: KeepCounts, sumsq: NDArray[np.float32], samples: int) -> None:
        """Add one device's sums of squared activations.

        Args:
            keep: Keep counts of the device's shape.
            sumsq: (Q,) finite, not negative: per observed weight, one sum of squares per input.
            samples: Samples summed over, at least 1.

        Raises:
            UsageError: `samples` is below 1, or `keep` lacks a common unit.
            WireError: Another length, or a value that is negative or not finite.
        """
        self._add_inputs("sumsq", keep, sumsq, samples)

    def add_zeros(self, keep: KeepCounts, zeros: NDArray[np.float32], samples: int) -> None:
        """Add one device's counts of zero activations.

        Args:
            keep: Keep counts of the device's shape.
            zeros: (Q,) between 0 and `samples`: per observed weight and input, the share of a
                sample's positions at which it is at most 0, summed over samples.
            samples: Samples summed over, at least 1.

        Raises:
            UsageError: `samples` is below 1, or `keep` lacks a common unit.
            WireError: Another length, or a value that no samples can have.
        """
        self._add_inputs("zeros", keep, zeros, samples, most=samples * (1 + _SLACK))

    def _add_inputs(
        self,
        kind: str,
        keep: KeepCounts,
        sums: NDArray[np.float32],
        samples: int,
        most: float = np.inf,
    ) -> None:
        if samples < 1:
            raise UsageError(f"{samples} samples, expected at least 1")
        self._check_keep(keep)
        dense = self._architecture.groups
        index = {
            name: axis_indices(self._architecture.tensor(name).axes[1], dense, keep)
            for name in self._architecture.observed
        }
        check_vector(sums, sum(i.size for i in index.values()), kind)
        if sums.size and sums.min() < 0:
            raise WireError(f"{kind}: {sums.min()}, expected at least 0")
        if sums.size and sums.max() > most:
            raise WireError(f"{kind}: {sums.max()} of {samples} samples, expected at most all")
        start = 0
        for name, where in index.items():
            part = sums[start : start + where.size].astype(np.float64)
            self._average(f"{kind}/{name}").add(where, part, float(samples))
            start += where.size

    def _average(self, name: str) -> Average:
        if name not in self._averages:
            self._averages[name] = Average(self._size(name), self._merge)
        return self._averages[name]

    def _size(self, name: str) -> int:
        kind, _, key = name.partition("/")
        if kind == "scores":
            return self._architecture.groups[key.partition("/")[2]]
        return self._architecture.tensor(key).shape(self._architecture.groups)[1]

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
        for average in self._averages.values():
            average.close(self._decay)

    def ready(self, criterion: Criterion) -> bool:
        """Whether closed rounds hold anything that `scores` can use."""
        if CATALOGUE[criterion].needs is Needs.NOTHING:
            return True
        names = self._names(criterion)
        return any(self._averages[name].seen.any() for name in names if name in self._averages)

    def _names(self, criterion: Criterion) -> Iterator[str]:
        """The averages that a criterion which devices measure is made of."""
        if criterion in _INPUTS:
            yield from (f"{_INPUTS[criterion]}/{name}" for name in self._architecture.observed)
        else:
            yield from (f"scores/{criterion}/{group}" for group in self._architecture.groups)

    def scores(self, criterion: Criterion, params: Tensors) -> Scores:
        """Importance of every unit.

        Args:
            criterion: Which; reconstruction has its own module.
            params: Dense parameters by name, in the present order of units.

        Returns:
            Per group (units,), the high ones stay.

        Raises:
            BudgetError: No device has reported what the criterion needs, or a score is not finite.
            UsageError: The criterion is not one of the ledger's, or its means were not given.
        """
        architecture = self._architecture
        if criterion in _WEIGHTS_ALONE:
            return _WEIGHTS_ALONE[criterion](architecture, params)
        if criterion is Criterion.NONE:
            return {g: -np.arange(n, dtype=np.float32) for g, n in architecture.groups.items()}
        if criterion is Criterion.SYNFLOW:
            if self._flow is None:
                raise UsageError("synflow needs the network, and this ledger was given none")
            return criteria.synflow(architecture, params, self._flow(params))
        if criterion is Criterion.RECONSTRUCTION:
            raise UsageError("reconstruction comes from Gram matrices, not from the ledger")
        if not self.ready(criterion):
            raise BudgetError(
                f"criterion {criterion}: no device has reported yet; "
                f"close a round first, or start with magnitude"
            )
        if criterion is Criterion.WANDA:
            return criteria.wanda(architecture, params, self._inputs("sumsq", unseen=0.0))
        if criterion is Criterion.APOZ:
            return criteria.apoz(architecture, self._inputs("zeros", unseen=1.0), 1.0)
        return {
            group: _filled(self._average(f"scores/{criterion}/{group}"))
            for group in architecture.groups
        }

    def norms(self) -> dict[str, NDArray[np.float32]]:
        """Per observed weight (inputs,) mean sums of squared inputs, of weights reported so far."""
        seen = {
            name
            for name in self._architecture.observed
            if f"sumsq/{name}" in self._averages and self._averages[f"sumsq/{name}"].seen.any()
        }
        return {n: v for n, v in self._inputs("sumsq", unseen=0.0).items() if n in seen}

    def _inputs(self, kind: str, unseen: float) -> dict[str, NDArray[np.float32]]:
        """Per observed weight (inputs,) means over samples."""
        averages = {n: self._average(f"{kind}/{n}") for n in self._architecture.observed}
        return {
            name: np.where(a.seen, a.value, unseen).astype(np.float32)
            for name, a in averages.items()
        }

    def reorder(self, order: Order, smallest: KeepCounts) -> None:
        """Follow a new mask.

        Args:
            order: Per group, a permutation of the present order of units.
            smallest: The new keep counts that every shape has at least.
        """
        self._architecture.check_keep(smallest)
        wide = self._architecture.groups
        for name, average in self._averages.items():
            kind, _, key = name.partition("/")
            if kind == "scores":
                average.reorder(order[key.partition("/")[2]])
            else:
                axis = self._architecture.tensor(key).axes[1]
                average.reorder(axis_indices(axis, wide, wide, order))
        self._smallest = dict(smallest)

    def arrays(self) -> dict[str, FloatArray]:
        """The averages of closed rounds, for a snapshot; an open round's reports are not in it.

        Returns:
            Of what was reported so far `scores/<criterion>/<group>` (units,), `sumsq/<tensor>` and
            `zeros/<tensor>` (inputs,) float64; NaN where unseen.
        """
        return {
            name: np.where(a.seen, a.value, np.nan)
            for name, a in self._averages.items()
            if a.seen.any()
        }

    @classmethod
    def from_arrays(
        cls,
        architecture: Architecture,
        smallest: KeepCounts,
        arrays: Mapping[str, FloatArray],
        decay: float = 0.8,
        *,
        merge: ScoreMerge = ScoreMerge.MEAN,
        flow: Flow | None = None,
    ) -> Self:
        """The ledger that `arrays` was made from; UsageError if names or shapes differ."""
        ledger = cls(architecture, smallest, decay, merge=merge, flow=flow)
        known = {name for criterion in MEASURED for name in ledger._names(criterion)}
        if unknown := sorted(set(arrays) - known):
            raise UsageError(
                f"ledger array {unknown[0]}, expected those of this model's groups and weights"
            )
        for name, values in arrays.items():
            average = ledger._average(name)
            if values.shape != average.value.shape:
                raise UsageError(
                    f"ledger array {name} of shape {values.shape}, expected {average.value.shape}"
                )
            average.seen = ~np.isnan(values)
            average.value = np.where(average.seen, values, 0.0)
        return ledger


def _filled(average: Average) -> NDArray[np.float32]:
    """(units,) values; what nobody has covered is no better than what somebody has."""
    lowest = average.value[average.seen].min(initial=0.0)
    return np.where(average.seen, average.value, lowest).astype(np.float32)
