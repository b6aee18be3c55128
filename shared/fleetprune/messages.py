"""The small JSON messages that devices and the coordinator exchange.

Everything large (weights, updates, graphs, releases) travels as blocks and is named here by
hash or by target path. A reader ignores fields it does not know, so a newer peer may add some;
`schema` rises only when an old reader would misread the message, and is then refused.
"""

import hashlib
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from fleetprune.errors import MessageError
from fleetprune.join_token import MAX_TOKEN

SCHEMA = 1
MAX_MESSAGE = 64 * 1024  # bytes of JSON; nothing legitimate comes near it

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""A device, class or task: safe as an MQTT topic level and as a file name."""
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
MAX_COUNT = 2**32 - 1
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
"""What is counted one by one: 32 bits, as in frames and updates (JSON knows no limit)."""
Size = Annotated[int, Field(ge=0, le=2**53 - 1)]
"""Bytes and sums of counts: what every JSON reader holds exactly."""
MAX_DEADLINE_S = 7 * 24 * 3600.0
"""No round lasts a week: the longest that a task is kept, and anything of it."""
MAX_REASON = 1024  # characters
MAX_PEM = 8 * 1024  # characters; ours have 800
MAX_LOSS = 3.4e38  # what float32 holds


def printable(text: str) -> str:
    """`text` in one line: what a terminal or a log would act upon becomes a space."""
    return "".join(c if c.isprintable() else " " for c in text)


Line = Annotated[str, AfterValidator(printable)]
"""Text of a peer for people to read."""


class Message(BaseModel):
    """Base of all messages: frozen, tolerant of unknown fields, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    schema_: Literal[1] = Field(default=1, alias="schema", serialization_alias="schema")

    def to_bytes(self) -> bytes:
        """UTF-8 JSON."""
        return self.model_dump_json(by_alias=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parse unverified bytes; MessageError if they are too long or malformed."""
        if len(data) > MAX_MESSAGE:
            raise MessageError(
                f"{cls.__name__} of {len(data)} bytes, expected at most {MAX_MESSAGE}"
            )
        try:
            return cls.model_validate_json(data)
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(str(p) for p in first["loc"]) or "message"
            raise MessageError(f"{cls.__name__}: {where}: {first['msg']}") from e


class Blob(Message):
    """Bytes that can be pulled in blocks, named by their hash."""

    sha256: Sha256
    size: Size

    @classmethod
    def of(cls, data: bytes) -> Self:
        """The name of some bytes."""
        return cls(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


class Enrol(Message):
    """Device to coordinator: who I am and what I can do."""

    device: Name
    device_class: Name
    agent_version: Line = Field(max_length=64)
    trains: bool
    """False: this device only runs forward passes."""
    samples: Count
    block: Literal[0, 8, 16] = 0
    """Channel block of onnxruntime's blocked convolutions on this processor; 0: none."""
    rss_mb: float = Field(default=0.0, ge=0)


class Enrolled(Message):
    """Coordinator to device: the answer to `Enrol`."""

    accepted: bool
    reason: Line = Field(default="", max_length=MAX_REASON)


class TaskKind(StrEnum):
    """What a task asks for."""

    TRAIN = "train"
    OBSERVE = "observe"
    TIME = "time"
    """How long each of the graphs takes here. They are timed in turn: `epochs` is how often each is
    visited and `max_steps` the timed runs of a visit (0: as the device sees fit); `model` is empty.
    """


class Codec(StrEnum):
    """How float values travel."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"


class GraphRef(Message):
    """A signed ONNX graph: a target of the release repository."""

    target: str = Field(max_length=256)
    sha256: Sha256


class Task(Message):
    """Coordinator to device: one piece of work for one device in one round.

    The same `task` id names the same work for ever; a device that has already answered it sends
    the same answer again.
    """

    task: Name
    device: Name
    kind: TaskKind
    round: Count
    mask_version: Count
    shape: Name
    """Name of the model shape (usually the device class) that `graphs` and `model` have."""
    graphs: tuple[GraphRef, ...] = Field(min_length=1)
    """Alternatives: a training device draws one of them per step (self-distillation partners)."""
    portable: tuple[GraphRef, ...] = ()
    """The same graphs with portable operators, for where the fast ones do not verify."""
    look: GraphRef | None = None
    """Of a training task: also run this observing graph on the received model, and send what it
    says of importance."""
    model: Blob
    """A frame of kind MODL: parameters and BatchNorm statistics of that shape."""
    epochs: Count = 1
    max_steps: Count = 0
    """At most so many optimiser steps; 0: as many as the epochs have."""
    learning_rate: float = Field(default=0.0, ge=0)
    proximal: float = Field(default=0.0, ge=0)
    """Pull towards the received weights: after each step `w -= lr * proximal * (w - start)`."""
    seed: Count = 0
    codec: Codec = Codec.INT4
    top_k: float = Field(default=1.0, gt=0, le=1)
    """Share of values sent; 1: all (then no positions travel)."""
    scores: bool = True
    """Whether the answer is to hold what tells importance: what the graphs' outputs `scores`,
    `sumsq`, `zeros` and `gram` add up to, as far as they have them."""
    criterion: str = Field(default="taylor", max_length=64)
    """Which importance criterion that is for, by its name in `criteria`; a device need not know."""
    deadline_s: float = Field(default=600.0, gt=0, le=MAX_DEADLINE_S)
    """Seconds from the announcement after which an answer is no longer used."""


class Progress(StrEnum):
    """States of a task on a device, reported in `TaskAck`."""

    ACCEPTED = "accepted"
    REFUSED = "refused"


class TaskAck(Message):
    """Device to coordinator: the task arrived (a broker's acknowledgement does not say that)."""

    task: Name
    device: Name
    state: Progress
    reason: Line = Field(default="", max_length=MAX_REASON)


class ResultHeader(Message):
    """Header of a frame of kind RSLT.

    Sections (little-endian float32 vectors but `update`): `update` a `SparseUpdate`, `stats`
    (S,) BatchNorm statistics after training, `scores` (U,) sums over steps of what the graph says
    of each unit, `sumsq` and `zeros` (Q,) over the inputs of the observed weights, `bn_sum` and
    `bn_sumsq` (S/2,), `bn_count` (number of BatchNorms,), `gram` (K,), `ranges` (T,) counts of
    values by size, and of a timing task `median_ms` and `spread_ms` (graphs,), of one sample and
    between the quartiles of its runs.
    """

    task: Name
    device: Name
    kind: TaskKind
    round: Count
    mask_version: Count
    samples: int = Field(ge=1, le=MAX_COUNT)
    steps: Count = 0
    loss: float | None = Field(default=None, ge=-MAX_LOSS, le=MAX_LOSS)
    correct: Count | None = None
    """Correctly classified of `samples` (observe tasks)."""
    train_s: float = Field(default=0.0, ge=0)
    runtime: Line = Field(default="", max_length=64)
    """What ran the graphs of a timing task, and its version."""
    runtime_version: Line = Field(default="", max_length=64)
    rss_mb: float = Field(default=0.0, ge=0)


class Announcement(Message):
    """Coordinator to all: an unsigned hint that the release repository has something new."""

    release: int = Field(ge=0)


class Telemetry(Message):
    """Device to coordinator: what runs, how it does, and what became of what it is told to run."""

    device: Name
    device_class: Name
    release: Count = 0
    """Installed release; 0: none yet."""
    sha256: Sha256 | None = None
    variant: Name | None = None
    """The class whose model runs, where it is a narrower one's: the own model failed here."""
    state: Literal["empty", "trial", "committed", "rolled_back"] = "empty"
    plan: Count = 0
    """Serial of the `Rollout` that the device has last verified; 0: none yet."""
    failed: Count = 0
    """The newest release that was refused or rolled back here; 0: none. `error` says why."""
    postponed: Line = Field(default="", max_length=MAX_REASON)
    """Why a release that is wanted is not fetched now (quiet hours, a metered link, no room)."""
    accuracy: float | None = Field(default=None, ge=0, le=1)
    samples: Count = 0
    """Held-out samples that `accuracy` and `accuracy_before` were measured on."""
    accuracy_before: float | None = Field(default=None, ge=0, le=1)
    """Of the release that ran before, on the same samples."""
    agreement: float | None = Field(default=None, ge=0, le=1)
    """Share of recent samples on which this release and the one before say the same."""
    latency_ms: float | None = Field(default=None, ge=0)
    rss_mb: float = Field(default=0.0, ge=0)
    crashes: Count = 0
    """Starts of the agent after an end that was not asked for, while this release ran."""
    bytes_up: Size = 0
    bytes_down: Size = 0
    error: Line = Field(default="", max_length=MAX_REASON)


class Renew(Message):
    """Device to coordinator: my certificate ends soon."""

    request: str = Field(max_length=MAX_PEM)
    """PKCS #10, PEM."""


class Certificate(Message):
    """Coordinator to device: the answer to `Renew`."""

    certificate: str = Field(default="", max_length=MAX_PEM)
    """PEM; empty: refused."""
    reason: Line = Field(default="", max_length=MAX_REASON)


class Join(Message):
    """Device to the join endpoint: let me in."""

    token: str = Field(max_length=MAX_TOKEN, repr=False)
    request: str = Field(max_length=MAX_PEM)
    """PKCS #10, PEM."""


class Joined(Message):
    """The join endpoint to a device: all that it must know to take part."""

    fleet: Name
    device: Name
    device_class: Name
    certificate: str = Field(max_length=MAX_PEM)
    """PEM."""
    ca: str = Field(max_length=MAX_PEM)
    """PEM, by which the device knows the broker."""
    root: str
    """JSON: the TUF root, by which it knows releases."""
    broker_host: Line = Field(min_length=1, max_length=255)
    broker_port: int = Field(ge=1, le=65535)
