"""The demo's fleet on disk: data, `fleet.toml`, and a folder with `agent.toml` per device."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fleetprune.errors import ConfigError
from fleetprune_sim.data import digits, har
from fleetprune_sim.data.fleet_data import FleetData

MARK = ".fleetprune-demo"
"""Says that a folder was made by a demo, so that the next one may replace what is in it."""


@dataclass(frozen=True)
class DemoClass:
    """A device class of the demo's fleet."""

    name: str
    devices: tuple[str, ...]
    macs_share: float
    """Budget: share of the dense model's multiply-accumulates."""
    trains: bool
    """False: these devices only run forward passes."""


CLASSES = (
    DemoClass("gateway", ("gateway-1", "gateway-2"), 1.0, trains=True),
    DemoClass("phone", ("phone-1", "phone-2"), 0.5, trains=True),
    DemoClass("sensor", ("sensor-1", "sensor-2"), 0.25, trains=False),
)
DEVICES = {device: group.name for group in CLASSES for device in group.devices}
"""Device to class."""


@dataclass(frozen=True)
class DemoTask:
    """What the fleet learns."""

    name: str
    factory: str
    rounds: int
    """By default."""
    epochs: int
    """In a round; a device of `har` has several times as many samples."""
    load: Callable[[int, Path], FleetData]
    """From a seed and a folder for caches."""
    held_out: float
    """Share of its samples that a device judges installed models by."""

    @property
    def training(self) -> dict[str, Any]:
        """The table `training` of `fleet.toml`."""
        return {
            "rounds": self.rounds,
            "devices_per_round": len(DEVICES),
            "min_devices": len(DEVICES),
            "epochs": self.epochs,
            "batch": 32,
            "learning_rate": 0.1,
        }


def _digits(seed: int, cache: Path) -> FleetData:
    return digits.load(list(DEVICES), seed)


def _har(seed: int, cache: Path) -> FleetData:
    gateways, phones, sensors = (list(group.devices) for group in CLASSES)
    return har.load(gateways, phones, sensors, seed, cache)


TASKS = {
    "digits": DemoTask(
        "digits", "fleetprune_sim.models:digits_cnn", 20, 2, _digits, digits.DEVICE_TEST_SHARE
    ),
    "har": DemoTask("har", "fleetprune_sim.models:cnn1d", 30, 1, _har, har.DEVICE_TEST_SHARE),
}


@dataclass(frozen=True)
class DemoFolder:
    """Where everything is below the demo's folder."""

    root: Path

    @property
    def fleet_toml(self) -> Path:
        """The coordinator's configuration."""
        return self.root / "fleet.toml"

    @property
    def state(self) -> Path:
        """The coordinator's state."""
        return self.root / "coordinator"

    @property
    def events(self) -> Path:
        """What happened, one JSON object per line."""
        return self.root / "events.jsonl"

    @property
    def summary(self) -> Path:
        """The figures of the run."""
        return self.root / "summary.json"

    @property
    def logs(self) -> Path:
        """One file per process."""
        return self.root / "logs"

    @property
    def cache(self) -> Path:
        """Parsed data sets; survives the next demo in the same folder."""
        return self.root / "cache"

    def device(self, name: str) -> Path:
        """A device's own folder."""
        return self.root / "devices" / name

    def agent_toml(self, name: str) -> Path:
        """A device's configuration."""
        return self.device(name) / "agent.toml"

    def provisioned_root(self) -> Path:
        """The TUF root metadata that `fleetprune coordinator init` made.

        Raises:
            ConfigError: There is none.
        """
        found = sorted(self.state.rglob("1.root.json"))
        if not found:
            raise ConfigError(f"{self.state} has no 1.root.json: coordinator init made no keys")
        return found[0]


_MADE = (
    "broker",
    "coordinator",
    "devices",
    "events.jsonl",
    "fleet.toml",
    "logs",
    "releases",
    "summary.json",
    "test.npz",
)
"""Everything that a demo leaves in its folder, but for the cache."""


def claim(folder: Path) -> None:
    """Make sure that a folder can take a demo's files; remove those of an earlier one.

    Raises:
        ConfigError: It has files that no demo made.
    """
    mark = folder / MARK
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, expected a folder for the results")
    if folder.is_dir() and any(folder.iterdir()) and not mark.is_file():
        raise ConfigError(f"{folder} is not empty and not from a demo: name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text("The next `fleetprune demo --out` here replaces the files of this one.\n")
        for path in (folder / name for name in _MADE):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as e:
        raise ConfigError(f"{folder} cannot be written: {e.strerror}") from e


def write_fleet(
    folder: DemoFolder,
    task: DemoTask,
    data: FleetData,
    *,
    classes: Sequence[DemoClass],
    training: Mapping[str, Any],
    port: int,
) -> None:
    """Write the coordinator's configuration and test set, and every device's data.

    Args:
        folder: Where to.
        task: What the fleet learns.
        data: Its samples.
        classes: The device classes.
        training: Keys of the table `training` that differ from the demo's own.
        port: Of the broker on 127.0.0.1.
    """
    np.savez(folder.root / "test.npz", x=data.x_test, y=data.y_test)
    fleet = {
        "fleet": task.name,
        "state": folder.state.name,
        "broker": {"host": "127.0.0.1", "port": port},
        "model": {
            "factory": task.factory,
            "input_shape": list(data.input_shape),
            "labels": list(data.labels),
        },
        "data": {"test": "test.npz"},
        "training": {**task.training, **training},
        "rollout": {"stages": [1.0], "soak_s": 0.0},  # to everybody at once
        "classes": {
            group.name: {"macs_share": group.macs_share, "trains": group.trains}
            for group in classes
        },
    }
    folder.fleet_toml.write_text(to_toml(fleet), encoding="utf-8")
    for device, own in data.devices.items():
        folder.device(device).mkdir(parents=True, exist_ok=True)
        np.savez(
            folder.device(device) / "data.npz",
            x=np.concatenate([own.x_train, own.x_test]),  # the agent holds out a part by itself
            y=np.concatenate([own.y_train, own.y_test]),
        )


def write_agents(
    folder: DemoFolder, task: DemoTask, *, classes: Sequence[DemoClass], port: int
) -> None:
    """Provision every device: the fleet's root of trust and its own configuration."""
    root = folder.provisioned_root().read_bytes()
    for group in classes:
        for device in group.devices:
            home = folder.device(device)
            (home / "root.json").write_bytes(root)
            agent = {
                "device": device,
                "device_class": group.name,
                "fleet": task.name,
                "root": "root.json",
                "state": "state",
                "trains": group.trains,
                "telemetry_s": 5.0,  # so that the table soon has every device's own figures
                "broker": {"host": "127.0.0.1", "port": port},
                "data": {"kind": "npz", "path": "data.npz", "held_out": task.held_out},
            }
            folder.agent_toml(device).write_text(to_toml(agent), encoding="utf-8")


def to_toml(table: Mapping[str, Any], path: str = "") -> str:
    """TOML for nested tables of strings, numbers, booleans and lists of these."""
    lines = [f"{k} = {_value(v)}" for k, v in table.items() if not isinstance(v, Mapping)]
    text = "".join(f"{line}\n" for line in lines)
    if path and lines:
        text = f"\n[{path}]\n{text}"
    for key, value in table.items():
        if isinstance(value, Mapping):
            text += to_toml(value, f"{path}.{key}" if path else key)
    return text


def _value(value: object) -> str:
    """JSON's scalars and lists are TOML's, but for null, which nothing here holds."""
    return json.dumps(value, ensure_ascii=False)
