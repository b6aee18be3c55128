"""What an agent costs a device: memory at rest and in training, and disk.

    python benchmarks/agent_footprint.py [--install | --python PATH] [--json]

A mosquitto and a coordinator's hub run here; the agent is a process of its own, started by
`fleetprune agent run`, with 512 samples of 3x32x32 in memory.
`idle`: the agent is connected and enrolled, and has looked for a release.
`training`: the peak of that same process over its whole life, after one training task: ResNet-8 at
batch 32, graph and model fetched over MQTT, the answer delivered. Once with the operators for this
processor and once with portable ones.
`install`: a new virtual environment, `pip install .[agent]`, measured by disk blocks (needs a
network); pip and setuptools are not counted, bytecode is. The agents measured are then those of
this installation, which is what a device has. Otherwise they run with `--python`, by default this
interpreter, where cryptography is installed and loaded too (7 MB; a device has no use for it).

Megabytes are 10**6 bytes. What is file-backed (code of shared libraries) the kernel may drop
and read again. An agent loads onnxruntime (some 30 MB) with its first task, release or
measurement and keeps it: `RSS after training` is what it rests at from then on.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from fleetprune.messages import Blob, Codec, Task, TaskKind
from fleetprune.model_payload import encode_model
from fleetprune.mqtt import BrokerSettings
from fleetprune.result import decode_result
from fleetprune_agent.agent import probe
from fleetprune_coordinator.graphs import export_train_step
from fleetprune_coordinator.hub import Hub
from fleetprune_coordinator.keys import init_repository
from fleetprune_coordinator.releases import ReleaseRepository
from fleetprune_sim.models import resnet8

ROOT = Path(__file__).parent.parent
DEVICE, FLEET = "bench", "bench"
SAMPLES, SHAPE, CLASSES, BATCH = 512, (3, 32, 32), 10, 32
TARGETS_MB = {"idle": 85.0, "training": 130.0, "install": 200.0}
SETTLE_S = 12.0
TIDY_S = 2.0  # after an answer: the agent drops its session and gives memory back
PATIENCE_S = 300.0


@contextmanager
def broker(folder: Path) -> Iterator[int]:
    program = shutil.which("mosquitto")
    if program is None:
        sys.exit("agent_footprint: mosquitto is not installed: apt-get install mosquitto")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    settings = folder / "mosquitto.conf"
    settings.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    process = subprocess.Popen([program, "-c", str(settings)], stderr=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


def write_samples(file: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SAMPLES, *SHAPE)).astype(np.float32)
    np.savez(file, x=x, y=rng.integers(0, CLASSES, SAMPLES))


def status_mb(pid: int, key: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no {key} in /proc/{pid}/status")


@dataclass
class Results:
    """The store of a coordinator that has one task; see `hub.TaskStore`."""

    task: list[Task] = field(default_factory=list)
    received: SimpleQueue[bytes] = field(default_factory=SimpleQueue)

    def open_tasks(self, device: str) -> list[Task]:
        """All of the one device."""
        return self.task

    def save_result(self, task_id: str, device: str, data: bytes) -> bool:
        """Hand it to whoever waits."""
        self.received.put(data)
        return True

    def result(self, task_id: str) -> bytes | None:
        """None: nothing is asked twice."""
        return None


@contextmanager
def coordinator(folder: Path, port: int) -> Iterator[tuple[Hub, ReleaseRepository, Results]]:
    def now() -> datetime:
        return datetime.now(UTC)

    init_repository(folder / "repository", now())
    repository, results = ReleaseRepository(folder / "repository", now), Results()
    hub = Hub(BrokerSettings(port=port), FLEET, results, repository.path, folder / "spool")
    hub.start()
    try:
        yield hub, repository, results
    finally:
        hub.stop()


@contextmanager
def agent(python: str, folder: Path, port: int, root: bytes) -> Iterator[subprocess.Popen[bytes]]:
    write_samples(folder / "samples.npz")
    (folder / "root.json").write_bytes(root)
    config = folder / "agent.toml"
    config.write_text(
        f'device = "{DEVICE}"\ndevice_class = "phone"\nfleet = "{FLEET}"\n'
        'root = "root.json"\nstate = "state"\n'
        f'[broker]\nport = {port}\n[data]\nkind = "npz"\npath = "samples.npz"\n'
    )
    command = [python, "-m", "fleetprune", "agent", "run", "--config", str(config)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # as the systemd unit sets it
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def training_task(repository: ReleaseRepository, block: int, steps: int) -> tuple[Task, bytes]:
    """A task, and the model that it names."""
    torch.manual_seed(0)
    net = resnet8(CLASSES)
    graph = export_train_step(net, torch.zeros(1, *SHAPE), batch=BATCH, block=block)
    params = np.concatenate([p.detach().numpy().ravel() for p in net.parameters()])
    stats = [b for n, b in net.named_buffers() if n.endswith(("running_mean", "running_var"))]
    flat = np.concatenate([b.numpy().ravel() for b in stats])
    model = encode_model(1, 0, params, flat, Codec.FP32)
    task = Task(
        task="t1",
        device=DEVICE,
        kind=TaskKind.TRAIN,
        round=0,
        mask_version=1,
        shape="phone",
        graphs=(repository.publish_graph(graph.onnx),),
        model=Blob.of(model),
        epochs=1000,
        max_steps=steps,
        learning_rate=0.01,
    )
    return task, model


def measure(folder: Path, python: str, block: int, steps: int) -> dict[str, float]:
    """One agent, from its start to the end of its first task."""
    folder.mkdir()
    with (
        broker(folder) as port,
        coordinator(folder, port) as (hub, repository, results),
        agent(python, folder, port, repository.root()) as process,
    ):
        time.sleep(SETTLE_S)
        if not hub.online(DEVICE):
            sys.exit("agent_footprint: the agent did not connect")
        found = {
            "idle": status_mb(process.pid, "VmRSS"),
            "idle_anonymous": status_mb(process.pid, "RssAnon"),
            "idle_peak": status_mb(process.pid, "VmHWM"),
        }
        task, model = training_task(repository, block, steps)
        results.task = [task]
        hub.announce(task, model)
        answer = results.received.get(timeout=PATIENCE_S)
        time.sleep(TIDY_S)
        return found | {
            "training": status_mb(process.pid, "VmHWM"),
            "after": status_mb(process.pid, "VmRSS"),
            "after_anonymous": status_mb(process.pid, "RssAnon"),
            "step_ms": 1000 * decode_result(answer).header.train_s / steps,
            "answer_bytes": len(answer),
        }


def install(folder: Path) -> tuple[str, float]:
    """An installation's interpreter, and its disk space beyond that of an empty environment."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    empty = disk_mb(folder)
    pip = [str(folder / "bin" / "pip"), "install", "-qq", f"{ROOT}[agent]"]
    subprocess.run(pip, check=True)
    return str(folder / "bin" / "python"), disk_mb(folder) - empty


