"""How much one device may weigh: what it says of itself is its own word."""

from collections.abc import Iterable, Mapping
from math import inf
from statistics import median_low

import numpy as np
from numpy.typing import NDArray


def length(values: NDArray[np.float32]) -> float:
    """L2 norm, which may be more than a float32 holds."""
    return float(np.linalg.norm(values.astype(np.float64)))


class Bounds:
    """Cuts the weights and the norms of one round's answers to a multiple of a median.

    Norms are compared with those of the round before, so that the result does not depend on the
    order of the answers and none has to wait for the others. A direction that is wrong stays
    wrong; what a device gains by lying is bounded.
    """

    def __init__(
        self,
        times: float,
        samples: Iterable[int] = (),
        norms: Mapping[str, float] | None = None,
        start: Mapping[str, float] | None = None,
    ) -> None:
        """Begin a round.

        Args:
            times: How many times the median is allowed; 0: no bound.
            samples: Of the devices that were asked.
            norms: Median norm of the last updates, per class that has sent any.
            start: Norm of each class's parameters: no update is longer than the model itself.
        """
        norms, start = norms or {}, start or {}
        counts = [max(1, n) for n in samples]
        self._weight = times * median_low(counts) if times and counts else inf
        self._limits = {
            name: min(times * norms.get(name, 0.0) or inf, norm or inf) if times else inf
            for name, norm in start.items()
        }
        self._before = dict(norms)
        self._seen: dict[str, list[float]] = {}
        self.cut = 0
        """Updates that were too long."""

    def weight(self, samples: int) -> float:
        """The weight of a device with so many samples."""
        return min(samples, self._weight)

    def update(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The update of a device of class `name`, shortened if it is too long."""
        norm = length(values)
        limit = self._limits.get(name, inf)
        self._seen.setdefault(name, []).append(min(norm, limit))
        if norm <= limit:
            return values
        self.cut += 1
        return (values * (limit / norm)).astype(np.float32)

    def norms(self) -> dict[str, float]:
        """What the next round is measured by: medians of this one, else what was known."""
        return self._before | {name: median_low(seen) for name, seen in self._seen.items()}
