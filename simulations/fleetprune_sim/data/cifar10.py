"""CIFAR-10: 60,000 colour images of 32x32 pixels in ten classes.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
https://www.cs.toronto.edu/~kriz/cifar.html. Read from the publisher's Python or binary version,
packed or unpacked, or from images in one folder per class. The data set is not part of this
project: see `WHERE`.
"""

import gzip
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import DataError
from fleetprune_sim.data.corpus import Corpus
from fleetprune_sim.data.fleet_data import Labels, Samples
from fleetprune_sim.data.image_folders import image_files, read_images
from fleetprune_sim.data.partition import hold_out
from fleetprune_sim.data.plain_pickle import load_plain
from fleetprune_sim.data.sources import (
    VARIABLE,
    Arrays,
    fingerprint,
    kept,
    read_errors,
    required_folder,
)

LABELS = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
SIDE = 32  # pixels
MEAN = (0.4914, 0.4822, 0.4465)  # per colour of the publisher's training images, in 0..1
DEVIATION = (0.2470, 0.2435, 0.2616)
VALIDATION_SHARE = 0.1  # of each class of the training images
TEST_SHARE = 1 / 6  # of each class, where image folders have no test set of their own

PYTHON, BINARY = "cifar-10-batches-py", "cifar-10-batches-bin"
ARCHIVES = {"cifar-10-python.tar.gz": PYTHON, "cifar-10-binary.tar.gz": BINARY}
IMAGES = "cifar-10"
WHERE = (
    f"download {' or '.join(ARCHIVES)} from https://www.cs.toronto.edu/~kriz/cifar.html and set "
    f"{VARIABLE} to the folder that holds it, packed or not; or put images into folders "
    f"{IMAGES}/train/airplane, {IMAGES}/test/airplane and so on there"
)

_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_PIXELS = 3 * SIDE * SIDE
_MOST = 2**26  # bytes in one batch; the publisher's have 31 million


@dataclass(frozen=True)
class Source:
    """Where the data set lies, and in which of its forms."""

    path: Path
    form: str
    """`PYTHON`, `BINARY` or `IMAGES`"""


def corpus(seed: int, cache: Path) -> Corpus:
    """The images; the publisher's test set is the test set.

    Args:
        seed: Decides what is in the validation set, and in the test set where there is none.
        cache: Folder for the parsed images, which take seconds to read.

    Returns:
        Images (n, 3, 32, 32) float32, standardised per colour.

    Raises:
        DataError: The data set is missing or malformed.
    """
    source = find()
    rng = np.random.default_rng(seed)
    parse = _read_folders if source.form == IMAGES else _read_batches
    found = kept(cache, f"cifar10-{fingerprint(source.path)}", lambda: parse(source))
    x, y, tested = found["x"], found["y"], found["tested"]
    if not tested.any():
        tested[hold_out(y, TEST_SHARE, rng)] = True
    rest = np.flatnonzero(~tested)
    tuned = rest[hold_out(y[rest], VALIDATION_SHARE, rng)]
    train = np.setdiff1d(rest, tuned)
    return Corpus(
        _standardised(x[train]),
        y[train],
        _standardised(x[tuned]),
        y[tuned],
        _standardised(x[tested]),
        y[tested],
        LABELS,
    )


def find(environment: Mapping[str, str] | None = None) -> Source:
    """The first form that is there: unpacked batches, packed ones, images.

    Args:
        environment: Variables to look in; the process's own by default.

    Raises:
        DataError: There is none; the message says where to download it.
    """
    folder = required_folder("CIFAR-10 is", WHERE, environment)
    for form in (PYTHON, BINARY, IMAGES):
        if (folder / form).is_dir():
            return Source(folder / form, form)
    for archive, form in ARCHIVES.items():
        if (folder / archive).is_file():
            return Source(folder / archive, form)
    names = ", ".join((PYTHON, BINARY, IMAGES, *ARCHIVES))
    raise DataError(f"{folder} has none of {names}: {WHERE}")


