"""`fleetprune simulate`: a fleet on this machine, without a network and in its own time."""

import json
import logging
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from fleetprune.errors import ConfigError, DataError, FleetpruneError
from fleetprune.exits import say
from fleetprune_sim.assemble import changes_of, parse_changes, parse_seeds
from fleetprune_sim.engines import ENGINES, check_engine
from fleetprune_sim.methods import METHODS, find_method
from fleetprune_sim.report.budgets import ON_DEVICE
from fleetprune_sim.report.comparison import compare
from fleetprune_sim.report.console import print_comparison, print_tried
from fleetprune_sim.report.page import write_report
from fleetprune_sim.report.runs import Run, read_run
from fleetprune_sim.report.variants import group
from fleetprune_sim.study import Order, Progress, Tell, carry_out_all
from fleetprune_sim.summary import SUMMARY
from fleetprune_sim.wanted import check_for_one, check_for_several, place, runs_in

REPORT = "report.html"
"""Name of the report in the folder of the run, or of all runs."""

app = typer.Typer()


@app.command()
def simulate(
    ctx: typer.Context,
    fleet: Annotated[
        Path | None, typer.Argument(help="A fleet.toml [default: the task's own fleet].")
    ] = None,
    *,
    task: Annotated[
        str, typer.Option(help="What the fleet learns: a name, or module:factory.")
    ] = "",
    method: Annotated[
        str, typer.Option(help=f"One or several of {', '.join(METHODS)}; with commas.")
    ] = "nested",
    clients: Annotated[int | None, typer.Option(min=1, help="Devices in the fleet.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of training.")] = None,
    seed: Annotated[str, typer.Option(help="One or several: 3, 0,2,5 or 0-4.")] = "0",
    engine: Annotated[
        str,
        typer.Option(click_type=click.Choice(ENGINES), help="What does devices' work."),
    ] = "loop",
    out: Annotated[Path, typer.Option(help="Folder of the run, or of all runs.")] = Path("out"),
    resume: Annotated[bool, typer.Option(help="Go on with what is in --out.")] = False,
    init: Annotated[
        Path | None, typer.Option(help="Start from this trained dense model (a state_dict).")
    ] = None,
    warm_rounds: Annotated[
        int, typer.Option(min=0, help="Train the dense model for so many rounds first.")
    ] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes for one run.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="KEY=VALUE over fleet.toml, for all methods or as METHOD:KEY=VALUE for one: "
            "training.learning_rate=0.05.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print summaries as JSON.")] = False,
) -> None:
    """Train a simulated fleet with one or several methods, and report what each class gets.

    Everything that decides is the real thing: the coordinator's strategy, solver, codec and
    release code, and the devices' own training. Only the network and the clock are simulated.
    """
    if getattr(ctx.obj, "debug", False):
        logging.basicConfig()
        logging.getLogger("fleetprune_sim").setLevel(logging.DEBUG)
    check_engine(engine, workers, jobs)
    values = parse_changes(changes or [])
    values |= {
        key: value
        for key, value in {
            "training.rounds": rounds,
            "simulation.devices": clients,
            "model.initial": None if init is None else str(init.absolute()),
        }.items()
        if value is not None
    }
    if init is not None and warm_rounds:
        raise ConfigError("give either --init or --warm-rounds")
    if init is not None and not init.is_file():
        raise ConfigError(f"--init: no file {init}")
    methods = [find_method(name.strip()).name for name in method.split(",")]
    for key in values:
        if ":" in key and (one := find_method(key.partition(":")[0]).name) not in methods:
            raise ConfigError(f"--set {key}: {one} is not among --method {','.join(methods)}")
    seeds = parse_seeds(seed)
    single = len(methods) * len(seeds) == 1
    orders = [
        Order(
            folder=out if single else out / place(name, number),
            fleet=fleet,
            task=task,
            method=name,
            seed=number,
            changes=changes_of(name, values),
            engine=engine,
            workers=workers,
            resume=resume,
            warm_rounds=warm_rounds,
            warm_in=out.parent if single else out,
        )
        for number in seeds
        for name in methods
    ]
    if single:
        check_for_one(out, place(methods[0], seeds[0]))
    else:
        check_for_several(out)
    console = Console(stderr=True)
    try:
        summaries = _carry_out(orders, jobs, console)
    except KeyboardInterrupt:
        say(f"stopped; the same command with --resume goes on with what is in {out}")
        raise
    report = out / REPORT
    runs = [read_run(order.folder) for order in orders]
    if not single:
        runs += _others(out, {order.folder for order in orders})
    write_report(report, runs, _title(runs))
    if as_json:
        typer.echo(json.dumps(summaries[0] if single else summaries, indent=2))
    else:
        shown = Console()
        if single:
            _table(summaries[0], shown)
        for name, variants in group(runs).items():  # the same runs as in the report
            comparison = compare(name, variants)
            if not single:
                print_comparison(shown, comparison)
            print_tried(shown, comparison)
        shown.print(f"report: {report}", highlight=False, markup=False, soft_wrap=True)


