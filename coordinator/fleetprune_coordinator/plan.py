"""From a fleet's budgets to the keep counts of each class in a round."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fleetprune.budgets import Allocation, Budget, BudgetSolver
from fleetprune.costs import CostModel, Costs
from fleetprune.errors import BudgetError
from fleetprune.layout import Architecture
from fleetprune.schedule import PolynomialDecay


class Planner:
    """Solves every class's keep counts for a round, under the budgets and the schedule."""

    def __init__(
        self,
        architecture: Architecture,
        budgets: Mapping[str, Budget],
        *,
        schedule: PolynomialDecay,
        multiple: int = 8,
        allocation: Allocation = Allocation.UNIFORM,
    ) -> None:
        """Prepare; BudgetError if a class's final budget cannot be met."""
        self.budgets = dict(budgets)
        self._schedule = schedule
        self._groups = architecture.groups
        model = CostModel(architecture)
        self.dense = model.costs(architecture.groups)
        self._costs = model.costs
        self._solver = BudgetSolver(
            model.costs, architecture.groups, multiple=multiple, allocation=allocation
        )
        flat = {g: np.ones(n, np.float32) for g, n in architecture.groups.items()}
        self._solver.solve(self.budgets, flat)

    def costs(self, keep: Mapping[str, int]) -> Costs:
        """Exact costs of keep counts."""
        return self._costs(keep)

    def shapes(
        self, round_: int, scores: Mapping[str, NDArray[np.float32]]
    ) -> dict[str, dict[str, int]]:
        """Keep counts per class in a round.

        Args:
            round_: The round; the schedule says how far above its budget a class still is.
            scores: Per group (units,), in any order.

        Returns:
            Per class its keep counts.
        """
        falling = {g: np.sort(s)[::-1] for g, s in scores.items()}
        return self._solver.solve(
            {name: self._in_force(round_, budget) for name, budget in self.budgets.items()},
            falling,
        )

    def _in_force(self, round_: int, budget: Budget) -> Budget:
        dense = self.dense
        pairs = {
            "flash_bytes": dense.artifact_bytes,
            "ram_bytes": dense.peak_activation_bytes,
            "macs": dense.macs,
        }
        eased = {
            field: self._schedule.limit(round_, cost, limit)
            for field, cost in pairs.items()
            if (limit := getattr(budget, field)) is not None
        }
        return budget.model_copy(update=eased)

    def check(self, name: str, costs: Costs) -> None:
        """Refuse a shipped file that is over its class's budget (BudgetError)."""
        if violations := self.budgets[name].violations(costs):
            raise BudgetError(f"class {name}: {'; '.join(violations)}")
