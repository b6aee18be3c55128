"""Channel pruning with all data in one place: `python benchmarks/centralised.py [--seeds 3]`.

Ours beside Torch-Pruning's, on Fashion-MNIST with ResNet-8: the same trained network, the same
samples, at most the same multiply-accumulates, the same steps of training afterwards. BatchNorm
statistics are recalibrated on the same samples for everybody before accuracy is taken. Ours cuts
to multiples of four channels; Torch-Pruning to any number, at the smallest ratio that keeps the
budget, by the magnitude and by the Taylor scores of its groups, per layer and globally.
"""

import argparse
import copy
import json
import logging
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy

from fleetprune.budgets import Allocation, Budget
from fleetprune.costs import costs
from fleetprune.schedule import Schedule
from fleetprune_coordinator.fleet_model import initial_model, remask
from fleetprune_coordinator.gram import GramSums, measured, reordered
from fleetprune_coordinator.graphs.export_observe import Observation
from fleetprune_coordinator.plan import Planner
from fleetprune_coordinator.reconstruction import reconstruction, refit
from fleetprune_coordinator.resize import extract, read
from fleetprune_coordinator.tracing import trace
from fleetprune_sim.data import fashion
from fleetprune_sim.evaluate import recalibrated, score
from fleetprune_sim.models import resnet8

SHAPE = (1, 28, 28)
MULTIPLE = 4
SHARES = (0.5, 0.25, 0.1)
BATCH = 32


class Data:
    """Training samples, and the test set that is looked at once per network."""

    def __init__(self, seed: int, samples: int) -> None:
        with tempfile.TemporaryDirectory() as cache:
            corpus = fashion.corpus(seed, Path(cache))
        order = np.random.default_rng(seed).permutation(len(corpus.x))[:samples]
        self.x, self.y = np.asarray(corpus.x[order]), np.asarray(corpus.y[order])
        self.x_test, self.y_test = corpus.x_test, corpus.y_test

    def accuracy(self, model: nn.Module) -> float:
        """Per cent of the test set."""
        tuned = recalibrated(model, self.x[:1000])
        return 100 * score(tuned, self.x_test, self.y_test).accuracy


Cut = Callable[[nn.Module, Data, int], nn.Module | None]
"""(dense network, data, most MACs) to a smaller network; None: it finds none."""


