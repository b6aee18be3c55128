"""What one more round costs as a delta: `python benchmarks/delta.py [--task har] [--seeds 3]`.

A fleet is trained in one process, and every class's file is made after rounds late, in the middle
and early in training, and before and after its last change of masks; with BatchNorm statistics of
the same training samples, as a release's calibration measures them. Per class and precision: the
file's bytes, the delta as a share of them, what rounding changes (accuracy on the test set, and
the largest change of an output as a share of their spread), and what making and applying a delta
takes.

`--granularity weight` and `hybrid` prune single weights, in files without zeros. Of several seeds:
the mean, and the worst of what rounding changes.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fleetprune.delta import apply
from fleetprune.patterns import Pattern
from fleetprune_agent.runtime import training_session
from fleetprune_coordinator.artifacts import predict, small_model
from fleetprune_coordinator.delta_maker import make
from fleetprune_coordinator.fleet_model import FleetModel
from fleetprune_coordinator.graphs import export_infer, export_ranges
from fleetprune_coordinator.grid_values import on_grid
from fleetprune_coordinator.quantise import quantise
from fleetprune_coordinator.resize import read
from fleetprune_coordinator.sparse_file import pack
from fleetprune_coordinator.value_ranges import RangeSums
from fleetprune_sim.assemble import assemble
from fleetprune_sim.evaluate import recalibrated
from fleetprune_sim.run import Simulation
from fleetprune_sim.study import quiet

SHARES = {"weight": (1.0, 0.5, 0.25, 0.12), "hybrid": (0.5, 0.25, 0.12, 0.07)}
"""Of the dense file's bytes, per class."""
CALIBRATION, REPEATS, BATCH = 1000, 5, 32


class Trained:
    """A fleet's models after every round."""

    def __init__(self, task: str, granularity: str, seed: int) -> None:
        changes: dict[str, Any] = {"simulation.evaluate_every": 0}
        if granularity in SHARES:
            changes["pruning.granularity"] = granularity
            classes = assemble(None, task, "nested", seed, {}).config.classes
            for name, share in zip(classes, SHARES[granularity], strict=True):
                changes[f"classes.{name}.flash_share"] = share
                if granularity == "weight":
                    changes[f"classes.{name}.macs_share"] = 1.0
        wanted = assemble(None, task, "nested", seed, changes)
        self.rounds: dict[int, FleetModel] = {}

        def on_round(metrics: dict[str, Any]) -> None:
            if metrics["phase"] == "train":
                self.rounds[metrics["round"]] = simulation.coordinator.rounds.model

        with (
            tempfile.TemporaryDirectory() as folder,
            Simulation(wanted, Path(folder) / "run", on_round) as simulation,
        ):
            simulation.train()
            coordinator, fleet = simulation.coordinator, simulation.fleet
            self.network, self.architecture = coordinator.network, coordinator.architecture
            rule = coordinator.planner.weights.rule
            self.pattern: Pattern | None = rule.pattern if rule.granularity.weights else None
            self.classes = list(wanted.config.classes)
            rng = np.random.default_rng(0)
            chosen = rng.choice(len(fleet.x), min(CALIBRATION, len(fleet.x)), replace=False)
            self.x: NDArray[np.float32] = fleet.x[np.sort(chosen)]
            self.x_test, self.y_test = fleet.x_test, fleet.y_test

    def moments(self) -> dict[str, tuple[int, int]]:
        """Pairs of rounds by what they are about."""
        last = max(self.rounds)
        masks = {n: model.mask_version for n, model in self.rounds.items()}
        remasks = [n for n in self.rounds if n > 1 and masks[n] != masks[n - 1]]
        found = {"late": (last - 1, last)}
        for name, share in (("three quarters", 0.75), ("half", 0.5), ("a third", 0.34)):
            at = next(n for n in range(round(share * last) + 1, last) if n + 1 not in remasks)
            found[name] = (at, at + 1)
        if remasks:
            found["new mask"] = (remasks[-1] - 1, remasks[-1])
        return found

    def exact(self, number: int, name: str) -> tuple[bytes, NDArray[np.float32]]:
        """A class's float32 file after a round, and the ranges of its values."""
        small = small_model(self.network, self.architecture, self.rounds[number], name)
        small = recalibrated(small, self.x)
        example = torch.zeros(1, *self.architecture.input_shape)
        params, stats = (
            np.concatenate([np.zeros(0, np.float32), *(v.ravel() for v in tensors.values())])
            for tensors in read(small)
        )
        feeds = {"x": self.x, "sw": np.ones(len(self.x), np.float32)}
        feeds |= {"params": params, "stats": stats}
        session = training_session(export_ranges(small, example, batch=BATCH).onnx)
        counts = session.run(["ranges"], feeds)[0]
        sums = RangeSums(counts.size)
        sums.add(counts, 1.0)
        ranges = sums.result()
        assert ranges is not None
        return export_infer(small, example).onnx, ranges

    def share_right(self, file: bytes) -> float:
        """Accuracy on the test set."""
        return float((predict(file, self.x_test).argmax(axis=1) == self.y_test).mean())


