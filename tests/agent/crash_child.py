"""A device that is killed: forks a process per line of stdin, installs in it, and kills it.

    python crash_child.py STATE PUBLIC ROOT NOW

`operation N` kills right before the N-th operation on the disk, `time S` after S seconds. Answers
`killed`, or `done` and an exit status, per line. One process imports onnxruntime once; no session
is ever made in it, so its forks have no threads to lose.
"""

import os
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np

from fleetprune_agent.install import install
from fleetprune_agent.serving import COMMIT_AFTER, Predictor
from fleetprune_agent.slots import Slots
from fleetprune_agent.trust import FolderSource, TrustedRepository

CHUNK_S = 0.002  # a slow line: so that many kills hit a download


class Countdown:
    """Kills this process before the N-th operation on the disk."""

    def __init__(self, left: int) -> None:
        self.left = left
        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, operation):
        def call(*args, **kwargs):
            self.tick()
            return operation(*args, **kwargs)

        return call

    def tick(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


class Line(FolderSource):
    def __init__(self, folder: Path, tick) -> None:
        super().__init__(folder)
        self.tick = tick

    def progress(self, name: str, done: int) -> None:
        self.tick()


def live(state: Path, public: Path, root: bytes, now: datetime, tick) -> None:
    """What an agent does between two power cuts."""
    slots = Slots(state)
    slots.start()
    trusted = TrustedRepository(state / "trust", root, Line(public, tick), lambda: now)
    install(trusted, slots, "phone")
    predictor = Predictor(slots)
    for _ in range(COMMIT_AFTER):
        predictor.predict(np.zeros((1, 4), dtype=np.float32))


def main(state: str, public: str, root: str, now: str) -> None:
    moment = datetime.fromisoformat(now)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, value = line.split()
        child = os.fork()
        if child == 0:
            tick = Countdown(int(value)).tick if kind == "operation" else slow
            code = 1
            try:
                live(Path(state), Path(public), Path(root).read_bytes(), moment, tick)
                code = 0
            finally:
                os._exit(code)
        if kind == "time":
            time.sleep(float(value))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        outcome = "killed" if os.WIFSIGNALED(status) else f"done {os.WEXITSTATUS(status)}"
        print(outcome, flush=True)


def slow() -> None:
    time.sleep(CHUNK_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
