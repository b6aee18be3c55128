"""What a data set is once it has been split over a fleet."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class DeviceData:
    """One device's own samples; they never leave it."""

    x_train: Samples
    """(n, *input shape)"""
    y_train: Labels
    """(n,) indices into the fleet's labels"""
    x_test: Samples
    """(m, *input shape), held back on the device to judge an installed model"""
    y_test: Labels


@dataclass(frozen=True)
class FleetData:
    """Every device's data, and the samples that no device has."""

    devices: Mapping[str, DeviceData]
    x_test: Samples
    """(t, *input shape)"""
    y_test: Labels
    labels: tuple[str, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.x_test.shape[1:])
