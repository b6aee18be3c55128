"""An agent that is killed all the time: `python tests/agent/crash_fuzz.py KILLS [SEED] [FOLDER]`.

One process imports onnxruntime once; each life of the agent is a fork of it that is killed after
1 to 50 ms (or what a whole life takes, on a slow machine), wherever it is: in its start, a refresh,
a download, a hash, a health check, the switch, the commit, a report or its delivery. Sometimes the
next lives are killed as well, each within a few milliseconds, before it has recovered. Meanwhile
releases appear: sound ones, deltas, ones that fail their check, that kill the process that tries
them, or that fail in service; and rollouts are aborted. Training tasks come, too.

After each kill the slots are read (their models are hashed, and known to run or not to run by their
hash), and what was delivered is compared with what may be true. From time to time the agent is left
alone, and then the coordinator must know just what is so. Prints what it counted as JSON.
"""

import faulthandler
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
from models import INPUTS, gemm, golden, raises_on_large_input
from repositories import NOW, MemoryRepository

import fleetprune_agent.health  # noqa: F401  (before the forks, like onnxruntime behind it)
from fleetprune.errors import InstallError
from fleetprune.messages import Blob, Codec, GraphRef, Task, TaskKind, Telemetry
from fleetprune.mqtt import BrokerSettings
from fleetprune.outbox import Kind, Outbox
from fleetprune.partfile import PartFile
from fleetprune_agent.config import AgentConfig, NpzData
from fleetprune_agent.data import Samples, Split
from fleetprune_agent.duties import Duties
from fleetprune_agent.feedback import OnDisk
from fleetprune_agent.inbox import MAX_WAITING, TaskInbox
from fleetprune_agent.parts import Parts
from fleetprune_agent.serving import Predictor
from fleetprune_agent.slots import Slots
from fleetprune_agent.state import locked
from fleetprune_agent.telemetry import Traffic
from fleetprune_agent.trial import Evidence, Finding, Request, Trial, in_process
from fleetprune_agent.trust import TrustedRepository
from fleetprune_agent.worker import Worker
from fleetprune_coordinator.delta_maker import make

DEVICE, CLASS = "d1", "phone"
PADDING = 12_000  # bytes of a model
BLOCK = 2048
BLOCK_S = 0.0004  # a slow line, so that kills hit downloads
KEPT = 6  # releases in the repository
QUIET = 40  # kills between two looks at an agent that is left alone
MOST_BYTES, MOST_FILES = 400_000, 60  # of the state folder
KILLS_WHO_TRIES = "kills"  # licence of a model whose health check does not survive
FAILS_LATER = 5.0  # input on which a model that fails in service raises


class Road(MemoryRepository):
    """Pulls in blocks into part files, as an agent does, over a slow line."""

    def pull(self, name: str, size: int, sha256: str, into: Path) -> None:
        data = self._find(name)

        def fetch(part: PartFile) -> None:
            for index in sorted(set(range(part.count)) - part.have):
                time.sleep(BLOCK_S)
                part.write(index, data[index * BLOCK : (index + 1) * BLOCK])

        Parts(into.parents[2] / "parts", BLOCK).fill(name, size, sha256, into, fetch)


class Answers:
    """In place of training: an answer is random, so one that is made twice gives itself away."""

    def __init__(self, store: OnDisk) -> None:
        self.store = store

    def answer(self, task: str) -> bytes | None:
        return self.store.load().answers.get(task)

    def handle(self, task: Task) -> bytes:
        memory = self.store.load()
        if task.task not in memory.answers:
            answer = os.urandom(300)
            rest = memory.residual if memory.residual.size else np.zeros(1, np.float32)
            self.store.save(memory.answered(task.task, answer).left_out(1, CLASS, rest + 1))
            return answer
        return memory.answers[task.task]


def trial(request: Request, evidence: Evidence) -> Finding:
    """As a child process is to the kernel, so is this process to a model that kills."""
    if request.manifest.licence == KILLS_WHO_TRIES:
        os.kill(os.getpid(), signal.SIGKILL)
    return in_process(request, evidence)


def samples() -> Split:
    x = np.zeros((8, INPUTS), np.float32)
    y = np.zeros(8, np.int64)
    part = Samples(x, y, str)
    return Split(train=part, held_out=part)


