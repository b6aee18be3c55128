"""Predicted against measured latency: `python benchmarks/latency.py [--models ds_cnn] [--int8]`.

What a class's device would do, on this machine: it times the weightless graphs of the shapes that
the coordinator chooses, and a latency model is fitted. Beside them, in the same sweeps, run the
real files of other shapes, drawn at random; their latency is predicted and compared. Target: each
within 15 %.

Then the solver gets 80 and 50 % of the dense model's latency as a limit, and what it keeps is
timed in turn with the dense model: `used` is measured over limit. One thread, batch 1.

With `--int8` all these files are quantised.
"""

import argparse
import json
import statistics
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fleetprune.budgets import Budget, Grid
from fleetprune.costs import CostModel
from fleetprune.errors import BudgetError
from fleetprune.latency import LatencyModel, LatencyPoint, LatencyTable, Precision
from fleetprune.layout import Architecture
from fleetprune.solver import BudgetSolver
from fleetprune_agent.timing import time_graphs
from fleetprune_coordinator.graphs import export_infer
from fleetprune_coordinator.graphs.weightless import weightless
from fleetprune_coordinator.quantise import no_ranges, quantise
from fleetprune_coordinator.resize import resize
from fleetprune_coordinator.timing import shapes_to_time
from fleetprune_coordinator.tracing import trace
from fleetprune_sim import models

MODELS: dict[str, tuple[int, ...]] = {
    "resnet8": (3, 32, 32),
    "ds_cnn": (3, 32, 32),
    "cnn1d": (6, 128),
    "mobilenet_v2": (3, 32, 32),
}
SHARES = (0.8, 0.5)  # of the dense model's latency, as limits


def others(architecture: Architecture, grid: Grid, known: list[Any], count: int) -> list[Any]:
    """Shapes that are not in the table, every group at a level of its own."""
    rng = np.random.default_rng(7)
    found: list[dict[str, int]] = []
    while len(found) < count:
        keep = {g: int(rng.choice(grid.levels[g])) for g in architecture.groups}
        if keep not in known and keep not in found:
            found.append(keep)
    return found


def measure(name: str, multiple: int, tests: int, precision: Precision) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, example = getattr(models, name)(), torch.zeros(1, *MODELS[name])
    architecture = trace(model, example)
    grid = Grid.of(architecture.groups, multiple)

    def real(keep: dict[str, int]) -> bytes:
        file = export_infer(resize(model, architecture, keep), example).onnx
        return quantise(file, no_ranges(file)) if precision is Precision.INT8 else file

    shapes = shapes_to_time(architecture, grid)
    unseen = others(architecture, grid, shapes, tests)
    graphs = [weightless(real(keep)) for keep in shapes] + [real(keep) for keep in unseen]
    timed = time_graphs(graphs)
    times = [float(ms) for ms in timed.median_ms]
    table = LatencyTable(
        device_class="this",
        runtime="onnxruntime",
        version="",
        precision=precision,
        devices=1,
        points=tuple(
            LatencyPoint(keep=keep, median_ms=ms) for keep, ms in zip(shapes, times, strict=False)
        ),
    )
    fitted = LatencyModel.fit(architecture, table)
    ratios = [fitted.predict(k) / ms for k, ms in zip(unseen, times[len(shapes) :], strict=True)]
    errors = sorted(abs(r - 1) for r in ratios)
    row: dict[str, Any] = {
        "groups": len(architecture.groups),
        "shapes": len(shapes),
        "table_kb": sum(map(len, graphs[: len(shapes)])) / 1e3,
        "dense_ms": times[0],
        "block": fitted.block,
        "stated": fitted.error,
        "worst_left_out": fitted.worst,
        "tests": tests,
        "median_error": statistics.median(errors),
        "largest_error": errors[-1],
        "within_stated": sum(e <= fitted.error for e in errors) / tests,
    }
    return row | {"limits": [limited(architecture, grid, fitted, real, s) for s in SHARES]}


def limited(
    architecture: Architecture, grid: Grid, fitted: LatencyModel, real: Any, share: float
) -> float | None:
    """Measured over limit of what the solver keeps; None where it refuses."""
    dense_ms = fitted.predict(architecture.groups)
    solver = BudgetSolver(CostModel(architecture), {"c": grid}, latency={"c": fitted})
    flat = {g: np.ones(n, np.float32) for g, n in architecture.groups.items()}
    try:
        keep = solver.solve({"c": Budget(latency_ms=share * dense_ms)}, flat)["c"]
    except BudgetError:
        return None
    dense, small = time_graphs([real(dict(architecture.groups)), real(keep)]).median_ms
    return float(small / dense / share)


def main(
    names: list[str], multiple: int, tests: int, precision: Precision, *, as_json: bool
) -> None:
    rows = {name: measure(name, multiple, tests, precision) for name in names}
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    columns = ("", "groups", "shapes", "kB", "dense ms", "block", "stated", "left out", "median")
    limits = (f"used at {100 * share:.0f} %" for share in SHARES)
    table = Table(*columns, "largest", "within", *limits)
    for name, row in rows.items():
        percents = ("stated", "worst_left_out", "median_error", "largest_error", "within_stated")
        table.add_row(
            name,
            f"{row['groups']}",
            f"{row['shapes']}",
            f"{row['table_kb']:.0f}",
            f"{row['dense_ms']:.3f}",
            f"{row['block']}",
            *(f"{100 * row[key]:.1f} %" for key in percents),
            *("refused" if used is None else f"{100 * used:.0f} %" for used in row["limits"]),
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--multiple", type=int, default=8)
    parser.add_argument("--tests", type=int, default=16)
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    numbers = Precision.INT8 if chosen.int8 else Precision.FLOAT32
    main(chosen.models, chosen.multiple, chosen.tests, numbers, as_json=chosen.json)
