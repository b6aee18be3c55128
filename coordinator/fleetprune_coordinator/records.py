"""What the registry hands out: one frozen record per row."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetprune.messages import Task, Telemetry


class Phase(StrEnum):
    """What a round is for."""

    TIME = "time"
    """Before everything else: how long models take on classes with a limit of latency."""
    SCORE = "score"
    """Before the first training round of a model that comes trained: which units matter."""
    TRAIN = "train"
    CALIBRATE = "calibrate"
    """Forward passes only: BatchNorm statistics, activation sums, accuracy."""


class RoundState(StrEnum):
    """At most one round is open."""

    OPEN = "open"
    CLOSED = "closed"


class TaskState(StrEnum):
    """What became of a task."""

    OPEN = "open"
    ANSWERED = "answered"
    LATE = "late"
    """Its round closed without an answer."""
    REFUSED = "refused"
    """The device said that it cannot."""


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """An enrolled device."""

    id: int
    """Flower's node id."""
    name: str
    device_class: str
    trains: bool
    """Both the device and its class do."""
    samples: int
    block: int
    agent_version: str
    rss_mb: float
    enrolled_at: float
    last_seen: float
    online: bool


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """A round, or one step of a calibration that goes layer by layer."""

    number: int
    phase: Phase
    step: int
    state: RoundState
    mask_version: int
    started_at: float
    closed_at: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task and what became of it."""

    task: Task
    node_id: int
    state: TaskState
    reason: str
    announced_at: float
    deadline: float
    """`announced_at` plus the task's `deadline_s`."""
    up_bytes: int
    """Length of the answer; 0 while there is none."""
    down_bytes: int
    """Length of the model that the task names."""


@dataclass(frozen=True, eq=False, slots=True)
class MaskRecord:
    """A version of the masks of all classes."""

    version: int
    round: int
    order: Mapping[str, NDArray[np.intp]]
    """Per group a permutation: which unit of the user's model stands at each place."""
    keep: Mapping[str, Mapping[str, int]]
    """Per class its keep counts."""


@dataclass(frozen=True, slots=True)
class ReleaseRecord:
    """What one release is for one class."""

    number: int
    device_class: str
    sha256: str
    bytes: int
    macs: int
    peak_activation_bytes: int
    accuracy: float | None
    path: str
    round: int
    mask_version: int
    created_at: float = 0.0
    """Set by the registry."""


@dataclass(frozen=True, slots=True)
class TelemetryRecord:
    """The last report of a device."""

    node_id: int
    at: float
    telemetry: Telemetry


@dataclass(frozen=True, slots=True)
class TrafficRecord:
    """Bytes counted on the wire for one device in one round."""

    device: str
    round: int
    up: int
    down: int


@dataclass(frozen=True, slots=True)
class EventRecord:
    """Something an operator may want to read."""

    at: float
    kind: str
    device: str | None
    text: str
