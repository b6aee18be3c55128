"""Training one step: onnxruntime on an exported graph against torch, on one thread.

    python benchmarks/train_step.py [--models resnet8 mlp] [--steps 20] [--json]

Per model: the gradient's relative error against float64 (of the fast graph and of torch float32);
the median time of a step, measured in turn within one run; the peak memory of a fresh process
that only trains; and the size of the graph. "torch best" is torch with channels_last tensors.

Where both errors are near 1e-3, the cause is not the graph: an activation that rounds across a
ReLU's kink moves the gradient, in torch's float32 as much as here. With Softplus in ReLU's place
both are near 5e-7.
"""

# ruff: noqa: PLC0415  (a child that trains without torch must not import it)

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH = 32
MODELS: dict[str, tuple[tuple[int, ...], int]] = {
    "mlp": ((64,), 10),
    "cnn1d": ((6, 128), 5),
    "ds_cnn": ((3, 32, 32), 10),
    "resnet8": ((3, 32, 32), 10),
    "mobilenet_v2": ((3, 32, 32), 10),
}
COLUMNS = {
    "gradient_error": "grad err",
    "torch_gradient_error": "torch err",
    "portable_ms": "portable",
    "block_ms": "block",
    "torch_ms": "torch",
    "torch_best_ms": "torch best",
    "block_ratio": "block/torch",
    "portable_ratio": "port./torch",
    "rss_mb": "RSS",
    "torch_rss_mb": "torch RSS",
    "train_kb": "train kB",
    "infer_kb": "infer kB",
}


def make_model(name: str) -> Any:
    import torch

    from fleetprune_sim import models

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return getattr(models, name)()


def torch_batch(name: str) -> Any:
    import torch

    shape, classes = MODELS[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, *shape, generator=generator)
    return x, torch.randint(0, classes, (BATCH,), generator=generator)


def torch_stepper(model: Any, x: Any, y: Any, *, best: bool) -> Callable[[], None]:
    import torch

    twin = copy.deepcopy(model).train()
    if best and x.dim() == 4:
        twin, x = (t.to(memory_format=torch.channels_last) for t in (twin, x))
    optimiser = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)

    def step() -> None:
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(twin(x), y).backward()
        optimiser.step()

    return step


def graph_stepper(onnx: bytes, feeds: dict[str, Any]) -> Callable[[], None]:
    from fleetprune_agent.runtime import training_session

    session = training_session(onnx)
    outputs = [o.name for o in session.get_outputs() if o.name != "grad"]
    state = {n.removesuffix("_out") for n in outputs if n.endswith("_out")}
    feeds = dict(feeds)

    def step() -> None:
        values = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        feeds.update({n: values[f"{n}_out"] for n in state})

    return step


def flat(tensors: Any) -> Any:
    import torch

    parts = [t.detach().double().reshape(-1) for t in tensors]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def graph_feeds(model: Any, x: Any, y: Any) -> dict[str, Any]:
    import numpy as np

    params = flat(model.parameters()).float().numpy()
    stats = flat(b for n, b in model.named_buffers() if "running" in n).float().numpy()
    feeds = {
        "x": x.numpy(),
        "y": y.numpy(),
        "sw": np.ones(BATCH, np.float32),
        "lr": np.array(0.05, np.float32),
        "params": params,
        "momentum": np.zeros_like(params),
    }
    return feeds | ({"stats": stats} if len(stats) else {})


def gradient_errors(model: Any, x: Any, y: Any, onnx: bytes, feeds: Any) -> tuple[float, float]:
    """Of the graph and of torch float32, both against float64."""
    import torch

    from fleetprune_agent.runtime import training_session

    def gradient(dtype: Any) -> Any:
        twin = copy.deepcopy(model).to(dtype).train()
        torch.nn.functional.cross_entropy(twin(x.to(dtype)), y).backward()
        return flat(p.grad for p in twin.parameters())

    exact, rounded = gradient(torch.float64), gradient(torch.float32)
    mine = torch.from_numpy(training_session(onnx).run(["grad"], feeds)[0]).double()
    return tuple(float((g - exact).norm() / exact.norm()) for g in (mine, rounded))


def peak_rss_mb(kind: str, name: str, folder: Path) -> float:
    """Peak memory of a fresh process that trains ten steps."""
    command = [sys.executable, __file__, "--child", kind, name, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def child(kind: str, name: str, folder: Path) -> None:
    if kind == "torch":
        step = torch_stepper(make_model(name), *torch_batch(name), best=False)
    else:
        import numpy as np

        feeds = dict(np.load(folder / "feeds.npz"))
        step = graph_stepper((folder / "graph.onnx").read_bytes(), feeds)
    for _ in range(10):
        step()
    print(peak_memory_kb() / 1024)


def peak_memory_kb() -> int:
    # Not getrusage: its maximum counts the parent's memory before exec.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise OSError("no VmHWM in /proc/self/status")


def measure(name: str, steps: int) -> dict[str, Any]:
    import numpy as np

    from fleetprune_agent.runtime import probe_block
    from fleetprune_coordinator.graphs import export_infer, export_train_step

    model, (x, y) = make_model(name), torch_batch(name)
    graphs = {
        block: export_train_step(model, x, batch=BATCH, block=block) for block in (0, probe_block())
    }
    checked = export_train_step(model, x, batch=BATCH, block=probe_block(), gradient=True)
    feeds = graph_feeds(model, x, y)
    error, torch_error = gradient_errors(model, x, y, checked.onnx, feeds)
    steppers = {
        "portable_ms": graph_stepper(graphs[0].onnx, feeds),
        "block_ms": graph_stepper(graphs[probe_block()].onnx, feeds),
        "torch_ms": torch_stepper(model, x, y, best=False),
        "torch_best_ms": torch_stepper(model, x, y, best=True),
    }
    times = interleaved_ms(steppers, steps if x.dim() > 2 else 20 * steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        np.savez(path / "feeds.npz", **feeds)
        (path / "graph.onnx").write_bytes(graphs[probe_block()].onnx)
        rss = {kind: peak_rss_mb(kind, name, path) for kind in ("onnx", "torch")}
    return {
        "model": name,
        "block": graphs[probe_block()].meta.block,
        "gradient_error": error,
        "torch_gradient_error": torch_error,
        **times,
        "block_ratio": times["block_ms"] / times["torch_ms"],
        "portable_ratio": times["portable_ms"] / times["torch_ms"],
        "rss_mb": rss["onnx"],
        "torch_rss_mb": rss["torch"],
        "train_kb": len(graphs[probe_block()].onnx) / 1000,
        "infer_kb": len(export_infer(model, x).onnx) / 1000,
    }


def interleaved_ms(steppers: dict[str, Callable[[], None]], steps: int) -> dict[str, float]:
    """Median time of each, taken in turn so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for number in range(steps + 3):
        for name, step in steppers.items():
            start = time.perf_counter()
            step()
            if number >= 3:  # the first ones allocate
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def formatted(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if key.endswith("error"):
        return f"{value:.1e}"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, name, folder = options.child
        child(kind, name, Path(folder))
        return
    rows = [measure(name, options.steps) for name in options.models]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    titles = {"model": "model", **COLUMNS}
    print("  ".join(f"{t:>12}" for t in titles.values()))
    for row in rows:
        print("  ".join(f"{formatted(key, row[key]):>12}" for key in titles))
    print(
        f"\nbatch {BATCH}, one thread, block {max(r['block'] for r in rows)}; ms per step, MB RSS"
    )


if __name__ == "__main__":
    main()
