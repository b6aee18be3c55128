"""The runs of one task side by side: per variant and class, over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from fleetprune.errors import DataError
from fleetprune_sim.report.figures import ClassResult, Spread, class_result, fleet_up_factor
from fleetprune_sim.report.runs import Run
from fleetprune_sim.report.variants import Variant

ENOUGH = 0.95
"""Share of the best variant's final accuracy that counts as reached."""


@dataclass(frozen=True)
class Cell:
    """One class under one variant."""

    results: tuple[ClassResult, ...]
    """one per seed"""

    @property
    def served(self) -> bool:
        """Whether every run gave the class a model."""
        return bool(self.results) and all(r.served for r in self.results)

    @property
    def kept(self) -> int:
        """In how many runs the class has a model, and it is within the budget."""
        return sum(r.within_budget for r in self.results)

    @property
    def within(self) -> bool:
        """Whether that is so in all of them."""
        return bool(self.results) and self.kept == len(self.results)

    def by_seed(self, figure: str) -> dict[int, float | None]:
        """A figure of `ClassResult` of every seed."""
        return {r.seed: getattr(r, figure) for r in self.results}

    def spread(self, figure: str) -> Spread | None:
        """The same over the seeds."""
        return Spread.of(self.by_seed(figure).values())

    def seconds_to(self, target: float | None) -> Spread | None:
        """Virtual time to a target, over the seeds that reached it."""
        if target is None:
            return None
        return Spread.of(r.seconds_to(target) for r in self.results)


@dataclass(frozen=True)
class Row:
    """One variant."""

    variant: Variant
    cells: Mapping[str, Cell]
    """by class"""

    @property
    def within(self) -> bool:
        """Whether every class has a model within its budget, in every run."""
        return all(cell.within for cell in self.cells.values())

    @property
    def served(self) -> int:
        """How many classes have a model."""
        return sum(cell.served for cell in self.cells.values())

    @property
    def rank(self) -> tuple[int, float]:
        """The higher, the better."""
        mean = self.mean("accuracy")
        return sum(c.within for c in self.cells.values()), mean.mean if mean else -1.0

    def mean(self, figure: str) -> Spread | None:
        """A figure's mean over the classes that have a model, every class counting the same."""
        return Spread.of(self.means(figure, list(self.cells)).values())

    def means(self, figure: str, classes: Sequence[str]) -> dict[int, float | None]:
        """By seed, a figure's mean over those of some classes that have a model."""
        served = [self.cells[name] for name in classes if self.cells[name].served]
        found: dict[int, float | None] = {}
        for i, seed in enumerate(self.variant.seeds):
            known = [v for c in served if (v := getattr(c.results[i], figure)) is not None]
            found[seed] = fmean(known) if known else None
        return found

    @cached_property
    def up_factor(self) -> Spread | None:
        """How many times the fleet's upload that of dense float32 updates would have been."""
        return Spread.of(fleet_up_factor(run) for run in self.variant.runs)

    @cached_property
    def virtual_s(self) -> Spread | None:
        """Length of the training by the fleet's clock."""
        return Spread.of(run.summary.virtual.s for run in self.variant.runs)


@dataclass(frozen=True)
class Comparison:
    """All variants of a task."""

    task: str
    classes: tuple[str, ...]
    rows: tuple[Row, ...]
    """Best first: by the number of classes within their budget, then by mean accuracy."""
    targets: Mapping[str, float | None]
    """Per class the validation accuracy that counts as reached."""
    chosen_target: bool
    """Whether a user chose it."""
    baseline: Row | None = None

    def delta(self, row: Row, device_class: str) -> Spread | None:
        """Accuracy above the baseline's, by pairs of the same seed; None for the baseline."""
        if self.baseline is None or row is self.baseline:
            return None
        mine, theirs = (r.cells[device_class].by_seed("accuracy") for r in (row, self.baseline))
        return paired(mine, theirs)

    def mean_delta(self, row: Row) -> Spread | None:
        """The same of the means over the classes for which both have a model."""
        if self.baseline is None or row is self.baseline:
            return None
        both = shared_classes(row, self.baseline)
        return paired(row.means("accuracy", both), self.baseline.means("accuracy", both))

    @property
    def best(self) -> Row:
        """The first."""
        return self.rows[0]


def compare(
    task: str,
    variants: Sequence[Variant],
    target: float | None = None,
    baseline: str | None = None,
) -> Comparison:
    """Lay the variants of a task side by side.

    Args:
        task: Its name.
        variants: Of it, at least one.
        target: Validation accuracy whose time is asked for; None: `ENOUGH` of the best variant's
            last one, class by class.
        baseline: Method, or label of a variant, that accuracies are measured against.

    Raises:
        DataError: There is no such baseline, or several.
    """
    names = dict.fromkeys(c for v in variants for run in v.runs for c in run.summary.classes)
    rows = [
        Row(
            variant,
            {
                name: Cell(
                    tuple(class_result(run, name) for run in variant.runs if _has(run, name))
                )
                for name in names
            },
        )
        for variant in variants
    ]
    rows.sort(key=lambda row: row.rank, reverse=True)
    targets = {name: target or _target(rows, name) for name in names}
    chosen = None if baseline is None else _baseline(task, rows, baseline)
    return Comparison(task, tuple(names), tuple(rows), targets, target is not None, chosen)


def _has(run: Run, name: str) -> bool:
    return name in run.summary.classes


def _target(rows: Sequence[Row], name: str) -> float | None:
    finals = [row.cells[name].spread("validation") for row in rows]
    best = max((final.mean for final in finals if final), default=None)
    return None if best is None else ENOUGH * best


def _baseline(task: str, rows: Sequence[Row], wanted: str) -> Row:
    by_label = [row for row in rows if row.variant.label == wanted]
    found = by_label or [row for row in rows if row.variant.method == wanted]
    if len(found) == 1:
        return found[0]
    labels = ", ".join(row.variant.label for row in found or rows)
    what = "is ambiguous" if found else "is not among the runs"
    raise DataError(f"baseline {wanted} {what} of {task}, expected one of {labels}")


def shared_classes(one: Row, other: Row) -> list[str]:
    """Classes for which both have a model."""
    return [n for n, cell in one.cells.items() if cell.served and other.cells[n].served]


def paired(mine: Mapping[int, float | None], theirs: Mapping[int, float | None]) -> Spread | None:
    """How far one figure is above another, over the seeds that have both."""
    pairs = [(value, theirs.get(seed)) for seed, value in mine.items()]
    return Spread.of(a - b for a, b in pairs if a is not None and b is not None)
