"""What an agent costs a device: memory at rest and in training, and disk.

    python benchmarks/agent_footprint.py [--install] [--json]

`idle`: an agent process connected to a mosquitto of its own, 512 samples of 3x32x32 in memory.
`training`: the peak of a fresh process that imports the whole agent and does one training task
on ResNet-8 at batch 32, with the operators for this processor and with portable ones.
`install`: `python -m venv` and `pip install .[agent]`, measured by disk blocks (needs a network).
Megabytes are 10**6 bytes. What is file-backed (code of shared libraries) the kernel may drop
and read again. An agent loads onnxruntime (some 30 MB) with its first task, release or
measurement and keeps it: `RSS after training` is what it rests at from then on.
"""

import argparse
import hashlib
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
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root

from fleetprune.messages import Blob, Codec, GraphRef, Task
from fleetprune.model_payload import encode_model
from fleetprune.result import decode_result
from fleetprune_agent.agent import probe
from fleetprune_agent.data import split
from fleetprune_agent.feedback import OnDisk
from fleetprune_agent.memory import peak_rss_mb, quiet_malloc, rss_mb, trim
from fleetprune_agent.readers import read_npz
from fleetprune_agent.sessions import Graphs
from fleetprune_agent.worker import Worker, WorkerSettings

ROOT = Path(__file__).parent.parent
SAMPLES, SHAPE, CLASSES, BATCH = 512, (3, 32, 32), 10, 32
TARGETS_MB = {"idle": 85.0, "training": 130.0}
SETTLE_S = 12.0


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


def write_root(file: Path) -> None:
    signer = CryptoSigner.generate_ed25519()
    root = Root(expires=datetime.now(UTC) + timedelta(days=365), consistent_snapshot=True)
    for role in ("root", "targets", "snapshot", "timestamp"):
        root.add_key(signer.public_key, role)
    metadata = Metadata(root)
    metadata.sign(signer)
    metadata.to_file(str(file))


