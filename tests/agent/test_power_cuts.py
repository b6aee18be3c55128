"""Power fails at every operation of an installation, and the disk loses what was not synced.

In each state that `lossy_disk` finds possible the device has a whole model that runs, whatever was
promised before still holds, and the next start completes the work. A table says which fsync is
needed for which of these; `POWER_CUTS=400` takes more states per operation.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from lossy_disk import PowerCut, Record, power_cuts, recording, write_tree
from models import ZEROS, gemm
from repositories import Clock, MemoryRepository

from fleetprune.errors import TrustError
from fleetprune.messages import Blob, Codec, GraphRef, Task, TaskKind
from fleetprune.outbox import Kind, Outbox
from fleetprune.partfile import PartFile
from fleetprune_agent.feedback import EMPTY, OnDisk
from fleetprune_agent.inbox import TaskInbox
from fleetprune_agent.install import install
from fleetprune_agent.parts import Parts
from fleetprune_agent.serving import Predictor
from fleetprune_agent.slot_files import State
from fleetprune_agent.slots import Slots
from fleetprune_agent.state import locked
from fleetprune_agent.trust import TrustedRepository
from fleetprune_coordinator.delta_maker import make

MOST = int(os.environ.get("POWER_CUTS", "8"))
PADDING = 20_000  # bytes of a model: five pages
BLOCK = 8192
RUNS = count()


class Road(MemoryRepository):
    """Pulls into part files, as an agent does."""

    def pull(self, name: str, size: int, sha256: str, into: Path) -> None:
        data = self._find(name)

        def fetch(part: PartFile) -> None:
            for index in sorted(set(range(part.count)) - part.have):
                part.write(index, data[index * BLOCK : (index + 1) * BLOCK])

        Parts(into.parents[2] / "parts", BLOCK).fill(name, size, sha256, into, fetch)


@dataclass
class Case:
    """Some code that writes to disk, and what must hold in every state that it may leave."""

    work: Callable[[Path, Record], None]
    check: Callable[[Path, PowerCut], None]
    before: Callable[[Path], None] = lambda disk: None


def failures(
    case: Case,
    record: Record,
    scratch: Path,
    verdicts: dict[object, str],
    most: int = MOST,
    *,
    first: int = 0,
    backwards: bool = False,
) -> Iterator[str]:
    """What goes wrong, and in which state, after at least `first` operations.

    `verdicts` remembers states that were looked at.
    """
    cuts = power_cuts(record, most=most)
    for cut in reversed(list(cuts)) if backwards else cuts:
        if cut.after < first:
            continue
        key = (cut.promises, tuple(sorted((n, hash(c)) for n, c in cut.tree.items())))
        if key not in verdicts:
            write_tree(cut.tree, scratch)
            try:
                case.check(scratch, cut)
                verdicts[key] = ""
            except Exception as e:
                verdicts[key] = f"{type(e).__name__}: {e}".split("\n")[0]
        if verdicts[key]:
            yield f"after {cut.after} operations {cut.promises[-1:]}, {cut.lost}: {verdicts[key]}"


def record_of(case: Case, disk: Path) -> Record:
    disk.mkdir()
    case.before(disk)
    with recording(disk) as record:
        case.work(disk, record)
    return record


def repository(newest: int) -> Road:
    made = Road()
    for number in range(1, newest + 1):
        made.release(number, model=gemm(number, padding=PADDING))
    return made


def live(disk: Path, road: Road, promise: Callable[[str], None] = lambda _: None) -> None:
    """An agent's start, one look for a release, and the runs that commit it."""
    state = disk / "state"
    with locked(state):
        slots = Slots(state)
        slots.start()
        trusted = TrustedRepository(state / "trust", road.bootstrap, road, Clock())
        outcome = install(trusted, slots, "phone")
        promise(f"runs {outcome.release}")
        predictor = Predictor(slots)
        for _ in range(3):
            predictor.predict(ZEROS)
        promise(f"committed {outcome.release}")
        slots.stop()


def whole(disk: Path, allowed: set[int | None]) -> Slots:
    """What runs right after the power is back, before anything is repaired."""
    slots = Slots(disk / "state")
    active = slots.active()
    release = None if active is None else active.release
    assert release in allowed, f"release {release} runs, expected one of {allowed}"
    if release is not None and next(RUNS) % 8 == 0:  # the others have the same hash
        answer = Predictor(slots, commit_after=1 << 30).predict(ZEROS)[0, 0]
        assert answer == release, f"release {release} answers {answer}"
    return slots


