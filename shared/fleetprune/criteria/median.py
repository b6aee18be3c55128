"""The geometric median of points: where the sum of distances to all of them is least."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STEPS = 1000
CLOSE = 1e-10
"""Movement of a step, in units of the points' spread, at which the search ends."""


def geometric_median(points: Floats) -> Floats:
    """Weiszfeld's algorithm, begun at the best of the points (Vardi and Zhang 2000).

    `y <- sum(x_i / |x_i - y|) / sum(1 / |x_i - y|)` never makes the sum of distances larger, so
    once it is below that of the best point, no step can land on a point and divide by 0. If no
    direction leads down from the best point, that point is the median.

    Args:
        points: (n, d) finite, n > 0.

    Returns:
        (d,).
    """
    best: Floats = points[int(np.argmin(_distances(points).sum(axis=1)))]
    spread = float(np.abs(points - points.mean(axis=0)).max())
    away = np.linalg.norm(points - best, axis=1)
    others = away > CLOSE * spread
    if not others.any():
        return best
    weights = 1 / away[others]
    pull = weights @ (points[others] - best)
    strength, here = float(np.linalg.norm(pull)), points.shape[0] - int(others.sum())
    if strength <= here * (1 + 1e-12):
        return best
    median: Floats = best + (1 - here / strength) * pull / weights.sum()
    for _ in range(STEPS):
        weights = 1 / np.maximum(np.linalg.norm(points - median, axis=1), 1e-300)
        moved = weights @ points / weights.sum()
        step, median = float(np.abs(moved - median).max()), moved
        if step <= CLOSE * spread:
            break
    return median


def _distances(points: Floats) -> Floats:
    """(n, n) between all pairs."""
    centred = points - points.mean(axis=0)
    squares = np.square(centred).sum(axis=1)
    between = squares[:, None] + squares - 2 * centred @ centred.T
    distances: Floats = np.sqrt(np.maximum(between, 0))
    return distances
