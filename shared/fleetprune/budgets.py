"""Hard budgets per device class, and the keep counts that a class may have at all.

Counts are whole multiples (an odd channel count has been seen to triple a convolution's time),
limits are checked with `<=`. What meets a budget is found by `solver`.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import gcd

from pydantic import BaseModel, ConfigDict, Field

from fleetprune.costs import Costs
from fleetprune.errors import BudgetError
from fleetprune.protection import UNPROTECTED, Protection

LIMITS: Mapping[str, str] = {
    "artifact_bytes": "flash_bytes",
    "peak_activation_bytes": "ram_bytes",
    "macs": "macs",
}
"""Cost, and how a budget calls its limit."""


class Budget(BaseModel):
    """What one device class can hold; None: no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flash_bytes: int | None = Field(default=None, gt=0)
    """Bytes of the shipped file."""
    ram_bytes: int | None = Field(default=None, gt=0)
    """Peak bytes of intermediate tensors of one inference of `batch` samples."""
    macs: int | None = Field(default=None, gt=0)
    """Multiply-accumulates for one sample."""
    latency_ms: float | None = Field(default=None, gt=0)
    """Median time of one sample, measured by the device at install."""
    batch: int = Field(default=1, ge=1)
    """Samples that the class runs at once; all intermediate tensors grow with it."""

    def limits(self) -> dict[str, int]:
        """The limits that the architecture decides, for one sample, by the name of the cost."""
        named = {
            "artifact_bytes": self.flash_bytes,
            "peak_activation_bytes": None
            if self.ram_bytes is None
            else self.ram_bytes // self.batch,
            "macs": self.macs,
        }
        return {name: limit for name, limit in named.items() if limit is not None}

    def violations(self, costs: Costs) -> list[str]:
        """One phrase per limit that `costs`, of one sample, exceeds."""
        said = []
        for name, limit in self.limits().items():
            if (got := getattr(costs, name)) > limit:
                factor = self.batch if name == "peak_activation_bytes" else 1
                at = f" at batch {factor}" if factor > 1 else ""
                said.append(f"{name} {factor * got}{at} > {getattr(self, LIMITS[name])}")
        return said

    def meets(self, costs: Costs) -> bool:
        """Whether every limit but that of latency holds."""
        return not self.violations(costs)

    def covers(self, other: "Budget") -> bool:
        """Whether a model within `other` is within this budget too; latencies are not compared.

        A millisecond of one class is not a millisecond of another.
        """
        mine, theirs = self.limits(), other.limits()
        return all(name in theirs and theirs[name] <= limit for name, limit in mine.items())


class Allocation(StrEnum):
    """How a class's cut is shared out among the groups."""

    UNIFORM = "uniform"
    """The same share of every group, whatever the scores: robust when training goes on for long,
    and the shapes, and so the graphs that devices hold, never change."""
    GLOBAL = "global"
    """The least important units per cost, wherever they are: better when few rounds follow."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The keep counts that are allowed: per group its rising levels."""

    levels: Mapping[str, tuple[int, ...]]
    protected: bool = False
    """Whether some groups have fewer levels than their widths allow."""

    @classmethod
    def of(
        cls,
        groups: Mapping[str, int],
        multiple: int,
        protection: Protection = UNPROTECTED,
        channels: Mapping[str, int] | None = None,
    ) -> "Grid":
        """Whole multiples, and the full width; a narrower group is left whole.

        Args:
            groups: Units per group.
            multiple: What widths are multiples of, in channels, where `protection` says nothing
                else of units.
            protection: Groups that are left whole, have a least count or a multiple of their own.
            channels: Per group the channels of a unit, as of a head of attention; 1 where it has
                none.

        Raises:
            BudgetError: `multiple` is below 1.
        """
        if multiple < 1:
            raise BudgetError(f"channel multiple {multiple}, expected at least 1")
        steps = {g: multiple // gcd(multiple, (channels or {}).get(g, 1)) for g in groups}
        levels = {g: protection.levels(g, n, steps[g]) for g, n in groups.items()}
        return cls(levels, protected=protection != UNPROTECTED)

    def smallest(self) -> dict[str, int]:
        """The lowest level of every group."""
        return {g: levels[0] for g, levels in self.levels.items()}

    def under(self, ceiling: Mapping[str, int]) -> "Grid":
        """The levels within a ceiling; the ceiling itself where the lowest level is above it."""
        return Grid(
            {
                g: levels[: bisect_right(levels, ceiling[g])] or (ceiling[g],)
                for g, levels in self.levels.items()
            },
            self.protected,
        )
