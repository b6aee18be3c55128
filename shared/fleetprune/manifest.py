"""What is signed about one model: `releases/<class>/<release>/manifest.json`.

A device reads it before it downloads anything else, and finds there whether it can run the model,
how to try it, and where the model came from.
"""

from typing import Annotated

from pydantic import Field, StringConstraints

from fleetprune.messages import Count, Line, Message, Name, Sha256

Version = Annotated[str, StringConstraints(pattern=r"^\d{1,6}(\.\d{1,6}){0,3}$")]
"""Numbers with points, compared number by number."""
TargetPath = Annotated[str, StringConstraints(min_length=1, max_length=256)]
MAX_DELTAS = 8


class Requirements(Message):
    """What a device must have to run a model; the defaults ask for nothing."""

    opset: int = Field(default=1, ge=1)
    """Of the default operator set."""
    ir_version: int = Field(default=1, ge=1)
    runtime: Line = Field(default="onnxruntime", max_length=64)
    runtime_version: Version = "0"
    """The oldest that will do."""
    agent_version: Version = "0"
    """The oldest that will do."""


class Delta(Message):
    """A file that makes the model from another one that may be installed."""

    base: Sha256
    """Of the installed model that it changes."""
    target: TargetPath
    sha256: Sha256
    size: int = Field(ge=1)


class Training(Message):
    """Where a model came from."""

    rounds: Count = 0
    devices: Count = 0
    """That answered in any round."""
    samples: Count = 0
    """Of those devices together."""
    criterion: Line = Field(default="", max_length=64)
    granularity: Line = Field(default="", max_length=64)
    precision: Line = Field(default="float32", max_length=64)


class Manifest(Message):
    """A release for one device class, or for devices whose own class's model failed there."""

    release: int = Field(ge=1)
    device_class: Name
    model: TargetPath
    """Of the ONNX file."""
    sha256: Sha256
    size: int = Field(ge=1)
    golden: TargetPath
    """Of the golden samples (.npz with `x` (n, ...) and `y` (n, classes))."""
    tolerance: float = Field(default=1e-3, gt=0)
    """Largest absolute difference from the golden outputs."""
    requires: Requirements = Requirements()
    deltas: tuple[Delta, ...] = Field(default=(), max_length=MAX_DELTAS)
    smaller: Name | None = None
    """The class whose model of the same release devices take where this one fails."""
    max_latency_ms: float | None = Field(default=None, gt=0)
    """Of one sample."""
    max_rss_mb: float | None = Field(default=None, gt=0)
    """That loading and running the model adds to a process."""
    min_agreement: float | None = Field(default=None, ge=0, le=1)
    """Share of a device's recent samples on which the model must say what the one before said."""
    labels: tuple[str, ...] = ()
    input_shape: tuple[int, ...]
    macs: int = Field(default=0, ge=0)
    peak_activation_bytes: int = Field(default=0, ge=0)
    accuracy: float | None = Field(default=None, ge=0, le=1)
    """On the coordinator's test set."""
    samples: Count = 0
    """In that test set."""
    round: int = Field(default=0, ge=0)
    mask_version: int = Field(default=0, ge=0)
    training: Training = Training()
    licence: Line = Field(default="", max_length=64)
    """SPDX expression."""


def manifest_path(device_class: str, release: int) -> str:
    """Target path of a manifest."""
    return f"releases/{device_class}/{release}/manifest.json"
