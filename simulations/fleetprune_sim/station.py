"""Does the tasks of all devices of a run, in whatever process it is made.

A device is its samples and what it remembers, which comes with each job and goes back with its
answer; between its tasks it takes no memory. So any process may do any device's next task.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from fleetprune.blocks import NotFoundError
from fleetprune.errors import FleetpruneError
from fleetprune.messages import Blob, GraphRef, Task, TaskKind
from fleetprune_agent.data import Samples
from fleetprune_agent.feedback import InMemory, decode_memory, encode_memory
from fleetprune_agent.sessions import Graphs
from fleetprune_agent.worker import WorkerSettings
from fleetprune_coordinator.keys import RELEASES
from fleetprune_sim.fleet import FOLDER, Fleet
from fleetprune_sim.methods import find_method

STATE = "state"
"""Folder of the coordinator's state, below a run's."""
GRAPHS = 64  # sessions that stay ready; a run has a handful per class


@dataclass(frozen=True)
class Job:
    """One task for one device, as it reaches it."""

    device: str
    task: bytes
    """JSON of a `Task`"""
    model: bytes
    """frame of kind MODL"""
    memory: bytes = b""
    """what the device remembers; empty: nothing"""


@dataclass(frozen=True)
class Done:
    """What became of a job."""

    frame: bytes | None
    """of kind RSLT; None: the device could not"""
    reason: str = ""
    memory: bytes | None = None
    """what the device remembers now; None: what it did before"""


def graph_path(state: Path, ref: GraphRef) -> Path:
    """Where a signed graph lies in a release repository, under the name that devices ask for."""
    folder, _, name = ref.target.rpartition("/")
    return state / RELEASES / "public" / "targets" / folder / f"{ref.sha256}.{name}"


class _Source:
    """A task's model, and graphs from the release repository on disk."""

    def __init__(self, state: Path, model: bytes) -> None:
        self._state, self._model = state, model

    def graph(self, ref: GraphRef) -> bytes:
        path = graph_path(self._state, ref)
        if not path.is_file():
            raise NotFoundError(f"{self._state} has no {ref.target}")
        return path.read_bytes()

    def model(self, blob: Blob) -> bytes:
        return self._model


class Station:
    """All devices of one run, one task at a time."""

    def __init__(self, folder: Path, method: str, trains: frozenset[str]) -> None:
        """Open a run's fleet.

        Args:
            folder: Of the run.
            method: By name; says what a device does.
            trains: Device classes that train.
        """
        self._folder, self._trains = folder, trains
        self._fleet = Fleet.load(folder / FOLDER)
        self._worker = find_method(method).worker()
        self._graphs = Graphs(kept=GRAPHS)

    def run(self, job: Job) -> Done:
        """Do a job; what the device refuses is said, not raised."""
        member = self._fleet.members[job.device]
        x, y = self._fleet.x[member.train], self._fleet.y[member.train]
        store = InMemory()
        if job.memory:
            store.save(decode_memory(job.memory))
        worker = self._worker(
            WorkerSettings(member.name, trains=member.device_class in self._trains),
            Samples(x, y, lambda i: f"{member.name}: sample {i}"),
            self._graphs,
            store,
            clock=lambda: 0.0,
            memory_mb=lambda: 0.0,
        )
        task = Task.from_bytes(job.task)
        try:
            frame = worker.handle(task, _Source(self._folder / STATE, job.model))
        except FleetpruneError as e:
            return Done(None, f"{type(e).__name__}: {e}")
        memory = store.load()
        if not memory.residual.size and not job.memory:
            return Done(frame)  # nothing to remember: done again, the task has the same answer
        last = replace(memory, answers={task.task: frame})
        return Done(frame, memory=encode_memory(last) if task.kind is TaskKind.TRAIN else None)
