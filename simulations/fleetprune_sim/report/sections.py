"""The report on one task, in the order in which somebody who decides wants it."""

from collections.abc import Callable, Mapping, Sequence
from math import floor

from fleetprune_sim.report import bar_charts, charts, findings, grids, tables, words
from fleetprune_sim.report.blocks import Figure, Grid, Legend, Plot, Section
from fleetprune_sim.report.chart_parts import BYTES, COUNT, unit_of
from fleetprune_sim.report.comparison import Comparison
from fleetprune_sim.report.partition_table import devices, partition
from fleetprune_sim.report.style import PALETTE, SHAPES
from fleetprune_sim.report.table import Table
from fleetprune_sim.report.tables import per_seed

ROOM = 0.25
"""Accuracy below the worst final one that is drawn."""
FEW = 25
"""Evaluations up to which each is marked on its curve."""


def sections(comparison: Comparison) -> list[Section]:
    """All sections but the headline."""
    settings = grids.settings(comparison)
    return [
        Section("Result", [grids.results(comparison), grids.budgets(comparison)]),
        Section("Accuracy against cost", [_pareto(comparison, c) for c in ("macs", "bytes")]),
        Section("Accuracy on its way", _curves(comparison)),
        Section("The models", _keep(comparison)),
        Section("What the training took", _spent(comparison), columns=2),
        Section("The fleet", [*_partition(comparison), *settings]),
    ]


def colors(comparison: Comparison) -> Mapping[str, str]:
    """Per variant."""
    return {v: PALETTE[i % len(PALETTE)] for i, v in enumerate(_variants(comparison))}


def _variants(comparison: Comparison) -> list[str]:
    return [row.variant.label for row in comparison.rows]


def _legends(comparison: Comparison, *, shapes: bool = False) -> list[Legend]:
    legends = []
    if len(comparison.rows) > 1:
        legends.append(Legend("Methods", colors=colors(comparison)))
    if shapes:
        marks = {c: SHAPES[i % len(SHAPES)] for i, c in enumerate(comparison.classes)}
        legends.append(Legend("Classes", shapes=marks))
    return legends


def _pareto(comparison: Comparison, cost: str) -> Figure:
    table = tables.pareto(comparison)
    costs = [c for c in table.column(cost) if c is not None]
    says = findings.of_pareto(table, cost, comparison)
    title = {"macs": "Accuracy against MACs", "bytes": "Accuracy against bytes of the file"}[cost]
    lows, highs = table.column("low"), table.column("high")
    whiskers = any(high > low for low, high in zip(lows, highs, strict=True))
    spec = charts.pareto(cost, _variants(comparison), comparison.classes, costs, whiskers=whiskers)
    plots = [Plot("", f"{title}. {says}", f"pareto-{cost}")] if table.rows else []
    return Figure(
        f"pareto-{cost}", f"{title}, test set", says, table, plots, {f"pareto-{cost}": spec},
        _legends(comparison, shapes=True), wide=True,
    )  # fmt: skip


def _curves(comparison: Comparison) -> list[Figure | Grid]:
    table = tables.curves(comparison)
    lows, highs = table.column("low"), table.column("high")
    domain = _domain(comparison, highs)
    longest = max(table.column("virtual_s"), default=0.0)
    band = any(high > low for low, high in zip(lows, highs, strict=True))
    few = len(set(table.column("round"))) <= FEW
    kinds: tuple[tuple[str, str, Callable[[Comparison], str]], ...] = (
        ("round", "Over rounds", findings.of_rounds),
        ("bytes", "Over bytes", findings.of_bytes),
        ("virtual_s", "Over virtual time", findings.of_time),
    )
    found: list[Figure | Grid] = []
    for x, title, finding in kinds:
        says = finding(comparison)
        spec = charts.curve(x, _variants(comparison), domain, longest=longest, band=band, few=few)
        plots = [
            Plot(name, f"{name}: validation accuracy {title.lower()}. {says}", f"curve-{x}",
                 {"class": name})
            for name in comparison.classes
            if table.where("class", name).rows
        ]  # fmt: skip
        if band and x == "round":
            says += " Line: mean over seeds; band: one standard deviation."
        if min(lows, default=1.0) < domain[0]:
            says += f" What lies below {words.percent(domain[0], 0)} is not drawn."
        found.append(
            Figure(f"accuracy-{x}", title, says, table, plots, {f"curve-{x}": spec},
                   _legends(comparison))
        )  # fmt: skip
    return found


