"""The agent itself, with its threads and its health check's process, is killed over a real broker.

The coordinator's side is its own hub and release repository. Releases appear all the time. The long
form: `make crashes AGENT_KILLS=500`.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from fleetprune.messages import Telemetry
from fleetprune_agent.serving import Predictor
from fleetprune_agent.slots import Slots
from fleetprune_coordinator.hub import Hub
from fleetprune_coordinator.keys import init_repository
from fleetprune_coordinator.releases import ReleaseContent, ReleaseRepository
from fleetprune_sim.demo_config import to_toml
from tests.brokers import KINDS, restartable  # noqa: F401  (a fixture)
from tests.coordinator.fleet_fakes import MemoryStore

sys.path.append(str(Path(__file__).parents[1] / "agent"))

from models import INPUTS, ZEROS, gemm, golden

KILLS = int(os.environ.get("AGENT_KILLS", "20"))
WAIT_S = 60.0
LIFE_S = 2.5  # an agent connects, looks, downloads, checks, installs and reports in it
PADDING = 150_000  # bytes of a model: three blocks

LIVES = """
import os, signal, sys, time
from pathlib import Path
from fleetprune_agent import agent, duties, health, process
agent.SPREAD_S, agent.QUIET_S = 0.1, 0.3
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            process.work(Path("agent.toml"))
        finally:
            os._exit(1)
    if line.strip():
        time.sleep(float(line))
        os.kill(child, signal.SIGKILL)
    else:
        print(child, flush=True)
        continue
    os.waitpid(child, 0)
    print("killed", flush=True)
"""
"""Everything is imported once; each line of standard input is a life of so many seconds. An empty
one is not ended here, and its process number is told."""


class Device:
    def __init__(self, folder: Path, port: int, root: bytes) -> None:
        self.state = folder / "state"
        np.savez(folder / "samples.npz", x=np.zeros((4, INPUTS)), y=np.zeros(4, np.int64))
        (folder / "root.json").write_bytes(root)
        settings = {
            "device": "d1",
            "device_class": "phone",
            "fleet": "kills",
            "root": str(folder / "root.json"),
            "state": str(self.state),
            "broker": {"port": port},
            "data": {"kind": "npz", "path": str(folder / "samples.npz"), "held_out": 0.5},
        }
        (folder / "agent.toml").write_text(to_toml(settings))
        self.log = (folder / "agent.log").open("wb")
        self.lives = subprocess.Popen(
            [sys.executable, "-P", "-c", LIVES],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )

    def live(self, seconds: float | None) -> str:
        self.lives.stdin.write("\n" if seconds is None else f"{seconds}\n")
        self.lives.stdin.flush()
        return self.lives.stdout.readline().strip()

    def answer(self) -> int:
        """What the active model says, in this process; 0: there is none."""
        slots = Slots(self.state)
        if slots.active() is None:
            return 0
        return int(Predictor(slots, commit_after=1 << 30).predict(ZEROS)[0, 0])

    def close(self) -> None:
        self.lives.stdin.close()
        self.lives.stdout.close()
        self.lives.wait(WAIT_S)
        self.log.close()


@pytest.fixture
def heard() -> list[Telemetry]:
    return []


@pytest.fixture
def releases(tmp_path: Path) -> ReleaseRepository:
    init_repository(tmp_path / "releases", datetime.now(UTC))
    return ReleaseRepository(tmp_path / "releases", lambda: datetime.now(UTC))


@pytest.fixture
def hub(tmp_path, restartable, releases, heard) -> Iterator[Hub]:  # noqa: F811
    hub = Hub(
        restartable.settings,
        "kills",
        MemoryStore(),
        releases.path,
        tmp_path / "spool",
        on_telemetry=heard.append,
    )
    hub.start()
    hub.connection.wait_connected(WAIT_S)
    yield hub
    hub.stop()


@pytest.fixture
def device(tmp_path, restartable, releases) -> Iterator[Device]:  # noqa: F811
    folder = tmp_path / "device"
    folder.mkdir()
    device = Device(folder, restartable.settings.port, releases.root())
    yield device
    device.close()


@pytest.mark.skipif(not KINDS, reason="no MQTT broker: install mosquitto or iotcore")
@pytest.mark.timeout(max(300, 20 * KILLS))
def test_an_agent_that_is_killed_all_the_time_has_a_model_and_tells_the_truth(
    hub, device, releases, heard
):
    rng = random.Random(3)
    published, runs = 0, 0

    def publish() -> None:
        nonlocal published
        published += 1
        content = ReleaseContent(
            onnx=gemm(published, padding=PADDING), golden=golden(published), input_shape=(INPUTS,)
        )
        releases.publish_release(published, {"phone": content}, to_all=True)
        hub.announce_release(published)

    publish()
    for kill in range(KILLS):
        if kill % 2:
            publish()
        life = rng.uniform(0.1, 0.5) if rng.random() < 0.3 else rng.uniform(0.5, LIFE_S)
        assert device.live(life) == "killed"
        answers = device.answer()
        assert answers or not runs, "no model"
        assert answers <= published
        runs = answers
    publish()
    survivor = int(device.live(None))
    end = time.monotonic() + WAIT_S
    try:
        while not (heard and (heard[-1].release, heard[-1].state) == (published, "committed")):
            assert time.monotonic() < end, f"the last report: {heard[-1:]}"
            time.sleep(0.05)
    finally:
        os.kill(survivor, 15)
    assert device.answer() == published
    assert len({said.release for said in heard}) > 2, "kills strike before anything is installed"
    for said in heard:
        manifest = releases.manifest("phone", said.release) if said.release else None
        assert said.release == 0 or manifest is None or manifest.sha256 == said.sha256
