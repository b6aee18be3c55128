"""A whole fleet in one process: the real coordinator, the real agent core, no network."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetprune.blocks import NotFoundError
from fleetprune.messages import Blob, Enrol, GraphRef, Task
from fleetprune_agent.data import Samples
from fleetprune_agent.feedback import InMemory
from fleetprune_agent.sessions import Graphs
from fleetprune_agent.worker import Worker, WorkerSettings
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.coordinator import Coordinator
from fleetprune_coordinator.events import EventLog
from fleetprune_coordinator.keys import RELEASES, init_repository
from fleetprune_coordinator.loop_grid import LoopGrid
from fleetprune_coordinator.strategy import NestedStrategy, run_app, server_app

Read = Callable[[str], bytes]


@dataclass(frozen=True)
class LoopDevice:
    """A simulated device and the samples it has."""

    device_class: str
    trains: bool
    x: NDArray[np.float32]
    """(n, *input shape)"""
    y: NDArray[np.int64]
    """(n,)"""


class _Source:
    """Graphs and models by the names that devices use over MQTT."""

    def __init__(self, read: Read) -> None:
        self._read = read

    def graph(self, ref: GraphRef) -> bytes:
        folder, _, name = ref.target.rpartition("/")
        return self._read(f"targets/{folder}/{ref.sha256}.{name}")

    def model(self, blob: Blob) -> bytes:
        return self._read(f"blobs/{blob.sha256}")


def _reader(coordinator: Coordinator) -> Read:
    def read(name: str) -> bytes:
        found = coordinator.read(name)
        if found is None:
            raise NotFoundError(f"the coordinator has no {name}")
        return found.read_bytes() if isinstance(found, Path) else found

    return read


def _device(name: str, device: LoopDevice, graphs: Graphs) -> Callable[[bytes, Read], bytes]:
    settings = WorkerSettings(name, trains=device.trains)
    worker = Worker(
        settings, Samples(device.x, device.y, lambda i: f"{name}: sample {i}"), graphs, InMemory()
    )

    def run(task: bytes, read: Read) -> bytes:
        return worker.handle(Task.from_bytes(task), _Source(read))

    return run


def open_coordinator(
    config: FleetConfig, devices: Mapping[str, LoopDevice], events: Path | None = None
) -> Coordinator:
    """A coordinator on `config.state`, made if it is new, with the devices enrolled.

    Args:
        config: The fleet.
        devices: By name.
        events: File that events are appended to.
    """
    if not (config.state / RELEASES).exists():
        init_repository(config.state / RELEASES, datetime.now(UTC))
    coordinator = Coordinator(config, time.time, EventLog(events, time.time))
    for name, device in devices.items():
        coordinator.registry.enrol(
            Enrol(
                device=name,
                device_class=device.device_class,
                agent_version="loop",
                trains=device.trains,
                samples=len(device.x),
            )
        )
    return coordinator


def train(
    coordinator: Coordinator,
    devices: Mapping[str, LoopDevice],
    on_round: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> LoopGrid:
    """Run what is left of the training.

    Args:
        coordinator: From `open_coordinator`.
        devices: By name.
        on_round: Told of every closed round's metrics.

    Returns:
        The grid, which has counted each device's payload bytes.
    """
    graphs = Graphs(kept=64)
    grid = LoopGrid(
        {name: _device(name, device, graphs) for name, device in devices.items()},
        {d.name: d.id for d in coordinator.registry.devices()},
        _reader(coordinator),
    )
    strategy = NestedStrategy(coordinator.rounds, on_round)
    timeout = coordinator.config.training.round_timeout_s
    run_app(server_app(strategy, coordinator.rounds, timeout), grid)
    return grid
