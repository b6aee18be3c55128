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
from fleetprune_agent.journal import Phase, standing
from fleetprune_agent.memory import rss_mb
from fleetprune_agent.slot_files import Installed
from fleetprune_agent.slots import Slots
from fleetprune_agent.trial import comparable

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
    samples: int = 0
    """Held-out samples behind `accuracy`."""


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
    samples = comparable(held)
    accuracy = _accuracy(predict, held, samples) if samples else None
    return Measured(accuracy, 1000 * max(0.0, median(seconds)), samples)


def _accuracy(predict: Predict, held: Samples, samples: int) -> float:
    """On the first `samples` labelled ones."""
    correct = 0
    for start in range(0, samples, BATCH):
        part = slice(start, min(start + BATCH, samples))
        says = predict(held.x[part]).argmax(axis=1)
        correct += int(np.count_nonzero(says == held.y[part]))  # type: ignore[index]
    return correct / samples


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes on all roads since the agent started, with headers, without TLS."""

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

    The state is `rolled_back` where the release that it is told to run failed here; `error` then
    says why, unless something else is given. It also says why a smaller class's model runs.
    """
    active, journal = slots.active(), slots.journal.read()
    refusals, finding = slots.refusals(), journal.finding
    stands = standing(journal, active, refusals)
    failed = {r.release for r in refusals}
    if journal.phase is Phase.REJECTED:
        failed.add(journal.release)
    state = active.state.value if active is not None else "empty"
    if stands.phase in (Phase.REJECTED, Phase.ROLLED_BACK):
        state = "rolled_back"
    if stands.reason and stands.release in failed:
        error = error or f"release {stands.release}: {stands.reason}"
    tried = active is not None and journal.model == active.manifest.sha256
    same = tried and finding.samples == measured.samples
    fields = {
        "device": device,
        "device_class": device_class,
        "release": active.release if active is not None else 0,
        "sha256": active.manifest.sha256 if active is not None else None,
        "variant": variant(active, device_class),
        "state": state,
        "plan": journal.serial,
        "failed": max(failed, default=0),
        "postponed": one_line(stands.reason) if stands.phase is Phase.WANTED else "",
        "accuracy": measured.accuracy,
        "samples": measured.samples,
        "accuracy_before": finding.accuracy_before if same else None,
        "agreement": finding.agreement if tried else None,
        "latency_ms": measured.latency_ms,
        "rss_mb": round(rss_mb(), 1),
        "crashes": slots.crashes(),
        "bytes_up": traffic.up,
        "bytes_down": traffic.down,
        "error": one_line(error),
    }
    return Telemetry.model_validate(fields)


def variant(active: Installed | None, device_class: str) -> str | None:
    """The class whose model runs, where it is not the device's own."""
    if active is None or active.manifest.device_class == device_class:
        return None
    return active.manifest.device_class


def one_line(error: str | FleetpruneError, limit: int = 1000) -> str:
    """An error as one line that fits a message."""
    return " ".join(str(error).split())[:limit]