def installs(before: int, newest: int, publish: Callable[[Road], None] | None = None) -> Case:
    """From release `before` (0: an empty disk) to `newest`."""
    road = Road()

    def prepare(disk: Path) -> None:
        for number in range(1, before + 1):
            road.release(number, model=gemm(number, padding=PADDING))
            live(disk, road)
        if publish is None:
            road.release(newest, model=gemm(newest, padding=PADDING))
        else:
            publish(road)

    def work(disk: Path, record: Record) -> None:
        live(disk, road, record.mark)

    def check(disk: Path, cut: PowerCut) -> None:
        promised = f"runs {newest}" in cut.promises
        allowed: set[int | None] = {newest} if promised else {newest, before or None}
        slots = whole(disk, allowed)
        if f"committed {newest}" in cut.promises:
            active = slots.active()
            assert active is not None and active.state is State.COMMITTED, "committed no more"
        if promised:
            origin = TrustedRepository(disk / "t", road.bootstrap, road, Clock()).origin
            assert slots.heard(origin) == road.serials["phone"], "an old rollout is believed"
        live(disk, road)
        whole(disk, {newest})

    return Case(work, check, prepare)


def with_delta(road: Road) -> None:
    """Release 2 comes as a change of release 1."""
    one, two = gemm(1, padding=PADDING), gemm(2, padding=PADDING)
    change, path = make(one, two), "releases/phone/2/from-1.delta"
    road.add(path, change)
    delta = {"base": _sha(one), "target": path, "sha256": _sha(change), "size": len(change)}
    road.release(2, model=two, fields={"deltas": [delta]})


def back_to_one(road: Road) -> None:
    """Release 2 is withdrawn: the signed rollout returns to release 1."""
    road.roll_out("phone", stable=1)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def rolls_back() -> Case:
    """Release 2, on trial, fails; release 1 is gone back to, and 2 is not taken again."""
    road = repository(1)

    def prepare(disk: Path) -> None:
        live(disk, road)
        road.release(2, model=gemm(2, padding=PADDING))
        state = disk / "state"
        slots = Slots(state)
        install(TrustedRepository(state / "trust", road.bootstrap, road, Clock()), slots, "phone")

    def work(disk: Path, record: Record) -> None:
        Slots(disk / "state").rollback("it fails")
        record.mark("went back")

    def check(disk: Path, cut: PowerCut) -> None:
        slots = whole(disk, {1} if cut.promises else {1, 2})
        if cut.promises:
            assert slots.rejected() == {2: "it fails"}, "forgot that 2 failed"
        slots.start()
        active = slots.active()
        assert active is not None
        if active.release == 2:  # the failure was not noted: it fails again
            slots.rollback("it fails")
        whole(disk, {1})

    return Case(work, check, prepare)


def counts_starts() -> Case:
    """A model that takes the device down with it is given up, though power fails each time."""
    inner = rolls_back()

    def work(disk: Path, record: Record) -> None:
        for number in range(1, 4):
            Slots(disk / "state").start()
            record.mark(f"started {number}")

    def check(disk: Path, cut: PowerCut) -> None:
        for _ in range(4 - len(cut.promises)):
            whole(disk, {1, 2}).start()
        whole(disk, {1})

    return Case(work, check, inner.before)


def trusts() -> Case:
    """What was verified is not forgotten, or an attacker could go back to before it."""
    road = repository(1)
    old: dict[str, bytes] = {}

    def look(disk: Path) -> None:
        TrustedRepository(disk / "state" / "trust", road.bootstrap, road, Clock()).refresh()

    def prepare(disk: Path) -> None:
        look(disk)
        for name in ("timestamp.json", f"{road.snapshot.version}.snapshot.json"):
            old[f"metadata/{name}"] = road.read(f"metadata/{name}", 1 << 20)
        road.release(2)

    def work(disk: Path, record: Record) -> None:
        look(disk)
        record.mark("verified 2")

    def check(disk: Path, cut: PowerCut) -> None:
        if cut.promises:
            road.overrides = old
            try:
                look(disk)
            except TrustError:
                pass
            else:
                raise AssertionError("an attacker's old metadata is believed")
            finally:
                road.overrides = {}
        look(disk)

    return Case(work, check, prepare)