def _domain(comparison: Comparison, highs: Sequence[float]) -> tuple[float, float]:
    """Accuracies that are drawn: enough below the worst final one to see how it was reached.

    From the bottom up, the differences that matter would be a few pixels.
    """
    finals = [
        last.mean
        for row in comparison.rows
        for cell in row.cells.values()
        if (last := cell.spread("validation")) is not None
    ]
    lowest = min(finals, default=0.0) - ROOM
    return max(0.0, floor(lowest * 20) / 20), min(1.0, max(highs, default=1.0) + 0.01)


def _keep(comparison: Comparison) -> list[Figure | Grid]:
    best, table = comparison.best, tables.keep_counts(comparison)
    mine = table.where("variant", best.variant.label)
    if not mine.rows:
        return []
    label, says = best.variant.label, findings.of_keep(table, best)
    groups = list(dict.fromkeys(mine.column("group")))
    plots = [
        Plot(name, f"{name}: units that {label} keeps per group.", "units",
             {"class": name, "variant": label})
        for name in comparison.classes
        if mine.where("class", name).rows
    ]  # fmt: skip
    spec = bar_charts.keep(groups, colors(comparison)[label])
    figure = Figure("units", f"Units per group, {label}", says, table, plots, {"units": spec})
    if len(comparison.rows) == 1:
        return [figure]
    return [figure, _all_units(comparison, table)]


def _all_units(comparison: Comparison, table: Table) -> Grid:
    """Keep counts of all methods, folded away."""
    groups = list(dict.fromkeys(table.column("group")))
    found = {(row[0], row[1], row[2]): row[3] for row in table.rows}
    blocks = []
    for name in comparison.classes:
        rows = [
            [label, *(_units(found.get((label, name, group))) for group in groups)]
            for label in _variants(comparison)
        ]
        blocks.append((name, rows))
    dense = dict(zip(table.column("group"), table.column("dense"), strict=True))
    blocks.append(("dense model", [["all", *(_units(dense[g]) for g in groups)]]))
    return Grid("all-units", "Units per group, all methods", "", ["method", *groups], blocks,
                folded=True)  # fmt: skip


def _units(count: object) -> str:
    return "–" if count is None else f"{count:g}"


def _spent(comparison: Comparison) -> list[Figure | Grid]:
    table = tables.spent(comparison)
    seconds, unit = unit_of(max(filter(None, table.column("seconds_to_target")), default=0.0))

    def figure(
        column: str, title: str, says: str, axis: str, *, labels: str = COUNT, divisor: float = 1
    ) -> Figure:
        some = "datum.seeds_that_reached_it < datum.seeds"
        pale = some if column == "seconds_to_target" else "false"
        spec = bar_charts.bars(
            "spent", column, _variants(comparison), comparison.classes,
            title=axis, labels=labels, divisor=divisor, pale=pale,
        )  # fmt: skip
        plots = [Plot("", f"{title}. {says}", column)] if any(table.column(column)) else []
        name, legends = column.replace("_", "-"), _legends(comparison)
        more = [per_seed(comparison)] if column == "seconds_to_target" else []
        return Figure(name, title, says, table, plots, {column: spec}, legends, more, wide=True)

    return [
        figure("up_bytes_per_device", "Upload of a device, by class",
               findings.of_traffic(comparison, "up"), "whole training", labels=BYTES),
        figure("down_bytes_per_device", "Download of a device, by class",
               findings.of_traffic(comparison, "down"), "whole training", labels=BYTES),
        figure("energy_j_per_device", "Energy of a device, by class",
               findings.of_energy(comparison), "joules, whole training"),
        figure("seconds_to_target", "Time to target, by class",
               findings.of_reaching(comparison), unit, divisor=seconds),
    ]  # fmt: skip


def _partition(comparison: Comparison) -> list[Figure | Grid]:
    run = comparison.best.variant.runs[0]
    if not run.devices:
        return []
    table = partition(run)
    shown = len(set(table.column("device")))
    labels = list(dict.fromkeys(table.column("label")))
    plots = [
        Plot(name, f"{name}: share of each label in each device's samples.", "partition",
             {"class": name})
        for name in comparison.classes
        if table.where("class", name).rows
    ]  # fmt: skip
    says = findings.of_partition(run, shown)
    return [
        Figure("partition", "Who has which samples", says, table, plots,
               {"partition": bar_charts.heat_map(labels)}, more=[devices(run)])
    ]  # fmt: skip
