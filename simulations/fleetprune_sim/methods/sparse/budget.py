"""How many weights stay, so that what is left of the multiply-accumulates fits the tightest class.

One model serves every class, so the tightest budget is everybody's. It is met exactly in whole
weights: `fixed + sum(kept * cost) <= budget` for every tensor's count.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fleetprune.costs import Costs
from fleetprune.errors import BudgetError
from fleetprune_coordinator.config import ClassConfig
from fleetprune_sim.methods.sparse.prunable import SparseLayout

HALVINGS = 60  # of the scale of densities: more than a float64 can tell apart
MOST_FOR_ENDS = 0.5
"""Share of the budget that tensors which are never pruned may take; above, nothing is spared."""


def tightest(classes: Mapping[str, ClassConfig], dense: Costs) -> int:
    """Multiply-accumulates that the tightest class allows.

    A budget of bytes is taken as the same share of multiply-accumulates; peak memory does not
    depend on single weights.

    Args:
        classes: Of the fleet.
        dense: Costs of the dense model.
    """
    limits = [dense.macs]
    for group in classes.values():
        budget = group.budget(dense)
        if budget.macs is not None:
            limits.append(budget.macs)
        if budget.flash_bytes is not None:
            limits.append(dense.macs * budget.flash_bytes // dense.artifact_bytes)
    return min(limits)


def uniform(layout: SparseLayout) -> tuple[float, ...]:
    """The same density for every tensor."""
    return (1.0,) * len(layout.shapes)


def erdos_renyi_kernel(layout: SparseLayout) -> tuple[float, ...]:
    """Relative densities by the sum of a tensor's axes over their product.

    Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020: small tensors stay
    denser than large ones.
    """
    return tuple(sum(shape) / math.prod(shape) for shape in layout.shapes)


def keep_counts(layout: SparseLayout, densities: Sequence[float], budget: int) -> tuple[int, ...]:
    """Weights to keep per tensor, in the given relation of densities, as many as fit.

    Args:
        layout: Tensors and costs.
        densities: Per tensor, relative to each other; none ends above 1.
        budget: Multiply-accumulates allowed.

    Returns:
        Per tensor 1..size; the densities' largest common factor that fits, rounded down, and then
        one weight more for each tensor that still has room, largest remainder first.

    Raises:
        BudgetError: Not even one weight per tensor fits.
    """
    sizes = layout.prunable.sizes
    least = layout.macs((1,) * len(sizes))
    if least > budget:
        raise BudgetError(
            f"{budget} multiply-accumulates for a model of single weights, which has at least "
            f"{least}: give the tightest class a larger budget"
        )

    def exact(scale: float) -> list[float]:
        return [min(1.0, scale * d) * n for d, n in zip(densities, sizes, strict=True)]

    def whole(scale: float) -> tuple[int, ...]:
        return tuple(max(1, math.floor(k)) for k in exact(scale))

    low, high = 0.0, 1.0 / min(densities, default=1.0)
    if layout.macs(whole(high)) <= budget:
        return whole(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if layout.macs(whole(middle)) <= budget else (low, middle)
    kept = list(whole(low))
    remainders = [k - math.floor(k) for k in exact(low)]
    for i in np.argsort([-r for r in remainders], kind="stable"):
        more = [k + (j == i) for j, k in enumerate(kept)]
        if kept[i] < sizes[i] and layout.macs(more) <= budget:
            kept = more
    return tuple(kept)
