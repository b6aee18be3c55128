"""`fleetprune plan`: what each class would keep, before anything is trained."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import click
import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fleetprune import criteria
from fleetprune.budgets import Allocation
from fleetprune.criteria.weights import magnitude
from fleetprune.errors import RegistryError
from fleetprune.exits import say
from fleetprune.latency import LatencyModel, LatencyTable
from fleetprune.layout import Architecture
from fleetprune_coordinator.config import FleetConfig, load_fleet_config
from fleetprune_coordinator.plan import Planner, Scores
from fleetprune_coordinator.plan_report import ClassPlan, Limit, as_json, explain

app = typer.Typer()


@app.command()
def plan(
    fleet: Annotated[Path, typer.Argument(help="The fleet's description.")] = Path("fleet.toml"),
    *,
    allocation: Annotated[
        str | None,
        typer.Option(
            click_type=click.Choice([a.value for a in Allocation]),
            help="Instead of pruning.allocation.",
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what each device class would keep of the model, without training.

    Per class and layer the units, what they cost, what each limit allows by itself and which one is
    in the way. Latencies are predicted where the fleet's devices have measured some.
    """
    config = load_fleet_config(fleet)
    architecture, costed, scores, params = _model(config)
    tables = _tables(config, architecture)
    planner = Planner.of(
        config,
        architecture,
        {name: LatencyModel.fit(architecture, table) for name, table in tables.items()},
        None if allocation is None else Allocation(allocation),
        costed,
    )
    weights = {name: magnitude(params[name]) for name in planner.weights.names}
    plans = explain(planner, scores, weights)
    if json_:
        typer.echo(json.dumps({"fleet": config.fleet, **as_json(planner, plans, tables)}, indent=2))
    else:
        _show(Console(), config, planner, plans, tables)


def _model(config: FleetConfig) -> tuple[Architecture, Architecture, Scores, Scores]:
    """The model as plain data, as its files cost, what its units are worth, and its weights.

    Weights that nobody has trained say nothing: all units count the same.
    """
    import torch  # noqa: PLC0415  (takes seconds, and a description that is wrong is told first)

    from fleetprune_coordinator.coordinator import load_model  # noqa: PLC0415
    from fleetprune_coordinator.describe import counted, describe  # noqa: PLC0415
    from fleetprune_coordinator.resize import read  # noqa: PLC0415

    torch.manual_seed(config.training.seed)
    model = load_model(config)
    architecture = describe(model, torch.zeros(1, *config.model.input_shape), config)
    scores = {g: np.ones(n, np.float32) for g, n in architecture.groups.items()}
    params = read(model)[0]
    if config.model.initial is not None:
        scores = criteria.magnitude(architecture, params)
    return architecture, counted(model, architecture, config), scores, params


def _tables(config: FleetConfig, architecture: Architecture) -> dict[str, LatencyTable]:
    """Per class what its devices measured of this model, if there is a registry that has some."""
    from fleetprune_coordinator.registry import Registry  # noqa: PLC0415  (sqlite_utils)
    from fleetprune_coordinator.store import DATABASE  # noqa: PLC0415
    from fleetprune_coordinator.timing import digest  # noqa: PLC0415

    if not (config.state / DATABASE).exists():
        return {}
    model, wanted = digest(architecture), config.pruning.precision
    try:
        with Registry.open(config.state, time.time, read_only=True) as registry:
            found = {name: registry.latency(name, model, wanted) for name in config.classes}
    except RegistryError as e:  # of an older version, or damaged: a plan needs none
        say(f"{e}; planned without latencies")
        return {}
    return {name: table for name, table in found.items() if table is not None}


def _show(
    console: Console,
    config: FleetConfig,
    planner: Planner,
    plans: Mapping[str, ClassPlan],
    tables: Mapping[str, LatencyTable],
) -> None:
    units, dense = sum(planner.groups.values()), planner.dense
    _line(
        console,
        f"{config.fleet}: {units} units in {len(planner.groups)} groups; the dense model has "
        f"{dense.artifact_bytes:,} bytes, {dense.macs:,} MACs and a peak of "
        f"{dense.peak_activation_bytes:,} bytes; allocation {planner.allocation.value}",
    )
    if config.pruning.int8 is True:
        _line(console, "classes' bytes and peaks are those of quantised files")
    console.print(_limits(planner, plans))
    console.print(_layers(planner, plans))
    for name, plan_ in plans.items():
        for note in _notes(config, planner, name, plan_, tables.get(name)):
            _line(console, f"{name}: {note}")


