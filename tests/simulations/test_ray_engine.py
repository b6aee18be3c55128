"""Devices' work on Flower's simulation engine: the same results as in this process, and its ends.

Ray takes long to start, so it starts twice: in `ray_child`, and for a command that gets Ctrl-C.
"""

import contextlib
import json
import os
import pickle
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from flwr.app import Error, Message

from fleetprune import cli
from fleetprune.errors import ConfigError, MissingExtraError, TransportError
from fleetprune_coordinator.flower_messages import ensure_identity, stamp
from fleetprune_sim import ray_engine, ray_worker
from fleetprune_sim.engines import check_engine
from fleetprune_sim.history import History, RoundRow
from fleetprune_sim.ray_engine import RayEngine, cut
from fleetprune_sim.ray_worker import Setup, request
from fleetprune_sim.station import Done, Job
from tests.simulations import ray_child
from tests.simulations.ray_child import ROUNDS, TASK, carry

ROOT = Path(__file__).parents[2]
LOST = (
    "a worker process of the simulation was lost (killed, out of memory, or its machine is gone); "
    "go on with --resume, perhaps with fewer workers"
)
SETUP = Setup("/nowhere", "nested", ("large", "small"))


def lasting(summary):
    """Without what depends on the machine and the engine."""
    dropped = ("wall_s", "client_rounds_per_s", "engine")
    kept = {k: v for k, v in summary.items() if k not in dropped}
    kept["classes"] = {
        name: entry | {"artifact": entry["artifact"] | {"latency_ms": None}}
        for name, entry in summary["classes"].items()
    }
    return kept


def rows(folder: Path) -> list[RoundRow]:
    with History(folder / "history.db") as history:
        return [replace(row, wall_s=0.0) for row in history.read(RoundRow)]


def finished(folder: Path) -> int:
    """Rounds of a run that another process is at."""
    try:
        with sqlite3.connect(f"file:{folder / 'history.db'}?mode=ro", uri=True) as db:
            return int(db.execute("SELECT count(DISTINCT number) FROM rounds").fetchone()[0])
    except sqlite3.Error:
        return 0