def disk_mb(folder: Path) -> float:
    done = subprocess.run(
        ["du", "-s", "--block-size=1", str(folder)], check=True, capture_output=True, text=True
    )
    return int(done.stdout.split()[0]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="What an agent costs a device.")
    parser.add_argument("--steps", type=int, default=40, help="training steps (default 40)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--install", action="store_true", help="measure a new installation")
    source.add_argument("--python", default=sys.executable, help="interpreter of the agents")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    found: dict[str, Any] = {"steps": options.steps, "targets_mb": TARGETS_MB}
    with tempfile.TemporaryDirectory() as name:
        folder, python = Path(name), options.python
        if options.install:
            python, found["install"] = install(folder / "venv")
        found["native"] = measure(folder / "native", python, probe(), options.steps)
        found["portable"] = measure(folder / "portable", python, 0, options.steps)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    rows: list[tuple[str, float, float | None]] = [
        ("RSS idle, connected", found["native"]["idle"], TARGETS_MB["idle"]),
        ("  of it not file-backed", found["native"]["idle_anonymous"], None),
    ]
    for kind in ("native", "portable"):
        rows += [
            (f"RSS peak, training, {kind}", found[kind]["training"], TARGETS_MB["training"]),
            (f"RSS after training, {kind}", found[kind]["after"], None),
            ("  of it not file-backed", found[kind]["after_anonymous"], None),
        ]
    if options.install:
        rows.append(("disk, agent and dependencies", found["install"], TARGETS_MB["install"]))
    print(f"{'':32}{'MB':>8}{'target':>8}")
    for what, value, target in rows:
        print(f"{what:32}{value:8.1f}{'' if target is None else f'{target:8.0f}'}")
    for kind in ("native", "portable"):
        print(f"{f'ms per step, {kind}':32}{found[kind]['step_ms']:8.1f}")


if __name__ == "__main__":
    main()
