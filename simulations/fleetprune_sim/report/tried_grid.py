"""The table of what was tried before the runs, for people."""

from math import sqrt
from statistics import fmean

from fleetprune_sim.report import words
from fleetprune_sim.report.blocks import Cells, Grid
from fleetprune_sim.report.comparison import Comparison, Row
from fleetprune_sim.report.figures import Spread
from fleetprune_sim.report.tried import (
    CHOSEN,
    CLEAR,
    Candidate,
    autos,
    candidates,
    lead,
    tried,
    uncertainty,
    with_autos,
)

ANY = "any"


def what_was_tried(comparison: Comparison) -> list[Grid]:
    """A table per variant with settings that were found out."""
    rows = with_autos(comparison)
    table = tried(comparison) if rows else None
    grids = []
    for i, row in enumerate(rows):
        title = "Candidates" if len(comparison.rows) == 1 else f"Candidates, {row.variant.label}"
        grids.append(_grid(row, f"tried-{i}" if i else "tried", title))
    return [
        Grid(g.name, g.title, g.says, g.head, g.groups, None if i else table, prose=True)
        for i, g in enumerate(grids)
    ]


def _grid(row: Row, name: str, title: str) -> Grid:
    found, seeds = candidates(row), len(autos(row))
    asked = next(iter(autos(row).values())).asked
    rounds = sorted({r for c in found for r in c.rounds})
    head = [
        *(key.rpartition(".")[2] for key in asked),
        *(f"after {r} (%)" for r in rounds),
        "outcome",
    ]
    lines: list[Cells] = []
    for candidate in found:
        values = [candidate.settings.get(key, ANY) for key in asked]
        figures = [_accuracy(candidate.accuracy(r), seeds) for r in rounds]
        lines.append([*values, *figures, _outcome(candidate, seeds)])
    return Grid(name, title, _says(row, found), head, [("", lines)])


def _accuracy(spread: Spread | None, seeds: int) -> str:
    if spread is None:
        return ""
    some = "" if spread.n == seeds else f" ({spread.n})"
    return words.percent_spread(spread) + some


def _outcome(candidate: Candidate, seeds: int) -> str:
    if candidate.chosen:
        return CHOSEN if seeds == 1 else f"{CHOSEN} by {candidate.chosen} of {seeds} seeds"
    last = next(iter(candidate.by_seed.values()))
    if last.reason:
        return f"{last.outcome}: {last.reason}"
    if seeds == 1 and candidate.rounds:
        return f"{last.outcome} after {candidate.rounds[-1]}"
    return last.outcome


def _says(row: Row, found: list[Candidate]) -> str:
    each = autos(row)
    auto = next(iter(each.values()))
    keys = words.joined(list(auto.asked))
    trained = [c for c in found if c.rounds]
    if not trained:
        return f"{keys}: only one value makes sense for this fleet, so nothing was tried."
    whole = next(run.summary.rounds for run in row.variant.runs)
    said = [
        f"{keys}: {len(trained)} candidates in {auto.rounds} rounds, "
        f"{auto.rounds / max(1, whole):.1f} times those of the run; the columns say after how many "
        "rounds of a training of their own. The mean over classes of accuracy on "
        f"{auto.samples:,} samples of the validation set decided; nobody looked at the test set.",
        _chance(row),
    ]
    if auto.left_out:
        names = words.joined([" ".join(settings.values()) for settings in auto.next])
        said.append(
            f"There were no rounds for {auto.left_out} more, first of all {names}: for these, "
            "raise simulation.auto_rounds."
        )
    return " ".join(said)


def _chance(row: Row) -> str:
    """How far apart the best were, and what that is worth."""
    each = autos(row)
    leads = [found for auto in each.values() if (found := lead(auto)) is not None]
    if not leads:
        return "Only one could be trained."
    mean = fmean(ahead for ahead, _ in leads)
    last = fmean(
        t.rungs[-1].accuracy
        for auto in each.values()
        for t in auto.candidates
        if t.outcome == CHOSEN and t.rungs
    )
    error = uncertainty(last, next(iter(each.values())).samples)
    clear = mean > CLEAR * sqrt(2) * error
    points = f"{words.lost(Spread.of([mean]))} points"
    error_said = f"{words.lost(Spread.of([error]))} points"
    verdict = "that is more than chance" if clear else "that may be chance"
    if len(each) == 1:
        ((_, second),) = leads
        name = " ".join(second.settings.values())
        return (
            f"In the last trial the chosen one is {points} ahead of {name}. So few samples "
            f"leave an accuracy uncertain by {error_said}: {verdict}. One seed has decided; "
            "another may choose otherwise."
        )
    chosen = [c for c in candidates(row) if c.chosen]
    counts = words.joined([f"{c.name} in {c.chosen}" for c in chosen])
    agree = (
        f"All {len(each)} seeds chose {chosen[0].name}"
        if len(chosen) == 1
        else f"The seeds do not agree ({counts}), so none of these is clearly the best"
    )
    return (
        f"{agree}. In the last trial the chosen one is {points} ahead in the mean; so few "
        f"samples leave an accuracy uncertain by {error_said}: {verdict}."
    )
