"""What was tried before the runs, to find settings out: per variant and candidate, over seeds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt

from fleetprune_sim.report.comparison import Comparison, Row
from fleetprune_sim.report.figures import Spread
from fleetprune_sim.report.summary_file import Auto, Tried
from fleetprune_sim.report.table import Table, Value, rounded

CHOSEN = "chosen"
_RANKS = (CHOSEN, "dropped", "failed", "refused")
CLEAR = 2.0
"""Standard errors of a difference from which on it is no chance."""


@dataclass(frozen=True)
class Candidate:
    """A candidate in all seeds that had it."""

    settings: Mapping[str, str]
    by_seed: Mapping[int, Tried]

    @property
    def name(self) -> str:
        """For people."""
        return " ".join(self.settings.values())

    @property
    def rounds(self) -> list[int]:
        """Lengths of its trials."""
        return sorted({r.rounds for t in self.by_seed.values() for r in t.rungs})

    @property
    def chosen(self) -> int:
        """By how many seeds."""
        return sum(t.outcome == CHOSEN for t in self.by_seed.values())

    def accuracy(self, rounds: int) -> Spread | None:
        """After so many rounds, over the seeds that got so far."""
        return Spread.of(
            r.accuracy for t in self.by_seed.values() for r in t.rungs if r.rounds == rounds
        )

    @property
    def _rank(self) -> tuple[float, ...]:
        """The lower, the better it did."""
        worst = min(_rank(t) for t in self.by_seed.values())
        last = self.accuracy(self.rounds[-1]) if self.rounds else None
        return -self.chosen, worst, -max(self.rounds, default=0), -last.mean if last else 0.0


def _rank(tried: Tried) -> int:
    return _RANKS.index(tried.outcome) if tried.outcome in _RANKS else len(_RANKS)


def autos(row: Row) -> dict[int, Auto]:
    """By seed what was tried; empty if nothing was to be found out."""
    found = {run.summary.seed: run.summary.auto for run in row.variant.runs}
    return {seed: auto for seed, auto in found.items() if auto is not None}


def with_autos(comparison: Comparison) -> list[Row]:
    """Variants with settings that were found out."""
    return [row for row in comparison.rows if autos(row)]


def candidates(row: Row) -> list[Candidate]:
    """All of a variant, the chosen one first, those that were refused last."""
    found: dict[tuple[tuple[str, str], ...], dict[int, Tried]] = {}
    for seed, auto in autos(row).items():
        for tried in auto.candidates:
            found.setdefault(tuple(tried.settings.items()), {})[seed] = tried
    every = [Candidate(dict(settings), by_seed) for settings, by_seed in found.items()]
    return sorted(every, key=lambda c: c._rank)


def lead(auto: Auto) -> tuple[float, Tried] | None:
    """How far the chosen one is ahead in its last trial, and of whom; None if it was alone."""
    (mine,) = [t for t in auto.candidates if t.outcome == CHOSEN]
    if not mine.rungs:
        return None
    last = mine.rungs[-1]
    others = [
        (r.accuracy, t)
        for t in auto.candidates
        for r in t.rungs
        if t is not mine and r.rounds == last.rounds
    ]
    if not others:
        return None
    second, who = max(others, key=lambda pair: pair[0])
    return last.accuracy - second, who


def uncertainty(accuracy: float, samples: int) -> float:
    """Standard error of an accuracy on so many samples: `sqrt(p (1 - p) / n)`."""
    return sqrt(accuracy * (1 - accuracy) / max(1, samples))


def tried(comparison: Comparison) -> Table:
    """A line per seed, candidate, trial and class; without a class, the mean that decided."""
    keys = list(
        dict.fromkeys(
            key for row in comparison.rows for auto in autos(row).values() for key in auto.asked
        )
    )
    columns = ("task", "method", "variant", "seed", *keys, "outcome", "reason", "rounds", "class",
               "accuracy")  # fmt: skip
    return Table.of("tried", columns, _records(comparison))


def _records(comparison: Comparison) -> Iterator[dict[str, Value]]:
    for row in comparison.rows:
        for seed, auto in autos(row).items():
            for one in auto.candidates:
                about: dict[str, Value] = {
                    "task": comparison.task,
                    "method": row.variant.method,
                    "variant": row.variant.label,
                    "seed": seed,
                    **one.settings,
                    "outcome": one.outcome,
                    "reason": one.reason,
                }
                if not one.rungs:
                    yield about
                for rung in one.rungs:
                    for name, accuracy in ((None, rung.accuracy), *rung.classes.items()):
                        yield {
                            **about,
                            "rounds": rung.rounds,
                            "class": name,
                            "accuracy": rounded(accuracy, 6),
                        }
