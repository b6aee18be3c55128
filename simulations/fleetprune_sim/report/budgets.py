"""Every limit of every class beside what was shipped."""

from collections.abc import Iterator
from dataclasses import dataclass

from fleetprune_sim.report.comparison import Comparison, Row
from fleetprune_sim.report.table import Table, rounded

LIMITS = {
    "macs": "macs",
    "flash_bytes": "bytes",
    "ram_bytes": "peak_activation_bytes",
    "latency_ms": "latency_ms",
}
"""How a budget calls a limit, and how an artifact calls its figure."""
ON_DEVICE = frozenset({"latency_ms"})
"""Limits that only the device can tell: how long this machine takes says nothing of it."""


@dataclass(frozen=True)
class Check:
    """One limit."""

    variant: str
    device_class: str
    kind: str
    limit: float
    shipped: float | None
    """The largest of all seeds; None: no model, or only the device can tell."""
    served: bool

    @property
    def within(self) -> bool | None:
        """Whether the limit is kept; None: nobody knows."""
        return None if self.shipped is None else self.shipped <= self.limit

    @property
    def left(self) -> float | None:
        """Share of the limit that is not used; negative: by how much it is exceeded."""
        return 1 - self.shipped / self.limit if self.shipped is not None and self.limit else None


def checks(comparison: Comparison) -> list[Check]:
    """All limits, by class and variant."""
    return [
        check
        for name in comparison.classes
        for row in comparison.rows
        for check in _of_class(row, name)
    ]


def left_to_devices(comparison: Comparison) -> list[str]:
    """Classes with a limit that nothing here decides."""
    return [
        name
        for name in comparison.classes
        if any(
            getattr(run.summary.classes[name].budget, kind) is not None
            for row in comparison.rows
            for run in row.variant.runs
            if name in run.summary.classes
            for kind in ON_DEVICE
        )
    ]


def _of_class(row: Row, name: str) -> Iterator[Check]:
    runs = [run.summary.classes[name] for run in row.variant.runs if name in run.summary.classes]
    artifacts = [c.artifact for c in runs if c.artifact is not None and c.model is not None]
    for kind, figure in LIMITS.items():
        limits = [limit for c in runs if (limit := getattr(c.budget, kind)) is not None]
        shipped = [
            v for a in artifacts if kind not in ON_DEVICE and (v := getattr(a, figure)) is not None
        ]
        if limits:
            worst = max(shipped, default=None)
            yield Check(row.variant.label, name, kind, min(limits), worst, bool(artifacts))


def budget_table(found: list[Check]) -> Table:
    """The same for scripts."""
    columns = ("variant", "class", "limit", "allowed", "shipped", "within", "left")
    rows = tuple(
        (c.variant, c.device_class, c.kind, c.limit, c.shipped, c.within, rounded(c.left, 5))
        for c in found
    )
    return Table("budgets", columns, rows)
