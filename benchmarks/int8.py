"""What int8 gives: `python benchmarks/int8.py [--accuracy] [--json]`.

Every model of the zoo, dense and cut to a quarter of its MACs, as a float32 file and quantised:
bytes, peak activation bytes, and the median time of one sample on one core. The two files take
turns in one process, and the best of several medians counts, so that the ratio holds also where
the machine has other work; still, compare ratios of one run alone.

`--accuracy` instead trains networks in one place (on digits, and on Fashion-MNIST where that is
installed), deals the training samples to sixteen devices by label, and quantises by what these
count: as the fleet does, and by the plain minimum and maximum; with all devices honest, and with
one whose values are a hundred times as large.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn

from fleetprune.budgets import Budget
from fleetprune.errors import DataError
from fleetprune.schedule import Schedule
from fleetprune_agent.runtime import inference_session, training_session
from fleetprune_coordinator.artifacts import predict
from fleetprune_coordinator.graphs import export_infer, export_ranges
from fleetprune_coordinator.int8 import planned
from fleetprune_coordinator.onnx_costs import file_costs
from fleetprune_coordinator.plan import Planner
from fleetprune_coordinator.quantise import no_ranges, quantise
from fleetprune_coordinator.resize import read, resize
from fleetprune_coordinator.selfcheck import randomised
from fleetprune_coordinator.tracing import trace
from fleetprune_coordinator.value_ranges import (
    BINS,
    LOWEST,
    PER_OCTAVE,
    PER_TENSOR,
    RangeSums,
)
from fleetprune_sim import models
from fleetprune_sim.data import digits, fashion

ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (models.mlp, (64,)),
    "digits_cnn": (models.digits_cnn, (1, 8, 8)),
    "cnn1d": (models.cnn1d, (6, 192)),
    "ds_cnn": (models.ds_cnn, (3, 32, 32)),
    "resnet8": (models.resnet8, (3, 32, 32)),
    "mobilenet_v2": (models.mobilenet_v2, (3, 32, 32)),
    "efficientnet_lite0": (models.efficientnet_lite0, (3, 32, 32)),
}
REPEATS, RUNS = 7, 60
QUARTER = 0.25
DEVICES, BATCH = 16, 32
FACTOR_BINS = 27  # a hundred times as large


def latencies(files: list[bytes], shape: tuple[int, ...]) -> list[float]:
    """Best of several median milliseconds for one sample, the files in turn."""
    sessions = [inference_session(file) for file in files]
    feeds = {"x": np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)}
    best = [float("inf")] * len(files)
    for _ in range(REPEATS):
        for i, session in enumerate(sessions):
            session.run(None, feeds)
            took = []
            for _ in range(RUNS):
                start = time.perf_counter()
                session.run(None, feeds)
                took.append(1e3 * (time.perf_counter() - start))
            best[i] = min(best[i], statistics.median(took))
    return best


def compare(name: str) -> list[dict[str, Any]]:
    """A row for the dense model and one for the cut one."""
    make, shape = ZOO[name]
    torch.manual_seed(0)
    model, example = randomised(make(), torch.float32), torch.zeros(1, *shape)
    architecture = trace(model, example)
    planner = Planner(
        architecture,
        {
            "quarter": Budget(
                macs=int(QUARTER * Planner(architecture, {}, schedule=Schedule()).dense.macs)
            )
        },
        schedule=Schedule(),
        counted=planned(model, architecture),
    )
    flat = {g: np.ones(n, np.float32) for g, n in architecture.groups.items()}
    rows = []
    for share, keep in ((1.0, architecture.groups), (QUARTER, planner.shapes(1, flat)["quarter"])):
        whole = export_infer(resize(model, architecture, keep), example).onnx
        small = quantise(whole, no_ranges(whole))
        costs = [file_costs(file) for file in (whole, small)]
        if costs[1].artifact_bytes > planner.costs(keep).artifact_bytes:
            raise SystemExit(f"{name}: the file is larger than the solver counted")
        ms = latencies([whole, small], shape)
        rows.append(
            {
                "model": name,
                "macs_share": share,
                "bytes": [c.artifact_bytes for c in costs],
                "peak_activation_bytes": [c.peak_activation_bytes for c in costs],
                "ms": [round(t, 4) for t in ms],
                "speedup": round(ms[0] / ms[1], 2),
            }
        )
    return rows


def trained(
    model: nn.Module, x: NDArray[np.float32], y: NDArray[np.int64], epochs: int
) -> nn.Module:
    """A model after some epochs of SGD."""
    xs, ys = torch.tensor(x), torch.tensor(y)
    steps = epochs * -(-len(x) // 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(xs)).split(64):
            loss = nn.functional.cross_entropy(model(xs[batch]), ys[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def counts(model: nn.Module, parts: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """What each device counts."""
    graph = export_ranges(model, torch.zeros(1, *parts[0].shape[1:]), batch=BATCH)
    session = training_session(graph.onnx)
    params, stats = (np.concatenate([v.ravel() for v in t.values()]) for t in read(model))
    found = []
    for x in parts:
        feeds = {"x": x, "sw": np.ones(len(x), np.float32), "params": params, "stats": stats}
        found.append(session.run(["ranges"], feeds)[0])
    return found


def pooled(devices: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The fleet's ranges."""
    sums = RangeSums(devices[0].size)
    for one in devices:
        sums.add(one, 1.0)
    ranges = sums.result()
    assert ranges is not None
    return ranges


