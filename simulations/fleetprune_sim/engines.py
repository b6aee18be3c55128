"""Where the tasks of a round are done: in this process, in several, or on several machines."""

import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Protocol, cast

from fleetprune.errors import ConfigError, MissingExtraError, TransportError
from fleetprune_sim.station import Done, Job, Station
from fleetprune_sim.workers import Workers

ENGINES = ("loop", "ray")
RAY_ADDRESS = "RAY_ADDRESS"
"""Environment variable that names a cluster, as Ray itself has it."""


class Engine(Protocol):
    """Does jobs."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        """What became of each job, in their order."""
        ...

    def close(self) -> None:
        """End all processes."""
        ...


def check_engine(name: str, workers: int = 1, jobs: int = 1) -> None:
    """Whether an engine can be used here, and so.

    Args:
        name: Of the engine.
        workers: Processes for one run.
        jobs: Runs side by side.

    Raises:
        ConfigError: There is none of this name, or it cannot do what is wanted of it.
        MissingExtraError: What it needs is not installed.
    """
    if name not in ENGINES:
        raise ConfigError(f"no engine {name!r}, expected {' or '.join(ENGINES)}")
    if name != "ray":
        return
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError(
            "--engine ray needs ray, which is not installed: pip install 'fleetprune[ray]'"
        )
    if jobs > 1:
        raise ConfigError("--engine ray does one run after another: leave out --jobs")
    if workers > 1 and os.environ.get(RAY_ADDRESS, "local") != "local":
        raise ConfigError(
            f"the cluster at {RAY_ADDRESS} has as many workers as CPUs: leave out --workers"
        )


def make_engine(
    name: str, folder: Path, method: str, trains: frozenset[str], workers: int
) -> Engine:
    """The engine of this name; the other arguments as for `Station`.

    Raises:
        ConfigError: There is none of this name.
        MissingExtraError: What it needs is not installed.
    """
    check_engine(name, workers)
    if name == "ray":
        module = importlib.import_module("fleetprune_sim.ray_engine")
        return cast(Engine, module.RayEngine(folder, method, trains, workers))
    if workers <= 1:
        return InProcess(folder, method, trains)
    return Processes(folder, method, trains, workers)


class InProcess:
    """One job after another."""

    def __init__(self, folder: Path, method: str, trains: frozenset[str]) -> None:
        """As `Station`."""
        self._station = Station(folder, method, trains)

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        """What became of each job, in their order."""
        return map(self._station.run, jobs)

    def close(self) -> None:
        """Nothing to end."""


class Processes:
    """Several processes, each with a station of its own; a device belongs to none of them."""

    def __init__(self, folder: Path, method: str, trains: frozenset[str], workers: int) -> None:
        """As `Station`, in `workers` processes."""
        self._pool = Workers(workers, _open, folder, method, trains)

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        """What became of each job, in their order.

        Raises:
            TransportError: A process was killed.
        """
        try:
            yield from self._pool.map(_run, jobs)
        except BrokenProcessPool as e:
            raise TransportError(
                "a worker process of the simulation was killed (out of memory?); "
                "go on with --resume, perhaps with fewer --workers"
            ) from e

    def close(self) -> None:
        """End all processes."""
        self._pool.end()


_station: Station | None = None
"""Of a worker process."""


def _open(folder: Path, method: str, trains: frozenset[str]) -> None:
    global _station  # noqa: PLW0603  (a pool gives its workers no other place)
    _station = Station(folder, method, trains)


def _run(job: Job) -> Done:
    assert _station is not None
    return _station.run(job)
