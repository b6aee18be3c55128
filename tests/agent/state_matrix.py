"""Every state of an installation, ended by every trouble: prints docs/installation-matrix.md.

A device runs release 1, committed and reported, and is told to run release 2. Its agent is a fork
that meets trouble when it enters a state; the trouble stays until that life ends. Then it is
started again, with all in order. `Cell.outcome` asserts what must be so in every cell: right after
the trouble a whole and verified model is active, and in the end the coordinator's last report says
what runs, and if that is not release 2, why.
"""

import errno
import io
import logging
import os
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from crash_fuzz import (
    CLASS,
    KILLS_WHO_TRIES,
    PADDING,
    Fleet,
    Road,
    live,
    trial,
)
from models import gemm, golden, raises_on_large_input

from fleetprune.errors import FleetpruneError, TransportError
from fleetprune.outbox import Outbox
from fleetprune_agent.duties import Duties
from fleetprune_agent.fetch import Fetch
from fleetprune_agent.journal import JournalFile, Phase
from fleetprune_agent.slot_files import State
from fleetprune_agent.slots import Slots
from fleetprune_agent.trial import InChild
from fleetprune_agent.trust import TrustedRepository

TROUBLES = ("killed", "disk full", "I/O error", "network gone", "hostile bytes")
LIVES = 4  # starts after the trouble within which all must be well


