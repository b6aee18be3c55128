"""Many devices' word about each element becomes one, and rounds become a moving average."""

from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

TRIM: Final = 0.2
"""Share of the devices that is left out at each end of a trimmed mean."""


class ScoreMerge(StrEnum):
    """How what devices report about one element is merged, over those that cover it."""

    MEAN = "mean"
    """Weighted by samples. Sums of activations then are exactly those of the pooled samples."""
    MEDIAN = "median"
    """One device, one voice: under half of them can say what they like."""
    TRIMMED = "trimmed"
    """The mean without the lowest and the highest fifth; one device, one voice."""


def merged(reports: FloatArray, merge: ScoreMerge) -> FloatArray:
    """The median, or the trimmed mean, of each element over the devices that cover it.

    Of n devices floor(n / 5) are left out at each end of a trimmed mean, so of fewer than five
    none is.

    Args:
        reports: (devices, n); NaN where a device does not cover an element.
        merge: `MEDIAN` or `TRIMMED`.

    Returns:
        (n,); 0 where no device covers the element.
    """
    ordered = np.sort(reports, axis=0)  # NaN come last
    count = (~np.isnan(reports)).sum(axis=0)
    rank = np.arange(len(reports))[:, None]
    if merge is ScoreMerge.MEDIAN:
        use = (rank >= (count - 1) // 2) & (rank <= count // 2) & (rank < count)
    else:
        cut = (TRIM * count + 1e-9).astype(np.intp)
        use = (rank >= cut) & (rank < count - cut)
    mean: FloatArray = np.where(use, ordered, 0.0).sum(axis=0) / np.maximum(use.sum(axis=0), 1)
    return mean


class Average:
    """A moving average per element, updated only where the round has seen the element."""

    def __init__(self, size: int, merge: ScoreMerge = ScoreMerge.MEAN) -> None:
        """Start with nothing seen.

        Args:
            size: Elements.
            merge: Of the devices' reports in one round.
        """
        self._merge = merge
        self.value = np.zeros(size)
        self.seen = np.zeros(size, np.bool_)
        self._sum = np.zeros(size)
        self._weight = np.zeros(size)
        self._reports: list[FloatArray] = []

    def add(self, index: NDArray[np.intp] | slice, total: FloatArray, weight: float) -> None:
        """Add a device's report to the open round.

        Args:
            index: The elements that it covers.
            total: Per such element, its value times `weight`.
            weight: Positive.
        """
        if self._merge is ScoreMerge.MEAN:  # streams: however many report, two numbers are kept
            self._sum[index] += total
            self._weight[index] += weight
            return
        report = np.full(self.value.size, np.nan)
        report[index] = total / weight
        self._reports.append(report)

    def close(self, decay: float) -> None:
        """Fold the open round into the average; what nobody covered keeps its value."""
        now, mean = self._round()
        mixed = np.where(self.seen, decay * self.value + (1 - decay) * mean, mean)
        self.value = np.where(now, mixed, self.value)
        self.seen |= now
        self._sum[:] = 0
        self._weight[:] = 0
        self._reports.clear()

    def _round(self) -> tuple[NDArray[np.bool_], FloatArray]:
        """Which elements the open round has seen, and their merged values."""
        now: NDArray[np.bool_] = self._weight > 0
        if self._merge is ScoreMerge.MEAN:
            return now, np.divide(self._sum, self._weight, out=np.zeros_like(self._sum), where=now)
        if not self._reports:
            return now, np.zeros_like(self.value)
        reports = np.stack(self._reports)
        now = np.logical_not(np.isnan(reports).all(axis=0))
        return now, merged(reports, self._merge)

    def reorder(self, index: NDArray[np.intp]) -> None:
        """Put the elements in another order."""
        for name in ("value", "seen", "_sum", "_weight"):
            setattr(self, name, getattr(self, name)[index])
        self._reports = [report[index] for report in self._reports]
