"""Which units are kept: exact counts, ties to the lower index, nested by construction.

All classes share one order of units per group, so a class's mask is the first `keep` of that
order and every narrower class's units are a subset of every wider one's.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import BudgetError


def check_scores(scores: NDArray[np.float32], what: str = "scores") -> None:
    """Refuse scores that are not a finite vector (BudgetError)."""
    if scores.ndim != 1:
        raise BudgetError(f"{what} of shape {scores.shape}, expected one per unit")
    if not np.isfinite(scores).all():
        raise BudgetError(f"{what}: unit {int(np.argmin(np.isfinite(scores)))} is not finite")


def order_units(scores: NDArray[np.float32]) -> NDArray[np.intp]:
    """Units by falling score; ties go to the lower index.

    Args:
        scores: (n,) finite, one per unit.

    Returns:
        (n,) permutation of the units.

    Raises:
        BudgetError: A score is not finite.
    """
    check_scores(scores)
    return np.argsort(-scores.astype(np.float64), kind="stable")


def keep_top(scores: NDArray[np.float32], keep: int) -> NDArray[np.bool_]:
    """Mark the `keep` highest scores; ties go to the lower index.

    Args:
        scores: (n,) finite, one per prunable unit.
        keep: Units to keep, 0 <= keep <= n.

    Returns:
        (n,) with exactly `keep` true.

    Raises:
        BudgetError: `keep` is outside 0..n, or a score is not finite.
    """
    if not 0 <= keep <= scores.size:
        raise BudgetError(f"keep {keep} of {scores.size} units, expected 0..{scores.size}")
    mask = np.zeros(scores.size, np.bool_)
    mask[order_units(scores)[:keep]] = True
    return mask


def bounded_order(
    scores: Mapping[str, NDArray[np.float32]],
    cuts: Mapping[str, set[int]],
    share: float,
    growth: Mapping[str, NDArray[np.float32]] | None = None,
) -> dict[str, NDArray[np.intp]]:
    """A new order in which each mask keeps most of its units (RigL, Evci et al. 2020).

    Of a mask of `c` units at most `floor(share * c)` are replaced: the lowest by score make room
    for the highest outside. With `growth`, which has another scale, as many as allowed are; by
    score alone only where the newcomer's is higher. Masks stay nested: what a narrower one takes
    in, a wider one has, and that counts towards its share too, even where it then exceeds it.

    Args:
        scores: Per group (n,) finite, in the present order of units.
        cuts: Per group the keep counts of all classes.
        share: Between 0 and 1.
        growth: Per group (n,) finite, what a unit outside would be worth; None: its score.

    Returns:
        Per group a permutation of the present order, as `settle_order` gives it.
    """
    ranked = {
        group: _bounded(values, cuts.get(group, set()), share, (growth or scores)[group], growth)
        for group, values in scores.items()
    }
    return settle_order(ranked, cuts)


def _bounded(
    scores: NDArray[np.float32],
    cuts: set[int],
    share: float,
    outside: NDArray[np.float32],
    growth: Mapping[str, NDArray[np.float32]] | None,
) -> NDArray[np.float32]:
    """(n,) ranks, the high ones first, that put the right units before each cut."""
    check_scores(scores)
    check_scores(outside, "growth")
    ranks = np.zeros(scores.size, np.float32)
    inner: set[int] = set()
    edges = sorted(c for c in cuts if 0 < c < scores.size)
    for level, cut in enumerate(edges):
        before = set(range(cut))
        forced = inner - before
        mine = sorted(before - inner, key=lambda u: (float(scores[u]), -u))
        others = sorted(
            set(range(scores.size)) - before - inner, key=lambda u: (-float(outside[u]), u)
        )
        drop = len(forced)
        room = max(0, int(share * cut) - drop)
        for out in others[:room]:
            if drop >= len(mine) or (growth is None and scores[out] <= scores[mine[drop]]):
                break
            forced.add(out)
            drop += 1
        inner = (before | forced) - set(mine[:drop])
        ranks[sorted(inner)] += len(edges) - level
    return ranks


def settle_order(
    scores: Mapping[str, NDArray[np.float32]], cuts: Mapping[str, set[int]]
) -> dict[str, NDArray[np.intp]]:
    """The order by score, left as it is wherever the order makes no difference.

    Only the cuts between classes tell units apart. Units that stay between the same two cuts keep
    their present places, so that a small change of scores does not cost every device its
    error-feedback residual.

    Args:
        scores: Per group (n,) finite, in the present order of units.
        cuts: Per group the keep counts of all classes.

    Returns:
        Per group a permutation of the present order; the identity where no unit crosses a cut.
    """
    settled: dict[str, NDArray[np.intp]] = {}
    for group, values in scores.items():
        best = order_units(values)
        edges = [0, *sorted(c for c in cuts.get(group, set()) if 0 < c < values.size), values.size]
        order = np.empty(values.size, np.intp)
        for start, stop in pairwise(edges):
            members = best[start:stop]
            stayed = members[(members >= start) & (members < stop)]
            order[stayed] = stayed
            free = np.setdiff1d(np.arange(start, stop), stayed)
            order[free] = members[(members < start) | (members >= stop)]
        settled[group] = order
    return settled