class Trouble:
    """Comes when a state is entered, and stays."""

    def __init__(self, state: str, kind: str, road: Road, came: Callable[[], object]) -> None:
        self.state, self.kind, self.road, self.came, self.here = state, kind, road, came, False
        self.told = 0

    def enter(self, state: str) -> None:
        if state != self.state or self.here:
            return
        self.here = True
        self.came()
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "disk full":
            _break_disk(errno.ENOSPC)
        elif self.kind == "I/O error":
            _break_disk(errno.EIO)

    def find(self, name: str) -> bytes:
        """What comes over the network."""
        data = Road._find(self.road, name)
        if self.here and self.kind == "network gone":
            raise TransportError("no answer")
        if self.here and self.kind == "hostile bytes":
            return (
                data[: len(data) // 2]
                + bytes([data[len(data) // 2] ^ 1])
                + data[len(data) // 2 + 1 :]
            )
        return data

    def before(self, where: type, name: str, state: str | Callable[..., str]) -> None:
        """Calling a method is entering a state."""
        real = getattr(where, name)

        def call(*args, **kwargs):
            self.enter(state if isinstance(state, str) else state(*args, **kwargs))
            return real(*args, **kwargs)

        setattr(where, name, call)

    def wait(self) -> None:
        """Put into this process."""
        self.road._find = self.find  # type: ignore[method-assign]
        self.before(Slots, "_begin", "starting")
        self.before(TrustedRepository, "refresh", "refreshing")
        self.before(TrustedRepository, "manifest", "reading the manifest")
        self.before(JournalFile, "note", lambda *_, **changes: str(changes.get("phase", "")))
        self.before(Fetch, "_change", "fetching a delta")
        self.before(Slots, "begin_delta", "applying a delta")
        self.before(Slots, "switch", "switching")
        self.before(Slots, "commit", "committing")
        self.before(Slots, "reject", "rejecting")
        self.before(Slots, "rollback", "rolling back")
        self.before(Slots, "resume", "resuming the other slot")
        self.before(Duties, "_send", self.reporting)
        self.before(Outbox, "done", lambda *_: "reported" if self.told == 2 else "")

    def reporting(self, duties: Duties, _data: bytes) -> str:
        """Only the report of the new release: the start repeats the one of release 1."""
        active = duties.slots.active()
        self.told = 0 if active is None else active.release
        return "reporting" if self.told == 2 else ""


def _break_disk(code: int) -> None:
    def refuse(real: Callable[..., object], wanted: Callable[..., bool]) -> Callable[..., object]:
        def call(*args, **kwargs):
            if wanted(*args, **kwargs):
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call

    def writes(_file: object, mode: str = "r", *_args: object, **_kwargs: object) -> bool:
        return not isinstance(_file, int) and any(c in mode for c in "wax+")

    for name in ("replace", "fsync", "pwrite", "ftruncate", "mkdir", "symlink"):
        setattr(os, name, refuse(getattr(os, name), lambda *_a, **_k: True))
    os.open = refuse(os.open, lambda _path, flags, *_a, **_k: bool(flags & os.O_CREAT))  # type: ignore[assignment]
    io.open = refuse(io.open, writes)  # type: ignore[assignment]


def sound(fleet: Fleet) -> None:
    fleet.add(2, gemm(2, padding=PADDING))


def changed(fleet: Fleet) -> None:
    fleet.add(2, gemm(2, padding=PADDING), delta=True)


def fails_its_check(fleet: Fleet) -> None:
    fleet.add(2, gemm(2, padding=PADDING), samples=golden(3), sound=False)


def kills_who_tries(fleet: Fleet) -> None:
    fleet.add(2, gemm(2, padding=PADDING), sound=False, licence=KILLS_WHO_TRIES)


def fails_in_service(fleet: Fleet) -> None:
    fleet.add(2, raises_on_large_input(2))


def returns(fleet: Fleet) -> None:
    """Release 2 runs, and is withdrawn."""
    sound(fleet)
    fleet.live(None, None)
    fleet.told = 1
    fleet.road.roll_out(CLASS, stable=1)


STATES: tuple[tuple[str, str, Callable[[Fleet], None]], ...] = (
    ("starting", "a sound release", sound),
    ("refreshing", "a sound release", sound),
    ("reading the manifest", "a sound release", sound),
    (Phase.WANTED, "a sound release", sound),
    (Phase.DOWNLOADING, "a sound release", sound),
    ("fetching a delta", "a delta", changed),
    ("applying a delta", "a delta", changed),
    (Phase.VERIFYING, "a sound release", sound),
    (Phase.CHECKING, "a sound release", sound),
    ("rejecting", "one that fails its check", fails_its_check),
    (Phase.REJECTED, "one that fails its check", fails_its_check),
    ("switching", "a sound release", sound),
    (Phase.TRIAL, "a sound release", sound),
    ("committing", "a sound release", sound),
    ("rolling back", "one that fails in service", fails_in_service),
    ("resuming the other slot", "a return to release 1", returns),
    (Phase.COMMITTED, "a return to release 1", returns),
    ("reporting", "a sound release", sound),
    ("reported", "a sound release", sound),
)


class Cell(Fleet):
    """One state and one trouble."""

    def meet(self, state: str, kind: str, how=trial) -> bool:
        """A life with trouble; whether it came."""
        came, here = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(60)
                Trouble(state, kind, self.road, lambda: os.write(here, b"1")).wait()
                live(self.state, self.road, self._end, None, how)
                code = 0
            except FleetpruneError:
                code = 0  # an agent that ends with one line, and is started again
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        os.close(here)
        with os.fdopen(came, "rb") as said:
            reached = bool(said.read())
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the agent raised"
        return reached

    def outcome(self) -> str:
        """What runs right after the trouble, and in the end."""
        self.take()
        self.check()
        after = Slots(self.state).active()
        for _ in range(LIVES):
            self.live(None, None)
            self.take()
            self.check()
        self.truth()
        active = Slots(self.state).active()
        assert after is not None and active is not None, "NO MODEL"
        reason = Slots(self.state).rejected().get(self.told, "")
        if active.release == self.told:
            assert active.state is State.COMMITTED
            end = f"{active.release}"
        else:
            assert reason
            end = f"{active.release} ({self.told} is refused)"
        same = after.release == active.release
        return end if same else f"{after.release}, then {end}"


def cell(state: str, kind: str, publish: Callable[[Fleet], None], how=trial) -> str:
    """Outcome; empty where the trouble never came, because that state was never entered."""
    folder = Path(tempfile.mkdtemp())
    try:
        fleet = Cell(folder, seed=0)
        fleet.add(1, gemm(1, padding=PADDING))
        fleet.live(None, None)
        fleet.take()
        assert fleet.last is not None and fleet.last.state == "committed"
        publish(fleet)
        if not fleet.meet(state, kind, how):
            return ""
        return fleet.outcome()
    finally:
        shutil.rmtree(folder)


def kill_child(times: int) -> InChild:
    """The process of the health check is killed so often."""
    left = [times]

    def kill(pid: int) -> None:
        left[0] -= 1
        if left[0] >= 0:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    return InChild(60.0, on_start=kill)


def main() -> None:
    logging.disable()
    print(HEAD, end="")
    for state, told, publish in STATES:
        row = [cell(state, kind, publish) for kind in TROUBLES]
        assert all(row), f"{state} is never entered: {row}"
        print(f"| {state} | {told} | {' | '.join(row)} |", flush=True)
    print(CHECKS)
    for name, publish, how in (
        ("the golden samples differ", fails_its_check, trial),
        ("the model kills the process that tries it", kills_who_tries, trial),
        ("the child is killed once", sound, kill_child(1)),
        ("the child is killed each time", sound, kill_child(9)),
        ("the model fails in service", fails_in_service, trial),
    ):
        print(f"| {name} | {cell('starting', '', publish, how)} |", flush=True)


HEAD = """# Every state, ended by every trouble

`make state-matrix` makes this page from real processes, and a test compares it. A device runs
release 1, is told to run release 2 (or, where a return is said, runs 2 and is told to go back), and
meets trouble when it enters a state of its [installation](installation.md). The trouble stays until
that agent ends; then it is started again with all in order. A cell says which release is active
right after the trouble, and which in the end where that differs. In every cell the active model is
whole and verified at each look, and the coordinator's last report names the release that runs, and
says why another does not.

| state | told to run | killed | disk full | I/O error | network gone | hostile bytes |
| --- | --- | --- | --- | --- | --- | --- |
"""
CHECKS = """
And what a health check or the first runs may come to:

| what happens | active |
| --- | --- |"""

if __name__ == "__main__":
    main()
