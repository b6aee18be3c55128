"""How the installed model does here: measured on the device's own held-out samples."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import FleetpruneError
from fleetprune.messages import Telemetry
from fleetprune_agent.data import Samples, Split
from fleetprune_agent.memory import rss_mb
from fleetprune_agent.slots import Slots

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""(n, *shape) float32 to (n, classes) float32."""

TIMED_RUNS = 20  # at batch 1; the median of fewer jumps by a tenth from report to report
BATCH = 32  # samples per run when accuracy is measured: bounds the activations in memory


@dataclass(frozen=True, slots=True)
class Measured:
    """What a model did on this device; None: not measured."""

    accuracy: float | None = None
    """Share of the held-out samples classified correctly."""
    latency_ms: float | None = None
    """Median of one sample."""


def measure(
    predict: Predict,
    split: Split,
    clock: Callable[[], float] = time.perf_counter,
    runs: int = TIMED_RUNS,
) -> Measured:
    """Measure a model.

    Accuracy needs labelled held-out samples; latency takes any sample.

    Args:
        predict: The model.
        split: The device's samples.
        clock: Seconds.
        runs: Timed runs, after one that is not timed.

    Raises:
        DataError: The samples do not fit the model.
        InstallError: There is no model, or none works.
    """
    held = split.held_out
    one = (held if len(held) else split.train).x[:1]
    predict(one)
    seconds = []
    for _ in range(runs):
        started = clock()
        predict(one)
        seconds.append(clock() - started)
    return Measured(_accuracy(predict, held), 1000 * max(0.0, median(seconds)))


def _accuracy(predict: Predict, held: Samples) -> float | None:
    if held.y is None or not len(held):
        return None
    correct = 0
    for start in range(0, len(held), BATCH):
        part = slice(start, start + BATCH)
        correct += int(np.count_nonzero(predict(held.x[part]).argmax(axis=1) == held.y[part]))
    return correct / len(held)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes on the wire since the agent started, headers and all."""

    up: int = 0
    down: int = 0


def report(
    device: str,
    device_class: str,
    slots: Slots,
    *,
    measured: Measured,
    traffic: Traffic,
    error: str = "",
) -> Telemetry:
    """What a device says about itself.

    The state is `rolled_back` where a release newer than the running one failed here; `error`
    then says why, unless something else is given.
    """
    active = slots.active()
    release = active.release if active is not None else 0
    state = active.state.value if active is not None else "empty"
    newer = {r: why for r, why in slots.rejected().items() if r > release}
    if newer:
        state = "rolled_back"
        error = error or f"release {max(newer)}: {newer[max(newer)]}"
    fields = {
        "device": device,
        "device_class": device_class,
        "release": release,
        "sha256": active.manifest.sha256 if active is not None else None,
        "state": state,
        "accuracy": measured.accuracy,
        "latency_ms": measured.latency_ms,
        "rss_mb": round(rss_mb(), 1),
        "bytes_up": traffic.up,
        "bytes_down": traffic.down,
        "error": one_line(error),
    }
    return Telemetry.model_validate(fields)


def one_line(error: str | FleetpruneError, limit: int = 1000) -> str:
    """An error as one line that fits a message."""
    return " ".join(str(error).split())[:limit]
