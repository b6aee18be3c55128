"""The tables of a comparison, for people."""

from collections.abc import Sequence
from dataclasses import replace

from fleetprune_sim.report import words
from fleetprune_sim.report.blocks import Grid, Mark
from fleetprune_sim.report.budgets import LIMITS, Check, budget_table, checks
from fleetprune_sim.report.comparison import ENOUGH, Cell, Comparison, Row
from fleetprune_sim.report.figures import mean_of
from fleetprune_sim.report.table import Table
from fleetprune_sim.report.tables import figures
from fleetprune_sim.report.variants import differing, fleet_differences

Cells = list[str | Mark]

_KINDS = {"macs": "MACs", "flash_bytes": "file", "ram_bytes": "RAM", "latency_ms": "latency"}


def results(comparison: Comparison) -> Grid:
    """What every class gets from every method."""
    head = ["method", "accuracy, test set (%)", "accuracy, own devices (%)"]
    if comparison.baseline is not None:
        head.append(f"points above {comparison.baseline.variant.label}, by pairs of seeds")
    head += ["MACs", "of dense", "file", "of dense", "upload saved", "time to target"]
    groups = []
    for name in comparison.classes:
        target = comparison.targets[name]
        reach = "" if target is None else f", target {words.percent(target)}"
        rows = [_result(comparison, row, name) for row in comparison.rows]
        devices = max(r.devices for row in comparison.rows for r in row.cells[name].results)
        groups.append((f"{name}: {words.counted(devices, 'device')}{reach}", rows))
    groups.append(("mean over the classes that have a model", _means(comparison)))
    says = words.spread_note(comparison) + (
        " Test set: samples that no device has. Own devices: the mean over the class's devices, "
        "each on samples that it kept back from training. Upload saved: how many times the bytes "
        "float32 updates of the dense model would have taken. "
    )
    if comparison.chosen_target:
        says += "Time: by the fleet's clock, until validation accuracy first reached the target."
    else:
        says += (
            f"Time: by the fleet's clock, until validation accuracy first reached "
            f"{words.percent(ENOUGH, 0)} of the best method's last one."
        )
    return _of_methods(
        comparison, Grid("figures", "What each class gets", says, head, groups, figures(comparison))
    )


def budgets(comparison: Comparison) -> Grid:
    """Limits, what was shipped, and how far one is from the other."""
    found = checks(comparison)
    kinds = [kind for kind in LIMITS if any(c.kind == kind for c in found)]
    head = ["method", "verdict", *(_KINDS[kind] for kind in kinds)]
    alone = len(comparison.rows) == 1
    groups = []
    for name in comparison.classes:
        mine = {(c.variant, c.kind): c for c in found if c.device_class == name}
        limits = {kind: {c.limit for c in mine.values() if c.kind == kind} for kind in kinds}
        rows = []
        for row in comparison.rows:
            label = row.variant.label
            cells: Cells = [label, _verdict(row.cells[name])]
            cells += [
                _limit(mine.get((label, kind)), alone or len(limits[kind]) > 1) for kind in kinds
            ]
            rows.append(cells)
        allowed = [f"{_KINDS[k]} {_exact(k, max(v))}" for k, v in limits.items() if len(v) == 1]
        title = f"at most {', '.join(allowed)}" if allowed else "no limit"
        groups.append((name if alone else f"{name}: {title}", rows))
    says = _exceeded(comparison, found)
    return _of_methods(
        comparison, Grid("budgets", "Budgets", says, head, groups, budget_table(found))
    )


def _of_methods(comparison: Comparison, grid: Grid) -> Grid:
    """With the best method's rows standing out; of a single method, with a row per class."""
    if len(comparison.rows) > 1:
        return replace(grid, emphasis=comparison.best.variant.label)
    rows = [[title, *row[1:]] for title, (row,) in grid.groups]
    return replace(grid, head=["class", *grid.head[1:]], groups=[("", rows)])


