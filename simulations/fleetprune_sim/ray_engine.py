"""The devices' work done by Flower's simulation engine: Ray's processes, on one machine or many.

The clock, the rounds and the history stay with `SimulatedGrid`; Flower and Ray bring jobs to
worker processes and answers back. What runs there is `ray_worker`.
"""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fleetprune.errors import TransportError
from fleetprune_sim.ray_cluster import ray_running
from fleetprune_sim.ray_worker import WORKER_FAILED, Setup, app, read_answers, request
from fleetprune_sim.station import Done, Job

log = logging.getLogger(__name__)

MESSAGES_PER_WORKER = 4
"""In a round: many, so that no worker waits long for the last one; few, since Flower hands out
one message per virtual node and 100 ms."""
MESSAGE_BYTES = 64 << 20
"""Of jobs in one message; a single job may have more."""
LOOK_S = 0.01
"""Between two looks at what has come back."""


class RayEngine:
    """Flower's virtual nodes on Ray. It starts with the first jobs: that takes seconds."""

    def __init__(self, folder: Path, method: str, trains: frozenset[str], workers: int) -> None:
        """As `Station`, in `workers` processes; on a cluster, in one per CPU of it."""
        self._setup = Setup(str(folder.absolute()), method, tuple(sorted(trains)))
        self._workers = workers
        self._cleanup = ExitStack()
        self._grid: Grid | None = None
        self._ended = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._simulate, name="flower")

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        """What became of each job, in their order.

        Raises:
            TransportError: Ray cannot be started or reached, or a worker was lost.
        """
        if self._grid is None:
            self._start()
        parts = cut(jobs, self._nodes)
        came: list[list[Done]] = [[] for _ in parts]
        waiting = self._push(dict(enumerate(parts)))
        for i in range(len(parts)):
            while len(came[i]) < len(parts[i]):
                for reply in self._pull(waiting):
                    which = waiting.pop(reply.metadata.reply_to_message_id)
                    came[which] += _read(reply)
                    if left := parts[which][len(came[which]) :]:
                        waiting |= self._push({which: left})
            yield from came[i]
            parts[i], came[i] = [], []  # frees the memory

    def close(self) -> None:
        """End all processes; on a cluster, those of this run."""
        self._cleanup.close()

    @property
    def _nodes(self) -> int:
        return MESSAGES_PER_WORKER * self._workers

    def _push(self, parts: Mapping[int, Sequence[Job]]) -> dict[str, int]:
        """Send parts of a round; returns the part of each message's id."""
        assert self._grid is not None
        nodes = list(self._grid.get_node_ids())
        messages = [
            Message(request(self._setup, jobs), nodes[i % len(nodes)], "train")
            for i, jobs in parts.items()
        ]
        ids = list(self._grid.push_messages(messages))
        if len(ids) != len(messages):
            raise TransportError(f"Flower took {len(ids)} of {len(messages)} messages")
        return dict(zip(ids, parts, strict=True))

    def _pull(self, waiting: Iterable[str]) -> list[Message]:
        assert self._grid is not None
        if found := list(self._grid.pull_messages(waiting)):
            return found
        if not self._thread.is_alive():
            raise TransportError(
                f"Flower's simulation engine ended early ({self._failure}); go on with --resume"
            )
        time.sleep(LOOK_S)
        return []

    # ---- starting

    def _start(self) -> None:
        self._workers = self._cleanup.enter_context(ray_running(self._workers))
        self._cleanup.callback(self._thread.join)
        self._cleanup.callback(self._ended.set)
        self._thread.start()
        # The grid comes before its nodes.
        while self._grid is None or len(list(self._grid.get_node_ids())) < self._nodes:
            if not self._thread.is_alive():
                raise TransportError(f"Flower's simulation engine does not start: {self._failure}")
            time.sleep(LOOK_S)

    def _simulate(self) -> None:
        """What the thread does until the engine is closed."""
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            self._grid = grid
            self._ended.wait()

        try:
            run_simulation(
                server_app=server,
                client_app=app,
                num_supernodes=self._nodes,
                backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
            )
        except Exception as e:  # belongs to the thread that asks for answers
            self._failure = e
            self._ended.set()


def _read(reply: Message) -> list[Done]:
    if not reply.has_error():
        return read_answers(reply.content)
    reason = reply.error.reason or ""
    if reply.error.code == WORKER_FAILED:
        raise TransportError(f"a worker of the simulation failed on {reason}")
    log.debug("%s", reason)
    if "RayTaskError" in reason:  # the process lives; Flower's reason is a whole traceback
        what = reason.removesuffix("'>").strip().splitlines()[-1]
        raise TransportError(f"a worker of the simulation failed: {what}")
    raise TransportError(
        "a worker process of the simulation was lost (killed, out of memory, or its machine is "
        "gone); go on with --resume, perhaps with fewer workers"
    )


def cut(jobs: Sequence[Job], parts: int) -> list[Sequence[Job]]:
    """Neighbouring jobs for one message each: about `parts` of them, more if they are large."""
    most = max(1, -(-len(jobs) // parts))
    found: list[Sequence[Job]] = []
    first = size = 0
    for i, job in enumerate(jobs):
        more = len(job.model) + len(job.memory)
        if i > first and (i - first == most or size + more > MESSAGE_BYTES):
            found.append(jobs[first:i])
            first, size = i, 0
        size += more
    return [*found, jobs[first:]] if jobs else []