def status_mb(pid: int, key: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no {key} in /proc/{pid}/status")


def measure_idle(folder: Path) -> dict[str, float]:
    write_samples(folder / "samples.npz")
    write_root(folder / "root.json")
    with broker(folder) as port:
        config = folder / "agent.toml"
        config.write_text(
            'device = "bench"\ndevice_class = "phone"\nfleet = "bench"\n'
            'root = "root.json"\nstate = "state"\n'
            f'[broker]\nport = {port}\n[data]\nkind = "npz"\npath = "samples.npz"\n'
        )
        command = [sys.executable, "-m", "fleetprune", "agent", "run", "--config", str(config)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            time.sleep(SETTLE_S)
            found = {
                "idle": status_mb(process.pid, "VmRSS"),
                "idle_anonymous": status_mb(process.pid, "RssAnon"),
            }
            process.terminate()
    return found


def measure_training(folder: Path, portable: bool, steps: int) -> dict[str, float]:
    block = 0 if portable else probe()
    subprocess.run(
        [sys.executable, __file__, "--export", str(block), str(folder)], check=True, cwd=ROOT
    )
    done = subprocess.run(
        [sys.executable, __file__, "--train", str(steps), str(folder)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def export(block: int, folder: Path) -> None:
    """In a process of its own, since it needs torch."""
    import torch  # noqa: PLC0415

    from fleetprune_coordinator.graphs import export_train_step  # noqa: PLC0415
    from fleetprune_sim.models import resnet8  # noqa: PLC0415

    torch.manual_seed(0)
    net = resnet8(CLASSES)
    graph = export_train_step(net, torch.zeros(1, *SHAPE), batch=BATCH, block=block)
    (folder / "graph.onnx").write_bytes(graph.onnx)
    params = np.concatenate([p.detach().numpy().ravel() for p in net.parameters()])
    stats = [b for n, b in net.named_buffers() if n.endswith(("running_mean", "running_var"))]
    np.savez(
        folder / "model.npz",
        params=params,
        stats=np.concatenate([b.numpy().ravel() for b in stats]),
    )
    write_samples(folder / "samples.npz")


def train(steps: int, folder: Path) -> None:
    """In a process of its own, which has what an agent has and no more."""
    quiet_malloc()
    samples = split(read_npz(folder / "samples.npz"), 0.2).train
    before = rss_mb()
    with np.load(folder / "model.npz") as model:
        data = encode_model(1, 0, model["params"], model["stats"], Codec.FP32)
    onnx = (folder / "graph.onnx").read_bytes()

    class Files:
        def graph(self, ref: GraphRef) -> bytes:
            return onnx

        def model(self, blob: Blob) -> bytes:
            return data

    task = Task.model_validate(
        {
            "task": "t1",
            "device": "bench",
            "kind": "train",
            "round": 0,
            "mask_version": 1,
            "shape": "phone",
            "graphs": [{"target": "graph.onnx", "sha256": _sha256(onnx)}],
            "model": {"sha256": _sha256(data), "size": len(data)},
            "epochs": 1000,
            "max_steps": steps,
            "learning_rate": 0.01,
        }
    )
    graphs, answers = Graphs(), folder / "answers.bin"
    answers.unlink(missing_ok=True)  # else the second run is given the first one's answer
    worker = Worker(WorkerSettings("bench"), samples, graphs, OnDisk(answers), source=Files())
    answer = worker.handle(task)
    seconds = decode_result(answer).header.train_s
    peak, anonymous = peak_rss_mb(), status_mb(os.getpid(), "RssAnon")
    graphs.release()
    trim()
    found = {
        "training": peak,
        "anonymous": anonymous,
        "before": before,
        "after": rss_mb(),
        "step_ms": 1000 * seconds / steps,
        "answer_bytes": len(answer),
    }
    sys.stdout.write(json.dumps(found))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def measure_install(folder: Path) -> dict[str, float]:
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    empty = disk_mb(venv)
    pip = [str(venv / "bin" / "pip"), "install", "-qq", f"{ROOT}[agent]"]
    subprocess.run(pip, check=True)
    return {"install": disk_mb(venv) - empty, "install_with_pip": disk_mb(venv)}


def disk_mb(folder: Path) -> float:
    done = subprocess.run(
        ["du", "-s", "--block-size=1", str(folder)], check=True, capture_output=True, text=True
    )
    return int(done.stdout.split()[0]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="What an agent costs a device.")
    parser.add_argument("--steps", type=int, default=40, help="training steps (default 40)")
    parser.add_argument("--install", action="store_true", help="also measure an installation")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--export", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        export(int(options.export[0]), Path(options.export[1]))
        return
    if options.train:
        train(int(options.train[0]), Path(options.train[1]))
        return
    found: dict[str, Any] = {"steps": options.steps, "targets_mb": TARGETS_MB}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found |= measure_idle(folder)
        found["native"] = measure_training(folder, False, options.steps)
        found["portable"] = measure_training(folder, True, options.steps)
        if options.install:
            found |= measure_install(folder)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    rows = [("RSS idle, connected", found["idle"], TARGETS_MB["idle"])]
    rows.append(("  of it not file-backed", found["idle_anonymous"], None))
    for kind in ("native", "portable"):
        rows.append(
            (f"RSS peak, training, {kind}", found[kind]["training"], TARGETS_MB["training"])
        )
        rows.append(("  of it not file-backed", found[kind]["anonymous"], None))
        rows.append((f"RSS after training, {kind}", found[kind]["after"], None))
    if options.install:
        rows.append(("disk, agent and dependencies", found["install"], None))
    print(f"{'':32}{'MB':>8}{'target':>8}")
    for what, value, target in rows:
        print(f"{what:32}{value:8.1f}{'' if target is None else f'{target:8.0f}'}")
    for kind in ("native", "portable"):
        print(f"{f'ms per step, {kind}':32}{found[kind]['step_ms']:8.1f}")


if __name__ == "__main__":
    main()