def extremes(devices: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The smallest and the largest value that any device has."""
    edges = np.append(0.0, 2.0 ** (LOWEST + np.arange(2, BINS + 1) / PER_OCTAVE))
    total = np.sum(devices, axis=0).reshape(-1, 2, BINS)
    tops = np.where(total > 0, np.arange(BINS), 0).max(axis=-1)
    return np.stack([-edges[tops[:, 1]], edges[tops[:, 0]]], axis=1).astype(np.float32)


def share(guess: NDArray[np.intp], y: NDArray[np.int64]) -> float:
    """Of right guesses."""
    return round(float((guess == y).mean()), 4)


def judge(name: str, model: nn.Module, corpus: Any, epochs: int) -> dict[str, Any]:
    """Accuracy of a network as it is, and quantised in four ways."""
    most = 16_000
    x, y = corpus.x[:most], corpus.y[:most]
    x_test, y_test = corpus.x_test[:5000], corpus.y_test[:5000]
    torch.manual_seed(0)
    model = trained(model, x, y, epochs)
    order = np.argsort(y, kind="stable")
    honest = counts(model, [x[part][:192] for part in np.array_split(order, DEVICES)])
    odd = np.roll(honest[0].reshape(-1, 2, BINS), FACTOR_BINS, axis=-1).reshape(-1)
    file = export_infer(model, torch.zeros(1, *x.shape[1:])).onnx
    guess = predict(file, x_test).argmax(1)
    row: dict[str, Any] = {"model": name, "float32": share(guess, y_test)}
    for who, devices in (("", honest), (", one odd", [odd, *honest[1:]])):
        for how, ranges in (("fleet", pooled), ("min/max", extremes)):
            ours = predict(quantise(file, ranges(devices)), x_test).argmax(1)
            row[how + who] = share(ours, y_test)
    row["tensors"] = honest[0].size // PER_TENSOR
    return row


def accuracies() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    rows = [judge("digits_cnn", models.digits_cnn(), digits.corpus(0, Path()), 15)]
    try:
        corpus = fashion.corpus(0, Path())
    except DataError as e:
        print(e, file=sys.stderr)
        return rows
    rows.append(judge("ds_cnn", models.ds_cnn(channels=1), corpus, 3))
    rows.append(judge("resnet8", models.resnet8(channels=1, stride=2), corpus, 3))
    rows.append(judge("mobilenet_v2", models.mobilenet_v2(channels=1, stride=2), corpus, 3))
    return rows


def vnni() -> bool:
    """Whether this processor multiplies bytes in one instruction."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and "vnni" in info.read_text()


def show(rows: list[dict[str, Any]]) -> None:
    table = Table()
    for key in rows[0]:
        table.add_column(key, justify="right")
    for row in rows:
        table.add_row(
            *(" ".join(map(str, v)) if isinstance(v, list) else str(v) for v in row.values())
        )
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--models", nargs="*", default=list(ZOO), choices=list(ZOO))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = accuracies() if options.accuracy else [r for n in options.models for r in compare(n)]
    said = f"onnxruntime {ort.__version__}, VNNI: {'yes' if vnni() else 'no'}"
    if options.json:
        print(json.dumps({"runtime": said, "rows": rows}, indent=1))
    else:
        show(rows)
        print(said)


if __name__ == "__main__":
    main()
