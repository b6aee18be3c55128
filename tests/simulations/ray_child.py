"""`python -m tests.simulations.ray_child DIR`: a run of the loop, of Ray, which loses a worker, and
of the loop again.

In a process of its own, because Ray leaves behind unclosed handles, whose warnings would be errors
of whatever test comes next. What it found is one JSON object on standard output.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import psutil
from flwr.supercore import telemetry

from fleetprune.errors import TransportError
from fleetprune_sim import run
from fleetprune_sim.engines import InProcess
from fleetprune_sim.ray_engine import RayEngine
from fleetprune_sim.station import Done
from fleetprune_sim.study import Order, Progress, carry_out

TASK = "tests.simulations.tiny_task:task"
ROUNDS = 40  # under Ray they take seconds: time to interrupt them
LOOP, RAY = 20, 4
"""Rounds that the loop does first, and that Ray does after it."""
WORKER = "ray::Client"
"""How the title of an actor of Flower's begins, between its jobs and in them."""


def carry(folder: Path, tell=lambda news: None, **options):
    changes = {"training.rounds": ROUNDS, "simulation.evaluate_every": 10}
    return carry_out(Order(folder, None, TASK, "nested", 0, changes, resume=True, **options), tell)


class Compared:
    """A Ray engine that gets a bad job with every round; notes what the loop makes of the same."""

    def __init__(self, folder, method, trains, workers) -> None:
        self.ray = RayEngine(folder, method, trains, workers)
        self.loop = InProcess(folder, method, trains)
        self.rounds: list[dict[str, object]] = []

    def run(self, jobs) -> Iterator[Done]:
        if len(self.rounds) == RAY:
            process = worker()
            process.suspend()  # so that it certainly has work when it dies
            threading.Timer(0.5, process.kill).start()
        jobs = [*jobs, replace(jobs[0], model=b"no frame")]
        there, here = list(self.ray.run(jobs)), list(self.loop.run(jobs))
        self.rounds.append(
            {
                "jobs": len(jobs),
                "models": len({id(job.model) for job in jobs}),
                "equal": there == here,
                "refused": [done.reason for done in there if done.frame is None],
            }
        )
        return iter(there[:-1])

    def close(self) -> None:
        self.ray.close()


def processes() -> list[tuple[psutil.Process, str]]:
    """Of this one's children and theirs, those that live, each with its title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended since it was listed
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append((process, title(process)))
    return found


def title(process: psutil.Process) -> str:
    """What Ray has a process called; the kernel's own name is a thread's, and cut."""
    return next(iter(process.cmdline()), "") or process.name()


def worker(seconds: float = 10.0) -> psutil.Process:
    """The one process that does jobs.

    Raises:
        LookupError: It is not there, after `seconds`; says what is.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = processes()
        workers = [process for process, name in found if name.startswith(WORKER)]
        if len(workers) == 1:
            return workers[0]
        if time.monotonic() > deadline:
            raise LookupError(
                f"{len(workers)} processes {WORKER}* after {seconds:g} s, expected 1; there are "
                f"{', '.join(sorted(name for _, name in found)) or 'none'}; {actors()}"
            )
        time.sleep(0.05)


def actors() -> str:
    """What Ray itself knows of its workers: one that it has ended has a cause of death."""
    import ray  # noqa: PLC0415  (the tests that import this module do without)

    if not ray.is_initialized():
        return "Ray does not run"
    known = ray._private.state.actors().values()
    kept = [{key: a[key] for key in ("State", "Pid", "DeathCause") if key in a} for a in known]
    return f"Ray says {kept}"


class Stopped(Exception):
    """In the middle of a run."""


def until(done: int):
    def tell(news: Progress) -> None:
        if news.done == done:
            raise Stopped

    return tell


def main(folder: Path) -> None:
    with contextlib.suppress(Stopped):
        carry(folder, until(LOOP))
    made: list[Compared] = []

    def make(name, *arguments) -> Compared:
        made.append(Compared(*arguments))
        return made[0]

    telemetry.FLWR_TELEMETRY_ENABLED = "1"  # as if Flower had been imported by somebody else
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    lost = ""
    with mock.patch.object(run, "make_engine", make):
        try:
            carry(folder, engine="ray", workers=1)
        except TransportError as e:
            lost = str(e)
    found = {
        "rounds": made[0].rounds,
        "lost": lost,
        "pid": os.getpid(),
        "telemetry": telemetry.FLWR_TELEMETRY_ENABLED,
        "environment kept": dict(os.environ) == environment,
        "handler kept": signal.getsignal(signal.SIGTERM) is handler,
        "children": [name for _, name in processes()],
    }
    with contextlib.suppress(Stopped):
        carry(folder, until(ROUNDS + 1))
    # Nothing is left to do but to release: Ray does not even start.
    print(json.dumps(found | {"summary": carry(folder, engine="ray")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