def delivers() -> Case:
    """What was put into the outbox is there; what was delivered does not come back as news."""

    def work(disk: Path, record: Record) -> None:
        outbox = Outbox(disk / "state" / "outbox", 10_000)
        outbox.put(Kind.RESULT, "results/t1", b"one" * 100)
        record.mark("has t1")
        outbox.put(Kind.TELEMETRY, "telemetry", b"release 1")
        record.mark("has release 1")
        outbox.put(Kind.TELEMETRY, "telemetry", b"release 2")
        record.mark("has release 2")
        record.mark("tells release 2")
        outbox.done("telemetry")
        record.mark("told release 2")
        record.mark("tells t1")
        outbox.done("results/t1")
        record.mark("told t1")

    def check(disk: Path, cut: PowerCut) -> None:
        found = {e.name: e.payload for e in Outbox(disk / "state" / "outbox", 10_000).pending()}
        assert found.get("results/t1") in (None, b"one" * 100)
        assert found.get("telemetry") in (None, b"release 1", b"release 2")
        said = set(cut.promises)
        if "has t1" in said and "tells t1" not in said:
            assert "results/t1" in found, "the result is lost"
        if "has release 2" in said and "tells release 2" not in said:
            assert found.get("telemetry") == b"release 2", "the report is lost"
        if "told release 2" in said:
            assert "telemetry" not in found, "an old report comes back"
        if "told t1" in said:
            assert "results/t1" not in found, "a delivered result comes back"
        assert not list((disk / "state" / "outbox").glob("*.bad")), "damaged"

    return Case(work, check, lambda disk: (disk / "state").mkdir())


def answers() -> Case:
    """Answers and residual are one commit."""
    rest = np.ones(3000, np.float32)
    one = EMPTY.answered("t1", b"1" * 5000).left_out(1, "phone", rest)
    two = one.answered("t2", b"2" * 5000).left_out(1, "phone", 2 * rest)

    def work(disk: Path, record: Record) -> None:
        OnDisk(disk / "answers.bin").save(two)
        record.mark("answered t2")

    def check(disk: Path, cut: PowerCut) -> None:
        got = OnDisk(disk / "answers.bin").load()
        assert list(got.answers) in (["t1"], ["t1", "t2"])
        assert np.array_equal(got.residual, len(got.answers) * rest), "counted twice or never"
        if cut.promises:
            assert "t2" in got.answers, "the answer is lost"

    return Case(work, check, lambda disk: OnDisk(disk / "answers.bin").save(one))


def accepts_tasks() -> Case:
    task = Task(
        task="t1",
        device="d1",
        kind=TaskKind.TRAIN,
        round=1,
        mask_version=1,
        shape="phone",
        graphs=(GraphRef(target="graphs/a.onnx", sha256="0" * 64),),
        model=Blob(sha256="0" * 64, size=1),
        codec=Codec.INT4,
    )

    def work(disk: Path, record: Record) -> None:
        inbox = TaskInbox(disk / "state" / "tasks")
        inbox.add(task)
        record.mark("accepted")
        record.mark("answered")
        inbox.done(task)

    def check(disk: Path, cut: PowerCut) -> None:
        waiting = TaskInbox(disk / "state" / "tasks").waiting()
        assert waiting in ([], [task])
        if cut.promises == ("accepted",):
            assert waiting == [task], "an accepted task is lost"

    return Case(work, check, lambda disk: (disk / "state").mkdir())


