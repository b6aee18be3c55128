"""Keep counts for a large model: `python benchmarks/solver.py [--profile]`.

A made-up network of 10,000 units in 300 groups, with shortcuts, for four classes: budgets of all
kinds at once, nested in one another or not. Seconds that the solver takes, of preparing the cost
model, and how many calls of either would have been asked one group at a time. Target: 2 s.
"""

import argparse
import cProfile
import pstats
import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fleetprune.budgets import Allocation, Budget, Grid
from fleetprune.costs import CostModel, Costs
from fleetprune.latency import LatencyModel, LatencyPoint, LatencyTable, Precision
from fleetprune.layout import Activation, Architecture, Axis, Role, Segment, TensorSpec
from fleetprune.solver import BudgetSolver

UNITS, GROUPS, SEED = 10_000, 300, 0


def network(units: int = UNITS, groups: int = GROUPS) -> Architecture:
    """A chain of convolutions: every third group is also read three layers later."""
    rng = np.random.default_rng(SEED)
    rest = units // 8 - 2 * groups
    widths = 8 * (2 + rng.multinomial(rest, np.full(groups, 1 / groups)))
    names = [f"layer{i}" for i in range(groups)]
    sizes = dict(zip(names, map(int, widths), strict=True))

    def axis(name: str) -> Axis:
        return (Segment(group=name, units=sizes[name]),)

    tensors, activations = [], []
    before: Axis = (Segment(units=3),)
    for i, name in enumerate(names):
        positions = max(1, 4096 >> (10 * i // groups))
        kernel = (Segment(units=1 + 2 * (i % 2)),)
        tensors.append(_weight(f"{name}.weight", (axis(name), before, kernel, kernel), positions))
        if i % 3 == 0 and i >= 3:
            skip = (axis(name), axis(names[i - 3]), *((Segment(units=1),),) * 2)
            tensors.append(_weight(f"{name}.shortcut.weight", skip, positions))
        activations.append(Activation(per_unit={name: 4 * positions}))
        before = axis(name)
    tensors.append(_weight("fc.weight", ((Segment(units=10),), before), 1))
    live = tuple(tuple(range(max(0, i - 3), i + 1)) for i in range(groups))
    return Architecture(
        groups=sizes, tensors=tuple(tensors), activations=tuple(activations), live=live
    )


def _weight(name: str, axes: tuple[Axis, ...], positions: int) -> TensorSpec:
    return TensorSpec(name=name, role=Role.PARAMETER, axes=axes, positions=positions)


def budgets(dense: Costs, *, nested: bool) -> dict[str, Budget]:
    """Four classes with three limits each."""
    shares = (
        ((0.7, 0.7, 0.7), (0.4, 0.4, 0.6), (0.2, 0.2, 0.5), (0.1, 0.1, 0.4))
        if nested
        else ((0.1, 0.9, 0.9), (0.9, 0.1, 0.9), (0.9, 0.9, 0.4), (0.15, 0.15, 0.9))
    )
    return {
        f"class{i}": Budget(
            macs=int(macs * dense.macs),
            flash_bytes=int(flash * dense.artifact_bytes),
            ram_bytes=int(ram * dense.peak_activation_bytes),
            latency_ms=1.2 * macs,
        )
        for i, (macs, flash, ram) in enumerate(shares)
    }


def latencies(net: Architecture, costs: CostModel) -> LatencyModel:
    """From a made-up table: a nanosecond per thousand MACs of the dense model's millisecond."""
    dense = costs.costs(net.groups).macs
    shapes = [
        {g: max(1, int(share * n)) for g, n in net.groups.items()}
        for share in np.linspace(0.1, 1, 12)
    ]
    points = tuple(
        LatencyPoint(keep=keep, median_ms=0.05 + costs.costs(keep).macs / dense) for keep in shapes
    )
    table = LatencyTable(
        device_class="x",
        runtime="r",
        version="1",
        precision=Precision.FLOAT32,
        devices=1,
        points=points,
    )
    return LatencyModel.fit(net, table)


def scores(groups: Mapping[str, int]) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(SEED)
    return {g: np.sort(rng.random(n, np.float32))[::-1] for g, n in groups.items()}


def main(*, profile: bool) -> None:
    net = network()
    started = time.perf_counter()
    costs = CostModel(net)
    prepared = time.perf_counter() - started
    started = time.perf_counter()
    latency = latencies(net, costs)
    fitted = time.perf_counter() - started
    dense, values = costs.costs(net.groups), scores(net.groups)
    table = Table("allocation", "multiple", "classes", "latency", "units kept", "seconds")
    profiler = cProfile.Profile()
    for allocation in Allocation:
        for multiple in (8, 1):
            for nested in (True, False):
                for limited in (False, True):
                    wanted = budgets(dense, nested=nested)
                    grid = Grid.of(net.groups, multiple)
                    solver = BudgetSolver(
                        costs,
                        dict.fromkeys(wanted, grid),
                        allocation=allocation,
                        latency=dict.fromkeys(wanted, latency) if limited else {},
                    )
                    if profile:
                        profiler.enable()
                    started = time.perf_counter()
                    solved = solver.solve(wanted, values)
                    seconds = time.perf_counter() - started
                    profiler.disable()
                    table.add_row(
                        allocation,
                        str(multiple),
                        "nested" if nested else "each its own limit",
                        "limited" if limited else "",
                        ", ".join(str(sum(keep.values())) for keep in solved.values()),
                        f"{seconds:.2f}",
                    )
    console = Console()
    console.print(
        f"{sum(net.groups.values())} units in {len(net.groups)} groups; cost model "
        f"{prepared:.2f} s, latency model {fitted:.2f} s"
    )
    console.print(table)
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true")
    main(profile=parser.parse_args().profile)