def live(state: Path, road: Road, wire: int, task: Task | None, how: Trial = trial) -> None:
    """An agent's life: what it does after each start, in the order of `Agent`."""
    with locked(state):
        outbox = Outbox(state / "outbox", 100_000)

        def deliver() -> None:
            for entry in outbox.pending():
                line = json.dumps([entry.kind, entry.name, entry.payload.hex()]) + "\n"
                os.write(wire, line.encode())  # less than PIPE_BUF: whole or not at all
                outbox.done(entry.name)

        inbox, slots = TaskInbox(state / "tasks"), Slots(state)
        slots.start()
        trusted = TrustedRepository(state / "trust", road.bootstrap, road, lambda: NOW)
        config = AgentConfig.model_construct(
            device=DEVICE,
            device_class=CLASS,
            fleet="f",
            broker=BrokerSettings(),
            state=state,
            threads=1,
            check_s=10.0,
            recent_samples=0,
            data=NpzData.model_construct(kind="npz", path=state),
        )
        duties = Duties(
            config=config,
            split=samples(),
            worker=cast(Worker, Answers(OnDisk(state / "answers.bin"))),
            inbox=inbox,
            slots=slots,
            repository=lambda: trusted,
            deliver=lambda kind, name, data: (outbox.put(kind, name, data), None)[1],
            acknowledge=lambda _: None,
            traffic=Traffic,
            trial=how,
        )
        deliver()
        duties.repeat_report()
        deliver()
        if task is not None:
            inbox.add(task)
        for waiting in inbox.waiting():
            duties.task(waiting)
        deliver()
        duties.refresh()
        deliver()
        _serve(slots)
        duties.repeat_report()
        deliver()
        slots.stop()


def _serve(slots: Slots) -> None:
    """The device uses its model, on an input that some models do not survive."""
    if slots.active() is not None:
        with suppress(InstallError):  # one model alone, and it fails on this input
            Predictor(slots).predict(np.full((1, INPUTS), FAILS_LATER, np.float32))