CASES: dict[str, Callable[[], Case]] = {
    "first installation": lambda: installs(0, 1),
    "installation": lambda: installs(1, 2),
    "delta": lambda: installs(1, 2, with_delta),
    "return": lambda: installs(2, 1, back_to_one),
    "rollback": rolls_back,
    "starts on trial": counts_starts,
    "metadata": trusts,
    "outbox": delivers,
    "answers": answers,
    "tasks": accepts_tasks,
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Damaged files are set aside and say so in the log, thousands of times."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a file system: nothing here needs a disk."""
    shm = Path("/dev/shm")
    with TemporaryDirectory(dir=shm if shm.is_dir() else tmp_path) as name:
        yield Path(name)


@pytest.mark.timeout(max(120, 30 * MOST))
@pytest.mark.parametrize("name", CASES)
def test_a_power_cut_at_any_operation(folder, name):
    case = CASES[name]()
    record = record_of(case, folder / "disk")
    states: dict[object, str] = {}
    assert list(failures(case, record, folder / "scratch", states)) == []
    print(f"{name}: {len(record.events)} operations, {len(states)} states")
    assert len(states) > len(record.syncs())


NEEDED: dict[str, tuple[str, ...]] = {
    "rollback": (
        "write_atomic < Slots._write_refusals < Slots.reject: state/slots/.rejected.json.tmp",
        "sync_folder < write_atomic < Slots._point: state/slots",
    ),
    "starts on trial": (
        "write_atomic < Slots._begin < Slots.start: state/slots/.starts.json.tmp",
        "sync_folder < write_atomic < Slots._begin: state/slots",
    ),
    "metadata": ("sync_folder < write_atomic < _DurableUpdater._persist_file: state/trust",),
    "outbox": (
        "sync_folder < make_folder < Outbox.__init__: state",
        "write_atomic < Outbox._put < Outbox.put: state/outbox/.000000000000.entry.tmp",
        "sync_folder < write_atomic < Outbox._put: state/outbox",
        "write_atomic < Outbox._put < Outbox.put: state/outbox/.000000000001.entry.tmp",
        "write_atomic < Outbox._put < Outbox.put: state/outbox/.000000000002.entry.tmp",
        "sync_folder < Outbox._remove < Outbox.done: state/outbox",
    ),
    "answers": (
        "write_atomic < OnDisk.save: .answers.bin.tmp",
        "sync_folder < write_atomic < OnDisk.save: .",
    ),
    "tasks": (
        "sync_folder < make_folder < TaskInbox.__init__: state",
        "write_atomic < TaskInbox.add: state/tasks/.t1.json.tmp",
        "sync_folder < write_atomic < TaskInbox.add: state/tasks",
    ),
}
"""What may not be left out, one at a time. The others are doubled by another one near by."""


@pytest.mark.parametrize("name", NEEDED)
def test_which_syncs_are_needed(folder, name):
    """Each fsync is struck out of the record: this is how the test above fails."""
    case = CASES[name]()
    record = record_of(case, folder / "disk")
    states: dict[object, str] = {}
    needed = tuple(
        label
        for label in record.syncs()
        if any(failures(case, record.without(label), folder / "scratch", states, backwards=True))
    )
    assert needed == NEEDED[name]


NEEDED_TO_INSTALL = (
    "Slots.switch < _Attempt._try: state/slots/b/.slot.json.tmp",
    "sync_folder < write_atomic < Slots.switch: state/slots/b",
    "write_atomic < Slots._point < Slots.switch: state/slots/.active.json.tmp",
    "write_atomic < Slots.commit < Predictor._count_good: state/slots/b/.slot.json.tmp",
)


@pytest.mark.parametrize("ending", NEEDED_TO_INSTALL)
def test_an_installation_without_one_of_its_syncs(folder, ending):
    case = installs(1, 2)
    record = record_of(case, folder / "disk")
    (label,) = (label for label in record.syncs() if label.endswith(ending))
    # What is missing shows when the most has been promised: from there it is found soon.
    assert any(failures(case, record.without(label), folder / "scratch", {}, backwards=True))


def test_code_without_a_sync_is_found(folder, monkeypatch):
    """The same with the code itself changed, instead of the record."""
    case = delivers()
    monkeypatch.setattr("fleetprune.files.sync_folder", lambda _: None)
    record = record_of(case, folder / "disk")
    found = next(failures(case, record, folder / "scratch", {}), "")
    assert found.endswith("the result is lost")


class _Killed(BaseException):
    """Comes out of every operation from the chosen one on, so that nothing is tidied up."""


@contextmanager
def killed_at(operation: int) -> Iterator[None]:
    """The process ends before that operation on the disk, and the disk keeps what it has."""
    names = ("fsync", "replace", "unlink", "mkdir")
    real = {name: getattr(os, name) for name in names}
    left = count(-operation)

    def guarded(name: str) -> Callable[..., object]:
        def call(*args, **kwargs):
            if next(left) >= 0:
                raise _Killed
            return real[name](*args, **kwargs)

        return call

    for name in names:
        setattr(os, name, guarded(name))
    try:
        yield
    except _Killed:
        pass
    finally:
        for name, call in real.items():
            setattr(os, name, call)


def after_a_kill(case: Case, operation: int, killed: list[int]) -> Case:
    """The work is begun, killed, and done again: what the first try left may be unsynced.

    `killed` is told how many events there were by then.
    """

    def work(disk: Path, record: Record) -> None:
        marks = len(record.events)
        with killed_at(operation):
            case.work(disk, record)
        record.look()
        record.events[marks:] = [e for e in record.events[marks:] if e.kind != "mark"]
        killed.append(len(record.events))
        case.work(disk, record)

    return Case(work, case.check, case.before)


LONG = MOST > 20
STEP = 4 if LONG else 45
"""Operations between two kills that are tried."""


@pytest.mark.timeout(max(120, 100 * MOST))
@pytest.mark.parametrize(
    "name", ["first installation", "metadata", *(["installation", "delta"] if LONG else [])]
)
def test_a_kill_and_then_a_power_cut(folder, name):
    """What a killed process did not sync, the next one must not take for done."""
    states: dict[object, str] = {}
    for operation in range(STEP // 2, 90, STEP):
        killed: list[int] = []
        case = after_a_kill(CASES[name](), operation, killed)
        record = record_of(case, folder / f"disk{operation}")
        # A power cut before the kill is one in the first try, which the test above has looked at.
        found = list(failures(case, record, folder / "scratch", states, most=2, first=killed[0]))
        assert found == [], f"killed before operation {operation}"
    print(f"{name}: {len(states)} states")
