"""Fashion-MNIST: 70,000 images of clothes, 28x28 grey values, in ten classes.

Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms", 2017, MIT licence, https://github.com/zalandoresearch/fashion-mnist. Read from the
publisher's four files, which are not part of this project: see `WHERE`.
"""

import gzip
import math
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import DataError
from fleetprune_sim.data.corpus import Corpus
from fleetprune_sim.data.fleet_data import Samples
from fleetprune_sim.data.partition import hold_out
from fleetprune_sim.data.sources import VARIABLE, data_folder, folder_problem, read_errors

LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SIDE = 28  # pixels
MEAN, DEVIATION = 0.286, 0.353  # of the publisher's training images, as grey values in 0..1
VALIDATION_SHARE = 1 / 6  # of each class: 10,000 of the publisher's 60,000

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
SYSTEM = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts them."""
WHERE = (
    "install Debian's package dataset-fashion-mnist, or download the four files from "
    "https://github.com/zalandoresearch/fashion-mnist (MIT licence) and set "
    f"{VARIABLE} to the folder that holds them"
)

_UNSIGNED_BYTE = 0x08
_CHUNK = 2**16  # bytes read at a time, so that one can say how far a damaged file goes
_MOST = 2**28  # bytes in one file; the largest of the publisher's has 47 million


def corpus(seed: int, cache: Path) -> Corpus:
    """The publisher's images; its test set is the test set.

    Args:
        seed: Decides which images are the validation set.
        cache: Not needed.

    Returns:
        Images (n, 1, 28, 28) float32, standardised.

    Raises:
        DataError: The files are missing, cut short or malformed.
    """
    files = find()
    x, y = _read_pair(*files[:2])
    x_test, y_test = _read_pair(*files[2:])
    tuned = hold_out(y, VALIDATION_SHARE, np.random.default_rng(seed))
    train = np.setdiff1d(np.arange(y.size), tuned)
    return Corpus(
        _standardised(x[train]),
        y[train],
        _standardised(x[tuned]),
        y[tuned],
        _standardised(x_test),
        y_test,
        LABELS,
    )


def find(environment: Mapping[str, str] | None = None) -> tuple[Path, Path, Path, Path]:
    """The four files in the order of `FILES`, each as it is or with the ending `.gz`.

    Args:
        environment: Variables to look in; the process's own by default.

    Raises:
        DataError: No folder has them all; the message says where to get them.
    """
    own = data_folder(environment)
    problem = "" if own is None else folder_problem(own)
    folders = [SYSTEM] if own is None or problem else [own, own / "fashion-mnist", SYSTEM]
    for folder in folders:
        found = [
            next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
            for name in FILES
        ]
        images, labels, test_images, test_labels = found
        if images and labels and test_images and test_labels:
            return images, labels, test_images, test_labels
        if any(found):
            missing = ", ".join(n for n, p in zip(FILES, found, strict=True) if p is None)
            raise DataError(f"{folder} lacks {missing} (or with .gz): {WHERE}")
    looked = ", ".join(map(str, folders))
    raise DataError(f"Fashion-MNIST is not in {looked}{problem and f'; {problem}'}: {WHERE}")


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of bytes.

    Its header is two zero bytes, the type of its values, the number of dimensions, and the size
    of each, big-endian.

    Args:
        path: The file; a name that ends in `.gz` is decompressed.
        dimensions: How many it must have.

    Raises:
        DataError: It is damaged, cut short, too long or of another type; names the file, what
            was got and what was expected.
    """
    with read_errors(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        header = file.read(4 + 4 * dimensions)
        if len(header) < 4 + 4 * dimensions:
            raise EOFError
        magic, *shape = struct.unpack(f">{1 + dimensions}I", header)
        expected = _UNSIGNED_BYTE << 8 | dimensions
        if magic != expected:
            raise DataError(f"{path}: magic number {magic}, expected {expected}")
        size = math.prod(shape)
        if not 0 < size <= _MOST:
            raise DataError(f"{path}: shape {tuple(shape)}, expected 1 to {_MOST} bytes")
        body = bytearray()
        whole = False
        with suppress(EOFError):  # of a compressed file that is cut short
            while chunk := file.read(min(_CHUNK, size + 1 - len(body))):
                body += chunk
            whole = len(body) >= size
    if not whole:
        raise DataError(
            f"{path}: {len(body)} of the {size} bytes of shape {tuple(shape)}: the download was "
            "interrupted, download it again"
        )
    if len(body) > size:
        raise DataError(f"{path}: goes on after the {size} bytes of shape {tuple(shape)}")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _read_pair(images: Path, labels: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    x, y = read_idx(images, 3), read_idx(labels, 1)
    if x.shape[1:] != (SIDE, SIDE):
        raise DataError(f"{images}: images of {x.shape[1:]}, expected {(SIDE, SIDE)}")
    if len(x) != len(y):
        raise DataError(f"{images} has {len(x)} images, {labels} has {len(y)} labels")
    if y.max() >= len(LABELS):
        raise DataError(f"{labels}: label {y.max()}, expected 0 to {len(LABELS) - 1}")
    return x, y.astype(np.int64)


def _standardised(images: NDArray[np.uint8]) -> Samples:
    """(n, 28, 28) grey values to (n, 1, 28, 28)."""
    x = images[:, None].astype(np.float32)
    x /= 255 * DEVIATION  # in place: the training images alone are 157 MB
    x -= MEAN / DEVIATION
    return x
