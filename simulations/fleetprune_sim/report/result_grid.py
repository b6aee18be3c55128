"""The table of what each class gets, for people."""

from collections.abc import Sequence
from dataclasses import replace
from math import isclose

from fleetprune_sim.report import words
from fleetprune_sim.report.blocks import Cells, Grid, Standing
from fleetprune_sim.report.comparison import ENOUGH, Cell, Comparison, Row
from fleetprune_sim.report.figures import mean_of
from fleetprune_sim.report.tables import figures


def results(comparison: Comparison) -> Grid:
    """What every class gets from every method."""
    head = ["method", "accuracy, test set (%)", "accuracy, own devices (%)"]
    if comparison.baseline is not None:
        head.append(f"points above {comparison.baseline.variant.label}, by pairs of seeds")
    head += ["MACs", "of dense MACs", "file", "of dense file"]
    head += ["upload saved", "time to target"]
    groups = []
    for name in comparison.classes:
        target = comparison.targets[name]
        reach = "" if target is None else f", target {words.percent(target)} on validation"
        rows = [_result(comparison, row, name) for row in comparison.rows]
        devices = max(r.devices for row in comparison.rows for r in row.cells[name].results)
        groups.append((f"{name}: {words.counted(devices, 'device')}{reach}", rows))
    groups.append(("mean over the classes that have a model", _means(comparison)))
    says = words.spread_note(comparison) + (
        " Test set: samples that no device has. Own devices: the mean over the class's devices, "
        "each on samples that it kept back from training. Upload saved: how many times the bytes "
        "float32 updates of the dense model, of which nothing is cut, would have taken. Time: by "
        "the fleet's clock, until accuracy on the validation set first reached "
    )
    says += (
        "the target"
        if comparison.chosen_target
        else f"{words.percent(ENOUGH, 0)} of the best method's last one"
    )
    if max(len(row.variant.runs) for row in comparison.rows) > 1:
        says += ", in the mean of the seeds that got there, and in brackets how many did"
    says += "."
    grid = Grid("figures", "What each class gets", says, head, groups, figures(comparison))
    if len(comparison.rows) == 1:
        return grid.by_class()
    standing = _standing(comparison)
    says += f" {Standing.BEST.value}: the most accurate within the class's budget."
    if Standing.OVER in standing.values():
        says += f" {Standing.OVER.value}: more accurate still, but over it."
    return replace(grid, says=says, standing=standing)


def _standing(comparison: Comparison) -> dict[tuple[int, int], Standing]:
    """Who is the most accurate within the budget, and of all: per class, and in the mean."""
    found: dict[tuple[int, int], Standing] = {}
    for i, name in enumerate(comparison.classes):
        cells = [row.cells[name] for row in comparison.rows]
        contest = [(mean_of(cell.spread("accuracy")), cell.within) for cell in cells]
        found |= {(i, j): standing for j, standing in _winners(contest).items()}
    most = max(row.served for row in comparison.rows)
    contest = [
        (mean_of(row.mean("accuracy")) if row.served == most else None, row.within)
        for row in comparison.rows
    ]
    last = len(comparison.classes)
    return found | {(last, j): standing for j, standing in _winners(contest).items()}


def _winners(contest: Sequence[tuple[float | None, bool]]) -> dict[int, Standing]:
    """The first within the budget and those who are above it without being so; ties share.

    Args:
        contest: Of each its accuracy, and whether it is within the budget.
    """
    known = [(accuracy, within) for accuracy, within in contest if accuracy is not None]
    allowed = max((accuracy for accuracy, within in known if within), default=-1.0)
    of_all = max((accuracy for accuracy, _ in known), default=-1.0)
    found = {}
    for i, (accuracy, within) in enumerate(contest):
        if accuracy is not None and within and isclose(accuracy, allowed):
            found[i] = Standing.BEST
        elif accuracy is not None and not within and isclose(accuracy, of_all):
            found[i] = Standing.OVER
    return found


def _result(comparison: Comparison, row: Row, name: str) -> Cells:
    cell = row.cells[name]
    label: Cells = [row.variant.label]
    if not cell.served:
        blank = 9 if comparison.baseline is not None else 8
        return [*label, "no model", *[words.NONE] * (blank - 1)]
    cells = [
        *label,
        words.percent_spread(cell.spread("accuracy")),
        words.percent_spread(cell.spread("own_accuracy")),
    ]
    if comparison.baseline is not None:
        cells.append(words.delta(comparison, row, name))
    return [
        *cells,
        words.macs(mean_of(cell.spread("macs"))),
        words.percent(mean_of(cell.spread("macs_share")), 0),
        words.byte_size(mean_of(cell.spread("bytes"))),
        words.percent(mean_of(cell.spread("bytes_share")), 0),
        words.times(mean_of(cell.spread("up_factor"))),
        _reached(cell, comparison.targets[name]),
    ]


def _reached(cell: Cell, target: float | None) -> str:
    """Time to a target: `3.4 h`, and in how many of several seeds: `3.4 h (2 of 3)`."""
    found = cell.seconds_to(target)
    if target is None or not cell.served:
        return words.NONE
    n, of = (0 if found is None else found.n), len(cell.results)
    some = f" ({n} of {of})" if of > 1 else ""
    return (words.duration(found.mean) if found is not None else "not reached") + some


def _means(comparison: Comparison) -> list[Cells]:
    rows: list[Cells] = []
    for row in comparison.rows:
        some = (
            ""
            if row.served == len(comparison.classes)
            else f" ({row.served} of {len(comparison.classes)} classes)"
        )
        rows.append(
            [
                row.variant.label + some,
                words.percent_spread(row.mean("accuracy")),
                words.percent_spread(row.mean("own_accuracy")),
                *([words.mean_delta(comparison, row)] if comparison.baseline is not None else []),
                "",
                words.percent(mean_of(row.mean("macs_share")), 0),
                "",
                words.percent(mean_of(row.mean("bytes_share")), 0),
                words.times(mean_of(row.up_factor)),
                "",
            ]
        )
    return rows
