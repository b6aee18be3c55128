"""A data set before it is split over a fleet."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import DataError
from fleetprune_sim.data.fleet_data import Labels, Samples


@dataclass(frozen=True)
class Corpus:
    """Samples that devices may own, and two sets that no device has.

    Every decision is made on the validation set; the test set is looked at once, at the end.
    """

    x: Samples
    """(n, *input shape), to be split over the devices"""
    y: Labels
    """(n,) indices into `labels`"""
    x_validation: Samples
    y_validation: Labels
    x_test: Samples
    y_test: Labels
    labels: tuple[str, ...]
    owner: NDArray[np.str_] | None = None
    """(n,) whose sample it is ("s07-phone"), where the set says so"""
    kind: NDArray[np.str_] | None = None
    """(n,) on what hardware it was recorded ("phone"), where the set says so"""
    test_owner: NDArray[np.str_] | None = None
    """(t,) as `owner`, of the test set"""
    test_kind: NDArray[np.str_] | None = None
    """(t,) as `kind`, of the test set"""

    def __post_init__(self) -> None:
        """DataError if the arrays do not belong together."""
        for what, x, y in (
            ("the samples", self.x, self.y),
            ("the validation set", self.x_validation, self.y_validation),
            ("the test set", self.x_test, self.y_test),
        ):
            if y.shape != x.shape[:1] or not y.size:
                raise DataError(f"{what}: x of shape {x.shape} and y of {y.shape}")
            if x.shape[1:] != self.x.shape[1:]:
                raise DataError(
                    f"{what}: one sample has shape {x.shape[1:]}, expected {self.x.shape[1:]}"
                )
            if y.min() < 0 or y.max() >= len(self.labels):
                raise DataError(
                    f"{what}: labels {y.min()}..{y.max()}, expected 0..{len(self.labels) - 1}"
                )
        for what, names, n in (
            ("owner", self.owner, self.y.size),
            ("kind", self.kind, self.y.size),
            ("test_owner", self.test_owner, self.y_test.size),
            ("test_kind", self.test_kind, self.y_test.size),
        ):
            if names is not None and names.shape != (n,):
                raise DataError(f"{what} of shape {names.shape}, expected ({n},)")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.x.shape[1:])
