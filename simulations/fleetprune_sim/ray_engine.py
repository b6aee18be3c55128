"""The devices' work done by Flower's simulation engine: Ray's processes, on one machine or many.

The clock, the rounds and the history stay with `SimulatedGrid`; Flower and Ray bring jobs to
worker processes and answers back. What runs there is `ray_worker`.
"""

import importlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from flwr.supercore import telemetry  # internal, pinned by flwr==1.41.0

from fleetprune.errors import TransportError
from fleetprune_sim.ray_worker import WORKER_FAILED, Setup, app, read_answers, request
from fleetprune_sim.station import Done, Job

log = logging.getLogger(__name__)

ADDRESS = "RAY_ADDRESS"
"""Environment variable that names a cluster, as Ray itself has it."""
MESSAGES_PER_WORKER = 4
"""In a round: many, so that no worker waits long for the last one; few, since Flower hands out
one message per virtual node and 100 ms."""
MESSAGE_BYTES = 64 << 20
"""Of jobs in one message; a single job may have more."""
LOOK_S = 0.01
"""Between two looks at what has come back."""
SHORT = "/tmp"  # noqa: S108  (Ray's sockets lie below it, and a socket's path holds 107 bytes)


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
            parts[i] = came[i] = []  # frees the memory

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
        chatty, keep = log.isEnabledFor(logging.DEBUG), self._cleanup
        flower = logging.getLogger("flwr")
        keep.callback(flower.setLevel, flower.level)
        flower.setLevel(logging.DEBUG if chatty else logging.CRITICAL)
        folder = keep.enter_context(
            tempfile.TemporaryDirectory(prefix="ray-", dir=SHORT, ignore_cleanup_errors=True)
        )
        keep.enter_context(_environment(folder))
        telemetry.FLWR_TELEMETRY_ENABLED = os.environ["FLWR_TELEMETRY_ENABLED"]
        ray: Any = importlib.import_module("ray")
        keep.callback(ray.shutdown)
        address = os.environ.get(ADDRESS)
        where = (
            {"address": address}
            if address
            else {
                "address": "local",
                "num_cpus": self._workers,
                "num_gpus": 0,
                "include_dashboard": False,
                "_temp_dir": folder,
            }
        )
        try:
            # In this thread: Linux ends what Ray starts with the thread that started it.
            ray.init(
                **where,
                log_to_driver=chatty,
                logging_level=logging.INFO if chatty else logging.CRITICAL,
            )
        except Exception as e:
            raise TransportError(f"Ray at {address or 'this machine'} does not start: {e}") from e
        keep.enter_context(_ended_by_sigterm())
        if address:
            self._workers = int(ray.cluster_resources().get("CPU", 0))
        keep.callback(self._thread.join)
        keep.callback(self._ended.set)
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
    error = reply.error
    if error.code == WORKER_FAILED:
        raise TransportError(f"a worker of the simulation failed on {error.reason}")
    log.debug("lost: %s", error.reason)
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


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Clean up at SIGTERM too; Ray's own handlers, which this replaces, dump a stack and abort."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def _environment(folder: str) -> Iterator[None]:
    """What Ray and Flower read; a user's own choice is left alone."""
    wanted: Mapping[str, str] = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or Ray warns of what will change
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_HOME": folder,
    }
    added = {k: v for k, v in wanted.items() if k not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
