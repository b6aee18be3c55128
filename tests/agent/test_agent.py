"""The whole agent against a real broker, and what it may import."""

import json
import logging
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hub import FLEET, Hub, broker, until, wait_until
from models import INPUTS, gemm
from repositories import MemoryRepository
from step_graphs import Shelf, observation, step

from fleetprune.errors import ConfigError
from fleetprune.messages import Progress
from fleetprune.mqtt import BrokerSettings
from fleetprune.result import decode_result
from fleetprune.update import decode_update
from fleetprune_agent.agent import INBOX, REFUSED, STOPPED, Agent
from fleetprune_agent.config import AgentConfig, NpzData
from fleetprune_agent.state import locked


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    with broker(tmp_path_factory.mktemp("broker")) as number:
        yield number


@pytest.fixture
def repository():
    return MemoryRepository(datetime.now(UTC))


@pytest.fixture
def hub(port, tmp_path, repository):
    hub = Hub(port, tmp_path / "spool", repository)
    yield hub
    hub.close()


class Device:
    """An agent in a thread, which can be stopped and started."""

    def __init__(self, port: int, folder: Path, repository: MemoryRepository) -> None:
        (folder / "root.json").write_bytes(repository.bootstrap)
        x, y = np.array([[1.0], [0.0], [1.0], [0.0]]), np.array([0, 1, 0, 1])
        np.savez(folder / "samples.npz", x=x, y=y)
        self.config = AgentConfig(
            device="d1",
            device_class="phone",
            fleet=FLEET,
            broker=BrokerSettings(port=port),
            root=folder / "root.json",
            state=folder / "state",
            data=NpzData(kind="npz", path=folder / "samples.npz", held_out=0),
        )
        self.code: int | None = None

    def start(self) -> None:
        self.stop_event = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.code = Agent(self.config).run(self.stop_event)

    def stop(self) -> int | None:
        self.stop_event.set()
        self.thread.join(30)
        assert not self.thread.is_alive()
        return self.code


@pytest.fixture
def device(port, tmp_path, repository):
    device = Device(port, tmp_path, repository)
    yield device
    if hasattr(device, "thread"):
        device.stop()


def offer(hub: Hub, shelf: Shelf) -> None:
    """Sign the shelf's graphs, and serve its models."""
    for name, data in shelf.blobs.items():
        if name.startswith("graphs/"):
            hub.repository.add(name, data)
        else:
            hub.blobs[name] = data
    hub.repository.bump()


def test_a_flood_of_messages_does_not_take_the_memory(device, caplog):
    agent = Agent(device.config)
    for _ in range(INBOX + 1):
        agent._note(f"fleetprune/{FLEET}/down/d1/task", bytes(1000))
    assert agent._events.qsize() == INBOX
    assert [r.getMessage() for r in caplog.records] == [
        f"{INBOX} messages are waiting: one on task is dropped"
    ]


def test_a_device_s_life(hub, device, repository):
    """Enrols, trains, repeats itself after a restart, installs, reports, says goodbye."""
    device.start()
    enrol = until(hub.enrolled, lambda e: True, "an enrolment")
    assert (enrol.device, enrol.device_class, enrol.trains, enrol.samples) == (
        "d1",
        "phone",
        True,
        4,
    )
    first = until(hub.telemetry, lambda t: True, "a report")
    assert (first.release, first.state, first.error) == (0, "empty", "")

    shelf = Shelf()
    train = shelf.task("t1", [step()], top_k=0.5)
    watch = shelf.task("t2", [observation()], kind="observe")
    offer(hub, shelf)
    hub.send(train)
    ack = until(hub.acks, lambda a: a.task == "t1", "an acknowledgement")
    assert ack.state is Progress.ACCEPTED
    hub.send(watch)
    wait_until(lambda: {"results/t1", "results/t2"} <= hub.results.keys(), "two answers")
    sent = decode_result(hub.results["results/t1"])
    assert decode_update(sent.update, mask_version=1, size=2).dense().tolist() == [0, -2]
    assert decode_result(hub.results["results/t2"]).header.correct == 4

    assert device.stop() == STOPPED
    wait_until(lambda: hub.presence[-1:] == [b"offline"], "the farewell")
    before = hub.results.pop("results/t1")
    device.start()
    wait_until(lambda: hub.presence[-1:] == [b"online"], "the return")
    hub.send(train)
    wait_until(lambda: "results/t1" in hub.results, "the same answer again")
    assert hub.results["results/t1"] == before

    manifest = repository.release(1, model=gemm(1), fields={"input_shape": (INPUTS,)})
    hub.announce(1)
    report = until(hub.telemetry, lambda t: t.release == 1, "a report of the release")
    assert report.sha256 == manifest.sha256
    assert report.bytes_up > 1000
    assert report.bytes_down > 1000
    assert report.rss_mb > 10
    assert json.loads((device.config.state / "last.json").read_bytes())["release"] == 1
    assert not list((device.config.state / "tasks").iterdir())


