"""Runs rounds against a registry and dies on purpose; started by test_registry.py.

crash_registry.py sweep FOLDER     per statement number n: a process killed at its n-th SQL
                                   statement, then one line of JSON on what a reopening finds
crash_registry.py loop FOLDER LOG  rounds without end, each acknowledged answer in LOG
crash_registry.py hold FOLDER      opens the registry, says so, waits
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np

from fleetprune.messages import Blob, Enrol, GraphRef, Task, TaskKind
from fleetprune_coordinator.records import MaskRecord, Phase
from fleetprune_coordinator.registry import Registry
from fleetprune_coordinator.snapshot import Snapshot

DEVICES = ("d1", "d2", "d3")


def task(round_: int, device: str, model: bytes) -> Task:
    return Task(
        task=f"r{round_}-{device}",
        device=device,
        kind=TaskKind.TRAIN,
        round=round_,
        mask_version=0,
        shape="phone",
        graphs=(GraphRef(target="graphs/train.onnx", sha256="0" * 64),),
        model=Blob(sha256=hashlib.sha256(model).hexdigest(), size=len(model)),
    )


def answer(task_id: str) -> bytes:
    return f"answer to {task_id}".encode() * 50


def snapshot(round_: int) -> Snapshot:
    return Snapshot(round_, 0, {"w": np.full(64, round_, np.float32)})


def setup(folder: Path) -> None:
    with Registry.open(folder, lambda: 0.0) as registry:
        registry.set_classes({"phone": True})
        for name in DEVICES:
            registry.enrol(
                Enrol(device=name, device_class="phone", agent_version="1", trains=True, samples=9)
            )
        registry.save_mask(MaskRecord(0, 0, {"g": np.arange(4)}, {"phone": {"g": 4}}), snapshot(0))


def work(registry: Registry, acknowledge) -> None:
    """One round, resumed where the last process left it."""
    last = registry.latest_snapshot()
    assert last is not None
    current = registry.open_round()
    if current is None:
        number = last.round + 1
        model = f"model of round {number}".encode()
        tasks = [(task(number, name, model), model) for name in DEVICES]
        current = registry.begin_round(number, Phase.TRAIN, 0, tasks)
    for name in DEVICES:
        for open_task in registry.open_tasks(name):
            assert registry.save_result(open_task.task, name, answer(open_task.task))
            acknowledge(open_task.task)
    registry.close_round(current.number, Phase.TRAIN, snapshot(current.number))


def check(folder: Path) -> dict[str, int]:
    """What must hold after any kill; AssertionError if it does not."""
    with Registry.open(folder, lambda: 0.0) as registry:
        assert registry.query("PRAGMA integrity_check") == [{"integrity_check": "ok"}]
        assert registry.query("PRAGMA foreign_key_check") == []
        last = registry.latest_snapshot()
        assert last is not None
        rounds = registry.rounds()
        is_open = registry.open_round() is not None
        assert [r.number for r in rounds] == list(range(1, last.round + is_open + 1))
        answered = 0
        for record in rounds:
            tasks = registry.tasks(record.number, Phase.TRAIN)
            assert [t.task.device for t in tasks] == list(DEVICES)
            for t in tasks:
                assert registry.blob(t.task.model.sha256) == b"model of round %d" % record.number
                if t.state == "answered":
                    answered += 1
                    assert registry.result(t.task.task) == answer(t.task.task)
                else:
                    assert t.state == "open"
                    assert record.state == "open"
                    assert registry.result(t.task.task) is None
        stored = {p.name for p in (folder / "blobs").iterdir()}
        named = {r["sha256"] for r in registry.query("SELECT sha256 FROM blobs")}
        assert named <= stored
        return {"closed": last.round, "open": int(is_open), "answered": answered}


def die_at(folder: Path, statement: int) -> bool:
    """Whether a forked process that works on `folder` was killed at that SQL statement."""
    pid = os.fork()
    if pid == 0:
        seen = 0

        def count(sql: str) -> None:
            nonlocal seen
            seen += 1
            if seen == statement:
                os.kill(os.getpid(), signal.SIGKILL)

        registry = Registry.open(folder, lambda: 0.0)
        registry._db.conn.set_trace_callback(count)
        work(registry, lambda _: None)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def sweep(folder: Path) -> None:
    statement = 1
    setup(folder / "0")
    while True:
        state = folder / str(statement)
        shutil.copytree(folder / "0", state)
        killed = die_at(state, statement)
        found = check(state)
        with Registry.open(state, lambda: 0.0) as registry:  # and the work can go on
            if killed and found["closed"] == 0:
                work(registry, lambda _: None)
        after = check(state)
        print(json.dumps({"killed": killed, "found": found, "after": after}))
        if not killed:
            return
        statement += 1


def loop(folder: Path, log: Path) -> None:
    if not folder.exists():
        setup(folder)
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with Registry.open(folder, time.time) as registry:
        print("ready", flush=True)
        while True:
            work(registry, lambda task_id: os.write(out, f"{task_id}\n".encode()))


def check_acknowledged(folder: Path, log: Path) -> None:
    found = check(folder)
    acknowledged = log.read_text().split()
    with Registry.open(folder, time.time, read_only=True) as registry:
        for task_id in acknowledged:
            assert registry.result(task_id) == answer(task_id)
    print(json.dumps({**found, "acknowledged": len(acknowledged)}))


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "sweep":
        sweep(folder)
    elif what == "loop":
        loop(folder, Path(sys.argv[3]))
    elif what == "check":
        check_acknowledged(folder, Path(sys.argv[3]))
    else:
        with Registry.open(folder, time.time):
            print("ready", flush=True)
            time.sleep(60)


if __name__ == "__main__":
    main()
