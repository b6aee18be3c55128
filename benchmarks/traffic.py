"""Bytes on the wire beside dense federated averaging: `python benchmarks/traffic.py [--rounds N]`.

The demo twice, with real processes over a real broker: once as it is, once as dense FedAvg, where
every device trains the whole model and sends and gets float32. Bytes are those of the MQTT packets
of training rounds, both ways, with block requests, acknowledgements and telemetry; the graphs,
which a device fetches once, fall into the first round and are shown apart.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fleetprune_sim.demo import DemoOptions, run_demo
from fleetprune_sim.demo_config import CLASSES, DEVICES, TASKS, DemoFolder
from fleetprune_sim.demo_processes import Interrupted

DENSE_CLASSES = tuple(replace(c, macs_share=1.0, trains=True) for c in CLASSES)
DENSE_TRAINING = {
    "codec": "fp32",
    "down_codec": "fp32",
    "distill_weight": 0.0,
    "remask_every": 0,
    "calibration_passes": 0,
}


def rounds_of(options: DemoOptions) -> list[dict[str, Any]]:
    """The demo's `round` events."""
    interrupted = Interrupted()
    with tempfile.TemporaryDirectory() as name, interrupted.listening():
        folder = DemoFolder(Path(name))
        run_demo(folder, options, lambda state, event: None, interrupted)
        events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    return [e for e in events if e["event"] == "round"]


def row(rounds: list[dict[str, Any]]) -> dict[str, float]:
    later = rounds[1:]
    count = len(later) * len(DEVICES)
    up = sum(e["bytes_up"] for e in later) / count
    down = sum(e["bytes_down"] for e in later) / count
    first = rounds[0]["bytes_up"] + rounds[0]["bytes_down"]
    return {
        "up_bytes_per_client_round": round(up, 1),
        "down_bytes_per_client_round": round(down, 1),
        "once_per_device": round(first / len(DEVICES) - up - down, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=sorted(TASKS), default="digits")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    ours = DemoOptions(options.task, options.rounds, 0)
    dense = replace(ours, classes=DENSE_CLASSES, training=DENSE_TRAINING)
    figures = {"ours": row(rounds_of(ours)), "dense FedAvg": row(rounds_of(dense))}
    if options.json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    table = Table("", "up, B per client-round", "down, B per client-round", "once, B per device")
    for name, figure in figures.items():
        table.add_row(name, *(f"{value:,.0f}" for value in figure.values()))
    one, other = figures.values()
    ratios = (f"{other[k] / one[k]:.1f} x" for k in list(one)[:2])
    table.add_section()
    table.add_row("dense / ours", *ratios, "")
    Console().print(table)


if __name__ == "__main__":
    main()
