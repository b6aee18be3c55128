"""What a plan says: per class what it keeps, what that costs, and which limit is in the way."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fleetprune.budgets import Budget
from fleetprune.costs import Costs
from fleetprune.latency import LatencyTable
from fleetprune.solver import KEYS
from fleetprune_coordinator.plan import Planner, Scores, falling

AT_THE_END = 1 << 30
"""A round in which every schedule has ended."""


@dataclass(frozen=True)
class Limit:
    """One limit of one class."""

    key: str
    """As the budget calls it."""
    budget: float
    reached: float
    """In the unit of the budget; a latency with its stated error."""
    alone: dict[str, int]
    """What the class would keep if this were its only limit, and it the only class."""
    refuses: int
    """Groups whose next step it does not allow, or layers whose weights it prunes; 0: it does not
    bind."""


@dataclass(frozen=True)
class ClassPlan:
    """What one class gets."""

    keep: dict[str, int]
    costs: Costs
    limits: tuple[Limit, ...]
    nesting: int
    """Groups that are as wide as the class around this one."""
    around: tuple[str, ...]
    """Classes whose models contain this one's."""
    weights: dict[str, tuple[int, int]]
    """Per layer of which single weights are pruned how many stay, and how many its units have."""
    predicted_ms: float | None
    """Without the stated error; None: its devices have measured nothing."""

    @property
    def binds(self) -> str | None:
        """The limit that refuses most groups their next step; None if none does."""
        most = max(self.limits, key=lambda limit: limit.refuses, default=None)
        return most.key if most is not None and most.refuses else None


def explain(
    planner: Planner, scores: Scores, weights: Scores | None = None
) -> dict[str, ClassPlan]:
    """Solve the final budgets and say what each limit does.

    Args:
        planner: Of the fleet.
        scores: Per group (units,), in any order.
        weights: Scores of single weights, where they are pruned, by name.
    """
    solver, ordered = planner.solver, falling(scores)
    found: dict[str, ClassPlan] = {}
    of_units = {name: planner.of_units(budget) for name, budget in planner.budgets.items()}
    nests = solver.nest(of_units, ordered)
    shapes = {name: nested.keep for name, nested in nests.items()}
    masks = {} if weights is None else planner.masks(AT_THE_END, shapes, weights)
    for name, nested in nests.items():
        budget, mine = planner.budgets[name], masks.get(name, {})
        costs = planner.costs(nested.keep)
        if mine:
            costs = replace(costs, artifact_bytes=planner.weights.bytes(nested.keep, mine))
        refused = solver.binding(name, of_units[name], nested.keep, nested.ceiling)
        refused.setdefault("flash_bytes", sum(not kept.all() for kept in mine.values()))
        model = planner.latency.get(name)
        reached: dict[str, float | None] = {
            "flash_bytes": costs.artifact_bytes,
            "ram_bytes": budget.batch * costs.peak_activation_bytes,
            "macs": costs.macs,
            "latency_ms": None if model is None else model.at_most(nested.keep),
        }
        limits = []
        for key in KEYS:
            limit, got = getattr(budget, key), reached[key]
            if limit is None or got is None:
                continue
            only = Budget.model_validate({key: limit, "batch": budget.batch})
            alone = solver.solve({name: planner.of_units(only)}, ordered)[name]
            limits.append(Limit(key, limit, got, alone, refused[key]))
        found[name] = ClassPlan(
            keep=nested.keep,
            costs=costs,
            limits=tuple(limits),
            nesting=refused["nesting"],
            around=nested.around,
            weights={n: (int(kept.sum()), kept.size) for n, kept in mine.items()},
            predicted_ms=None if model is None else model.predict(nested.keep),
        )
    return found


def as_json(
    planner: Planner, plans: Mapping[str, ClassPlan], tables: Mapping[str, LatencyTable]
) -> dict[str, Any]:
    """A plan as JSON values.

    Args:
        planner: Of the fleet.
        plans: What `explain` found.
        tables: Per class the measurements behind its predictions.
    """
    groups = planner.groups
    return {
        "schema": 1,
        "allocation": planner.allocation.value,
        "granularity": planner.weights.rule.granularity.value,
        "groups": dict(groups),
        "dense": _costs(planner.dense),
        "classes": {name: _class(planner, name, plan, tables) for name, plan in plans.items()},
    }


def _class(
    planner: Planner, name: str, plan: ClassPlan, tables: Mapping[str, LatencyTable]
) -> dict[str, Any]:
    model, table = planner.latency.get(name), tables.get(name)
    latency = None
    if model is not None and table is not None:
        latency = {
            "predicted_ms": plan.predicted_ms,
            "error": model.error,
            "worst_error": model.worst,
            "block": model.block,
            "runtime": table.runtime,
            "version": table.version,
            "precision": table.precision.value,
            "devices": table.devices,
            "shapes": len(table.points),
        }
    return {
        "keep": plan.keep,
        "units": sum(plan.keep.values()),
        "costs": _costs(plan.costs),
        "weights": {n: {"kept": kept, "of": of} for n, (kept, of) in plan.weights.items()},
        "batch": planner.budgets[name].batch,
        "limits": {
            limit.key: {
                "budget": limit.budget,
                "reached": limit.reached,
                "alone": {"units": sum(limit.alone.values()), "keep": limit.alone},
                "refuses": limit.refuses,
            }
            for limit in plan.limits
        },
        "binds": plan.binds,
        "inside": list(plan.around),
        "nesting_refuses": plan.nesting,
        "latency": latency,
    }


def _costs(costs: Costs) -> dict[str, int]:
    return {
        "artifact_bytes": costs.artifact_bytes,
        "macs": costs.macs,
        "peak_activation_bytes": costs.peak_activation_bytes,
    }
