"""One class's keep counts under its limits: shared out evenly or by importance, then filled up.

Both walk a ladder: per group its levels, with what lies between two of them. Ties go to the lower
index.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetprune.budgets import Allocation, Grid
from fleetprune.costs import FIGURES, CostModel
from fleetprune.products import Ints, Places

Floats = NDArray[np.float64]
Scores = Mapping[str, NDArray[np.float32]]

NO_LIMIT = int(np.iinfo(np.int64).max)
_MACS = FIGURES.index("macs")


@dataclass(frozen=True)
class Ladder:
    """The levels of a grid, group after group, and the importance of what lies between them."""

    levels: Ints
    """(levels,)"""
    first: Places
    """(groups,) place of each group's lowest level."""
    last: Places
    """(groups,) place of each group's highest level."""
    gains: Floats
    """(levels,) importance of the units between the level below and this one; 0 for the lowest."""
    units: Ints
    """(groups,) of the dense model."""

    @classmethod
    def of(cls, grid: Grid, groups: Mapping[str, int], scores: Scores | None = None) -> "Ladder":
        """Lay out a grid.

        Args:
            grid: Levels per group.
            groups: Units per group of the dense model.
            scores: Per group (units,), by falling importance; None: no gains.
        """
        sizes = np.array([len(grid.levels[g]) for g in groups], np.intp)
        last = np.cumsum(sizes) - 1
        levels = np.array([n for g in groups for n in grid.levels[g]], np.int64)
        gains = np.zeros(levels.size)
        if scores is not None:
            for g, end, size in zip(groups, last, sizes, strict=True):
                steps, values = np.array(grid.levels[g]), scores[g]
                found = gains[end - size + 2 : end + 1]
                found[:] = values[steps[:-1]]
                for i in np.flatnonzero(np.diff(steps) > 1):  # of several units
                    found[i] = values[steps[i] : steps[i + 1]].sum()
        units = np.array(list(groups.values()), np.int64)
        return cls(levels, last - sizes + 1, last, gains, units)

    def at_most(self, limit: Floats | Ints) -> Places:
        """(groups,) places of the highest levels within `limit` (groups,), else of the lowest."""
        within = np.add.reduceat(
            self.levels <= np.repeat(limit + 1e-9, self.last - self.first + 1),
            self.first,
            dtype=np.intp,
        )
        places: Places = self.first + np.maximum(within - 1, 0)
        return places


class Route:
    """Keep counts on their way up or down a ladder, one step of one group after another."""

    def __init__(
        self, ladder: Ladder, model: CostModel, places: Places, end: Places, direction: int
    ) -> None:
        """Begin.

        Args:
            ladder: What is stepped on.
            model: What it costs.
            places: (groups,) where to begin.
            end: (groups,) where each group's steps end.
            direction: 1 leads up, -1 down.
        """
        self._levels, self._end, self._direction = ladder.levels, end, direction
        self.places = places.copy()
        self.counts: Ints = ladder.levels[places]
        """(groups,)"""
        self.open: NDArray[np.bool_] = places != end
        """(groups,) whether a group has another step."""
        ahead = np.where(self.open, places + direction, places)
        self.walk = model.walk(self.counts, ladder.levels[ahead] - self.counts)

    def step(self, group: int) -> None:
        """Take one group's step."""
        place = int(self.places[group]) + self._direction
        self.places[group] = place
        self.counts[group] = count = self._levels[place]
        self.open[group] = more = place != self._end[group]
        then = int(self._levels[place + self._direction] - count) if more else 0
        self.walk.move(group, then)


def uniform(ladder: Ladder, model: CostModel, limits: Sequence[int]) -> Places:
    """The largest common share of every group that meets the limits."""
    widths = np.repeat(ladder.units, ladder.last - ladder.first + 1)
    shares = np.unique(ladder.levels / widths)
    low, high = -1, len(shares) - 1  # figures rise with the share, so bisection is exact
    while low < high:
        middle = (low + high + 1) // 2
        places = ladder.at_most(shares[middle] * ladder.units)
        figures = model.figures(ladder.levels[places])
        if all(f <= limit for f, limit in zip(figures, limits, strict=True)):
            low = middle
        else:
            high = middle - 1
    return ladder.at_most(shares[low] * ladder.units) if low >= 0 else ladder.first


def least_important(
    ladder: Ladder, model: CostModel, limits: Sequence[int], uniform: Places, floor: float
) -> Places:
    """Take away the steps that lose least importance per cost saved."""
    lowest = ladder.at_most(np.maximum(1.0, floor * ladder.levels[uniform]))
    route = Route(ladder, model, ladder.last, np.minimum(lowest, ladder.last), -1)
    lost = np.where(route.open, ladder.gains[route.places], np.inf)
    price = np.empty_like(lost)
    while True:
        figures = route.walk.figures()
        over = [i for i, limit in enumerate(limits) if figures[i] > limit]
        if not over:
            return route.places
        saved = route.walk.added(over[0]) / -limits[over[0]]
        for i in over[1:]:
            saved += route.walk.added(i) / -limits[i]
        # A step off the peak saves nothing by itself but may be what the peak needs next.
        saved += -1e-6 * route.walk.added(_MACS) / max(figures[_MACS], 1)
        price.fill(np.inf)
        np.divide(lost, saved, out=price, where=saved > 0)
        group = int(price.argmin())  # the first of equal ones
        if not route.open[group]:
            if not route.open.any():  # floors are in the way: the uniform counts are known to fit
                return uniform
            group = int(route.open.argmax())
        route.step(group)
        lost[group] = ladder.gains[route.places[group]] if route.open[group] else np.inf


def filled(
    ladder: Ladder,
    model: CostModel,
    limits: Sequence[int],
    places: Places,
    allocation: Allocation,
) -> Ints:
    """Give back steps that still fit: to the most cut group, or to the most important units."""
    route = Route(ladder, model, places, ladder.last, 1)
    limited = [i for i, limit in enumerate(limits) if limit < NO_LIMIT]
    while True:
        figures = route.walk.figures()
        fits = route.open.copy()
        for i in limited:
            fits &= route.walk.added(i) <= limits[i] - figures[i]
        able = np.flatnonzero(fits)
        if not able.size:
            return route.counts
        macs = np.maximum(route.walk.added(_MACS)[able], 1)
        if allocation is Allocation.UNIFORM:
            share = route.counts[able] / ladder.units[able]
            able, macs = able[least := share == share.min()], macs[least]
            value = (ladder.levels[route.places[able] + 1] - route.counts[able]) / macs
        else:
            value = ladder.gains[route.places[able] + 1] / macs
        route.step(int(able[value.argmax()]))  # the first of equal ones
