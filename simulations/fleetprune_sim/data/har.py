"""People's activities, split over the devices of a demo or of a simulation.

Whole people are held out, never single windows: neighbouring windows of one person are nearly the
same, so that a test on them would only show what was learned by heart.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import DataError
from fleetprune_sim.data.corpus import Corpus
from fleetprune_sim.data.fleet_data import DeviceData, FleetData, Samples
from fleetprune_sim.data.har_recordings import LABELS, Windows, find, read_windows
from fleetprune_sim.data.partition import deal, hold_out

HELD_OUT_SUBJECTS = 6
VALIDATION_SUBJECTS = 3
DEVICE_TEST_SHARE = 0.15  # of a device's own windows; it judges installed models by them
CORPUS_WINDOW = 192  # readings: about 1.9 s
CORPUS_STEP = 96  # readings


def corpus(seed: int, cache: Path) -> Corpus:
    """Windows of two seconds, each with the device that recorded it ("s07-phone").

    Args:
        seed: Decides who is held out.
        cache: Folder for the parsed windows.

    Returns:
        Windows (n, 6, 192) float32; six people are the test set, three the validation set.

    Raises:
        DataError: The data set is missing, malformed or too small.
    """
    windows = read_windows(find(), cache, window=CORPUS_WINDOW, step=CORPUS_STEP)
    return hold_out_people(windows, seed)


def hold_out_people(
    windows: Windows,
    seed: int,
    *,
    test: int = HELD_OUT_SUBJECTS,
    validation: int = VALIDATION_SUBJECTS,
) -> Corpus:
    """As `corpus`, from windows that were read already.

    Args:
        windows: Everybody's.
        seed: Decides who is held out.
        test: People in the test set.
        validation: People in the validation set.
    """
    people = _shuffled_people(windows, test + validation, np.random.default_rng(seed))
    tested = np.isin(windows.subject, people[:test])
    tuned = np.isin(windows.subject, people[test : test + validation])
    known = ~(tested | tuned)
    x = _standardised(windows.x, known)
    owner = np.char.add(np.char.add(windows.subject, "-"), windows.kind)
    return Corpus(
        x[known],
        windows.y[known],
        x[tuned],
        windows.y[tuned],
        x[tested],
        windows.y[tested],
        LABELS,
        owner=owner[known],
        kind=windows.kind[known],
        test_owner=owner[tested],
        test_kind=windows.kind[tested],
    )


def load(
    gateways: Sequence[str],
    phones: Sequence[str],
    sensors: Sequence[str],
    seed: int,
    cache: Path | None = None,
) -> FleetData:
    """Split the recordings by subject and device over a fleet.

    Six subjects are held out whole: the test set is people whom no device knows. The others are
    dealt out: a gateway stands for a household's hub, with what the phones and watches of its
    people recorded; a phone has its people's smartphone recordings; a sensor has the smartwatch
    recordings of the phone's people. Two thirds of the people belong to gateways. Values are
    standardised per channel with the training windows' mean and deviation.

    Args:
        gateways: Names of the gateways.
        phones: Names of the phones.
        sensors: Names of the sensors, as many as phones.
        seed: Decides who is held out and who belongs to which device.
        cache: Folder for the parsed windows.

    Raises:
        DataError: The data set is missing, malformed or too small.
    """
    if len(phones) != len(sensors):
        raise DataError(f"{len(phones)} phones and {len(sensors)} sensors, expected as many")
    return split(read_windows(find(), cache), gateways, phones, sensors, seed)


def split(
    windows: Windows,
    gateways: Sequence[str],
    phones: Sequence[str],
    sensors: Sequence[str],
    seed: int,
    *,
    held_out: int = HELD_OUT_SUBJECTS,
) -> FleetData:
    """As `load`, from windows that were read already; `held_out` subjects go to the test set."""
    rng = np.random.default_rng(seed)
    people = _shuffled_people(windows, held_out, rng)
    test = np.isin(windows.subject, people[:held_out])
    shares = [2] * len(gateways) + [1] * len(phones)
    homes = deal(people[held_out:], shares)
    owned: dict[str, NDArray[np.bool_]] = {}
    for name, home in zip(gateways, homes[: len(gateways)], strict=True):
        owned[name] = np.isin(windows.subject, home)
    for phone, sensor, home in zip(phones, sensors, homes[len(gateways) :], strict=True):
        theirs = np.isin(windows.subject, home)
        owned[phone] = theirs & (windows.kind == "phone")
        owned[sensor] = theirs & (windows.kind == "watch")
    x = _standardised(windows.x, ~test)
    devices = {}
    for name in sorted(owned):
        own = np.flatnonzero(owned[name])
        if own.size == 0:
            raise DataError(f"{name} gets no windows: its people have no such recordings")
        judged = hold_out(windows.y[own], DEVICE_TEST_SHARE, rng)
        held, train = own[judged], np.delete(own, judged)
        devices[name] = DeviceData(x[train], windows.y[train], x[held], windows.y[held])
    return FleetData(devices, x[test], windows.y[test], LABELS)


def _shuffled_people(windows: Windows, held_out: int, rng: np.random.Generator) -> list[str]:
    people: list[str] = rng.permutation(np.unique(windows.subject)).tolist()
    if held_out >= len(people):
        raise DataError(f"{len(people)} subjects, expected more than the {held_out} held out")
    return people


def _standardised(x: Samples, known: NDArray[np.bool_]) -> Samples:
    """With mean and deviation per channel of the windows in `known`."""
    seen = x[known]
    mean = seen.mean(axis=(0, 2), keepdims=True, dtype=np.float64)
    deviation = seen.std(axis=(0, 2), keepdims=True, dtype=np.float64)
    standardised: Samples = ((x - mean) / np.maximum(deviation, 1e-6)).astype(np.float32)
    return standardised
