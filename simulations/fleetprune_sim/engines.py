"""Where the tasks of a round are done: in this process, or in several."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Protocol

from fleetprune.errors import TransportError
from fleetprune_sim.station import Done, Job, Station


class Engine(Protocol):
    """Does jobs."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        """What became of each job, in their order."""
        ...

    def close(self) -> None:
        """End all processes."""
        ...


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
        self._pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),  # torch's threads do not survive fork
            initializer=_open,
            initargs=(folder, method, trains),
        )

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
        self._pool.shutdown(cancel_futures=True)


_station: Station | None = None
"""Of a worker process."""


def _open(folder: Path, method: str, trains: frozenset[str]) -> None:
    global _station  # noqa: PLW0603  (a pool gives its workers no other place)
    _station = Station(folder, method, trains)


def _run(job: Job) -> Done:
    assert _station is not None
    return _station.run(job)
