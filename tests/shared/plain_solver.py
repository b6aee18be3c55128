"""The solver as its definition reads: one group after the other, every cost asked anew."""

from fractions import Fraction

import numpy as np

from fleetprune.budgets import Allocation


def solve(costs, grid, budget, scores, *, allocation=Allocation.UNIFORM, floor=0.5, ceiling=None):
    """Keep counts of one class.

    `costs` is a function of keep counts, `scores` fall; ties go to the group that stands first.
    """
    groups = {g: steps[-1] for g, steps in grid.levels.items()}
    ceiling = ceiling or groups
    limits = budget.limits()

    def at_most(limit):
        return {
            g: max((n for n in steps if n <= limit[g] + 1e-9), default=steps[0])
            for g, steps in grid.levels.items()
        }

    def step(group, count, up):
        steps = grid.levels[group]
        if up:
            return next((n for n in steps if n > count), None)
        return next((n for n in reversed(steps) if n < count), None)

    def fits(keep):
        got = costs(keep)
        return all(getattr(got, name) <= limit for name, limit in limits.items())

    uniform = {g: steps[0] for g, steps in grid.levels.items()}
    for share in sorted({Fraction(n, groups[g]) for g, s in grid.levels.items() for n in s}):
        keep = at_most({g: min(float(share) * n, ceiling[g]) for g, n in groups.items()})
        if not fits(keep):
            break
        uniform = keep
    counts = dict(uniform)
    if allocation is Allocation.GLOBAL:
        lowest = at_most({g: max(1.0, floor * n) for g, n in uniform.items()})
        counts = at_most(ceiling)
        while not fits(counts):
            before, best = costs(counts), None
            for g in counts:
                below = step(g, counts[g], up=False)
                if below is None or below < lowest[g]:
                    continue
                after = costs({**counts, g: below})
                saved = 0.0
                for name, limit in limits.items():
                    if getattr(before, name) > limit:
                        saved += (getattr(before, name) - getattr(after, name)) / limit
                saved += 1e-6 * (before.macs - after.macs) / max(before.macs, 1)
                lost = float(scores[g][below : counts[g]].sum())
                price = lost / saved if saved > 0 else np.inf
                if best is None or price < best[0]:
                    best = (price, g, below)
            if best is None:
                counts = dict(uniform)
                break
            counts[best[1]] = best[2]
    while True:
        before, best = costs(counts), None
        for g in counts:
            above = step(g, counts[g], up=True)
            if above is None or above > ceiling[g] or not fits({**counts, g: above}):
                continue
            added = max(costs({**counts, g: above}).macs - before.macs, 1)
            if allocation is Allocation.UNIFORM:
                value = (-counts[g] / groups[g], (above - counts[g]) / added)
            else:
                value = (0.0, float(scores[g][counts[g] : above].sum()) / added)
            if best is None or value > best[0]:
                best = (value, g, above)
        if best is None:
            return counts
        counts[best[1]] = best[2]