def one_class(trained: Trained, name: str) -> list[dict[str, Any]]:
    """A row per precision."""
    moments = trained.moments()
    exact = {n: trained.exact(n, name) for pair in moments.values() for n in pair}
    last = max(exact)
    packed = (lambda f: f) if trained.pattern is None else (lambda f: pack(f, trained.pattern))
    rows = []
    for precision in ("float32", "int8"):
        files = {
            n: packed(quantise(*both) if precision == "int8" else on_grid(both[0]))
            for n, both in exact.items()
        }
        row: dict[str, Any] = {"class": name, "precision": precision, "bytes": len(files[last])}
        for what, (before, after) in moments.items():
            delta = make(files[before], files[after])
            row[what] = len(delta) / len(files[after])
        row |= costs(files[last - 1], files[last])
        if precision == "float32":
            plain = predict(exact[last][0], trained.x_test)
            moved = np.abs(predict(files[last], trained.x_test) - plain).max() / np.ptp(plain)
            row["accuracy"] = trained.share_right(exact[last][0])
            row["by rounding"] = trained.share_right(files[last]) - row["accuracy"]
            row["moved"] = float(moved)
        rows.append(row)
    return rows


def costs(base: bytes, target: bytes) -> dict[str, float]:
    """Milliseconds to make and to apply a delta, and the most bytes that applying it held."""
    took: dict[str, list[float]] = {"make ms": [], "apply ms": []}
    for _ in range(REPEATS):
        start = time.perf_counter()
        delta = make(base, target)
        took["make ms"].append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
        apply(base, delta, len(target))
        took["apply ms"].append(1e3 * (time.perf_counter() - start))
    tracemalloc.start()
    apply(base, delta, len(target))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {name: min(times) for name, times in took.items()} | {"apply bytes": peak}


def merged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several seeds."""
    found: dict[str, Any] = {}
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        if isinstance(first, str):
            found[key] = first
        else:
            worst = {"by rounding": min, "moved": max}.get(key, statistics.mean)
            found[key] = worst(values)
    return found


def cell(key: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if key in ("bytes", "apply bytes"):
        return f"{value:,.0f}"
    if key.endswith("ms"):
        return f"{value:.1f}"
    return f"{100 * value:.2f}" if key in ("moved", "by rounding") else f"{100 * value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--task", default="digits")
    parser.add_argument("--granularity", choices=["channel", *SHARES], default="channel")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    quiet()
    by_key: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in range(options.seeds):
        trained = Trained(options.task, options.granularity, seed)
        print(f"seed {seed}: rounds {trained.moments()}", file=sys.stderr)
        for row in (row for name in trained.classes for row in one_class(trained, name)):
            by_key.setdefault((row["class"], row["precision"]), []).append(row)
    rows = [merged(rows) for rows in by_key.values()]
    if options.json:
        print(json.dumps({"task": options.task, "granularity": options.granularity, "rows": rows}))
        return
    table = Table(title=f"{options.task}, {options.granularity}; shares in %")
    keys = list(rows[0])
    for key in keys:
        table.add_column(key, justify="right")
    for row in rows:
        table.add_row(*(cell(key, row.get(key)) for key in keys))
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