def _limits(planner: Planner, plans: Mapping[str, ClassPlan]) -> Table:
    """A row per class and limit."""
    units = sum(planner.groups.values())
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("class", "limit"):
        table.add_column(heading, no_wrap=True)
    for heading in ("budget", "reached", "used", "alone keeps"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("binds", no_wrap=True)
    for name, found in plans.items():
        ms = planner.budgets[name].latency_ms
        untimed = ms is not None and all(limit.key != "latency_ms" for limit in found.limits)
        if not found.limits and not untimed:
            table.add_row(name, "none", "-", "-", "-", f"{units} units", "")
        for i, limit in enumerate(found.limits):
            alone = sum(limit.alone.values())
            table.add_row(
                name if i == 0 else "",
                limit.key,
                _figure(limit, limit.budget),
                _figure(limit, limit.reached),
                f"{100 * limit.reached / limit.budget:.1f} %",
                f"{alone} units",
                "yes" if limit.key == found.binds else "partly" if limit.refuses else "",
            )
        if untimed:
            first = "" if found.limits else name
            table.add_row(first, "latency_ms", f"{ms:.4g}", "not timed yet", "-", "-", "")
    return table


def _layers(planner: Planner, plans: Mapping[str, ClassPlan]) -> Table:
    """A row per group: what each class keeps of it."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("units", justify="right", no_wrap=True)
    for name in plans:
        table.add_column(name, justify="right")
    for group, units in planner.groups.items():
        table.add_row(group, str(units), *(str(p.keep[group]) for p in plans.values()))
    for layer in dict.fromkeys(layer for p in plans.values() for layer in p.weights):
        found = [p.weights.get(layer) for p in plans.values()]
        shares = ("all" if f is None else f"{100 * f[0] / f[1]:.0f} %" for f in found)
        table.add_row(f"weights of {layer.removesuffix('.weight')}", "", *shares)
    table.add_section()
    columns = [(sum(planner.groups.values()), planner.dense)]
    columns += [(sum(p.keep.values()), p.costs) for p in plans.values()]
    table.add_row("units", *(f"{units:,}" for units, _ in columns))
    table.add_row("bytes", *(f"{costs.artifact_bytes:,}" for _, costs in columns))
    table.add_row("MACs", *(f"{costs.macs:,}" for _, costs in columns))
    table.add_row("peak bytes", *(f"{costs.peak_activation_bytes:,}" for _, costs in columns))
    if any(p.predicted_ms is not None for p in plans.values()):
        cells = ("-" if (ms := p.predicted_ms) is None else f"{ms:.4g}" for p in plans.values())
        table.add_row("predicted ms", "", *cells)
    return table


def _notes(
    config: FleetConfig, planner: Planner, name: str, found: ClassPlan, table: LatencyTable | None
) -> Iterator[str]:
    """What the tables do not say about a class."""
    budget, model = planner.budgets[name], planner.latency.get(name)
    if budget.batch > 1 and budget.ram_bytes is not None:
        yield f"memory is meant at batch {budget.batch}"
    if found.nesting:
        groups = "1 group is" if found.nesting == 1 else f"{found.nesting} groups are"
        yield f"{groups} as wide as {found.around[-1]} has them"
    if table is not None and model is not None:
        yield (
            f"{table.devices} of its devices timed {len(table.points)} shapes in "
            f"{table.precision} with {table.runtime} {table.version}; predictions are within "
            f"{100 * model.error:.0f} %"
        )
        multiple = config.classes[name].multiple or config.pruning.channel_multiple
        if multiple % model.block:
            yield (
                f"its runtime works on {model.block} channels at once: "
                f"multiple = {model.block} may lose less time than {multiple}"
            )
    elif budget.latency_ms is not None:
        files = config.pruning.precision
        yield f"latency_ms is not planned for, no device has timed files in {files} yet"


def _figure(limit: Limit, value: float) -> str:
    return f"{value:.4g}" if limit.key == "latency_ms" else f"{value:,.0f}"


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
