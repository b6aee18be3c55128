"""The table of limits and what was shipped, for people."""

from collections.abc import Mapping, Sequence

from fleetprune_sim.report import words
from fleetprune_sim.report.blocks import Cells, Grid, Mark
from fleetprune_sim.report.budgets import (
    LIMITS,
    ON_DEVICE,
    Check,
    budget_table,
    checks,
    left_to_devices,
)
from fleetprune_sim.report.comparison import Cell, Comparison

_KINDS = {"macs": "MACs", "flash_bytes": "file", "ram_bytes": "RAM", "latency_ms": "latency"}
_MEASURED = "measured on the device"


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
            own = {kind: mine[label, kind] for kind in kinds if (label, kind) in mine}
            cells: Cells = [label, _verdict(row.cells[name], own)]
            cells += [_limit(own.get(kind), alone or len(limits[kind]) > 1) for kind in kinds]
            rows.append(cells)
        allowed = [_allowed(k, max(v)) for k, v in limits.items() if len(v) == 1]
        title = f"at most {', '.join(allowed)}" if allowed else "no limit"
        groups.append((name if alone else f"{name}: {title}", rows))
    says = _exceeded(comparison, found)
    grid = Grid("budgets", "Budgets", says, head, groups, budget_table(found))
    return grid.by_class() if alone else grid


def _exceeded(comparison: Comparison, found: Sequence[Check]) -> str:
    """Who does not keep what."""
    over: dict[str, list[str]] = {}
    for row in comparison.rows:
        for name, cell in row.cells.items():
            if cell.served and not cell.within:
                over.setdefault(row.variant.label, []).append(name)
    decided = any(c.kind not in ON_DEVICE for c in found)
    open_limits = left_to_devices(comparison)
    if over:
        who = [f"{label} ({', '.join(names)})" for label, names in over.items()]
        says = f"Exceeded by {words.joined(who)}."
    elif decided:
        aside = ", latency aside," if open_limits else ""
        says = f"Every limit{aside} is kept by every model."
    else:
        says = "" if open_limits else "No class has a limit."
    if decided:
        says += (
            " Each figure is the file's own, the largest of all seeds, and beside it what is left "
            "of the limit."
        )
    if open_limits:
        says += (
            f" Latency ({', '.join(open_limits)}) is measured on the device, which refuses a model "
            "that takes longer: the time that this machine takes would say nothing of it."
        )
    return says.strip()


def _verdict(cell: Cell, limits: Mapping[str, Check]) -> Mark:
    """Of all limits together that can be told here."""
    if not cell.served:
        return Mark(None, "no model")
    if not limits:
        return Mark(None, "no limit")
    if cell.within and limits.keys() <= ON_DEVICE:
        return Mark(None, _MEASURED)
    if cell.within:
        return Mark(True, "kept, latency aside" if limits.keys() & ON_DEVICE else "kept")
    some = "" if not cell.kept else f" in {len(cell.results) - cell.kept} of {len(cell.results)}"
    return Mark(False, f"exceeded{some}")


def _limit(check: Check | None, with_limit: bool) -> str | Mark:
    if check is None or (check.shipped is None and not check.served):
        return words.NONE
    allowed = f" of {_exact(check.kind, check.limit)}" if with_limit else ""
    if check.kind in ON_DEVICE:
        allowed = f" (at most {_exact(check.kind, check.limit)})" if with_limit else ""
        return Mark(None, f"{_MEASURED}{allowed}")
    if check.shipped is None or check.left is None:
        return Mark(None, f"not known{allowed}")
    left = f"{words.percent(abs(check.left))} {'left' if check.within else 'over'}"
    return Mark(check.within, f"{_exact(check.kind, check.shipped)}{allowed} ({left})")


def _exact(kind: str, value: float) -> str:
    if kind == "latency_ms":
        return words.milliseconds(value)
    return f"{value:,.0f}{'' if kind == 'macs' else ' B'}"


def _allowed(kind: str, limit: float) -> str:
    """A limit in words: `1,000 MACs`, `a file of 2,000 B`."""
    exact = _exact(kind, limit)
    return {
        "macs": f"{exact} MACs",
        "flash_bytes": f"a file of {exact}",
        "ram_bytes": f"{exact} of RAM",
        "latency_ms": f"{exact} on the device",
    }[kind]
