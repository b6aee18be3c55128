"""A simulated fleet on disk: every device's class and samples, shared by all processes of a run.

Samples are stored once, whatever the number of devices: a device is a list of places in them, and
its samples are read when it has something to do.
"""

import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import ConfigError, DataError
from fleetprune_sim.data.corpus import Corpus
from fleetprune_sim.data.partition import Indices, draw, hold_out, split
from fleetprune_sim.settings import DeviceProfile, SimulationConfig

FOLDER = "fleet"
DEVICES = "devices.npz"
"""Of the files in the folder, the one that is written last."""
_ARRAYS = ("x", "y", "x_test", "y_test", "x_validation", "y_validation")


@dataclass(frozen=True)
class Member:
    """One device."""

    name: str
    device_class: str
    train: Indices
    """places of its samples in `Fleet.x`"""
    test: Indices
    """places of the samples that it judges models by"""


@dataclass(frozen=True)
class Fleet:
    """Devices and data."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    x_validation: NDArray[np.float32]
    y_validation: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]
    labels: tuple[str, ...]
    members: Mapping[str, Member]
    own_tests: Mapping[str, Sequence[Indices]]
    """Per class, places in the test set of devices that are held out whole; where the data has
    no such devices, nothing: then members judge for themselves."""

    def save(self, folder: Path) -> None:
        """Write to `folder`, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name))
        members = list(self.members.values())
        owned = [(name, part) for name, parts in self.own_tests.items() for part in parts]
        arrays: dict[str, Any] = {
            "labels": np.array(self.labels),
            "names": np.array([m.name for m in members]),
            "classes": np.array([m.device_class for m in members]),
            "own_classes": np.array([c for c, _ in owned], dtype=np.str_),
        }
        arrays |= _pack("train", [m.train for m in members])
        arrays |= _pack("test", [m.test for m in members])
        arrays |= _pack("own", [part for _, part in owned])
        save_whole(folder / DEVICES, arrays)  # last: says that all the rest is whole

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What `save` wrote; samples stay on disk until they are looked at.

        Raises:
            ConfigError: A file is missing or damaged.
        """
        # Plain views of the mapped files: a `memmap` takes far longer to index a few samples.
        arrays: dict[str, Any] = {}
        for name in _ARRAYS:
            with _reading(path := folder / f"{name}.npy"):
                arrays[name] = np.asarray(np.load(path, mmap_mode="r"))
        path = folder / DEVICES
        with _reading(path), path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            names, classes = file["names"].tolist(), file["classes"].tolist()
            parts = zip(names, classes, _unpack(file, "train"), _unpack(file, "test"), strict=True)
            own: dict[str, list[Indices]] = {}
            for name, part in zip(file["own_classes"].tolist(), _unpack(file, "own"), strict=True):
                own.setdefault(name, []).append(part)
            labels = tuple(file["labels"].tolist())
            members = {name: Member(name, c, train, test) for name, c, train, test in parts}
        return cls(**arrays, labels=labels, members=members, own_tests=own)


def save_whole(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an .npz in one step: a kill leaves all of it or nothing."""
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)
    part.replace(path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise ConfigError(
            f"{path} cannot be read ({e}): remove {path.parent}, and --resume makes it anew"
        ) from e


def _pack(name: str, parts: Sequence[Indices]) -> dict[str, NDArray[np.intp]]:
    sizes = np.array([p.size for p in parts], np.intp)
    flat = np.concatenate(parts) if parts else np.empty(0, np.intp)
    return {f"{name}_sizes": sizes, f"{name}_flat": flat.astype(np.intp)}


def _unpack(file: Mapping[str, NDArray[np.intp]], name: str) -> list[Indices]:
    cuts = np.cumsum(file[f"{name}_sizes"])[:-1]
    return np.split(file[f"{name}_flat"], cuts) if file[f"{name}_sizes"].size else []


def build_fleet(corpus: Corpus, config: SimulationConfig, seed: int) -> Fleet:
    """Split a data set over devices and give these their classes.

    Args:
        corpus: The data set.
        config: Devices, classes with their profiles, partition.
        seed: Decides everything.

    Raises:
        DataError: A device would have too few samples.
        ConfigError: A class wants hardware that the data does not know.
    """
    rng = np.random.default_rng([seed, 4127])
    groups = _by_kind(corpus, config)
    counts = _apportion({n: p.share for n, p in config.classes.items()}, config.devices)
    width = len(str(max(0, config.devices - 1)))
    members: dict[str, Member] = {}
    for kind, classes in groups.items():
        here = np.arange(corpus.y.size)
        if kind and corpus.kind is not None:
            here = np.flatnonzero(corpus.kind == kind)
        devices = sum(counts[name] for name in classes)
        if not devices:
            continue
        if config.samples_per_device is not None:
            here = here[draw(corpus.y[here], devices * config.samples_per_device, seed)]
        owner = None if corpus.owner is None else corpus.owner[here]
        parts = split(corpus.y[here], owner, config.partition, devices, seed)
        for device_class, part in zip(_deal(classes, counts, rng), parts, strict=True):
            name = f"d{len(members):0{width}d}"
            held = hold_out(corpus.y[here[part]], config.held_out, rng)
            train = np.delete(part, held)
            if not train.size:
                raise DataError(
                    f"device {name} of class {device_class} would have no samples to train on: "
                    "simulate fewer devices, or give them more samples"
                )
            members[name] = Member(name, device_class, here[train], here[part[held]])
    return Fleet(
        **{name: getattr(corpus, name) for name in _ARRAYS},
        labels=corpus.labels,
        members=members,
        own_tests=_own_tests(corpus, config.classes),
    )


def _by_kind(corpus: Corpus, config: SimulationConfig) -> dict[str, list[str]]:
    """Classes by the hardware whose samples they take; "" for any."""
    groups: dict[str, list[str]] = {}
    for name, profile in config.classes.items():
        groups.setdefault(profile.kind, []).append(name)
    known = set() if corpus.kind is None else set(np.unique(corpus.kind).tolist())
    for kind, classes in groups.items():
        if kind and kind not in known:
            what = f"expected one of {', '.join(sorted(known))}" if known else "it knows none"
            raise ConfigError(
                f"simulation.classes.{classes[0]}.kind: the data has no {kind!r}, {what}"
            )
    if len(groups) > 1 and "" in groups:
        raise ConfigError(
            f"simulation.classes.{groups[''][0]}.kind: other classes have one, so this needs one"
        )
    return groups


def _apportion(shares: Mapping[str, float], devices: int) -> dict[str, int]:
    """Whole devices per class, by largest remainder; every class gets one at least.

    Raises:
        ConfigError: There are fewer devices than classes.
    """
    if devices < len(shares):
        raise ConfigError(f"{devices} devices for {len(shares)} classes, expected at least as many")
    total = sum(shares.values())
    exact = {name: devices * share / total for name, share in shares.items()}
    counts = {name: max(1, int(value)) for name, value in exact.items()}
    while sum(counts.values()) > devices:
        counts[max(counts, key=lambda n: counts[n] - exact[n])] -= 1
    for name in sorted(exact, key=lambda n: counts[n] - exact[n])[: devices - sum(counts.values())]:
        counts[name] += 1
    return counts


def _deal(classes: Sequence[str], counts: Mapping[str, int], rng: np.random.Generator) -> list[str]:
    """A class for each part, in random order."""
    slots = [name for name in classes for _ in range(counts[name])]
    return [slots[i] for i in rng.permutation(len(slots))]


def _own_tests(corpus: Corpus, classes: Mapping[str, DeviceProfile]) -> dict[str, list[Indices]]:
    """Per class the held-out devices of its hardware."""
    kinds, owners = corpus.test_kind, corpus.test_owner
    if kinds is None or owners is None or not any(p.kind for p in classes.values()):
        return {}
    return {
        name: [
            np.flatnonzero((kinds == profile.kind) & (owners == owner))
            for owner in np.unique(owners[kinds == profile.kind])
        ]
        for name, profile in classes.items()
    }
