"""Hard budgets per device class, and the keep counts that meet them.

Counts are whole multiples (an odd channel count has been seen to triple a convolution's time),
limits are checked with `<=`, and a budget that cannot be met is refused with the smallest figure
that can.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fleetprune.costs import Costs
from fleetprune.errors import BudgetError
from fleetprune.layout import KeepCounts

_KEYS = {"artifact_bytes": "flash_bytes", "peak_activation_bytes": "ram_bytes"}
"""How a budget calls the limit of a cost, where it is not the cost's own name."""


class Budget(BaseModel):
    """What one device class can hold; None: no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flash_bytes: int | None = Field(default=None, gt=0)
    """Bytes of the shipped file."""
    ram_bytes: int | None = Field(default=None, gt=0)
    """Peak bytes of intermediate tensors of one inference."""
    macs: int | None = Field(default=None, gt=0)
    """Multiply-accumulates of one inference."""
    latency_ms: float | None = Field(default=None, gt=0)
    """Median time of one inference, measured by the device at install."""

    def limits(self) -> dict[str, int]:
        """The limits that keep counts decide, by the name of the cost they hold for."""
        named = {
            "artifact_bytes": self.flash_bytes,
            "peak_activation_bytes": self.ram_bytes,
            "macs": self.macs,
        }
        return {name: limit for name, limit in named.items() if limit is not None}

    def violations(self, costs: Costs) -> list[str]:
        """One phrase per limit that `costs` exceeds."""
        return [
            f"{name} {getattr(costs, name)} > {limit}"
            for name, limit in self.limits().items()
            if getattr(costs, name) > limit
        ]

    def meets(self, costs: Costs) -> bool:
        """Whether every limit holds."""
        return not self.violations(costs)

    def covers(self, other: "Budget") -> bool:
        """Whether a model within `other` is within this budget too."""
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

    @classmethod
    def of(cls, groups: Mapping[str, int], multiple: int) -> "Grid":
        """Whole multiples of `multiple`, and the full width; a narrower group is left whole."""
        if multiple < 1:
            raise BudgetError(f"channel multiple {multiple}, expected at least 1")
        return cls({g: (*range(multiple, n, multiple), n) for g, n in groups.items()})

    def smallest(self) -> dict[str, int]:
        """The lowest level of every group."""
        return {g: levels[0] for g, levels in self.levels.items()}

    def at_most(self, limit: Mapping[str, float]) -> dict[str, int]:
        """Per group the highest level within `limit`, or the lowest where none is."""
        return {
            g: max((n for n in levels if n <= limit[g] + 1e-9), default=levels[0])
            for g, levels in self.levels.items()
        }

    def above(self, group: str, count: int) -> int | None:
        """The next level up, or None."""
        return next((n for n in self.levels[group] if n > count), None)

    def below(self, group: str, count: int) -> int | None:
        """The next level down, or None."""
        return next((n for n in reversed(self.levels[group]) if n < count), None)


class BudgetSolver:
    """Finds nested keep counts for all classes of a fleet."""

    def __init__(
        self,
        costs: Callable[[KeepCounts], Costs],
        groups: Mapping[str, int],
        *,
        multiple: int = 8,
        allocation: Allocation = Allocation.UNIFORM,
        floor: float = 0.5,
    ) -> None:
        """Prepare for one architecture.

        Args:
            costs: Exact costs of keep counts, rising in each count.
            groups: Units per group of the dense model.
            multiple: Keep counts are multiples of this, or the full width.
            allocation: How the cut is shared out.
            floor: With `GLOBAL`, no group falls below this share of its uniform count, so that
                no layer collapses.
        """
        self._costs = costs
        self._groups = dict(groups)
        self._grid = Grid.of(groups, multiple)
        self._allocation = allocation
        self._floor = floor

    def solve(
        self, budgets: Mapping[str, Budget], scores: Mapping[str, NDArray[np.float32]]
    ) -> dict[str, dict[str, int]]:
        """Keep counts per class.

        A class never keeps more of a group than a class whose budget covers its own, so nested
        budgets give nested models.

        Args:
            budgets: Per class.
            scores: Per group (units,), by falling importance.

        Returns:
            Per class its keep counts; every limit holds.

        Raises:
            BudgetError: A class's budget is below the smallest model; names the class, the cost
                and the smallest achievable figure.
        """
        for name, budget in budgets.items():
            self._check_feasible(name, budget)
        solved: dict[str, dict[str, int]] = {}
        # A covering budget comes before what it covers: it has at least its limits.
        for name in sorted(budgets, key=lambda n: self._width(budgets[n]), reverse=True):
            ceiling = dict(self._groups)
            for other, counts in solved.items():
                if budgets[other].covers(budgets[name]):
                    ceiling = {g: min(ceiling[g], counts[g]) for g in ceiling}
            solved[name] = self._one(budgets[name], ceiling, scores)
        return {name: solved[name] for name in budgets}

    def _width(self, budget: Budget) -> tuple[float, ...]:
        limits = budget.limits()
        names = ("macs", "artifact_bytes", "peak_activation_bytes")
        return tuple(float(limits.get(name, np.inf)) for name in names)

    def _check_feasible(self, name: str, budget: Budget) -> None:
        smallest = self._costs(self._grid.smallest())
        for cost, limit in budget.limits().items():
            if (least := getattr(smallest, cost)) > limit:
                raise BudgetError(
                    f"class {name}: {_KEYS.get(cost, cost)} {limit} cannot be met, "
                    f"the smallest achievable is {least}; raise the budget or lower "
                    f"channel_multiple"
                )

    def _one(
        self,
        budget: Budget,
        ceiling: dict[str, int],
        scores: Mapping[str, NDArray[np.float32]],
    ) -> dict[str, int]:
        counts = self._uniform(budget, ceiling)
        if self._allocation is Allocation.GLOBAL:
            counts = self._global(budget, ceiling, counts, scores)
        return self._fill(budget, ceiling, counts, scores)

    def _uniform(self, budget: Budget, ceiling: dict[str, int]) -> dict[str, int]:
        """The largest common share of every group that meets the budget."""
        shares = sorted(
            {n / self._groups[g] for g, levels in self._grid.levels.items() for n in levels}
        )

        def at(share: float) -> dict[str, int]:
            limit = {g: min(share * n, ceiling[g]) for g, n in self._groups.items()}
            return self._grid.at_most(limit)

        low, high = -1, len(shares) - 1  # costs rise with the share, so bisection is exact
        while low < high:
            middle = (low + high + 1) // 2
            if budget.meets(self._costs(at(shares[middle]))):
                low = middle
            else:
                high = middle - 1
        return at(shares[low]) if low >= 0 else self._grid.smallest()

    def _global(
        self,
        budget: Budget,
        ceiling: dict[str, int],
        uniform: dict[str, int],
        scores: Mapping[str, NDArray[np.float32]],
    ) -> dict[str, int]:
        """Take away the steps that lose least importance per cost saved."""
        floor = self._grid.at_most({g: max(1.0, self._floor * uniform[g]) for g in uniform})
        counts = self._grid.at_most(ceiling)
        limits = budget.limits()
        costs = self._costs(counts)
        while violated := [n for n, limit in limits.items() if getattr(costs, n) > limit]:
            best: tuple[float, str, int, Costs] | None = None
            for group in counts:
                step = self._grid.below(group, counts[group])
                if step is None or step < floor[group]:
                    continue
                after = self._costs({**counts, group: step})
                saved = sum((getattr(costs, n) - getattr(after, n)) / limits[n] for n in violated)
                # A step off the peak saves nothing by itself but may be what the peak needs next.
                saved += 1e-6 * (costs.macs - after.macs) / max(costs.macs, 1)
                lost = float(scores[group][step : counts[group]].sum())
                price = lost / saved if saved > 0 else np.inf
                if best is None or price < best[0]:
                    best = (price, group, step, after)
            if best is None:  # floors are in the way: the uniform counts are known to fit
                return dict(uniform)
            counts[best[1]], costs = best[2], best[3]
        return counts

    def _fill(
        self,
        budget: Budget,
        ceiling: dict[str, int],
        counts: dict[str, int],
        scores: Mapping[str, NDArray[np.float32]],
    ) -> dict[str, int]:
        """Give back steps that still fit: to the most cut group, or to the most important units."""
        counts = dict(counts)
        while True:
            costs = self._costs(counts)
            best: tuple[tuple[float, float], str, int] | None = None
            for group in counts:
                step = self._grid.above(group, counts[group])
                if step is None or step > ceiling[group]:
                    continue
                after = self._costs({**counts, group: step})
                if not budget.meets(after):
                    continue
                added = max(after.macs - costs.macs, 1)
                if self._allocation is Allocation.UNIFORM:
                    value = (-counts[group] / self._groups[group], (step - counts[group]) / added)
                else:
                    value = (0.0, float(scores[group][counts[group] : step].sum()) / added)
                if best is None or value > best[0]:
                    best = (value, group, step)
            if best is None:
                return counts
            counts[best[1]] = best[2]
