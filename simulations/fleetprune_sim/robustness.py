"""How accurate models stay on corrupted samples, which are the same ones for all of them."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fleetprune_sim.corruptions import Samples, applicable, corrupted

MOST = 2000
"""Test samples that are corrupted, evenly spaced: a test set may be sorted by label or by owner."""
CLEAN = "clean"
"""Those samples as they are: what a corruption costs is then no matter of which were chosen."""

Labels = NDArray[np.int64]
Judge = Callable[[Samples, Labels], float]
"""Accuracy of one model on (n, ...) samples with labels (n,)."""


class Trial:
    """Corrupted samples of one test set, made once."""

    def __init__(self, x: Samples, y: Labels, seed: int, most: int = MOST) -> None:
        """Corrupt the samples in every way that they can be.

        Args:
            x: (n, C, ...) the test set; stays as it is.
            y: (n,) its labels.
            seed: Of the run.
            most: Samples that are used.
        """
        chosen = np.arange(len(y)) if len(y) <= most else np.arange(most) * len(y) // most
        clean = x[chosen]
        self._y = y[chosen]
        self._x = {CLEAN: clean}
        self._x |= {name: corrupted(name, clean, seed) for name in applicable(x.shape[1:])}

    def of(self, judge: Judge) -> dict[str, float]:
        """Accuracy of a model by corruption, and under `CLEAN` without any."""
        return {name: judge(x, self._y) for name, x in self._x.items()}
