"""What a worker process of the Ray engine runs: a Flower `ClientApp` that does jobs.

A virtual node of Flower's simulation is a place where messages wait, no device and no process:
whichever worker is free does the jobs of the next message, each with the device's memory in it.
"""

import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fleetprune.errors import TransportError
from fleetprune_sim.fleet import DEVICES, FOLDER
from fleetprune_sim.station import Done, Job, Station

WORKER_FAILED = 1001  # error code: the job could not be tried; Flower's own are below 1000
ENOUGH_S = 1.0
"""After which the rest of a message's jobs is left to another message: Ray can only be ended
between two messages, and nobody waits long after Ctrl-C."""

app = ClientApp()


@dataclass(frozen=True)
class Setup:
    """What a station is made of; hashable, so that a process makes it once."""

    folder: str
    """of the run, the same on every machine"""
    method: str
    trains: tuple[str, ...]


@app.train()
def work(message: Message, context: Context) -> Message:
    """Do a message's jobs; a device that refuses is part of the answer, all else is an error."""
    try:
        setup, jobs = read_request(message.content)
        station = open_station(setup)
        answer = answers(list(_in_time(station, jobs)))
    except Exception as e:  # it would reach the engine as pages of Ray's and Flower's tracebacks
        what = str(e) if isinstance(e, TransportError) else f"{type(e).__name__}: {e}"
        return Message(Error(WORKER_FAILED, f"{socket.gethostname()}: {what}"), reply_to=message)
    return Message(answer, reply_to=message)


def _in_time(station: Station, jobs: Sequence[Job]) -> Iterator[Done]:
    started = time.monotonic()
    for job in jobs:
        yield station.run(job)
        if time.monotonic() - started > ENOUGH_S:
            return


@lru_cache(maxsize=1)
def open_station(setup: Setup) -> Station:
    """The station of this process.

    Raises:
        TransportError: This machine does not see the run's folder.
    """
    folder = Path(setup.folder)
    if not (folder / FOLDER / DEVICES).is_file():
        raise TransportError(
            f"there is no {folder / FOLDER} on this machine: "
            "all machines must share the run's folder under the same path"
        )
    return Station(folder, setup.method, frozenset(setup.trains))


# ---- what travels: lists of bytes in one record, which Ray pickles. A model that several jobs
# have in common is one object, so it travels once per message.


def request(setup: Setup, jobs: Sequence[Job]) -> RecordDict:
    """The content of a message that asks for jobs."""
    return RecordDict(
        {
            "setup": ConfigRecord(asdict(setup) | {"trains": list(setup.trains)}),
            "jobs": ConfigRecord(
                {
                    "device": [j.device for j in jobs],
                    "task": [j.task for j in jobs],
                    "model": [j.model for j in jobs],
                    "memory": [j.memory for j in jobs],
                }
            ),
        }
    )


def read_request(content: RecordDict) -> tuple[Setup, list[Job]]:
    """What `request` wrote."""
    setup, jobs = content.config_records["setup"], content.config_records["jobs"]
    trains = tuple(cast(list[str], setup["trains"]))
    made = Setup(str(setup["folder"]), str(setup["method"]), trains)
    columns = (jobs[name] for name in ("device", "task", "model", "memory"))
    return made, [Job(*values) for values in zip(*columns, strict=True)]


def answers(done: Sequence[Done]) -> RecordDict:
    """The content of the reply, in the order of the jobs."""
    return RecordDict(
        {
            "done": ConfigRecord(
                {
                    "frame": [d.frame or b"" for d in done],  # no frame is empty
                    "reason": [d.reason for d in done],
                    "memory": [d.memory or b"" for d in done],
                }
            )
        }
    )


def read_answers(content: RecordDict) -> list[Done]:
    """What `answers` wrote."""
    done = content.config_records["done"]
    columns = (done[name] for name in ("frame", "reason", "memory"))
    return [Done(f or None, reason, m or None) for f, reason, m in zip(*columns, strict=True)]
