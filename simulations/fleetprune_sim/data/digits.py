"""scikit-learn's 1,797 real 8x8 images of handwritten digits, split non-IID over devices.

The data set is inside scikit-learn's wheel (UCI "Optical Recognition of Handwritten Digits",
CC BY 4.0), so that nothing is downloaded.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fleetprune_sim.data.corpus import Corpus
from fleetprune_sim.data.fleet_data import DeviceData, FleetData, Labels, Samples
from fleetprune_sim.data.partition import dirichlet, hold_out

LABELS = tuple(str(digit) for digit in range(10))
TEST_SHARE = 0.2  # of all images; no device has them
VALIDATION_SHARE = 0.15  # of all images, in simulations
DEVICE_TEST_SHARE = 0.15  # of a device's own images; it judges installed models by them
ALPHA = 0.5  # strongly non-IID: a device sees two to five digits often and the others rarely
LEAST_SAMPLES = 64  # per device: two batches of 32


def corpus(seed: int, cache: Path) -> Corpus:
    """The images before they are split.

    Args:
        seed: Decides which are held out.
        cache: Not needed.

    Returns:
        Images (n, 1, 8, 8) float32 in 0..1; a fifth of each digit is the test set, three in
        twenty are the validation set.
    """
    rng = np.random.default_rng(seed)
    x, y = _images()
    test = hold_out(y, TEST_SHARE, rng)
    rest = np.setdiff1d(np.arange(y.size), test)
    validation = rest[hold_out(y[rest], VALIDATION_SHARE / (1 - TEST_SHARE), rng)]
    train = np.setdiff1d(rest, validation)
    return Corpus(x[train], y[train], x[validation], y[validation], x[test], y[test], LABELS)


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
    images, labels = _images()
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


def _images() -> tuple[Samples, Labels]:
    from sklearn.datasets import load_digits  # noqa: PLC0415  (a second)

    raw = load_digits()
    return (raw.images / 16.0).astype(np.float32)[:, None], raw.target.astype(np.int64)
