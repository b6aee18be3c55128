"""Keep counts that meet every class's budget, nested, exact and the same every time.

Every figure that is limited never falls when a group grows, so the smallest model decides whether
a budget can be met at all, and no step is taken without knowing what it comes to. A budget that
cannot be met is refused with the smallest figures that can.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from fleetprune.allocation import NO_LIMIT, Ladder, Route, Scores, filled, least_important, uniform
from fleetprune.budgets import LIMITS, Allocation, Budget, Grid
from fleetprune.costs import FIGURES, CostModel
from fleetprune.errors import BudgetError
from fleetprune.latency import LatencyModel
from fleetprune.layout import KeepCounts
from fleetprune.masks import check_scores

KEYS = (*(LIMITS[figure] for figure in FIGURES), "latency_ms")
"""How a budget calls the limits of what a `CostWalk` gives, in that order."""


@dataclass(frozen=True)
class Nested:
    """What the solver found for one class."""

    keep: dict[str, int]
    ceiling: dict[str, int]
    """Units per group that the classes around this one leave it."""
    around: tuple[str, ...]
    """Classes whose budgets cover this one's: none of their groups is narrower."""


class BudgetSolver:
    """Finds nested keep counts for all classes of a fleet."""

    def __init__(
        self,
        costs: CostModel,
        grids: Mapping[str, Grid],
        *,
        allocation: Allocation = Allocation.UNIFORM,
        floor: float = 0.5,
        latency: Mapping[str, LatencyModel] | None = None,
    ) -> None:
        """Prepare for one architecture.

        Args:
            costs: Exact costs of keep counts.
            grids: Per class the counts that it may have.
            allocation: How the cut is shared out.
            floor: With `GLOBAL`, no group falls below this share of its uniform count, so that
                no layer collapses.
            latency: Per class what its devices measured; a class without has no limit of latency
                here.
        """
        self._costs, self._grids = costs, dict(grids)
        self._groups = costs.groups
        self._allocation, self._floor = allocation, floor
        self._latency = dict(latency or {})
        self._models = {n: costs.with_latency(m.products) for n, m in self._latency.items()}

    def solve(self, budgets: Mapping[str, Budget], scores: Scores) -> dict[str, dict[str, int]]:
        """Keep counts per class.

        A class never keeps more of a group than a class whose budget covers its own, so nested
        budgets give nested models.

        Args:
            budgets: Per class.
            scores: Per group (units,), by falling importance.

        Returns:
            Per class its keep counts; every limit holds, and no group could have one more step.

        Raises:
            BudgetError: A class's budget is below the smallest model; names the class, its limits
                and the smallest achievable figures. Or scores are not one finite number per unit.
        """
        return {name: solved.keep for name, solved in self.nest(budgets, scores).items()}

    def nest(self, budgets: Mapping[str, Budget], scores: Scores) -> dict[str, Nested]:
        """As `solve`, with what the classes leave each other."""
        for group, units in self._groups.items():
            check_scores(scores[group], f"scores of group {group}")
            if scores[group].shape != (units,):
                raise BudgetError(
                    f"scores of group {group}: {scores[group].size} of them, expected {units}"
                )
        for name, budget in budgets.items():
            self.check_feasible(name, budget)

        @cache
        def alone(name: str) -> dict[str, int]:
            return self._one(name, budgets[name], self._grids[name], scores)

        solved: dict[str, Nested] = {}
        for name in self._widest_first(budgets, alone):
            around = [n for n in solved if self._covers(n, name, budgets, alone)]
            ceiling = {
                g: min([units, *(solved[n].keep[g] for n in around)])
                for g, units in self._groups.items()
            }
            if around:
                grid = self._grids[name].under(ceiling)
                keep = self._one(name, budgets[name], grid, scores)
            else:
                keep = alone(name)
            solved[name] = Nested(keep, ceiling, tuple(around))
        return {name: solved[name] for name in budgets}

    def check_feasible(self, name: str, budget: Budget) -> None:
        """BudgetError if not even the smallest model is within a class's budget."""
        grid = self._grids[name]
        ladder = Ladder.of(grid, self._groups)
        figures = self._model(name).figures(ladder.levels[ladder.first])
        missed = list(self._told(name, budget, figures))
        if not missed:
            return
        limits = " and ".join(f"{key} {limit}" for key, limit, _ in missed)
        least = " and ".join(least for *_, least in missed)
        remedy = "raise the budget or lower channel_multiple"
        if grid.protected:
            remedy = "raise the budget, lower channel_multiple or protect fewer layers"
        raise BudgetError(
            f"class {name}: {limits} cannot be met, the smallest achievable "
            f"{'is' if len(missed) == 1 else 'are'} {least}; {remedy}"
        )

    def binding(
        self, name: str, budget: Budget, keep: KeepCounts, ceiling: KeepCounts
    ) -> dict[str, int]:
        """How many groups' next step each limit of a class refuses.

        Args:
            name: The class.
            budget: Its budget.
            keep: Its keep counts.
            ceiling: What the classes around this one leave it.

        Returns:
            Per limit, as the budget calls it, a count; `nesting` counts the groups that are as
            wide as the narrowest class around this one.
        """
        ladder = Ladder.of(self._grids[name].under(ceiling), self._groups)
        counts = self._costs.vector(keep)
        route = Route(ladder, self._model(name), ladder.at_most(counts), ladder.last, 1)
        figures, limits = route.walk.figures(), self._limits(name, budget)
        refused = {
            key: int((route.open & (route.walk.added(i) > limits[i] - figures[i])).sum())
            for i, key in enumerate(KEYS)
            if limits[i] < NO_LIMIT
        }
        top = np.array([self._grids[name].levels[g][-1] for g in self._groups])
        return refused | {"nesting": int((~route.open & (counts < top)).sum())}

    # ---- limits

    def _model(self, name: str) -> CostModel:
        return self._models.get(name, self._costs)

    def _limits(self, name: str, budget: Budget) -> list[int]:
        """The largest allowed figures, in the order of `KEYS`."""
        limits = budget.limits()
        found = [limits.get(figure, NO_LIMIT) for figure in FIGURES]
        latency, ms = self._latency.get(name), budget.latency_ms
        return [*found, NO_LIMIT if latency is None or ms is None else latency.cap(ms)]

    def _told(
        self, name: str, budget: Budget, figures: Sequence[int]
    ) -> Iterator[tuple[str, str, str]]:
        """Per limit that figures exceed: its key, itself, and the figure as it is compared."""
        for i, (key, limit) in enumerate(zip(KEYS, self._limits(name, budget), strict=True)):
            if figures[i] <= limit:
                continue
            if key == "latency_ms":
                latency = self._latency[name]
                ms, error = latency.ms(figures[i]), latency.error
                told = f"{ms * (1 + error):.4g} ({ms:.4g} predicted, error {100 * error:.0f} %)"
                yield key, f"{budget.latency_ms:g}", told
            elif key == "ram_bytes" and budget.batch > 1:
                asked = f"{budget.ram_bytes} at batch {budget.batch}"
                yield key, asked, str(budget.batch * figures[i])
            else:
                yield key, str(getattr(budget, key)), str(figures[i])

    # ---- nesting

    def _latency_limit(self, name: str, budget: Budget) -> bool:
        return name in self._latency and budget.latency_ms is not None

    def _widest_first(
        self, budgets: Mapping[str, Budget], alone: Callable[[str], KeepCounts]
    ) -> list[str]:
        """A covering budget comes before what it covers: it has at least its limits.

        Among equal budgets, where latencies differ, that of the larger model comes first.
        """
        names = ("macs", "artifact_bytes", "peak_activation_bytes")
        widths = {
            n: tuple(float(budget.limits().get(figure, np.inf)) for figure in names)
            for n, budget in budgets.items()
        }
        timed = {widths[n] for n, budget in budgets.items() if self._latency_limit(n, budget)}
        equal = {key for key, count in Counter(widths.values()).items() if count > 1}
        macs = {
            n: self._costs.costs(alone(n)).macs if widths[n] in timed & equal else 0
            for n in budgets
        }
        return sorted(budgets, key=lambda n: (widths[n], macs[n]), reverse=True)

    def _covers(
        self,
        wide: str,
        name: str,
        budgets: Mapping[str, Budget],
        alone: Callable[[str], KeepCounts],
    ) -> bool:
        """Whether what a class may keep is within another's budget.

        Milliseconds of two classes cannot be compared, so where the wider one's latency is limited
        it is asked what the narrower class would keep by itself.
        """
        if not budgets[wide].covers(budgets[name]):
            return False
        limit = budgets[wide].latency_ms
        if limit is None or wide not in self._latency:
            return True
        took = self._model(wide).figures(self._costs.vector(alone(name)))
        return took[-1] <= self._latency[wide].cap(limit)

    # ---- one class

    def _one(self, name: str, budget: Budget, grid: Grid, scores: Scores) -> dict[str, int]:
        ladder = Ladder.of(grid, self._groups, scores)
        model, limits = self._model(name), self._limits(name, budget)
        places = uniform(ladder, model, limits)
        if self._allocation is Allocation.GLOBAL:
            places = least_important(ladder, model, limits, places, self._floor)
        counts = filled(ladder, model, limits, places, self._allocation)
        return dict(zip(self._groups, map(int, counts), strict=True))
