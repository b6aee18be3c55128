"""`fleetprune compare`: finished simulations side by side."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fleetprune.errors import DataError
from fleetprune.exits import MISUSED, say
from fleetprune_sim.report.as_json import comparisons_json
from fleetprune_sim.report.comparison import Comparison, compare
from fleetprune_sim.report.console import print_comparison
from fleetprune_sim.report.finding import Found, find_runs
from fleetprune_sim.report.page import write_page
from fleetprune_sim.report.table import Table
from fleetprune_sim.report.tables import figures
from fleetprune_sim.report.variants import group

app = typer.Typer()


@app.command("compare")
def compare_command(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Runs, or folders that have runs somewhere in them."),
    ],
    *,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a report with charts.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the table as CSV.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the table.")
    ] = False,
    target: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Validation accuracy whose time is asked for; if not given, 0.95 of the best "
            "method's last one, class by class.",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="Also show accuracies relative to this method's."),
    ] = None,
) -> None:
    """Lay simulated runs side by side: accuracy, cost and traffic of every class and method.

    Runs that differ in nothing but their seed are averaged.
    """
    found = find_runs(folders)
    for folder in found.unfinished:
        say(f"{folder}: unfinished, left out")
    for problem in found.problems:
        say(problem)
    if found.problems:
        raise typer.Exit(MISUSED)
    comparisons = _compared(found, target, baseline)
    if csv is not None:
        _write(csv, _table(comparisons).csv())
    if out is not None:
        write_page(out, comparisons, _title(comparisons))
    if as_json:
        typer.echo(json.dumps(comparisons_json(comparisons, found.unfinished), indent=2))
        return
    console = Console()
    for comparison in comparisons:
        print_comparison(console, comparison)
    for path in (csv, out):
        if path is not None:
            console.print(f"Written: {path}", highlight=False, markup=False, soft_wrap=True)


def _compared(found: Found, target: float | None, baseline: str | None) -> list[Comparison]:
    if not found.runs:
        raise DataError("none of these runs is finished")
    tasks = group(found.runs)
    return [compare(task, variants, target, baseline) for task, variants in tasks.items()]


def _table(comparisons: list[Comparison]) -> Table:
    """All tasks in one table, which has a column for them."""
    tables = [figures(comparison) for comparison in comparisons]
    return Table("figures", tables[0].columns, tuple(row for t in tables for row in t.rows))


def _title(comparisons: list[Comparison]) -> str:
    return f"Federated pruning of {' and '.join(c.task for c in comparisons)}"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise DataError(f"{path}: cannot be written: {e.strerror}") from e