def _others(out: Path, done: Set[Path]) -> list[Run]:
    """Finished runs in the folder of several that are not among those just done."""
    found: list[Run] = []
    for folder in runs_in(out):
        if folder in done or not (folder / SUMMARY).exists():
            continue
        try:
            run = read_run(folder)
        except DataError as e:
            say(f"{e}: left out of the report")
            continue
        if folder == out / place(run.summary.method, run.summary.seed):  # else a copy
            found.append(run)
    return found


def _title(runs: Sequence[Run]) -> str:
    """Of a report: every task and every method once."""
    tasks = dict.fromkeys(run.summary.task for run in runs)
    methods = dict.fromkeys(run.summary.method for run in runs)
    return f"{', '.join(tasks)}: {', '.join(methods)}"


def _carry_out(orders: Sequence[Order], jobs: int, console: Console) -> list[dict[str, Any]]:
    """Summaries in the order of `orders`; the first failure is raised when all have ended."""
    summaries: dict[Path, dict[str, Any]] = {}
    failed: list[Exception] = []
    with _bars(console) as bars:
        tell = _teller(bars, orders, console)
        for order, outcome in carry_out_all(orders, jobs, tell):
            if isinstance(outcome, dict):
                summaries[order.folder] = outcome
            else:
                failed.append(outcome)
                if len(orders) > 1:  # of a single one it is said in the end
                    what = outcome if isinstance(outcome, FleetpruneError) else repr(outcome)
                    text = f"{order.title}: {what}"
                    console.print(text, highlight=False, markup=False, soft_wrap=True)
    if failed:
        raise failed[0]
    return [summaries[order.folder] for order in orders]


def _bars(console: Console) -> Bars:
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )


def _teller(bars: Bars, orders: Sequence[Order], console: Console) -> Tell:
    titles = {order.folder: order.title for order in orders}
    rows: dict[Path, TaskID] = {}
    said: dict[Path, str] = {}

    def tell(news: Progress) -> None:
        if news.folder not in rows:
            rows[news.folder] = bars.add_task(titles[news.folder], total=news.total, note="")
        bars.update(rows[news.folder], completed=news.done, total=news.total, note=news.note)
        if not console.is_terminal and news.note != said.get(news.folder):
            said[news.folder] = news.note
            note = f", {news.note}" if news.note else ""
            line = f"{titles[news.folder]}: {news.done} of {news.total}{note}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    return tell


def _table(summary: dict[str, Any], console: Console) -> None:
    """What each class got out of a single run."""
    title = f"{summary['task']}, {summary['method']}, seed {summary['seed']}"
    table = Table(title=title, title_justify="left")
    for column in ("class", "devices", "accuracy", "own data", "MACs", "file", "budget"):
        table.add_column(column, justify="left" if column in ("class", "budget") else "right")
    for name, entry in summary["classes"].items():
        table.add_row(name, *_cells(entry, summary["dense"]))
    console.print(table)
    traffic = summary["traffic"]
    up = traffic["up_bytes_per_client_round"]
    console.print(
        f"up {up / 1e3:.1f} kB per device and round, all tasks counted; a dense float32 update "
        f"is {traffic['dense_up_bytes_per_client_round'] / 1e3:.1f} kB",
        highlight=False,
    )


def _cells(entry: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    artifact = entry["artifact"]
    if artifact is None:
        return [str(entry["devices"]), "-", "-", "-", "-", "no model"]
    return [
        str(entry["devices"]),
        percent(entry["accuracy"]),
        percent(entry["own_accuracy"]),
        f"{100 * artifact['macs'] / dense['macs']:.0f} %",
        f"{artifact['bytes'] / 1e3:.0f} kB",
        _verdict(entry),
    ]


def _verdict(entry: dict[str, Any]) -> str:
    """Whether the budget is held, as far as this machine can tell."""
    limits = {kind for kind, limit in entry["budget"].items() if limit is not None}
    if not entry["within_budget"]:
        return "[red]exceeded[/red]"
    told = "held" if limits - ON_DEVICE else ""
    aside = "latency aside" if limits & ON_DEVICE else ""
    return ", ".join(filter(None, (told, aside))) or "no limit"