def train(model: nn.Module, data: Data, epochs: int, rate: float, seed: int) -> nn.Module:
    """SGD with momentum along a cosine; the same batches for every network of a seed."""
    model = copy.deepcopy(model).train()
    optimiser = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    steps = epochs * (len(data.x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(data.x))
        for i in range(len(data.x) // BATCH):
            batch = order[i * BATCH : (i + 1) * BATCH]
            optimiser.zero_grad()
            logits = model(torch.from_numpy(data.x[batch]))
            cross_entropy(logits, torch.from_numpy(data.y[batch])).backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def macs(model: nn.Module) -> int:
    """Of convolutions and linear layers, counted by the same code for everybody."""
    architecture = trace(model, torch.zeros(1, *SHAPE))
    return costs(architecture, architecture.groups).macs


def gradients(model: nn.Module, data: Data) -> None:
    model.zero_grad()
    for i in range(0, 2000, BATCH):
        logits = model(torch.from_numpy(data.x[i : i + BATCH]))
        cross_entropy(logits, torch.from_numpy(data.y[i : i + BATCH])).backward()


def theirs(importance: Callable[[], Any], *, everywhere: bool) -> Cut:
    """Torch-Pruning at the largest ratio that keeps the budget, by bisection."""

    def at(model: nn.Module, data: Data, ratio: float) -> nn.Module:
        small = copy.deepcopy(model)
        if "Taylor" in type(importance()).__name__:
            gradients(small, data)
        tp.pruner.BasePruner(
            small,
            torch.zeros(1, *SHAPE),
            importance(),
            global_pruning=everywhere,
            pruning_ratio=ratio,
            max_pruning_ratio=0.95,
            ignored_layers=[m for m in small.modules() if isinstance(m, nn.Linear)],
        ).step()
        return small

    def cut(model: nn.Module, data: Data, limit: int) -> nn.Module | None:
        low, high = 0.0, 1.0
        best = None
        for _ in range(9):
            ratio = (low + high) / 2
            small = at(model, data, ratio)
            if macs(small) <= limit:
                best, high = small, ratio
            else:
                low = ratio
        return best

    return cut


def ours(allocation: Allocation) -> Cut:
    """Order and weights by reconstruction; one class, as Torch-Pruning makes one model."""

    def cut(model: nn.Module, data: Data, limit: int) -> nn.Module:
        architecture = trace(model, torch.zeros(1, *SHAPE))
        params, stats = read(model)
        sums = GramSums(architecture, architecture.groups)
        look = Observation(copy.deepcopy(model).eval(), (), measured(architecture))
        state = [*look.params.values(), *look.stats.values()]
        with torch.no_grad():
            for i in range(0, 2000, 200):
                x = torch.from_numpy(data.x[i : i + 200])
                sums.add(look(x, torch.ones(len(x)), *state)[-1].numpy(), len(x))
        grams = sums.result()
        planner = Planner(
            architecture,
            {"one": Budget(macs=limit)},
            schedule=Schedule(),
            multiple=MULTIPLE,
            allocation=allocation,
        )
        scores = reconstruction(architecture, params, grams)
        shapes = planner.shapes(1, scores)
        fleet = initial_model(architecture, params, stats, shapes)
        fleet, order = remask(architecture, fleet, scores, shapes)
        grams = reordered(grams, architecture, order)
        fitted = refit(architecture, fleet.params, grams, shapes)
        return extract(model, architecture, fitted, fleet.stats["one"], shapes["one"])

    return cut


METHODS: dict[str, Cut] = {
    "ours, uniform": ours(Allocation.UNIFORM),
    "ours, global": ours(Allocation.GLOBAL),
    "Torch-Pruning, magnitude": theirs(
        lambda: tp.importance.GroupMagnitudeImportance(p=2), everywhere=False
    ),
    "Torch-Pruning, magnitude, global": theirs(
        lambda: tp.importance.GroupMagnitudeImportance(p=2), everywhere=True
    ),
    "Torch-Pruning, Taylor": theirs(tp.importance.GroupTaylorImportance, everywhere=False),
    "Torch-Pruning, Taylor, global": theirs(tp.importance.GroupTaylorImportance, everywhere=True),
}


def one_seed(seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    data = Data(seed, options.samples)
    dense = train(resnet8(channels=1, stride=2), data, options.epochs, 0.1, seed)
    whole = macs(dense)
    found = [{"method": "dense", "seed": seed, "share": 1.0, "after": data.accuracy(dense)}]
    for share in SHARES:
        for name, cut in METHODS.items():
            small = cut(dense, data, int(share * whole))
            if small is None:
                continue
            at_once = data.accuracy(small)
            tuned = train(small, data, options.repair, 0.05, seed)
            entry = {"method": name, "seed": seed, "share": share, "macs": macs(small) / whole}
            entry |= {"at_once": at_once, "after": data.accuracy(tuned)}
            print(json.dumps(entry), flush=True)
            found.append(entry)
    return found


def mean(entries: list[dict[str, Any]], key: str) -> str:
    values = [e[key] for e in entries]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=8, help="of the dense network")
    parser.add_argument("--repair", type=int, default=2, help="epochs after the cut")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    seeds = range(options.first, options.first + options.seeds)
    found = [entry for seed in seeds for entry in one_seed(seed, options)]
    table = Table(title=f"Fashion-MNIST, ResNet-8, {options.seeds} seeds, test accuracy, per cent")
    for column in ("", "MACs", "at once", f"after {options.repair} epochs"):
        table.add_column(column, justify="left" if not column else "right")
    dense = [e for e in found if e["method"] == "dense"]
    table.add_row("dense", "100 %", "", mean(dense, "after"))
    for share in SHARES:
        table.add_section()
        for name in METHODS:
            own = [e for e in found if e["method"] == name and e["share"] == share]
            if not own:
                table.add_row(name, "none found", "", "")
                continue
            reached = statistics.mean(e["macs"] for e in own)
            table.add_row(name, f"{100 * reached:.1f} %", mean(own, "at_once"), mean(own, "after"))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
