"""Rollouts go on beside everything else, whatever goes wrong in a look."""

import threading

import pytest

from fleetprune.errors import InstallError
from fleetprune_coordinator.pacemaker import Pacemaker


class Rollouts:
    """Counts looks; the first ones fail."""

    def __init__(self, *errors):
        self.errors, self.looks, self.seen = list(errors), [], threading.Semaphore(0)

    def tick(self, *, listening):
        self.looks.append(listening)
        self.seen.release()
        if self.errors:
            raise self.errors.pop(0)


def look(rollouts, pacemaker):
    pacemaker.wake()
    assert rollouts.seen.acquire(timeout=20)


@pytest.fixture
def started():
    ends = []

    def start(rollouts, listening=lambda: True):
        pacemaker = Pacemaker(rollouts, listening)
        pacemaker.start()
        ends.append(pacemaker.stop)
        return pacemaker

    yield start
    for end in ends:
        end()


def test_errors_do_not_end_it_and_are_said_once(started, caplog):
    full = "disk full: cannot write x, 0 bytes free"
    rollouts = Rollouts(InstallError(full), InstallError(full), ZeroDivisionError("oh"))
    pacemaker = started(rollouts)
    for _ in range(4):
        look(rollouts, pacemaker)
    said = [r.getMessage() for r in caplog.records if r.name.endswith("pacemaker")]
    assert said == [f"rollouts: {full}", "rollouts"]


def test_it_knows_whether_devices_can_be_heard(started):
    rollouts, heard = Rollouts(), [True]
    pacemaker = started(rollouts, lambda: heard[0])
    look(rollouts, pacemaker)
    heard[0] = False
    look(rollouts, pacemaker)
    look(rollouts, pacemaker)
    assert rollouts.looks[0] and not rollouts.looks[-1]


def test_it_looks_without_being_woken(started):
    rollouts = Rollouts()
    started(rollouts)
    assert rollouts.seen.acquire(timeout=20)