def _exceeded(comparison: Comparison, found: Sequence[Check]) -> str:
    """Who does not keep what."""
    over: dict[str, list[str]] = {}
    for row in comparison.rows:
        for name, cell in row.cells.items():
            if cell.served and not cell.within:
                over.setdefault(row.variant.label, []).append(name)
    if over:
        who = [f"{label} ({', '.join(names)})" for label, names in over.items()]
        says = f"Exceeded by {words.joined(who)}."
    else:
        says = "Every limit is kept by every model." if found else "No class has a limit."
    return (
        f"{says} Each figure is the file's own, the largest of all seeds, and beside it what is "
        "left of the limit."
    )


def settings(comparison: Comparison) -> list[Grid]:
    """What the runs were told: what differs, what is the same."""
    variants = [row.variant for row in comparison.rows]
    labels = [v.label for v in variants]
    apart = differing([v.settings for v in variants])
    fleet = fleet_differences(variants)
    seeds = Table("", (), tuple(("seeds", ", ".join(map(str, v.seeds))) for v in variants))
    first: list[Sequence[str | Mark]] = [["seeds", *(str(row[1]) for row in seeds.rows)]]
    rows = [*first, *([name, *(v.settings.get(name, "") for v in variants)] for name in apart)]
    says = "All else is the same for all of them; see below."
    if fleet:
        says += (
            f" Read with care: {words.joined(fleet)} differ, so the methods did not meet the same "
            "fleet."
        )
    same = [
        [name, value] for name, value in sorted(variants[0].settings.items()) if name not in apart
    ]
    table = Table(
        "settings",
        ("setting", *labels),
        tuple(
            (name, *(v.settings.get(name) for v in variants))
            for name in dict.fromkeys(n for v in variants for n in v.settings)
        ),
    )
    shared = Grid(
        "shared-settings", "Settings of every run", "", ["setting", "value"], [("", same)],
        folded=True,
    )  # fmt: skip
    if len(variants) == 1:
        seen = f"Seeds {', '.join(map(str, variants[0].seeds))}."
        return [Grid("settings", "Settings", seen, shared.head, shared.groups, table, folded=True)]
    apart_grid = Grid(
        "settings", "Where the methods differ", says, ["setting", *labels], [("", rows)], table
    )
    return [apart_grid, shared]


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
    """Time to a target: `3.4 h`, or `3.4 h (2 of 3)` where not all seeds got there."""
    found = cell.seconds_to(target)
    if found is None:
        return "not reached" if cell.served and target is not None else words.NONE
    some = "" if found.n == len(cell.results) else f" ({found.n} of {len(cell.results)})"
    return words.duration(found.mean) + some


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
                *([""] if comparison.baseline is not None else []),
                "",
                words.percent(mean_of(row.mean("macs_share")), 0),
                "",
                words.percent(mean_of(row.mean("bytes_share")), 0),
                words.times(mean_of(row.up_factor)),
                "",
            ]
        )
    return rows


def _verdict(cell: Cell) -> Mark:
    if not cell.served:
        return Mark(None, "no model")
    if cell.within:
        return Mark(True, "kept")
    some = "" if not cell.kept else f" in {len(cell.results) - cell.kept} of {len(cell.results)}"
    return Mark(False, f"exceeded{some}")


def _limit(check: Check | None, with_limit: bool) -> str | Mark:
    if check is None or (check.shipped is None and not check.served):
        return words.NONE
    allowed = f" of {_exact(check.kind, check.limit)}" if with_limit else ""
    if check.shipped is None or check.left is None:
        return Mark(None, f"not measured{allowed}")
    left = f"{words.percent(abs(check.left))} {'left' if check.within else 'over'}"
    return Mark(check.within, f"{_exact(check.kind, check.shipped)}{allowed} ({left})")


def _exact(kind: str, value: float) -> str:
    unit = {"flash_bytes": " B", "ram_bytes": " B", "latency_ms": " ms"}.get(kind, "")
    return f"{value:,.2f}{unit}" if kind == "latency_ms" else f"{value:,.0f}{unit}"
