"""What range of values a tensor has, from histograms that devices add up.

A device counts, for every tensor of its class's model, how many values lie between neighbouring
powers of two, split in four: a few hundred numbers that tell no sample. A plain minimum and
maximum would do for one honest device; in a fleet a single odd or hostile one would decide both.

The range is the one that costs least: with levels `step` apart, values inside it are rounded with
a mean squared error of step**2 / 12 (Widrow, Kollar and Liu 1996), and those outside are cut off.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import WireError
from fleetprune_coordinator.aggregate import check_vector

LOWEST: Final = -16  # powers of two: what is smaller counts as zero
HIGHEST: Final = 16  # what is larger counts as this
PER_OCTAVE: Final = 4
BINS: Final = (HIGHEST - LOWEST) * PER_OCTAVE
"""Of magnitudes; a tensor has one set of them from 0 up, and one for values below 0."""
PER_TENSOR: Final = 2 * BINS

_LEVELS = 255
_DEEPEST = 5 * PER_OCTAVE
"""Bins below the largest value that are tried as the end of the range."""
_EDGES = 2.0 ** (LOWEST + np.arange(BINS + 1) / PER_OCTAVE)

Histograms = NDArray[np.float64]


class RangeSums:
    """Collects the histograms of devices of one shape; each counts by its weight alone.

    Every device's histogram is brought to a sum of 1 first: how many values it says to have seen
    does not matter. And no device's values count as larger than twice the median device's largest.
    """

    def __init__(self, size: int) -> None:
        """Prepare for vectors of `size` numbers, `PER_TENSOR` per tensor; 0: nothing is asked."""
        self._size = size
        self._shares: list[NDArray[np.float32]] = []
        self._weights: list[float] = []

    def check(self, counts: NDArray[np.float32]) -> Histograms:
        """A device's histograms (tensors, 2, BINS), each with a sum of 1.

        Raises:
            WireError: Another length, or numbers that no samples can have.
        """
        check_vector(counts, self._size, "ranges")
        if counts.size and counts.min() < 0:
            raise WireError(f"ranges: {counts.min()}, expected counts of at least 0")
        table = counts.astype(np.float64).reshape(-1, 2, BINS)
        totals = table.sum(axis=(1, 2))
        if not (totals > 0).all():
            place = int(np.argmin(totals))
            raise WireError(f"ranges: tensor {place} has no values, expected some")
        shares: Histograms = table / totals[:, None, None]
        return shares

    def add(self, counts: NDArray[np.float32], weight: float) -> None:
        """Add one device's counts (size,), with a weight above 0; WireError as in `check`."""
        self._shares.append(self.check(counts).astype(np.float32))
        self._weights.append(weight)

    def result(self) -> NDArray[np.float32] | None:
        """(tensors, 2) lowest and highest value per tensor; None if nothing was added."""
        if not self._shares:
            return None
        shares, weights = np.stack(self._shares).astype(np.float64), np.array(self._weights)
        pooled = np.einsum("d,dtsb->tsb", weights, _bounded(shares))
        return np.array([best_range(h) for h in pooled], np.float32)


def _bounded(shares: Histograms) -> Histograms:
    """(devices, tensors, 2, BINS) with what lies beyond the bound counted at the bound."""
    places = np.arange(BINS)
    tops = np.where(shares > 0, places, 0).max(axis=-1)  # (devices, tensors, 2)
    bounds = np.median(tops, axis=0) + PER_OCTAVE
    beyond = places > bounds[..., None]
    bounded: Histograms = np.where(beyond, 0.0, shares)
    at = np.minimum(bounds, BINS - 1).astype(np.intp)
    excess = (shares * beyond).sum(axis=-1)  # (devices, tensors, 2)
    for side in (0, 1):
        tensors = np.arange(at.shape[0])
        bounded[:, tensors, side, at[:, side]] += excess[..., side]
    return bounded


def best_range(histogram: Histograms) -> tuple[float, float]:
    """The range in which 256 levels represent a tensor with the least squared error.

    Args:
        histogram: (2, BINS) shares of values from 0 up, and of those below.

    Returns:
        Lowest and highest value, 0 among them. (0, 1) for a tensor that is all zeros.
    """
    ends, inside, cut = zip(*(_ends(side) for side in histogram), strict=True)
    step = (ends[0][:, None] + ends[1][None, :]) / _LEVELS
    rounding = (inside[0][:, None] + inside[1][None, :]) * step**2 / 12
    errors = rounding + cut[0][:, None] + cut[1][None, :]
    high, low = np.unravel_index(int(errors.argmin()), errors.shape)
    if not (ends[0][high] or ends[1][low]):
        return 0.0, 1.0
    return 0.0 - float(ends[1][low]), float(ends[0][high])


Ends = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _ends(side: NDArray[np.float64]) -> Ends:
    """Where one side of a range may end.

    Args:
        side: (BINS,) shares of values. Within a bin they are taken to be spread evenly.

    Returns:
        (n,) ends, (n,) for each the share of values before it, and (n,) the squared error of those
        behind it.
    """
    filled = np.flatnonzero(side[1:]) + 1  # the first bin is zero
    if not filled.size:
        return np.zeros(1), np.zeros(1), np.zeros(1)
    top = int(filled[-1])
    ends = _EDGES[max(1, top - _DEEPEST) + 1 : top + 2]
    below, above = _EDGES[1:-1], _EDGES[2:]
    whole = above[None, :] <= ends[:, None] * (1 + 1e-9)
    outside = ((above - ends[:, None]) ** 3 - np.maximum(below - ends[:, None], 0) ** 3) / 3
    squared = np.where(whole, 0.0, outside) / (above - below)
    return ends, whole @ side[1:], squared @ side[1:]
