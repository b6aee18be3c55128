"""Which models nothing else beats: the Pareto front of accuracy against cost."""

from collections.abc import Sequence


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points are not dominated.

    A point is dominated by another that costs no more and is no less accurate, and is better in
    one of the two; equal points do not dominate each other.

    Args:
        points: Of each (cost, accuracy).

    Returns:
        One truth value per point.
    """
    marked = [False] * len(points)
    best = float("-inf")
    # By rising cost, the most accurate first: what is not above all before it is dominated.
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    for place, i in enumerate(order):
        twin = order[place - 1] if place else None
        if points[i][1] > best:
            marked[i], best = True, points[i][1]
        elif twin is not None and points[i] == points[twin]:
            marked[i] = marked[twin]
    return marked
