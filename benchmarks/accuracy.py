"""Every class against the dense model: `python benchmarks/accuracy.py [--task har] [--seeds 3]`.

The demo's fleet, in one process: the same data, budgets, rounds, strategy, agent core and release
code. The dense model is trained twice by the same devices for the same rounds, in disregard of
all budgets: once by those that train, once by all six.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fleetprune_coordinator.config import FleetConfig
from fleetprune_sim.data.fleet_data import FleetData
from fleetprune_sim.demo_config import CLASSES, DEVICES, TASKS, DemoTask
from fleetprune_sim.loop import LoopDevice, open_coordinator, train

DENSE = {"dense": {"macs_share": 1.0, "trains": True}}


def config(
    task: DemoTask, data: FleetData, folder: Path, classes: Mapping[str, Any], training: Any
) -> FleetConfig:
    np.savez(folder / "test.npz", x=data.x_test, y=data.y_test)
    return FleetConfig.model_validate(
        {
            "fleet": task.name,
            "state": folder / "state",
            "model": {
                "factory": task.factory,
                "input_shape": data.input_shape,
                "labels": data.labels,
            },
            "data": {"test": folder / "test.npz"},
            "training": training,
            "classes": classes,
        }
    )


def run(
    task: DemoTask, data: FleetData, classes: Mapping[str, Any], devices: Any, training: Any
) -> tuple[dict[str, float], float]:
    """Accuracy per class on the test set, and seconds."""
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        setup = config(task, data, Path(name), classes, training)
        with open_coordinator(setup, devices) as coordinator:
            train(coordinator, devices)
            released = coordinator.release()
            accuracies = {n: float(r.manifest.accuracy or 0.0) for n, r in released.items()}
        return accuracies, time.perf_counter() - start


def fleet(data: FleetData) -> dict[str, LoopDevice]:
    """The demo's devices with what an agent trains on: all but its held-out share."""
    trains = {d: c.trains for c in CLASSES for d in c.devices}
    return {
        name: LoopDevice(DEVICES[name], trains[name], own.x_train, own.y_train)
        for name, own in data.devices.items()
    }


def one_seed(task: DemoTask, seed: int, extra: Mapping[str, Any], cache: Path) -> dict[str, Any]:
    data = task.load(seed, cache)
    devices = fleet(data)
    training = {**task.training, "seed": seed, **extra}
    classes = {c.name: {"macs_share": c.macs_share, "trains": c.trains} for c in CLASSES}
    ours, seconds = run(task, data, classes, devices, training)
    alone = {**training, "distill_weight": 0.0, "remask_every": 0}
    everyone = {n: LoopDevice("dense", True, d.x, d.y) for n, d in devices.items()}
    trainers = {n: everyone[n] for n, d in devices.items() if d.trains}
    least = {"min_devices": len(trainers)}
    by_trainers, _ = run(task, data, DENSE, trainers, {**alone, **least})
    by_all, _ = run(task, data, DENSE, everyone, alone)
    return {
        "seed": seed,
        "classes": ours,
        "dense_by_trainers": by_trainers["dense"],
        "dense_by_all": by_all["dense"],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=sorted(TASKS), default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--set", default="{}", help="JSON: other values of [training]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    console = Console(stderr=True)
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for seed in range(options.first, options.first + options.seeds):
            task = TASKS[options.task]
            rows.append(one_seed(task, seed, json.loads(options.set), Path(cache)))
            console.print(rows[-1])
    if options.json:
        sys.stdout.write(json.dumps(rows) + "\n")
        return
    columns = [c.name for c in CLASSES]
    table = Table("seed", *columns, "dense, devices that train", "dense, all devices")
    for row in rows:
        table.add_row(
            str(row["seed"]),
            *(f"{100 * row['classes'][c]:.1f}" for c in columns),
            f"{100 * row['dense_by_trainers']:.1f}",
            f"{100 * row['dense_by_all']:.1f}",
        )
    figures = np.array(
        [
            [*(r["classes"][c] for c in columns), r["dense_by_trainers"], r["dense_by_all"]]
            for r in rows
        ]
    )
    table.add_section()
    spread = figures.std(axis=0)
    cells = zip(figures.mean(axis=0), spread, strict=True)
    table.add_row("mean ± sd", *(f"{100 * m:.1f} ± {100 * s:.1f}" for m, s in cells))
    Console().print(table)


if __name__ == "__main__":
    main()
