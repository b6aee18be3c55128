"""The two ways to work out a partition: Flower Datasets, and arrays where that takes too long.

Both give the same parts to the sample, which a test holds them to. They take neighbouring samples
of a label, so the caller shuffles first.
"""

import contextlib
import importlib
import io
import os
import sys
import tempfile
import warnings
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import DataError

Indices = NDArray[np.intp]


class Splitter(Protocol):
    """Deals samples out; a part has the places of its samples, in any order."""

    def iid(self, samples: int, devices: int) -> list[Indices]:
        """Parts of equal size, one sample more or less."""

    def dirichlet(
        self, y: NDArray[np.int64], devices: int, alpha: float, seed: int
    ) -> list[Indices]:
        """Each label in proportions drawn from Dirichlet(alpha); parts may be empty."""

    def pathological(
        self, y: NDArray[np.int64], devices: int, labels: int, seed: int
    ) -> list[Indices]:
        """Exactly `labels` labels per part; DataError if a label has too few samples for that."""

    def natural(self, owner: NDArray[np.str_]) -> list[Indices]:
        """One part per owner, by the owners' sorted names."""


class FlowerSplitter:
    """The partitioners of `flwr_datasets`, on samples that are named by their place."""

    def iid(self, samples: int, devices: int) -> list[Indices]:
        """See `Splitter`."""
        partitioner = _partitioners().IidPartitioner(devices)
        return _parts(partitioner, {"place": np.arange(samples)})

    def dirichlet(
        self, y: NDArray[np.int64], devices: int, alpha: float, seed: int
    ) -> list[Indices]:
        """See `Splitter`."""
        # 0: its own remedy for small parts, to draw everything again, fails for many devices.
        partitioner = _partitioners().DirichletPartitioner(
            devices, "label", float(alpha), min_partition_size=0, seed=seed
        )
        return _parts(partitioner, {"label": y, "place": np.arange(y.size)})

    def pathological(
        self, y: NDArray[np.int64], devices: int, labels: int, seed: int
    ) -> list[Indices]:
        """See `Splitter`."""
        partitioner = _partitioners().PathologicalPartitioner(
            devices, "label", labels, "first-deterministic", seed=seed
        )
        try:
            return _parts(partitioner, {"label": y, "place": np.arange(y.size)})
        except ValueError as e:
            raise DataError(_too_few(devices, labels)) from e

    def natural(self, owner: NDArray[np.str_]) -> list[Indices]:
        """See `Splitter`."""
        partitioner = _partitioners().NaturalIdPartitioner("owner")
        return _parts(partitioner, {"owner": owner, "place": np.arange(owner.size)})


class ArraySplitter:
    """The same with arrays alone: 10,000 devices in under a second."""

    def iid(self, samples: int, devices: int) -> list[Indices]:
        """See `Splitter`."""
        return np.array_split(np.arange(samples), devices)

    def dirichlet(
        self, y: NDArray[np.int64], devices: int, alpha: float, seed: int
    ) -> list[Indices]:
        """See `Splitter`."""
        rng = np.random.default_rng(seed)
        device = np.empty(y.size, np.intp)
        for label in np.unique(y):
            members = np.flatnonzero(y == label)
            shares = np.cumsum(rng.dirichlet(np.full(devices, float(alpha))))
            ends = (shares * members.size).astype(np.intp)[:-1]
            device[members] = np.searchsorted(ends, np.arange(members.size), side="right")
        return _by(device, devices)

    def pathological(
        self, y: NDArray[np.int64], devices: int, labels: int, seed: int
    ) -> list[Indices]:
        """See `Splitter`."""
        rng = np.random.default_rng(seed)
        known = np.unique(y)
        holders: list[list[int]] = [[] for _ in known]
        for number in range(devices):
            chosen = [number % known.size]
            while len(chosen) < labels:  # one draw at a time, as Flower Datasets has it
                label = int(rng.choice(known.size, size=1)[0])
                if label not in chosen:
                    chosen.append(label)
            for label in chosen:
                holders[label].append(number)
        device = np.full(y.size, -1, np.intp)
        for label, whose in zip(known, holders, strict=True):
            members = np.flatnonzero(y == label)
            if members.size < len(whose):
                raise DataError(_too_few(devices, labels))
            for number, part in zip(
                whose, np.array_split(members, max(1, len(whose))), strict=False
            ):
                device[part] = number
        return _by(device, devices)

    def natural(self, owner: NDArray[np.str_]) -> list[Indices]:
        """See `Splitter`."""
        names, device = np.unique(owner, return_inverse=True)
        return _by(device, names.size)


def _too_few(devices: int, labels: int) -> str:
    return (
        f"{devices} devices with {labels} labels each share a label that has fewer samples than "
        "these: simulate fewer devices, or raise samples_per_device"
    )


def _by(device: NDArray[np.intp], devices: int) -> list[Indices]:
    """Places by device; -1 is nobody's."""
    counts = np.bincount(device[device >= 0], minlength=devices)
    order = np.argsort(device, kind="stable")[device.size - int(counts.sum()) :]
    return np.split(order, np.cumsum(counts)[:-1])


def _parts(partitioner: Any, columns: dict[str, NDArray[Any]]) -> list[Indices]:
    datasets = importlib.import_module("datasets")
    partitioner.dataset = datasets.Dataset.from_dict(columns)
    # It draws a progress bar that cannot be switched off, and warns of labels that no part has,
    # which the caller refuses.
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            np.array(partitioner.load_partition(i)["place"][:], dtype=np.intp)
            for i in range(partitioner.num_partitions)
        ]


def _partitioners() -> Any:
    """The module `flwr_datasets.partitioner`, imported when first needed: it takes seconds."""
    name = "flwr_datasets.partitioner"
    if name not in sys.modules and "MPLCONFIGDIR" not in os.environ:
        # It imports matplotlib, which would write a list of fonts below the user's ~/.cache.
        with tempfile.TemporaryDirectory(prefix="fleetprune-") as folder:
            os.environ["MPLCONFIGDIR"] = folder
            try:
                return importlib.import_module(name)
            finally:
                del os.environ["MPLCONFIGDIR"]
    return importlib.import_module(name)