class Fleet:
    """The coordinator, the device, and the power switch."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.state = folder / "state"
        self.rng = random.Random(seed)
        self.road = Road(NOW)
        self.models: dict[int, bytes] = {}
        self.good: dict[int, str] = {}
        """Release to SHA-256 of the model, of those that pass their check."""
        self.poor: set[int] = set()
        """Releases that fail in service."""
        self.told = 0
        self.results: dict[str, str] = {}
        self.tasks: dict[str, Task] = {}
        self.last: Telemetry | None = None
        self.count: Counter[str] = Counter()
        self.ever = False
        self.life_s = 0.05
        self.wire, self._end = os.pipe()
        os.set_blocking(self.wire, False)
        self._left = b""

    # What the coordinator does.

    def publish(self) -> None:
        """A new release, or the end of one."""
        kind = self.rng.choices(
            ("sound", "delta", "fails", "deadly", "later", "abort"), (8, 3, 2, 1, 1, 3)
        )[0]
        if kind == "abort" and len(self.good) < 2:
            kind = "sound"
        self.count[kind] += 1
        if kind == "abort":
            least = len(self.models) - KEPT + 1
            older = [r for r in sorted(set(self.good) - self.poor) if r >= least][:-1]
            if older:
                self.told = self.rng.choice(older)
                self.road.roll_out(CLASS, stable=self.told)
            return
        number = len(self.models) + 1
        if kind == "later":
            self.poor.add(number)
        self.add(
            number,
            raises_on_large_input(number) if kind == "later" else gemm(number, padding=PADDING),
            samples=golden(number + 1) if kind == "fails" else None,
            delta=kind == "delta" and number > 1,
            sound=kind not in ("fails", "deadly"),
            licence=KILLS_WHO_TRIES if kind == "deadly" else "",
        )

    def add(
        self,
        number: int,
        model: bytes,
        *,
        samples: bytes | None = None,
        delta: bool = False,
        sound: bool = True,
        licence: str = "",
    ) -> None:
        """Publish a release, and tell the device to run it."""
        fields: dict[str, Any] = {"licence": licence}
        if delta:
            base = self.models[number - 1]
            change, path = make(base, model), f"releases/{CLASS}/{number}/from.delta"
            self.road.add(path, change)
            fields["deltas"] = [
                {"base": _sha(base), "target": path, "sha256": _sha(change), "size": len(change)}
            ]
        samples = golden(number) if samples is None else samples
        self.road.release(number, CLASS, model=model, samples=samples, fields=fields)
        self.models[number], self.told = model, number
        if sound:
            self.good[number] = _sha(model)
        for old in [path for path in self.road.targets.targets if _number(path) <= number - KEPT]:
            self.road.blobs.pop(f"targets/{_blob(old, self.road.targets.targets.pop(old))}", None)

    def take(self) -> None:
        """What arrived; anything that cannot be true is an error."""
        with suppress(BlockingIOError):
            while data := os.read(self.wire, 1 << 16):
                self._left += data
        *lines, self._left = self._left.split(b"\n")
        for line in lines:
            kind, name, payload = json.loads(line)
            self.count[f"delivered {kind}"] += 1
            if kind == Kind.RESULT:
                assert self.results.setdefault(name, payload) == payload, f"{name} told differently"
            else:
                self._hear(Telemetry.from_bytes(bytes.fromhex(payload)))

    def _hear(self, said: Telemetry) -> None:
        assert (said.release == 0) == (said.sha256 is None)
        if said.release:
            assert self.good.get(said.release) == said.sha256, f"{said} was never sound"
        self.last = said

    # What the device does.

    def live(self, seconds: float | None, task: Task | None) -> bool:
        """One life; whether it was killed. `seconds` None: it is left alone."""
        child = os.fork()
        if child == 0:
            code = 1
            try:
                faulthandler.enable()
                signal.alarm(60)
                live(self.state, self.road, self._end, task)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, "the agent raised"
            return False
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True

    def check(self) -> None:
        """Right after a kill: a verified model that runs, and no more files than there may be."""
        active = Slots(self.state).active()
        assert active is not None or not self.ever, "NO MODEL"
        if active is not None:
            self.ever = True
            assert self.good.get(active.release) == active.manifest.sha256, "not a sound model"
        files = [path.stat().st_size for path in self.state.rglob("*") if path.is_file()]
        assert sum(files) < MOST_BYTES and len(files) < MOST_FILES, "the state folder grows"
        self.count["most bytes"] = max(self.count["most bytes"], sum(files))
        self.count["most files"] = max(self.count["most files"], len(files))

    def settle(self) -> None:
        """Left alone, the agent brings about what it is told, and says just what is so."""
        lives = 0
        while lives < 6 or (self._unanswered() and lives < 20):  # a model that kills takes a few
            lives += 1
            begun = time.monotonic()
            self.live(None, next(iter(self._unanswered()), None))
            self.life_s = max(0.9 * self.life_s, time.monotonic() - begun)
            self.take()
        self.truth()
        assert not self._unanswered(), "accepted and never answered"
        assert not len(Outbox(self.state / "outbox", 100_000))
        self.count["told the truth"] += 1

    def truth(self) -> None:
        """The coordinator's last report says what runs, and why that is not what should."""
        slots = Slots(self.state)
        active, said = slots.active(), self.last
        assert said is not None, "nothing was ever reported"
        runs = (0, None) if active is None else (active.release, active.manifest.sha256)
        assert (said.release, said.sha256) == runs, said
        assert said.state in ("rolled_back", "" if active is None else active.state.value), said
        assert said.plan == self.road.serials[CLASS], said
        if active is None or active.release != self.told:
            assert said.failed >= self.told or self.told in slots.rejected(), said
            assert said.state == "rolled_back" and f"release {self.told}: " in said.error, said
        else:
            assert said.state != "rolled_back", said
        self.count["runs what it is told"] += runs[0] == self.told

    def run(self, kills: int) -> dict[str, object]:
        """Kill so often."""
        begun = time.monotonic()
        self.publish()
        while self.count["kills"] < kills:
            if self.rng.random() < 0.3:
                self.publish()
            task = self._task() if self.rng.random() < 0.2 else None
            lives = [self.rng.uniform(0.001, max(0.05, 1.1 * self.life_s))]
            if self.rng.random() < 0.15:  # and again, while it recovers
                lives += [self.rng.uniform(0.001, 0.008) for _ in range(self.rng.randint(1, 4))]
            for seconds in lives:
                self.count["kills"] += self.live(seconds, task)
                self.count["lives"] += 1
                self.take()
                self.check()
                task = None
            if self.count["kills"] // QUIET > self.count["told the truth"]:
                self.settle()
        self.settle()
        return {
            **self.count,
            "releases": len(self.models),
            "results": len(self.results),
            "seconds": round(time.monotonic() - begun, 1),
        }

    def _unanswered(self) -> list[Task]:
        return [t for name, t in self.tasks.items() if f"results/{name}" not in self.results]

    def _task(self) -> Task | None:
        """Killed before it was stored, it was not accepted; so it is sent again."""
        waiting = self._unanswered()
        if waiting:
            return self.rng.choice(waiting[:MAX_WAITING])
        name = f"t{len(self.tasks)}"
        self.tasks[name] = Task(
            task=name,
            device=DEVICE,
            kind=TaskKind.TRAIN,
            round=1,
            mask_version=1,
            shape=CLASS,
            graphs=(GraphRef(target="graphs/a.onnx", sha256="0" * 64),),
            model=Blob(sha256="0" * 64, size=1),
            codec=Codec.INT4,
        )
        return self.tasks[name]


def _sha(data: bytes) -> str:
    return sha256(data).hexdigest()


def _number(path: str) -> int:
    return int(path.split("/")[2])


def _blob(path: str, target: Any) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/{target.hashes['sha256']}.{name}"


def main(kills: int, seed: int = 0, folder: str | None = None) -> None:
    logging.disable()
    where = Path(folder or tempfile.mkdtemp())
    fleet = Fleet(where, seed)
    try:
        print(json.dumps(fleet.run(kills)))
    except AssertionError:
        print(f"seed {seed}, {dict(fleet.count)}, told {fleet.told}: see {where}", file=sys.stderr)
        raise
    if folder is None:
        shutil.rmtree(where)


if __name__ == "__main__":
    main(int(sys.argv[1]), *(int(a) for a in sys.argv[2:3]), *sys.argv[3:4])
