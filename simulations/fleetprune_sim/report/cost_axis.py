"""The axis of costs: whether it is logarithmic, and how no point on it hides another."""

from collections.abc import Iterator, Sequence
from itertools import count
from math import log

LOG_FROM = 8.0
"""Ratio of the largest to the smallest cost from which it is logarithmic."""
STEP = 13
"""Pixels from mark to mark where they stand side by side."""
ROOM = 600, 300
"""Pixels that a chart is taken to have; where it has more, fewer points come close."""


def logarithmic(costs: Sequence[float]) -> bool:
    """Whether equal ratios of these costs are to be equally far apart."""
    positive = [c for c in costs if c > 0]
    return bool(positive) and max(positive) / min(positive) >= LOG_FROM


def sides(points: Sequence[tuple[float, float]], order: Sequence[int]) -> list[int]:
    """How many steps to the right (or left, below 0) each point is drawn so that none covers one.

    Args:
        points: Of each its cost and its accuracy.
        order: The lower, the sooner it is placed; those that come first stand where they belong.

    Returns:
        One number per point, 0 for most.
    """
    scaled = logarithmic([cost for cost, _ in points])
    xs = _pixels([log(max(cost, 1)) if scaled else cost for cost, _ in points], ROOM[0])
    ys = _pixels([accuracy for _, accuracy in points], ROOM[1])
    taken: list[tuple[float, float]] = []
    found = [0] * len(points)
    for i in sorted(range(len(points)), key=lambda i: (order[i], xs[i], -ys[i], i)):
        for side in _outwards():
            place = xs[i] + STEP * side, ys[i]
            if not any(abs(place[0] - x) < STEP and abs(place[1] - y) < STEP for x, y in taken):
                break
        found[i] = side
        taken.append(place)
    return found


def _outwards() -> Iterator[int]:
    """0, 1, -1, 2, -2 and so on."""
    return ((n + 1) // 2 * (1 if n % 2 else -1) for n in count())


def _pixels(values: Sequence[float], room: int) -> list[float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return [room * (value - low) / ((high - low) or 1.0) for value in values]
