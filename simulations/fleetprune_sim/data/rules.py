"""The rules by which the devices of a simulated fleet get their samples."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fleetprune.config_file import Section
from fleetprune.errors import DataError
from fleetprune_sim.data.splitters import Indices, Splitter


class PartitionSpec(Section):
    """The table `simulation.partition`: by what rule devices get their samples."""

    kind: Literal["iid", "dirichlet", "pathological", "natural"] = "dirichlet"
    """`iid`: at random. `dirichlet`: each label in proportions drawn from Dirichlet(alpha).
    `pathological`: devices see `labels_per_device` labels. `natural`: by who recorded a sample,
    and further by Dirichlet(alpha) where there are more devices than that."""
    alpha: float = Field(default=0.3, gt=0)
    """A small one gives every label to few devices, a large one gives all the same mixture."""
    labels_per_device: int = Field(default=2, ge=1)
    least: int = Field(default=1, ge=1)
    """Samples that every device has at least."""


@dataclass(frozen=True)
class Rules:
    """A rule, who works its parts out, and the source of its draws."""

    splitter: Splitter
    spec: PartitionSpec
    rng: np.random.Generator

    def parts(
        self, y: NDArray[np.int64], owner: NDArray[np.str_] | None, devices: int
    ) -> list[Indices]:
        """Per device the places of its samples; see `partition.split`.

        Args:
            y: (n,) labels of shuffled samples.
            owner: (n,) whose they are, if the data set says so.
            devices: Number of parts, at most n.

        Raises:
            DataError: The rule cannot be kept.
        """
        if self.spec.kind == "iid":
            return self.splitter.iid(y.size, devices)
        if self.spec.kind == "dirichlet":
            return self._by_label(y, devices)
        if self.spec.kind == "pathological":
            return self._few_labels(y, devices)
        if owner is None:
            raise DataError("partition natural: the data set does not say whose its samples are")
        return self._by_owner(y, owner, devices)

    def _by_label(self, y: NDArray[np.int64], devices: int) -> list[Indices]:
        seed = int(self.rng.integers(2**31))
        drawn = self.splitter.dirichlet(y, devices, self.spec.alpha, seed)
        if min(part.size for part in drawn) >= self.spec.least:
            return drawn
        parts = [part.tolist() for part in drawn]
        fill_up(parts, self.spec.least, self.rng)
        return [np.array(part, dtype=np.intp) for part in parts]

    def _few_labels(self, y: NDArray[np.int64], devices: int) -> list[Indices]:
        labels, known = self.spec.labels_per_device, np.unique(y)
        if labels > known.size:
            raise DataError(f"labels_per_device {labels}, expected at most the data's {known.size}")
        parts = self.splitter.pathological(y, devices, labels, int(self.rng.integers(2**31)))
        unused = np.setdiff1d(known, y[np.concatenate(parts)])
        if unused.size:
            raise DataError(
                f"{devices} devices with {labels} labels each leave labels "
                f"{', '.join(map(str, unused))} to nobody: simulate more devices, or raise "
                "labels_per_device"
            )
        smallest = min(part.size for part in parts)
        if smallest < self.spec.least:
            raise DataError(
                f"a device would have {smallest} samples, expected at least {self.spec.least}: "
                "simulate fewer devices, or raise samples_per_device"
            )
        return parts

    def _by_owner(
        self, y: NDArray[np.int64], owner: NDArray[np.str_], devices: int
    ) -> list[Indices]:
        owned = self.splitter.natural(owner)
        if devices < len(owned):
            raise DataError(
                f"partition natural: {devices} devices are fewer than the data's {len(owned)} "
                f"owners, expected {len(owned)} or more"
            )
        counts = np.ones(len(owned), np.intp)
        sizes = np.array([part.size for part in owned])
        for _ in range(devices - len(owned)):  # the next to the one with most samples per device
            counts[np.argmax(sizes / counts)] += 1
        parts: list[Indices] = []
        for part, count in zip(owned, counts.tolist(), strict=True):
            check_enough(f"{count} devices of {owner[part[0]]}", part.size, count, self.spec.least)
            pieces = [np.arange(part.size)] if count == 1 else self._by_label(y[part], count)
            parts.extend(part[piece] for piece in pieces)
        return parts


def check_enough(whose: str, samples: int, devices: int, least: int) -> None:
    """DataError if `devices` devices, named by `whose`, cannot have `least` samples each."""
    if samples < devices * least:
        raise DataError(
            f"{samples} samples are too few for {whose} with at least {least} each: "
            "simulate fewer devices, or raise samples_per_device"
        )


def fill_up(parts: list[list[int]], least: int, rng: np.random.Generator) -> None:
    """Move samples, drawn at random, from the largest part to those that have too few."""
    sizes = np.array([len(part) for part in parts])
    for number, part in enumerate(parts):
        while len(part) < least:
            largest = int(sizes.argmax())
            part.append(parts[largest].pop(int(rng.integers(len(parts[largest])))))
            sizes[[number, largest]] += 1, -1
