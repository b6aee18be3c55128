"""Groups: units that lie side by side, in the same order and as wide, wherever they lie."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from fleetprune_coordinator.units import Array

Slot = tuple[str, int]
"""A tensor's name and one of its axes."""
Neighbours = dict[int, int | None]
"""Per unit the one next to it wherever it lies; None: not always the same one."""


@dataclass(frozen=True)
class Group:
    """Units that can be counted instead of listed."""

    units: tuple[int, ...]
    slots: tuple[Slot, ...]
    """The axes on which they lie."""


def chains(axes: Mapping[Slot, Array]) -> list[Group]:
    """All groups, of single units too, in the order in which their first units appear.

    Args:
        axes: Per axis the unit of each index, 0 where it is never cut.
    """
    runs = {slot: _runs(units) for slot, units in axes.items()}
    behind, before = _neighbours(runs.values())
    groups = []
    for head in (unit for unit in behind if before[unit] is None):
        chain = [head]
        while (following := behind[chain[-1]]) is not None:
            chain.append(following)
        slots = tuple(slot for slot, found in runs.items() if any(u == head for u, _ in found))
        groups.append(Group(tuple(chain), slots))
    return groups


def _runs(units: Array) -> list[tuple[int, int]]:
    """(unit, length) of each run of equal units."""
    edges = np.flatnonzero(np.diff(units)) + 1
    return [(int(part[0]), part.size) for part in np.split(units, edges) if part.size]


def _neighbours(axes: Iterable[list[tuple[int, int]]]) -> tuple[Neighbours, Neighbours]:
    """The unit behind each unit, and the one before it, with runs of the same length."""
    behind: dict[int, set[int]] = {}
    before: dict[int, set[int]] = {}
    for runs in axes:
        padded = [(0, 0), *runs, (0, 0)]
        for (front, wide), (unit, length), (after, long) in zip(
            padded, padded[1:], padded[2:], strict=False
        ):
            if unit:
                behind.setdefault(unit, set()).add(after if long == length else 0)
                before.setdefault(unit, set()).add(front if wide == length else 0)
    follows = {unit: _only(found) for unit, found in behind.items()}
    leads = {unit: _only(found) for unit, found in before.items()}
    return _mutual(follows, leads), _mutual(leads, follows)


def _only(found: set[int]) -> int | None:
    """The one unit in a set; None if there are several, or it is none."""
    return next(iter(found)) or None if len(found) == 1 else None


def _mutual(one: Neighbours, other: Neighbours) -> Neighbours:
    return {u: v if v is not None and other[v] == u else None for u, v in one.items()}