def ray_folders(pid: int) -> list[Path]:
    """That the Rays of a process left."""
    return list(Path("/tmp").glob(f"ray-{pid}-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of the loop."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, carry(folder)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """What `ray_child` found, and where."""
    folder = tmp_path_factory.mktemp("mixed") / "run"
    command = [sys.executable, "-m", ray_child.__name__, str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "raylet" not in done.stdout + done.stderr  # Ray's daemons are loud when a worker dies
    return folder, json.loads(done.stdout)


def test_every_answer_of_ray_is_the_loops_to_the_bit(mixed):
    _, found = mixed
    assert len(found["rounds"]) == ray_child.RAY
    for told in found["rounds"]:
        assert told["equal"]
        assert told["jobs"] > ray_engine.MESSAGES_PER_WORKER  # more than virtual nodes
        assert [reason.partition(":")[0] for reason in told["refused"]] == ["WireError"]
        assert told["models"] <= 3  # of two classes, and the bad one


def test_a_lost_worker_ends_the_run_and_says_how_to_go_on(mixed):
    assert mixed[1]["lost"] == LOST


def test_a_run_of_both_engines_is_that_of_one(whole, mixed):
    folder, found = mixed
    assert lasting(found["summary"]) == lasting(whole[1])
    assert rows(folder) == rows(whole[0])
    assert (whole[1]["engine"], found["summary"]["engine"]) == ("loop", "ray")  # what ended it


def test_ray_leaves_nothing_behind(mixed):
    _, found = mixed
    assert (ray_folders(found["pid"]), found["children"]) == ([], [])
    assert (found["environment kept"], found["handler kept"]) == (True, True)
    assert found["telemetry"] == "0"


@contextlib.contextmanager
def under_ray(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The command, in the middle of a run."""
    # A shell that runs the tests in the background may have them ignore Ctrl-C.
    main = (
        "import signal; from fleetprune.cli import main; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); main()"
    )
    command = [
        sys.executable, "-c", main, "simulate", "--task", TASK, "--engine", "ray", "--out",
        str(folder), "--rounds", str(ROUNDS), "--set", "simulation.evaluate_every=10", "--json",
    ]  # fmt: skip
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=pipe, stderr=pipe, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 300
        while not finished(folder):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_ctrl_c_ends_all_processes_and_leaves_no_folder(whole, tmp_path):
    with under_ray(tmp_path / "run") as process:
        group = psutil.Process(process.pid).children(recursive=True)
        assert len(group) >= 4  # Ray's daemons and the worker
        assert len(ray_folders(process.pid)) == 1
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert ray_folders(process.pid) == []
    assert 0 < finished(tmp_path / "run") < ROUNDS
    _, alive = psutil.wait_procs(group, timeout=60)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    assert lasting(carry(tmp_path / "run")) == lasting(whole[1])


# ---- without Ray


@contextlib.contextmanager
def titled(name: str, *, after: float = 0.0) -> Iterator[subprocess.Popen[bytes]]:
    """A process that takes a title, as Ray's workers do, but not the kernel's name for it."""
    command = ["bash", "-c", f"sleep {after}; exec -a '{name}' sleep 60"]
    with subprocess.Popen(command) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_worker_is_waited_for_by_its_title_and_what_was_there_instead_is_said():
    with titled("ray::IDLE"), titled("ray::ClientAppActor", after=0.5) as late:
        assert ray_child.worker(seconds=10.0).pid == late.pid
        late.kill()
        late.wait()
        with pytest.raises(
            LookupError,
            match=r"^0 processes ray::Client\* after 0 s, expected 1; there are .*ray::IDLE.*; "
            r"Ray does not run$",
        ):
            ray_child.worker(seconds=0.0)


def test_without_ray_the_command_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        MissingExtraError,
        match=r"^--engine ray needs ray, which is not installed: "
        r"pip install 'fleetprune\[ray\]'$",
    ):
        cli.run(["simulate", "--engine", "ray", "--out", str(tmp_path / "run")], cli.Options())
    assert list(tmp_path.iterdir()) == []
    check_engine("loop", workers=2, jobs=2)


def test_what_a_cluster_cannot_do_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"^--engine ray does one run after another: leave out"):
        check_engine("ray", jobs=2)
    check_engine("ray", workers=2)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_engine("ray")
    with pytest.raises(ConfigError, match=r"^the cluster at RAY_ADDRESS has as many workers as"):
        check_engine("ray", workers=2)


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "10.0.0.1", "head:port"])
def test_an_address_of_another_kind_is_refused(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    engine = RayEngine(Path(), "nested", frozenset(), 1)
    with (
        contextlib.closing(engine),
        pytest.raises(
            ConfigError, match=rf"^RAY_ADDRESS={address}: expected HOST:PORT, auto or local$"
        ),
    ):
        next(engine.run([Job("d0", b"", b"")]))


def test_a_cluster_that_is_not_there_is_said_at_once(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: refuses
        port = taken.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        engine = RayEngine(Path(), "nested", frozenset(), 1)
        with (
            contextlib.closing(engine),
            pytest.raises(
                TransportError,
                match=rf"^no Ray at RAY_ADDRESS=127\.0\.0\.1:{port} \(\[Errno \d+\] Connection "
                r"refused\): start it with ray start --head, or unset RAY_ADDRESS",
            ),
        ):
            next(engine.run([Job("d0", b"", b"")]))
        assert ray_folders(os.getpid()) == []


class Grid:
    """Flower's grid, whose nodes answer when they are asked for the second time, last one first."""

    def __init__(self, work) -> None:
        self.work, self.sent, self.asked = work, {}, 0
        self.sizes: list[int] = []

    def get_node_ids(self):
        return [11, 12]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            ids.append(f"m{len(self.sizes)}")
            self.sent[ids[-1]] = stamp(message, ids[-1])
            self.sizes.append(len(ray_worker.read_request(message.content)[1]))
        return ids

    def pull_messages(self, message_ids):
        self.asked += 1
        if self.asked % 2:
            return []
        return [self.work(self.sent.pop(i), None) for i in sorted(message_ids, reverse=True)]


class Echo:
    """A station whose answers tell the job."""

    def run(self, job) -> Done:
        return Done(job.task + job.model, memory=job.memory or None)


class Thread:
    def is_alive(self) -> bool:
        return True


def on(grid: Grid) -> RayEngine:
    ensure_identity()
    engine = RayEngine(Path("/nowhere"), "nested", frozenset({"large", "small"}), 1)
    engine._grid, engine._thread = grid, Thread()
    return engine


JOBS = [Job(f"d{i}", b"task%d" % i, b"model", b"m" * (i % 2)) for i in range(10)]


def test_answers_come_in_the_order_of_the_jobs_and_what_was_left_is_asked_again(monkeypatch):
    asked: list[Setup] = []
    monkeypatch.setattr(ray_worker, "open_station", lambda setup: asked.append(setup) or Echo())
    monkeypatch.setattr(ray_worker, "ENOUGH_S", -1.0)  # after one job
    grid = Grid(ray_worker.work)
    assert list(on(grid).run(JOBS)) == [Echo().run(job) for job in JOBS]
    assert set(asked) == {SETUP}
    assert sorted(grid.sizes) == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert grid.sent == {}


def failed(reason: str, code: int):
    return lambda message, context: stamp(Message(Error(code, reason), reply_to=message), "r")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            failed("<class 'ray.exceptions.ActorDiedError'>:<'The actor died\nclass_name: x'>", 0),
            LOST,
        ),
        (
            failed(
                "<class 'ray.exceptions.RayTaskError(ModuleNotFoundError)'>:<'ray::Client.run() "
                "(pid=7)\n  At least one of the input arguments\nModuleNotFoundError: No module "
                "named fleetprune_sim'>",
                0,
            ),
            "a worker of the simulation failed: ModuleNotFoundError: No module named "
            "fleetprune_sim",
        ),
        (
            ray_worker.work,
            f"a worker of the simulation failed on {socket.gethostname()}: there is no "
            "/nowhere/fleet on this machine: all machines must share the run's folder under the "
            "same path",
        ),
    ],
    ids=["lost", "not installed", "folder not shared"],
)
def test_what_is_no_answer_of_a_device_ends_the_run(answer, message):
    with pytest.raises(TransportError) as caught:
        list(on(Grid(answer)).run(JOBS))
    assert str(caught.value) == message


def test_an_error_in_a_station_names_the_machine(monkeypatch):
    class Broken:
        def run(self, job):
            raise KeyError(job.device)

    monkeypatch.setattr(ray_worker, "open_station", lambda setup: Broken())
    with pytest.raises(TransportError, match=rf"failed on {socket.gethostname()}: KeyError: 'd"):
        list(on(Grid(ray_worker.work)).run(JOBS))


def test_jobs_are_cut_into_even_parts_of_bounded_size(monkeypatch):
    assert [len(p) for p in cut(JOBS, 4)] == [3, 3, 3, 1]
    assert [len(p) for p in cut(JOBS, 100)] == [1] * 10
    assert [job for p in cut(JOBS, 3) for job in p] == JOBS
    assert cut([], 4) == []
    monkeypatch.setattr(ray_engine, "MESSAGE_BYTES", 11)  # two jobs' model and memory are 10 to 12
    assert [len(p) for p in cut(JOBS, 1)] == [2] * 5
    monkeypatch.setattr(ray_engine, "MESSAGE_BYTES", 1)
    assert [len(p) for p in cut(JOBS, 1)] == [1] * 10


def test_a_model_travels_once_per_message():
    model = os.urandom(100_000)
    jobs = [Job(f"d{i}", b"task", model) for i in range(10)]
    assert len(pickle.dumps(request(SETUP, jobs))) < 110_000
    assert ray_worker.read_request(request(SETUP, jobs)) == (SETUP, jobs)
