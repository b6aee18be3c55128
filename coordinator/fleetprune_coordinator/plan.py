"""From a fleet's budgets to the keep counts of each class in a round."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fleetprune.budgets import Allocation, Budget, Grid
from fleetprune.costs import CostModel, Costs
from fleetprune.errors import BudgetError
from fleetprune.latency import LatencyModel
from fleetprune.layout import Architecture
from fleetprune.patterns import Granularity, Pattern
from fleetprune.protection import UNPROTECTED, Protection, protect
from fleetprune.schedule import Schedule
from fleetprune.solver import BudgetSolver
from fleetprune.weight_masks import Masks
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.weight_pruning import WeightPruning, WeightRule

Scores = Mapping[str, NDArray[np.float32]]
NS = 1e6  # nanoseconds in a millisecond: schedules ease whole numbers
_UNITS_STAY = (
    'single weights save bytes alone: raise the budget or set pruning.granularity = "hybrid"'
)


class Planner:
    """Solves every class's keep counts for a round, under the budgets and the schedule."""

    def __init__(
        self,
        architecture: Architecture,
        budgets: Mapping[str, Budget],
        *,
        schedule: Schedule,
        multiple: int = 8,
        allocation: Allocation = Allocation.UNIFORM,
        floor: float = 0.5,
        multiples: Mapping[str, int] | None = None,
        protection: Protection = UNPROTECTED,
        latency: Mapping[str, LatencyModel] | None = None,
        counted: Architecture | None = None,
        weights: WeightRule | None = None,
    ) -> None:
        """Prepare; BudgetError if a class's final budget cannot be met.

        Args:
            architecture: The model.
            budgets: Per class.
            schedule: When budgets come into force.
            multiple: What keep counts are multiples of.
            allocation: How a class's cut is shared out.
            floor: See `BudgetSolver`.
            multiples: Of single classes, instead of `multiple`.
            protection: Groups that are spared.
            latency: Per class what its devices measured, as far as they have: only there does a
                limit of latency decide keep counts.
            counted: Whose costs the budgets are held against, where that is not `architecture`: of
                quantised files (`int8.planned`).
            weights: How single weights are pruned; None: not at all.
        """
        self.weights = WeightPruning(architecture, weights or WeightRule(), counted)
        granularity = self.weights.rule.granularity
        if granularity is Granularity.WEIGHT:
            protection = replace(protection, whole=frozenset(architecture.groups))
        self.budgets = dict(budgets)
        self.latency = {n: m for n, m in (latency or {}).items() if n in self.budgets}
        self.groups = dict(architecture.groups)
        self.allocation, self._floor, self.schedule = allocation, floor, schedule
        self._model = CostModel(counted or architecture)
        self.dense = CostModel(architecture).costs(architecture.groups)
        self.grids: dict[str, Grid] = {
            name: Grid.of(
                architecture.groups,
                (multiples or {}).get(name, multiple),
                protection,
                architecture.channels,
            )
            for name in self.budgets
        }
        self.solver = self._solver()
        self._check_feasible()

    @classmethod
    def of(
        cls,
        config: FleetConfig,
        architecture: Architecture,
        latency: Mapping[str, LatencyModel] | None = None,
        allocation: Allocation | None = None,
        counted: Architecture | None = None,
    ) -> Self:
        """The planner that a fleet's description asks for.

        Args:
            config: The description.
            architecture: Its model.
            latency: See `__init__`.
            allocation: Instead of the description's.
            counted: See `__init__`.

        Raises:
            BudgetError: A budget cannot be met, or a layer that is to be spared is not there.
        """
        pruning = config.pruning
        dense = CostModel(architecture).costs(architecture.groups)
        return cls(
            architecture,
            {name: group.budget(dense) for name, group in config.classes.items()},
            schedule=config.schedule,
            multiple=pruning.channel_multiple,
            allocation=allocation or pruning.allocation,
            floor=pruning.floor,
            multiples={n: c.multiple for n, c in config.classes.items() if c.multiple is not None},
            protection=protect(
                architecture,
                exclude=pruning.exclude,
                minimum=pruning.minimum,
                multiple=pruning.multiple,
            ),
            latency=latency,
            counted=counted,
            weights=WeightRule(
                pruning.granularity,
                Pattern.parse(pruning.pattern),
                pruning.weight_allocation,
                pruning.exclude,
                pruning.dense_layers,
            ),
        )

    def _solver(self) -> BudgetSolver:
        return BudgetSolver(
            self._model,
            self.grids,
            allocation=self.allocation,
            floor=self._floor,
            latency=self.latency,
        )

    def _check_feasible(self) -> None:
        """BudgetError with every class whose budget cannot be met."""
        refused = []
        for name, budget in self.budgets.items():
            try:
                self.solver.check_feasible(name, self.of_units(budget))
            except BudgetError as e:
                if self.weights.rule.granularity is Granularity.WEIGHT:
                    missed, _, _ = str(e).partition(";")
                    refused.append(f"{missed}; {_UNITS_STAY}")
                else:
                    refused.append(str(e))
        if refused:
            raise BudgetError("; ".join(refused))
        flat = {g: np.zeros(n, np.float32) for g, n in self.groups.items()}
        for name, keep in self._solve(self.budgets, flat).items():
            try:
                self.weights.check(name, self.budgets[name], keep, self.grids[name])
            except BudgetError as e:
                refused.append(str(e))
        if refused:
            raise BudgetError("; ".join(refused))

    def of_units(self, budget: Budget) -> Budget:
        """What of a budget units answer for: where weights are pruned, they answer for bytes."""
        if not self.weights.names:  # not wanted, or all layers are spared
            return budget
        return budget.model_copy(update={"flash_bytes": None})

    def _solve(self, budgets: Mapping[str, Budget], scores: Scores) -> dict[str, dict[str, int]]:
        units = {name: self.of_units(budget) for name, budget in budgets.items()}
        return self.solver.solve(units, falling(scores))

    def learn_latency(self, latency: Mapping[str, LatencyModel]) -> None:
        """Take in what devices have measured since; from now on it decides.

        Args:
            latency: Per class, instead of what was known of it.

        Raises:
            BudgetError: A limit of latency turns out to be out of reach; nothing is changed.
        """
        before, solver = self.latency, self.solver
        self.latency = before | {n: m for n, m in latency.items() if n in self.budgets}
        self.solver = self._solver()
        try:
            self._check_feasible()
        except BudgetError:
            self.latency, self.solver = before, solver
            raise

    def costs(self, keep: Mapping[str, int]) -> Costs:
        """Exact costs of keep counts."""
        return self._model.costs(keep)

    def shapes(
        self, round_: int, scores: Scores, slack: float | None = None
    ) -> dict[str, dict[str, int]]:
        """Keep counts per class in a round.

        Args:
            round_: The round; the schedule says how far above its budget a class still is.
            scores: Per group (units,), in any order.
            slack: What a dynamic schedule has left; None: what the schedule's curve says.

        Returns:
            Per class its keep counts.

        Raises:
            BudgetError: A score is not finite.
        """
        limits = {name: self._in_force(round_, name, slack) for name in self.budgets}
        return self._solve(limits, scores)

    def masks(
        self,
        round_: int,
        shapes: Mapping[str, Mapping[str, int]],
        scores: Scores,
        slack: float | None = None,
    ) -> dict[str, Masks]:
        """Which single weights stay in a round.

        Args:
            round_: As in `shapes`.
            shapes: Per class its keep counts in this round.
            scores: Per prunable weight, dense, in the present order of units.
            slack: As in `shapes`.

        Returns:
            Per class that has pruned some its masks.

        Raises:
            BudgetError: A score is negative or not finite; or units of which `allocation` leaves
                more parameters than was to be expected leave too few bytes for the weights.
        """
        curve = self.schedule.slack(round_)
        left = curve if slack is None else min(slack, curve)
        found = {}
        for name, keep in shapes.items():
            limit = self._in_force(round_, name, slack).flash_bytes
            try:
                found[name] = self.weights.masks(keep, limit, scores, left)
            except BudgetError as e:
                raise BudgetError(f"class {name}: {e}") from e
        return {name: masks for name, masks in found.items() if masks}

    def _in_force(self, round_: int, name: str, slack: float | None) -> Budget:
        budget, dense = self.budgets[name], self.costs(self.groups)
        pairs = {
            "flash_bytes": dense.artifact_bytes,
            "ram_bytes": budget.batch * dense.peak_activation_bytes,
            "macs": dense.macs,
        }
        eased: dict[str, float] = {
            field: self.schedule.limit(round_, cost, limit, slack)
            for field, cost in pairs.items()
            if (limit := getattr(budget, field)) is not None
        }
        if budget.latency_ms is not None and (model := self.latency.get(name)) is not None:
            cost = math.ceil(NS * model.at_most(self.groups))
            limit = self.schedule.limit(round_, cost, int(NS * budget.latency_ms), slack)
            eased["latency_ms"] = max(budget.latency_ms, limit / NS)
        return budget.model_copy(update=eased)

    def check(self, name: str, costs: Costs) -> None:
        """Refuse a shipped file that is over its class's budget (BudgetError)."""
        if violations := self.budgets[name].violations(costs):
            raise BudgetError(f"class {name}: {'; '.join(violations)}")


def falling(scores: Scores) -> dict[str, NDArray[np.float32]]:
    """Scores by falling importance."""
    return {g: np.sort(s)[::-1] for g, s in scores.items()}
