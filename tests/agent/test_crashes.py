"""SIGKILL at every operation on the disk, and at random instants: the old model or the new one."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from models import ZEROS, gemm, golden
from repositories import NOW

from fleetprune_agent.install import install
from fleetprune_agent.serving import Predictor
from fleetprune_agent.slots import Slots
from fleetprune_agent.trust import FolderSource, TrustedRepository
from fleetprune_coordinator.keys import init_repository
from fleetprune_coordinator.releases import ReleaseContent, ReleaseRepository

LENGTH = 200_000  # bytes of a model: 4 chunks


class Fleet:
    """A release repository on disk and one device that gets killed."""

    def __init__(self, folder: Path) -> None:
        self.state, self.public = folder / "device", folder / "releases" / "public"
        self.state.mkdir()
        init_repository(folder / "releases", NOW)
        self.releases = ReleaseRepository(folder / "releases", lambda: NOW)
        root = self.public / "metadata" / "1.root.json"
        script = Path(__file__).with_name("crash_child.py")
        self.process = subprocess.Popen(
            [sys.executable, script, self.state, self.public, root, NOW.isoformat()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        assert self.process.stdout.readline() == "ready\n"

    def publish(self, release: int) -> None:
        content = ReleaseContent(
            onnx=gemm(release, padding=LENGTH), golden=golden(release), input_shape=(4,)
        )
        self.releases.publish_release(release, {"phone": content}, to_all=True)

    def live(self, kind: str, value: float) -> str:
        """Let the device run until it is killed or done."""
        self.process.stdin.write(f"{kind} {value}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def answer(self) -> int:
        """Right after a kill: open the slots and predict, without changing anything."""
        return int(Predictor(Slots(self.state), commit_after=1 << 30).predict(ZEROS)[0, 0])

    def finish(self) -> str:
        """What the next start would do, here."""
        slots = Slots(self.state)
        slots.start()
        source = FolderSource(self.public)
        trusted = TrustedRepository(self.state / "trust", self.releases.root(), source, lambda: NOW)
        return install(trusted, slots, "phone").status

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.close()


def test_killed_before_every_operation_on_the_disk(fleet, tmp_path):
    fleet.publish(1)
    assert fleet.live("operation", 1 << 30) == "done 0"
    before = tmp_path / "before"
    shutil.copytree(fleet.state, before, symlinks=True)
    fleet.publish(2)
    answers = []
    while True:
        outcome = fleet.live("operation", len(answers))
        answers.append(fleet.answer())
        if outcome == "done 0":
            break
        assert outcome == "killed"
        assert fleet.finish() in ("installed", "current"), "the next start completes it"
        assert fleet.answer() == 2
        shutil.rmtree(fleet.state)
        shutil.copytree(before, fleet.state, symlinks=True)
    switches = answers.index(2)
    assert answers == [1] * switches + [2] * (len(answers) - switches)
    assert switches > 30, "most operations come before the switch"
    assert len(answers) - switches > 3, "and committing comes after it"


def test_killed_before_every_operation_of_the_first_installation(fleet):
    """There is no old model: none, or the new one, and the next start gets it."""
    fleet.publish(1)
    operations = 0
    while fleet.live("operation", operations) == "killed":
        found = Slots(fleet.state).active()
        assert found is None or fleet.answer() == 1
        assert fleet.finish() in ("installed", "current")
        assert fleet.answer() == 1
        shutil.rmtree(fleet.state)
        fleet.state.mkdir()
        operations += 1
    assert fleet.answer() == 1
    assert operations > 30


def test_killed_at_random_instants(fleet):
    """20 kills or more of a device that is offered a new release each time; seeded.

    A release still on trial gives way to a newer one, so the proven one counts as old too.
    Instants are drawn from the time that one whole life takes, and follow the machine's load.
    """
    rng = random.Random(7)
    fleet.publish(1)
    begun = time.monotonic()
    assert fleet.live("operation", 1 << 30) == "done 0"
    life = time.monotonic() - begun
    kills, seen, release = 0, set(), 1
    while kills < 20 or len(seen) < 2:
        release += 1
        assert release < 200, f"{kills} kills, seen {seen}: instants are drawn badly"
        fleet.publish(release)
        slots = Slots(fleet.state)
        old = slots.active()
        proven = slots.fallback(old)
        allowed = {old.release, release} | ({proven.release} if proven else set())
        killed = fleet.live("time", rng.uniform(0, life)) == "killed"
        kills, life = kills + killed, life * (1.1 if killed else 0.7)
        got = fleet.answer()
        assert got in allowed, f"release {got} runs, allowed are {allowed}"
        seen.add("new" if got == release else "old")