def test_a_stop_is_told_from_a_crash_and_a_settled_release_is_noted(
    hub, device, repository, monkeypatch
):
    monkeypatch.setattr("fleetprune_agent.agent.STEADY_S", 0.5)
    repository.release(1)
    starts = device.config.state / "slots" / "starts.json"

    def noted() -> dict:
        return json.loads(starts.read_bytes())

    device.start()
    report = until(hub.telemetry, lambda t: t.release == 1, "a report of the release")
    wait_until(lambda: noted()["sha256"] == report.sha256 and noted()["settled"], "the note")
    assert noted()["running"]
    device.stop()
    assert not noted()["running"]
    device.start()
    wait_until(lambda: noted()["running"], "the start")
    assert (noted()["crashes"], noted()["settled"]) == (0, True)


def test_a_damaged_trust_folder_is_set_aside(hub, device, repository):
    trust = device.config.state / "trust"
    (trust / "targets.json").mkdir(parents=True)
    repository.release(1)
    device.start()
    until(hub.telemetry, lambda t: t.release == 1, "a report of the release")
    assert (trust / "targets.json").is_file()
    assert (device.config.state / "trust.bad" / "targets.json").is_dir()


def test_a_task_that_cannot_be_done_is_refused_with_its_reason(hub, device):
    shelf = Shelf()
    task = shelf.task("t1", [step()], device="d1", mask_version=9)
    offer(hub, shelf)
    device.start()
    until(hub.enrolled, lambda e: True, "an enrolment")
    hub.send(task)
    ack = until(hub.acks, lambda a: a.state is Progress.REFUSED, "a refusal")
    assert (ack.task, ack.reason) == (
        "t1",
        "model of mask version 1 and round 0, expected 9 and 0",
    )
    wait_until(lambda: not list((device.config.state / "tasks").iterdir()), "the end of the task")


def test_an_unsigned_graph_is_not_run(hub, device):
    shelf = Shelf()
    task = shelf.task("t1", [step()])
    hub.blobs.update(shelf.blobs)  # served, but not signed
    device.start()
    until(hub.enrolled, lambda e: True, "an enrolment")
    hub.send(task)
    ack = until(hub.acks, lambda a: a.state is Progress.REFUSED, "a refusal")
    assert ack.reason == f"the release repository has no target {task.graphs[0].target}"


def test_an_accepted_task_survives_a_kill(hub, device):
    """The message is on disk before it is acknowledged, and is done at the next start."""
    shelf = Shelf()
    task = shelf.task("t1", [step()])
    offer(hub, shelf)
    tasks = device.config.state / "tasks"
    tasks.mkdir(parents=True)
    (tasks / "t1.json").write_bytes(task.to_bytes())
    (tasks / "bad.json").write_bytes(b"{")
    device.start()
    wait_until(lambda: "results/t1" in hub.results, "the answer")
    until(hub.acks, lambda a: a.task == "t1" and a.state is Progress.ACCEPTED, "its ack")


def test_a_refused_device_says_so_and_ends(hub, device, caplog):
    hub.accepts = False
    with caplog.at_level(logging.ERROR):
        device.start()
        device.thread.join(30)
    assert device.code == REFUSED
    assert [r.message for r in caplog.records if r.levelno == logging.ERROR] == [
        "enrolment refused by the coordinator: not on the list"
    ]


def test_two_agents_on_one_folder(device):
    with (
        locked(device.config.state),
        pytest.raises(
            ConfigError, match=f"^state folder {device.config.state} is in use by another agent$"
        ),
    ):
        Agent(device.config).run(threading.Event())