def python_batch(name: str, data: bytes) -> tuple[NDArray[np.uint8], Labels]:
    """Images (n, 3072) and labels (n,) of one file of the publisher's Python version.

    Raises:
        DataError: It is malformed or would run code; names the file.
    """
    batch = load_plain(name, data)
    x, y = batch.get(b"data"), batch.get(b"labels")
    if not isinstance(x, np.ndarray) or x.ndim != 2 or x.shape[1] != _PIXELS:
        got = f"shape {x.shape}" if isinstance(x, np.ndarray) else "no array"
        raise DataError(f"{name}: data is {got}, expected images of {_PIXELS} bytes")
    if not isinstance(y, list) or len(y) != len(x) or not all(type(i) is int for i in y):
        raise DataError(f"{name}: labels are no list of {len(x)} numbers")
    return x, _checked(name, np.array(y, np.int64))


def binary_batch(name: str, data: bytes) -> tuple[NDArray[np.uint8], Labels]:
    """Images (n, 3072) and labels (n,) of one file of the publisher's binary version.

    Raises:
        DataError: It is malformed; names the file.
    """
    record = 1 + _PIXELS
    if not data or len(data) % record:
        raise DataError(
            f"{name}: {len(data)} bytes, expected a multiple of {record}: download it again"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return records[:, 1:], _checked(name, records[:, 0].astype(np.int64))


def _checked(name: str, y: Labels) -> Labels:
    if y.size and not 0 <= y.min() <= y.max() < len(LABELS):
        raise DataError(f"{name}: labels {y.min()}..{y.max()}, expected 0..{len(LABELS) - 1}")
    return y


def _read_batches(source: Source) -> Arrays:
    """Images (n, 3, 32, 32), labels, and which are of the publisher's test set."""
    suffix, parse = ("", python_batch) if source.form == PYTHON else (".bin", binary_batch)
    names = [f"{batch}{suffix}" for batch in _BATCHES]
    with read_errors(source.path):
        batches = {name: parse(name, data) for name, data in _files(source.path, names)}
    if missing := [name for name in names if name not in batches]:
        raise DataError(f"{source.path} lacks {', '.join(missing)}: {WHERE}")
    x = np.concatenate([batches[name][0] for name in names]).reshape(-1, 3, SIDE, SIDE)
    y = np.concatenate([batches[name][1] for name in names])
    return {"x": x, "y": y, "tested": np.arange(y.size) >= y.size - batches[names[-1]][1].size}


def _files(source: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Name and contents of those files that are there."""
    if source.is_dir():
        for name in names:
            if (source / name).is_file():
                _check_size(name, (source / name).stat().st_size)
                yield name, (source / name).read_bytes()
        return
    with gzip.open(source) as packed, tarfile.open(fileobj=packed, mode="r:") as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name in names and member.isfile():
                _check_size(name, member.size)
                file = archive.extractfile(member)
                yield name, file.read() if file is not None else b""
        while packed.read(2**20):
            pass  # up to the checksum at its end


def _check_size(name: str, size: int) -> None:
    if size > _MOST:
        raise DataError(f"{name}: {size} bytes, expected at most {_MOST}")


def _read_folders(source: Source) -> Arrays:
    """Images (n, 3, 32, 32), labels, and which are of a test set of its own."""
    folder = source.path
    parts = [folder / "train", folder / "test"]
    if not parts[0].is_dir():
        parts = [folder]
    elif not parts[1].is_dir():
        first = LABELS[0]
        raise DataError(
            f"{folder} has a folder train but no folder test: put the test images into "
            f"{folder}/test/{first} and so on, or all images into {folder}/{first} and so on"
        )
    with read_errors(folder):
        files = [image_files(part, LABELS) for part in parts]
        x = read_images([path for paths, _ in files for path in paths], SIDE)
    tested = [np.full(y.size, number > 0) for number, (_, y) in enumerate(files)]
    return {
        "x": x,
        "y": np.concatenate([y for _, y in files]),
        "tested": np.concatenate(tested),
    }


def _standardised(images: NDArray[np.uint8]) -> Samples:
    x = images.astype(np.float32)
    for colour, (mean, deviation) in enumerate(zip(MEAN, DEVIATION, strict=True)):
        x[:, colour] /= 255 * deviation  # in place: the training images alone are 553 MB
        x[:, colour] -= mean / deviation
    return x
