"""The settings that a run asks for: candidates are tried, and the best is taken."""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fleetprune.errors import TransportError
from fleetprune_sim.assemble import with_values
from fleetprune_sim.auto.candidates import Candidate, Candidates, find_candidates
from fleetprune_sim.auto.halving import Ladder, halve, plan_ladder
from fleetprune_sim.auto.trial import Result, run_trial, shortened
from fleetprune_sim.settings import simulation_of
from fleetprune_sim.wanted import Wanted

FOLDER = "auto"
"""Of all trials, below the folder of the run."""

Told = Callable[[int, int, str], None]
"""(rounds done, rounds of all trials, what is tried)"""

NEXT = 3
"""Candidates that are named of those for which there were no rounds."""
ALONE = Ladder((1,), (0,))


@dataclass
class _Search:
    """What has been tried so far."""

    wanted: Wanted
    folder: Path
    ladder: Ladder
    candidates: tuple[Candidate, ...]
    """that are on the ladder"""
    told: Told
    exported: MutableMapping[str, bytes]
    done: int = 0
    results: dict[tuple[int, int], Result] = field(default_factory=dict)
    """by candidate and rounds, in the order in which they were made"""

    def judge(self, number: int, rounds: int) -> float:
        """Score of a candidate after so many rounds."""
        candidate = self.candidates[number]
        i = sum(made == rounds for _, made in self.results) + 1
        of = self.ladder.sizes[self.ladder.rounds.index(rounds)]
        note = f"trying {candidate.name.replace('-', ' ')} ({i} of {of}, {rounds} rounds)"
        self._tell(0, note)
        short = replace(with_values(self.wanted, candidate.settings), asked=())
        short = with_values(short, shortened(short.config, rounds))
        result = run_trial(
            short,
            self.folder / candidate.name / f"rounds-{rounds}",
            lambda number: self._tell(number, note),
            self.exported,
        )
        self.done += rounds
        self.results[number, rounds] = result
        return result.score

    def _tell(self, more: int, note: str) -> None:
        self.told(self.done + more, self.ladder.total, note)

    def rungs(self, number: int) -> list[dict[str, Any]]:
        """What a candidate has reached, as in `summary.json`."""
        return [
            {"rounds": rounds, "accuracy": result.score, "classes": dict(result.classes)}
            for (of, rounds), result in self.results.items()
            if of == number and not result.failed
        ]

    def failure(self, number: int) -> str:
        """Why a candidate could not be trained; "": it could."""
        failed = [r.failed for (of, _), r in self.results.items() if of == number and r.failed]
        return failed[0] if failed else ""


def choose(
    wanted: Wanted, folder: Path, told: Told, exported: MutableMapping[str, bytes]
) -> Wanted:
    """Find out what a run asks for; what has been tried already is not tried again.

    Args:
        wanted: The run.
        folder: Of the run.
        told: Told of the progress.
        exported: Graphs of this process's runs.

    Returns:
        The run with the best candidate's settings, and with what was tried.

    Raises:
        ConfigError: There is nothing to choose from, or no rounds to try it.
        TransportError: No candidate could be trained.
    """
    config = wanted.config
    found = find_candidates(wanted)
    ladder = ALONE
    if len(found.possible) > 1:
        share = simulation_of(config).auto_rounds
        ladder = plan_ladder(len(found.possible), config.training.rounds, share)
    tried = found.possible[: ladder.sizes[0]]
    search = _Search(wanted, folder / FOLDER, ladder, tried, told, exported)
    best = halve(ladder, search.judge) if len(tried) > 1 else 0
    if reason := search.failure(best):
        raise TransportError(
            f"none of {len(tried)} candidates could be trained; {tried[best].name}: {reason}"
        )
    chosen = tried[best].settings
    return replace(with_values(wanted, chosen), tried=_report(search, found, best))


def _report(search: _Search, found: Candidates, best: int) -> dict[str, Any]:
    """Key `auto` of `summary.json`."""
    entries = []
    for number, candidate in enumerate(search.candidates):
        failure = search.failure(number)
        outcome = "chosen" if number == best else "failed" if failure else "dropped"
        entries.append(_entry(candidate, outcome, failure, search.rungs(number)))
    left_out = found.possible[len(search.candidates) :]
    entries += [_entry(c, "refused", c.reason) for c in found.refused]
    simulation = simulation_of(search.wanted.config)
    return {
        "asked": list(search.wanted.asked),
        "chosen": dict(search.candidates[best].settings),
        "rounds": search.ladder.total,
        "wall_s": round(sum(r.wall_s for r in search.results.values()), 3),
        "samples": min(simulation.evaluation_samples, len(search.wanted.corpus.y_validation)),
        "candidates": entries,
        "left_out": len(left_out),
        "next": [dict(candidate.settings) for candidate in left_out[:NEXT]],
    }


def _entry(
    candidate: Candidate, outcome: str, reason: str, rungs: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    return {
        "settings": dict(candidate.settings),
        "outcome": outcome,
        "reason": reason or None,
        "rungs": rungs or [],
    }
