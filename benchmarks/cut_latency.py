"""How much faster a cut model is: `python benchmarks/cut_latency.py [--json]`.

Networks dense and cut to a quarter of their MACs, in multiples of 8 and of 16 channels, as float32
and as int8 files: median time of one sample on one core. All files of a network take turns in one
process, and the best of several medians counts, so that ratios hold also where the machine has
other work; still, compare ratios of one run alone. Inputs are as small as the tasks of the
simulator have them, and as large as cameras give them: of small layers a runtime's own time is a
larger part.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fleetprune.budgets import Budget
from fleetprune.errors import BudgetError
from fleetprune.schedule import Schedule
from fleetprune_agent.runtime import inference_session
from fleetprune_coordinator.graphs import export_infer
from fleetprune_coordinator.plan import Planner
from fleetprune_coordinator.quantise import no_ranges, quantise
from fleetprune_coordinator.resize import resize
from fleetprune_coordinator.selfcheck import randomised
from fleetprune_coordinator.tracing import trace
from fleetprune_sim import models

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (models.mlp, (64,)),
    "MLP, 1024 hidden": (partial(models.mlp, 784, 1024), (784,)),
    "1-D CNN": (models.cnn1d, (6, 192)),
    "DS-CNN, 32": (models.ds_cnn, (3, 32, 32)),
    "DS-CNN, 128": (models.ds_cnn, (3, 128, 128)),
    "ResNet-8, 32": (models.resnet8, (3, 32, 32)),
    "ResNet-8, 128": (models.resnet8, (3, 128, 128)),
    "MobileNetV2 (0.35), 32": (models.mobilenet_v2, (3, 32, 32)),
    "MobileNetV2 (1.0), 128": (partial(models.mobilenet_v2, width=1.0), (3, 128, 128)),
    "EfficientNet-Lite0, 32": (models.efficientnet_lite0, (3, 32, 32)),
    "EfficientNet-Lite0, 128": (models.efficientnet_lite0, (3, 128, 128)),
    "transformer": (models.transformer, (6, 128)),
}
QUARTER = 0.25
ENOUGH = 3.0
"""Times as fast that a quarter of the MACs should be."""
REPEATS, LEAST_S = 7, 0.05


def medians(files: list[bytes], shape: tuple[int, ...]) -> list[float]:
    """Best of several median milliseconds for one sample, the files in turn."""
    sessions = [inference_session(file) for file in files]
    feeds = {"x": np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)}
    best = [float("inf")] * len(files)
    for _ in range(REPEATS):
        for i, session in enumerate(sessions):
            session.run(None, feeds)
            took: list[float] = []
            while sum(took) < LEAST_S or len(took) < 5:
                start = time.perf_counter()
                session.run(None, feeds)
                took.append(time.perf_counter() - start)
            best[i] = min(best[i], 1e3 * statistics.median(took))
    return best


def compare(name: str) -> dict[str, Any]:
    """A row of the table."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, example = randomised(make(), torch.float32), torch.zeros(1, *shape)
    architecture = trace(model, example)
    dense = Planner(architecture, {}, schedule=Schedule()).dense
    flat = {g: np.ones(n, np.float32) for g, n in architecture.groups.items()}
    files = [export_infer(model, example).onnx]
    shares = []
    for multiple in (8, 16):
        budgets = {"quarter": Budget(macs=int(QUARTER * dense.macs))}
        try:
            planner = Planner(architecture, budgets, schedule=Schedule(), multiple=multiple)
        except BudgetError:  # too coarse for a network of narrow layers
            continue
        keep = planner.shapes(1, flat)["quarter"]
        shares.append(planner.costs(keep).macs / dense.macs)
        files.append(export_infer(resize(model, architecture, keep), example).onnx)
    cuts = len(files) - 1
    files += [quantise(file, no_ranges(file)) for file in files[:2]]
    ms = medians(files, shape)
    return {
        "network": name,
        "macs": dense.macs,
        "ms": round(ms[0], 4),
        "macs_shares": [round(share, 3) for share in shares],
        "faster": [round(ms[0] / t, 2) for t in ms[1 : 1 + cuts]],
        "int8_faster": [round(ms[0] / t, 2) for t in ms[1 + cuts :]],
    }


def main() -> None:
    """Measure all networks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--network", action="append", choices=NETWORKS, help="only this one")
    asked = parser.parse_args()
    rows = [compare(name) for name in asked.network or NETWORKS]
    if asked.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table()
    for heading in ("network", "million MACs", "dense ms"):
        table.add_column(heading)
    for heading in ("MACs left, of 8", "times as fast", "of 16", "times as fast"):
        table.add_column(heading, justify="right")
    for heading in ("dense int8", "quarter int8, of 8"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["network"],
            f"{row['macs'] / 1e6:.2f}",
            f"{row['ms']:.3f}",
            *_cells(row),
            *(_bold(faster) for faster in row["int8_faster"]),
        )
    Console().print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    """Two per multiple."""
    pairs = zip(row["macs_shares"], row["faster"], strict=True)
    cells = [cell for s, f in pairs for cell in (f"{100 * s:.0f} %", _bold(f))]
    return [*cells, *["too coarse", ""] * (2 - len(row["faster"]))]


def _bold(faster: float) -> str:
    return f"[bold]{faster:.2f}[/]" if faster >= ENOUGH else f"{faster:.2f}"


if __name__ == "__main__":
    main()
