"""Rolls releases out and dies on purpose; started by test_rollouts.py.

crash_rollouts.py sweep FOLDER  per number n: a process killed at its n-th write (an SQL statement
                                that writes, or a file of the repository), then one line of JSON on
                                what a restart finds, and on where it ends
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from fleetprune_coordinator.rollout_config import RolloutConfig
from tests.coordinator.rollout_fleets import START, Fleet, write_fast

PERSON = "ada (uid 1000)"
NAMES = ("p1", "p2", "p3", "p4")
WRITES = ("BEGIN", "COMMIT")  # what is between them is undone


RULES = RolloutConfig(stages=(1.0,), soak_s=0.0)


def prepare(folder):
    with Fleet(folder, RULES) as fleet:
        fleet.enrol(*NAMES)
        fleet.publish(1)
        fleet.publish(2)


def work(fleet):
    """One release to all; another as far as a person lets it. Each step may have been done."""
    phones = fleet.rollouts
    phones.ensure(1, ["phone"])
    if fleet.repository.rollout("phone").stable == 0:
        fleet.obey()
        fleet.tick()
    phones.ensure(2, ["phone"])
    said = [e.action for e in fleet.registry.rollout_log("phone")]
    for action in ("pause", "resume", "abort"):
        if action not in said:
            getattr(phones, action)(["phone"], who=PERSON)


def check(folder):
    """What a kill leaves, what a restart makes of it, and where it ends."""
    fleet = Fleet(folder, RULES, now=START + 1)
    registry = fleet.registry
    assert registry.query("PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    assert registry.query("PRAGMA foreign_key_check") == []
    signed, decided = fleet.repository.rollout("phone"), registry.documents().get("phone")
    left = [0 if document is None else document.serial for document in (signed, decided)]
    with fleet:
        work(fleet)
        fleet.obey()
        end = fleet.repository.rollout("phone")
        runs = [d.telemetry.release for d in registry.rollout_devices("phone")]
        return {
            "signed": left[0],
            "decided": left[1],
            "end": {"stable": end.stable, "candidate": end.candidate, "runs": runs},
            "log": [e.action for e in registry.rollout_log("phone")],
        }


def doomed(folder, at):
    """Works until its `at`-th write."""
    left = [at]

    def count():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(path, data):
        count()  # before it
        write_fast(path, data)
        count()  # and after it

    with Fleet(folder, RULES, now=START + 1, write=write) as fleet:

        def trace(statement):
            if statement.lstrip().upper().startswith(WRITES):
                count()

        fleet.registry._db.conn.set_trace_callback(trace)
        work(fleet)


def sweep(folder):
    base = folder / "base"
    base.mkdir()
    prepare(base)
    at, killed = 0, True
    while killed:
        at += 1
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(base, copy)
        child = os.fork()
        if child == 0:
            try:
                doomed(copy, at)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        print(json.dumps({"killed": killed, **check(copy)}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "sweep":
        sweep(Path(sys.argv[2]))
