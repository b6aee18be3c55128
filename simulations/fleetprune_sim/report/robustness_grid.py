"""The table of what corruptions leave of accuracy, for people."""

from fleetprune_sim.corruptions import BIAS, BLUR, NOISE
from fleetprune_sim.report import words
from fleetprune_sim.report.blocks import Cells, Grid
from fleetprune_sim.report.comparison import Comparison, Row
from fleetprune_sim.report.figures import Spread
from fleetprune_sim.report.robustness import (
    BEFORE,
    Stand,
    befores,
    corruptions,
    new_headed,
    of_class,
    robustness,
)
from fleetprune_sim.report.robustness_finding import finding
from fleetprune_sim.robustness import CLEAN, MOST

MEANINGS = {
    "noise": f"Gaussian noise of {NOISE:g} standard deviations of the channel",
    "blur": f"a Gaussian blur of {BLUR:g} pixel or time step",
    "bias": f"{BIAS:g} standard deviations added to one channel of each sample",
    "dropped": "one channel of each sample at its mean, or a quarter of the only one",
}
"""What the corruptions of this version do."""


def under_corruptions(comparison: Comparison) -> list[Grid]:
    """Accuracy on clean samples and under each corruption; nothing where nobody looked."""
    names = corruptions(comparison)
    if not names:
        return []
    groups = []
    if rows := _before_the_cut(comparison, names):
        groups.append((BEFORE, rows))
    for name in comparison.classes:
        rows = [
            _row(row.variant.label, of_class(row.cells[name]), names, served=row.cells[name].served)
            for row in comparison.rows
        ]
        groups.append((name, rows))
    head = ["method", "clean (%)", *(f"{name} (%)" for name in names)]
    explained = [f"{n.capitalize()}: {MEANINGS[n]}." for n in names if n in MEANINGS]
    says = (
        f"{finding(comparison)} {words.spread_note(comparison)} In brackets: points lost. All on "
        f"the same samples, up to {MOST:,} of the test set; clean: as they are. "
        f"{' '.join(explained)}"
    ).strip()
    grid = Grid(
        "robustness", "Accuracy on corrupted samples", says, head, groups, robustness(comparison)
    )
    return [grid.by_class() if len(comparison.rows) == 1 else grid]


def _before_the_cut(comparison: Comparison, names: list[str]) -> list[Cells]:
    """The trained models, and last those with a new head, of which there is nothing to show."""
    found = [_row(_whose(comparison, rows), stand, names) for stand, rows in befores(comparison)]
    if rows := new_headed(comparison):
        found.append([_whose(comparison, rows), words.NEW_HEAD, *[words.NONE] * len(names)])
    return found


def _whose(comparison: Comparison, rows: list[Row]) -> str:
    """Who has cut a model."""
    labels = [row.variant.label for row in rows]
    return "all" if len(labels) == len(comparison.rows) else words.joined(labels)


def _row(label: str, stand: Stand, names: list[str], *, served: bool = True) -> Cells:
    clean = Spread.of(stand.accuracy(CLEAN).values())
    if not served:
        return [label, "no model", *[words.NONE] * len(names)]
    cells: Cells = [label, words.percent_spread(clean)]
    for name in names:
        accuracy = Spread.of(stand.accuracy(name).values())
        lost = Spread.of(stand.lost(name).values())
        shown = words.percent_spread(accuracy)
        cells.append(f"{shown} ({words.lost(lost)})" if lost is not None else shown)
    return cells
