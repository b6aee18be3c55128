"""The report on one task, in the order in which somebody who decides wants it."""

from collections.abc import Callable, Mapping, Sequence
from math import floor

from fleetprune_sim.report import bar_charts, charts, findings, tables, words
from fleetprune_sim.report.blocks import Figure, Grid, Legend, Plot, Section
from fleetprune_sim.report.budget_grid import budgets
from fleetprune_sim.report.chart_parts import BYTES, COUNT, unit_of
from fleetprune_sim.report.comparison import Comparison
from fleetprune_sim.report.partition_table import devices, partition
from fleetprune_sim.report.result_grid import results
from fleetprune_sim.report.robustness_grid import under_corruptions
from fleetprune_sim.report.settings_grid import settings
from fleetprune_sim.report.style import PALETTE, SHADES, SHAPES
from fleetprune_sim.report.table import Table
from fleetprune_sim.report.tables import per_seed
from fleetprune_sim.report.tried_grid import what_was_tried

FEW = 25
"""Evaluations up to which each is marked on its curve."""
_SOME = "datum.seeds_that_reached_it < datum.seeds"
_REACHED = (
    "!datum.seeds_with_a_model ? 'no model' : datum.seeds > 1 ? "
    "datum.seeds_that_reached_it + ' of ' + datum.seeds : "
    "datum.seeds_that_reached_it ? '' : 'not reached'"
)
"""Expressions on what became of a target."""


def sections(comparison: Comparison) -> list[Section]:
    """All sections but the headline."""
    return [
        Section("Result", [results(comparison), budgets(comparison)]),
        Section("Accuracy against cost", [_pareto(comparison, c) for c in ("macs", "bytes")]),
        Section("Under corruptions", under_corruptions(comparison)),
        Section("Accuracy on its way", _curves(comparison)),
        Section("The models", _keep(comparison)),
        Section("What the training took", _spent(comparison), columns=2),
        Section("What was tried", what_was_tried(comparison)),
        Section("The fleet", [*_partition(comparison), *settings(comparison)]),
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
    spec = charts.pareto(
        cost, _variants(comparison), comparison.classes, costs, whiskers=whiskers,
        widest=max((abs(side) for side in table.column(f"{cost}_side")), default=0),
    )  # fmt: skip
    plots = [Plot("", f"{title}. {says}", f"pareto-{cost}")] if table.rows else []
    return Figure(
        f"pareto-{cost}", f"{title}, test set", says, table, plots, {f"pareto-{cost}": spec},
        _legends(comparison, shapes=True), wide=True,
    )  # fmt: skip


def _curves(comparison: Comparison) -> list[Figure | Grid]:
    table = tables.curves(comparison)
    lows, highs = table.column("low"), table.column("high")
    domain = _domain(lows, highs)
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
        found.append(
            Figure(f"accuracy-{x}", title, says, table, plots, {f"curve-{x}": spec},
                   _legends(comparison))
        )  # fmt: skip
    return found


def _domain(lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float]:
    """All accuracies that are drawn, from a round figure on: no curve begins out of sight."""
    lowest = floor(10 * min(lows, default=0.0)) / 10
    return lowest, min(1.0, max(highs, default=1.0) + 0.01)


def _keep(comparison: Comparison) -> list[Figure | Grid]:
    best, table = comparison.best, tables.keep_counts(comparison)
    mine = table.where("variant", best.variant.label)
    if not mine.rows:
        return []
    label = best.variant.label
    says = findings.of_keep(table, best) + findings.of_weights(best)
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
        timed = column == "seconds_to_target"
        spec = bar_charts.bars(
            "spent", column, _variants(comparison), comparison.classes,
            title=axis, labels=labels, divisor=divisor, pale=_SOME if timed else "false",
            note=_REACHED if timed else "",
        )  # fmt: skip
        plots = [Plot("", f"{title}. {says}", column)] if any(table.column(column)) else []
        name, legends = column.replace("_", "-"), _legends(comparison)
        more = [per_seed(comparison)] if timed else []
        return Figure(name, title, says, table, plots, {column: spec}, legends, more, wide=True)

    return [
        figure("up_bytes_per_device", "Upload of a device, by class",
               findings.of_traffic(comparison, "up"), "whole training", labels=BYTES),
        figure("down_bytes_per_device", "Download of a device, by class",
               findings.of_traffic(comparison, "down"), "whole training", labels=BYTES),
        figure("energy_j_per_device", "Energy of a device, by class",
               findings.of_energy(comparison), "joules, whole training"),
        figure("seconds_to_target", "Time to the target on validation, by class",
               findings.of_reaching(comparison), unit, divisor=seconds),
    ]  # fmt: skip


def _shades() -> Legend:
    """Of the heat map: a label's share of a device's samples."""
    low, high = SHADES
    shares = {i / 4: low + (high - low) * i / 4 for i in range(5)}
    return Legend("Share of a device's samples", shades={
        words.percent(share, 0): strength for share, strength in shares.items()
    })  # fmt: skip


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
               {"partition": bar_charts.heat_map(labels)}, [_shades()], [devices(run)])
    ]  # fmt: skip
