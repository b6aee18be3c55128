"""scikit-learn's 1,797 real 8x8 images of handwritten digits, split non-IID over devices.

The data set is inside scikit-learn's wheel (UCI "Optical Recognition of Handwritten Digits",
CC BY 4.0), so that nothing is downloaded.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.datasets import load_digits

from fleetprune_sim.data.fleet_data import DeviceData, FleetData
from fleetprune_sim.data.partition import dirichlet, hold_out

LABELS = tuple(str(digit) for digit in range(10))
TEST_SHARE = 0.2  # of all images; no device has them
DEVICE_TEST_SHARE = 0.15  # of a device's own images; it judges installed models by them
ALPHA = 0.5  # strongly non-IID: a device sees two to five digits often and the others rarely
LEAST_SAMPLES = 64  # per device: two batches of 32


def load(devices: Sequence[str], seed: int) -> FleetData:
    """Split the images over devices.

    Args:
        devices: Names of the devices.
        seed: Decides both the test split and the partition.

    Returns:
        Images (n, 1, 8, 8) float32 in 0..1.

    Raises:
        DataError: There are too many devices for the data set.
    """
    rng = np.random.default_rng(seed)
    raw = load_digits()
    images = (raw.images / 16.0).astype(np.float32)[:, None]
    labels = raw.target.astype(np.int64)
    test = hold_out(labels, TEST_SHARE, rng)
    train = np.setdiff1d(np.arange(labels.size), test)
    parts = dirichlet(labels[train], len(devices), ALPHA, LEAST_SAMPLES, rng)
    split = {}
    for name, part in zip(devices, parts, strict=True):
        own = train[part]
        judged = hold_out(labels[own], DEVICE_TEST_SHARE, rng)
        held, kept = own[judged], np.delete(own, judged)
        split[name] = DeviceData(images[kept], labels[kept], images[held], labels[held])
    return FleetData(split, images[test], labels[test], LABELS)
