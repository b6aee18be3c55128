"""A comparison on a terminal."""

from collections.abc import Callable, Collection

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fleetprune_sim.report import words
from fleetprune_sim.report.budgets import left_to_devices
from fleetprune_sim.report.comparison import Cell, Comparison, Row
from fleetprune_sim.report.figures import mean_of
from fleetprune_sim.report.setting_words import short
from fleetprune_sim.report.tried import candidates, with_autos
from fleetprune_sim.report.tried_grid import what_was_tried
from fleetprune_sim.report.variants import fleet_differences

OWN = "own %"
LESS = ((), (OWN,), (OWN, "n"), (OWN, "n", "file"))
"""Columns that a terminal may be too narrow for: the first choice that fits is taken."""

Column = tuple[
    Callable[[Comparison, Row, str], RenderableType], Callable[[Comparison, Row], RenderableType]
]
"""What it says of a class, and of the mean over classes."""


def print_comparison(console: Console, comparison: Comparison) -> None:
    """One task: a table by class, and what it rests on."""
    for left_out in LESS:
        table = _table(comparison, left_out)
        needed = console.measure(table, options=console.options.update(width=10_000)).maximum
        if needed <= console.width or not console.is_terminal:
            break
    if not console.is_terminal:
        console.width = max(console.width, needed)  # a file has no edge
    head = Text.assemble((comparison.task, "bold"), f"  {words.spread_note(comparison)}")
    notes = [Text(line) for line in _notes(comparison, own=OWN not in left_out)]
    console.print(Group(head, table, *notes))


def print_tried(console: Console, comparison: Comparison) -> None:
    """What was tried before the runs, to find settings out; nothing if there were none."""
    for row, grid in zip(with_autos(comparison), what_was_tried(comparison), strict=True):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for name in grid.head:
            table.add_column(name, justify="right" if name.endswith("(%)") else "left")
        notes = [grid.says]
        ((_, lines),) = grid.groups
        for candidate, cells in zip(candidates(row), lines, strict=True):
            if candidate.rounds or candidate.chosen:
                table.add_row(*(Text(str(cell)) for cell in cells))
            else:  # the reason is too long for a column
                notes.append(f"{candidate.name} {cells[-1]}")
        console.print(Group(Text(grid.title, "bold"), table, *map(Text, notes)))


def _table(comparison: Comparison, left_out: Collection[str]) -> Table:
    columns = {
        name: column for name, column in _columns(comparison).items() if name not in left_out
    }
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", overflow="fold")
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    blank = [""] * (len(columns) - 1)
    for name in comparison.classes:
        target = comparison.targets[name]
        aim = "" if target is None else words.percent(target)
        table.add_row(Text(name, "bold"), *blank, Text(aim, "dim"))
        for row in comparison.rows:
            cells = (of_class(comparison, row, name) for of_class, _ in columns.values())
            table.add_row(Text(f"  {row.variant.label}"), *cells)
        table.add_section()
    table.add_row(Text("mean", "bold"))
    for row in comparison.rows:
        cells = (of_all(comparison, row) for _, of_all in columns.values())
        table.add_row(Text(f"  {row.variant.label}"), *cells)
    return table


def _columns(comparison: Comparison) -> dict[str, Column]:
    columns: dict[str, Column] = {
        "n": (
            lambda _, row, name: str(len(row.cells[name].results)),
            lambda _, row: str(len(row.variant.runs)),
        ),
        "accuracy %": (
            lambda _, row, name: words.percent_spread(row.cells[name].spread("accuracy")),
            lambda _, row: words.percent_spread(row.mean("accuracy")),
        ),
        OWN: (
            lambda _, row, name: words.percent_spread(row.cells[name].spread("own_accuracy")),
            lambda _, row: words.percent_spread(row.mean("own_accuracy")),
        ),
        "points": (words.delta, words.mean_delta),
        "MACs": _share("macs_share"),
        "file": _share("bytes_share"),
        "upload": (
            lambda _, row, name: words.times(mean_of(row.cells[name].spread("up_factor"))),
            lambda _, row: words.times(mean_of(row.up_factor)),
        ),
        "fits": (
            lambda _, row, name: _fits(row.cells[name]),
            lambda _, row: f"{sum(c.within for c in row.cells.values())}/{len(row.cells)}",
        ),
        "to target": (
            lambda c, row, name: _reached(row.cells[name], c.targets[name]),
            lambda _, row: "",
        ),
    }
    if comparison.baseline is None:
        del columns["points"]
    return columns


def _share(figure: str) -> Column:
    def of_class(_: Comparison, row: Row, name: str) -> str:
        return words.percent(mean_of(row.cells[name].spread(figure)), 0)

    def of_all(_: Comparison, row: Row) -> str:
        return words.percent(mean_of(row.mean(figure)), 0)

    return of_class, of_all


def _reached(cell: Cell, target: float | None) -> str:
    found = cell.seconds_to(target)
    if found is None:
        return "never" if cell.served and target is not None else words.NONE
    some = "" if found.n == len(cell.results) else f" ({found.n}/{len(cell.results)})"
    return words.duration(found.mean) + some


def _fits(cell: Cell) -> Text:
    """Whether the class's model is within its budget."""
    if not cell.served:
        return Text("none", "yellow")
    if cell.within:
        return Text("yes", "green")
    return Text(f"{cell.kept}/{len(cell.results)}", "bold red")


def _notes(comparison: Comparison, *, own: bool) -> list[str]:
    notes = [
        "±: one sample standard deviation over the seeds. "
        * (max(len(row.variant.runs) for row in comparison.rows) > 1)
        + ("Own: on the class's devices' own held-out samples. " if own else "")
        + "MACs, file: of the dense model's. Upload: how many times the bytes dense float32 "
        f"updates would have taken. Fits: within budget{_aside(comparison)}. To target: virtual "
        "time until validation accuracy reached the figure beside the class, in brackets in how "
        "many runs if not in all."
    ]
    if any(row.served < len(comparison.classes) for row in comparison.rows):
        notes.append("Means are over the classes that have a model: not the same for all methods.")
    if comparison.baseline is not None:
        label = comparison.baseline.variant.label
        notes.append(
            f"Points: accuracy above {label}'s, paired by seed; {_pairs(comparison)}. In the mean: "
            "over the classes for which both have a model."
        )
    if apart := fleet_differences([row.variant for row in comparison.rows]):
        names = words.joined([short(name) for name in apart])
        notes.append(f"Read with care: the runs differ in {names}.")
    return notes


def _aside(comparison: Comparison) -> str:
    """What the verdict on budgets leaves open."""
    left = left_to_devices(comparison)
    return (
        f", but for the latency of {words.joined(left)}: only the device can tell" if left else ""
    )


def _pairs(comparison: Comparison) -> str:
    """How many pairs there were."""
    numbers = sorted(
        {
            delta.n
            for row in comparison.rows
            for name in comparison.classes
            if (delta := comparison.delta(row, name)) is not None
        }
    )
    if not numbers:
        return "no seed is common to any two"
    most = words.counted(numbers[-1], "seed")
    return most if len(numbers) == 1 else f"{numbers[0]} to {most}"
