"""What a class's devices are asked to time, and how their answers become a table.

Pure functions; a round asks, and `latency_tables` keeps what comes of it.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fleetprune.budgets import Grid
from fleetprune.costs import CostModel
from fleetprune.errors import MessageError
from fleetprune.graphmeta import hashed
from fleetprune.latency import LatencyPoint, LatencyTable, Precision
from fleetprune.layout import Architecture
from fleetprune.messages import Blob, GraphRef, Task, TaskKind
from fleetprune.result import Result
from fleetprune_coordinator.records import DeviceRecord

MOST_SHAPES = 24
"""Graphs that one device times: a few kB each, and seconds to minutes of its time."""
SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.0)
"""Of every group, in the uniform shapes; 0: its lowest level."""
MIXED = 8
"""Shapes in which every group has a level of its own: what single changes cannot show, and what
the stated error is honest by."""
DEVICES = 3
"""That time for a class: the median of three is one that measured."""
LONGEST_MS = 600_000.0
"""Of one inference; more is no measurement."""
NO_MODEL = Blob.of(b"")
"""A timing task's graphs have no use for one."""


@dataclass(frozen=True)
class Answer:
    """One device's times, checked."""

    runtime: str
    version: str
    median_ms: tuple[float, ...]
    """Per shape asked for."""
    spread_ms: tuple[float, ...]


def digest(architecture: Architecture) -> str:
    """Names the model that a table was measured with: 64 hex digits."""
    same = architecture.model_copy(update={"overhead_bytes": 0})
    return hashlib.sha256(same.model_dump_json().encode()).hexdigest()


def shapes_to_time(architecture: Architecture, grid: Grid) -> list[dict[str, int]]:
    """Keep counts whose graphs tell most about all others, the dense model first.

    Uniform shares; then the dense model with one group at its lowest level, beginning with the
    groups that this takes most multiply-accumulates from; then mixed ones, drawn by a hash.

    Args:
        architecture: The model.
        grid: Counts that the class may have.

    Returns:
        At most `MOST_SHAPES`, all different, the same every time.
    """
    groups, levels = architecture.groups, grid.levels
    shapes = [
        {
            g: max((n for n in levels[g] if n <= share * units), default=levels[g][0])
            for g, units in groups.items()
        }
        for share in SHARES
    ]
    model = CostModel(architecture)
    single = [{**groups, g: levels[g][0]} for g in groups]
    single.sort(key=lambda keep: model.costs(keep).macs)
    shapes += single[: MOST_SHAPES - MIXED - len(SHARES)]
    # Of a model with few shapes, many draws are of shapes that are there already.
    draws = hashed(8 * MOST_SHAPES * len(groups), seed=1).reshape(-1, len(groups))
    shapes += [
        {g: levels[g][int(d) % len(levels[g])] for g, d in zip(groups, row, strict=True)}
        for row in draws
    ]
    different: list[dict[str, int]] = []
    for keep in shapes:
        if keep not in different:
            different.append(keep)
    return different[:MOST_SHAPES]


def timers(devices: Iterable[DeviceRecord], classes: Collection[str]) -> list[DeviceRecord]:
    """Who times: the first `DEVICES` of each class that are online, by node id.

    Args:
        devices: Of the fleet.
        classes: Those whose latency is wanted.
    """
    taken: Counter[str] = Counter()
    chosen = []
    for device in sorted(devices, key=lambda d: d.id):
        name = device.device_class
        if device.online and name in classes and taken[name] < DEVICES:
            taken[name] += 1
            chosen.append(device)
    return chosen


def timing_task(
    task: str,
    device: str,
    device_class: str,
    graphs: Sequence[GraphRef],
    *,
    round_: int = 0,
    mask_version: int = 0,
    sweeps: int = 0,
    runs: int = 0,
    deadline_s: float = 600.0,
) -> Task:
    """What a device is asked.

    Args:
        task: A name that means this task for ever.
        device: Whose it is.
        device_class: Its class.
        graphs: Published `weightless` graphs, in the order of `shapes_to_time`.
        round_: The round that asks.
        mask_version: That of the round.
        sweeps: Times that each graph is visited; 0: as the agent sees fit.
        runs: Timed runs in each visit; 0: as the agent sees fit.
        deadline_s: See `Task`.
    """
    return Task(
        task=task,
        device=device,
        kind=TaskKind.TIME,
        round=round_,
        mask_version=mask_version,
        shape=device_class,
        graphs=tuple(graphs),
        model=NO_MODEL,
        epochs=sweeps,
        max_steps=runs,
        scores=False,
        deadline_s=deadline_s,
    )


def read_times(result: Result, shapes: int) -> Answer:
    """Check an answer to a timing task.

    Args:
        result: Decoded, and matched with its task.
        shapes: How many graphs the task named.

    Raises:
        MessageError: It does not say which runtime, or has not one possible time per graph.
    """
    header, task = result.header, result.header.task
    if not header.runtime or not header.runtime_version:
        raise MessageError(f"answer to {task} does not say which runtime measured")
    found = {}
    for name in ("median_ms", "spread_ms"):
        vector = result.vectors.get(name)
        if vector is None or vector.shape != (shapes,):
            got = "no" if vector is None else vector.size
            raise MessageError(f"answer to {task} has {got} values of {name}, expected {shapes}")
        found[name] = tuple(float(v) for v in vector)
    median, spread = found["median_ms"], found["spread_ms"]
    if not (min(median) > 0 and max(median) <= LONGEST_MS):
        raise MessageError(
            f"answer to {task}: {min(median):g} to {max(median):g} ms, "
            f"expected more than 0 and at most {LONGEST_MS:g}"
        )
    if min(spread) < 0:
        raise MessageError(f"answer to {task}: a spread of {min(spread):g} ms, expected at least 0")
    return Answer(header.runtime, header.runtime_version, median, spread)


def tables(
    device_class: str,
    precision: Precision,
    shapes: Sequence[Mapping[str, int]],
    answers: Iterable[Answer],
) -> list[LatencyTable]:
    """Put the answers of a class's devices together.

    Args:
        device_class: The class.
        precision: Of the graphs that it timed.
        shapes: What was timed, in the order of the answers' values.
        answers: One per device.

    Returns:
        A table per runtime and version, medians over its devices; in order of their names.
    """
    by_runtime: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        by_runtime.setdefault((answer.runtime, answer.version), []).append(answer)
    found = []
    for (runtime, version), of_one in sorted(by_runtime.items()):
        medians = np.median([a.median_ms for a in of_one], axis=0)
        spreads = np.median([a.spread_ms for a in of_one], axis=0)
        points = tuple(
            LatencyPoint(keep=dict(keep), median_ms=float(ms), spread_ms=float(spread))
            for keep, ms, spread in zip(shapes, medians, spreads, strict=True)
        )
        found.append(
            LatencyTable(
                device_class=device_class,
                runtime=runtime,
                version=version,
                precision=precision,
                devices=len(of_one),
                points=points,
            )
        )
    return found
