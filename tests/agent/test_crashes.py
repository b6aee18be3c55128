"""SIGKILL at every operation on the disk, and at random instants: the old model or the new one.

`make crashes KILLS=20000` runs the long form of the last test, with another seed if SEED says so.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
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

KILLS = int(os.environ.get("KILLS", "2000"))
SEED = os.environ.get("SEED", "0")
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


FUZZ = Path(__file__).with_name("crash_fuzz.py")


def fuzz(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In memory where there is such a file system: a kill does not ask what the disk has."""
    shm = Path("/dev/shm")
    folder = tempfile.mkdtemp(dir=shm if shm.is_dir() else tmp_path)
    try:
        return subprocess.run(
            [sys.executable, *arguments, SEED, folder],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
    finally:
        shutil.rmtree(folder)


@pytest.mark.timeout(max(600, KILLS))
def test_killed_all_the_time(tmp_path):
    """A whole life, with every kind of release: see `crash_fuzz`, which asserts after each kill."""
    done = fuzz(tmp_path, str(FUZZ), str(KILLS))
    assert done.returncode == 0, done.stderr[-3000:]
    counted = json.loads(done.stdout)
    print(counted)
    assert counted["kills"] >= KILLS
    assert counted["told the truth"] >= KILLS // 41
    if KILLS >= 1000:
        kinds = ("sound", "delta", "fails", "deadly", "later", "abort", "results")
        assert all(counted[kind] for kind in kinds)
        assert counted["told the truth"] > counted["runs what it is told"] > 0


BREAKS = {
    "the running model's slot is used": (
        "Slots._idle = lambda self, active: 'a' if active is None else active.slot",
        "NO MODEL",
    ),
    "a start says what the last report said": (
        "Duties.repeat_report = lambda self: None",
        "AssertionError",
    ),
    "an answer is delivered before it is kept": (
        "OnDisk.save = lambda self, memory: None; done = TaskInbox.done; "
        "TaskInbox.done = lambda self, task: (time.sleep(0.02), done(self, task))",
        "told differently",
    ),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_the_fuzz_finds(tmp_path, broken):
    change, message = BREAKS[broken]
    code = f"import sys; sys.path.append({str(FUZZ.parent)!r}); import crash_fuzz; "
    code += f"from crash_fuzz import *; {change}; main(1000, int(sys.argv[1]), sys.argv[2])"
    done = fuzz(tmp_path, "-c", code)
    assert done.returncode == 1
    assert message in done.stderr
