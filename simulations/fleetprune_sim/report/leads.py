"""Who is ahead of whom, and whether that is more than chance."""

from collections.abc import Mapping
from dataclasses import dataclass

from fleetprune_sim.report.comparison import Comparison, Row, paired, shared_classes
from fleetprune_sim.report.figures import Spread

CLEAR = 2.0
"""Standard errors from which a difference is taken for more than chance."""
LEAST = 0.001
"""Accuracy below which a difference is none."""
LEAST_OF_ONE = 0.01
"""The same of a single seed, which says nothing of chance."""


@dataclass(frozen=True)
class Lead:
    """By how much one figure is above another."""

    by: float
    error: float | None
    """Standard error; None: a single seed."""

    @property
    def clear(self) -> bool:
        """Whether it is more than chance, as far as the seeds say."""
        if self.error is None:
            return self.by >= LEAST_OF_ONE
        return self.by >= LEAST and self.by > CLEAR * self.error


def lead(mine: Mapping[int, float | None], theirs: Mapping[int, float | None]) -> Lead | None:
    """How far one method's figures, by seed, are above another's.

    Two methods have a seed's data and devices in common, so differences are taken seed by seed;
    only where fewer than two seeds are common, between the means.
    """
    pairs = paired(mine, theirs)
    if pairs is not None and pairs.sd is not None:
        return Lead(pairs.mean, pairs.sd / pairs.n**0.5)
    one, other = Spread.of(mine.values()), Spread.of(theirs.values())
    if one is None or other is None:
        return None
    by = one.mean - other.mean
    if one.sd is None or other.sd is None:
        return Lead(by if pairs is None else pairs.mean, None)
    return Lead(by, (one.sd**2 / one.n + other.sd**2 / other.n) ** 0.5)


def lead_in_mean(row: Row, other: Row) -> Lead | None:
    """By how much a method is above another in the mean over the classes that both serve."""
    both = shared_classes(row, other)
    return lead(row.means("accuracy", both), other.means("accuracy", both))


def behind(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Where the best method is not the best: by method that is ahead and by class, how far.

    Of each class, only the method that is furthest ahead, and none that is over the class's budget.
    """
    best = comparison.best
    found: dict[str, dict[str, float]] = {}
    for name in comparison.classes:
        mine = best.cells[name].by_seed("accuracy")
        leads = [
            (ahead.by, row.variant.label)
            for row in comparison.rows
            if row is not best
            and row.cells[name].within
            and (ahead := lead(row.cells[name].by_seed("accuracy"), mine)) is not None
            and ahead.clear
        ]
        if leads:
            by, label = max(leads)
            found.setdefault(label, {})[name] = by
    return found