def test_the_command_runs_checks_and_stops_at_sigterm(hub, device, tmp_path, repository):
    config = tmp_path / "agent.toml"
    config.write_text(
        f'device = "d1"\ndevice_class = "phone"\nfleet = "{FLEET}"\n'
        'root = "root.json"\nstate = "state"\n'
        f"[broker]\nport = {device.config.broker.port}\n"
        '[data]\nkind = "npz"\npath = "samples.npz"\nheld_out = 0.25\n'
    )
    fleetprune = [sys.executable, "-m", "fleetprune", "agent"]

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [*fleetprune, *words, "--config", str(config)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    checked = call("check")
    assert checked.stdout.splitlines() == [
        "ok    configuration  d1 of class phone",
        "ok    data           3 samples of shape (1,) in 2 classes, 1 more held out",
        f"ok    root of trust  {tmp_path / 'root.json'}",
        f"ok    state folder   {tmp_path / 'state'}",
        f"ok    broker         127.0.0.1:{device.config.broker.port}",
    ]
    assert checked.returncode == 0
    repository.release(1)
    with subprocess.Popen(
        [*fleetprune, "run", "--config", str(config)], stderr=subprocess.PIPE, text=True
    ) as process:
        until(hub.telemetry, lambda t: t.release == 1, "a report of the release")
        assert json.loads(call("status", "--json").stdout)["running"]
        np.save(tmp_path / "x.npy", np.zeros((2, INPUTS)))
        predicted = call("predict", "--input", str(tmp_path / "x.npy"), "--json")
        assert json.loads(predicted.stdout) == {
            "release": 1,
            "predictions": [{"class": 0, "label": "0", "scores": [1.0, 1.0, 1.0]}] * 2,
        }
        missing = call("predict", "--input", str(tmp_path / "y.npy"))
        assert (missing.returncode, missing.stderr) == (
            2,
            f"fleetprune: {tmp_path / 'y.npy'}: cannot be read: No such file or directory\n",
        )
        (tmp_path / "y.npy").write_bytes(b"hello")
        assert (
            "y.npy: not a plain .npy file" in call("predict", "--input", f"{tmp_path}/y.npy").stderr
        )
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=30)[1]
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    status = json.loads(call("status", "--json").stdout)
    assert (status["running"], status["release"], status["waiting_tasks"]) == (False, 1, 0)
    (tmp_path / "root.json").write_bytes(b"{}")
    wrong = call("check")
    assert wrong.returncode == 1
    assert wrong.stdout.splitlines()[2].startswith(
        f"wrong root of trust  root {tmp_path / 'root.json'} is not signed root metadata: "
    )


WATCHED = """
import importlib, pkgutil, sys
import fleetprune_agent
for module in pkgutil.iter_modules(fleetprune_agent.__path__):
    importlib.import_module(f"fleetprune_agent.{module.name}")
sys.path.insert(0, sys.argv[1])
from shelf_task import run
run()
loaded = {name.split(".")[0] for name in sys.modules}
print(sorted(loaded & {"torch", "flwr", "onnx", "torch_pruning", "sqlite_utils",
                       "fleetprune_coordinator", "fleetprune_sim"}))
"""


def test_the_agent_loads_no_torch_and_no_coordinator(tmp_path):
    """In a process of its own: import everything, do a task, look at what was loaded."""
    shelf = Shelf()
    task = shelf.task("t1", [step()])
    for name, data in shelf.blobs.items():
        (tmp_path / name.replace("/", "_")).write_bytes(data)
    (tmp_path / "task.json").write_bytes(task.to_bytes())
    (tmp_path / "shelf_task.py").write_text(
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from fleetprune_agent.data import checked\n"
        "from fleetprune_agent.feedback import InMemory\n"
        "from fleetprune_agent.sessions import Graphs\n"
        "from fleetprune_agent.worker import Worker, WorkerSettings, as_loop_device\n"
        "here = Path(__file__).parent\n"
        "def run():\n"
        "    samples = checked(np.ones((4, 1)), [0, 1, 0, 1], str, 'memory')\n"
        "    worker = Worker(WorkerSettings('d1'), samples, Graphs(), InMemory())\n"
        "    read = lambda name: (here / name.replace('/', '_')).read_bytes()\n"
        "    assert as_loop_device(worker)((here / 'task.json').read_bytes(), read)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_a_forged_announcement_is_a_reason_to_look_and_no_more(
    hub, device, repository, monkeypatch
):
    """Whoever writes on the topic of releases: what is signed decides."""
    monkeypatch.setattr("fleetprune_agent.agent.QUIET_S", 0.1)
    repository.release(1)
    device.start()
    until(hub.telemetry, lambda t: t.release == 1, "a report of the release")
    looks = repository.asked.count("metadata/timestamp.json")
    hub.announce(2**31)
    wait_until(lambda: repository.asked.count("metadata/timestamp.json") > looks, "a look")
    device.stop()
    last = json.loads((device.config.state / "last.json").read_bytes())
    assert (last["release"], last["failed"]) == (1, 0)
