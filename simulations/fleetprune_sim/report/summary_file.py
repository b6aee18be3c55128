"""`summary.json` of a simulated run, read and checked; keys that are unknown here are ignored."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Dense(_Part):
    """The model that nothing was cut from."""

    params: Count
    bytes: Count
    macs: Count
    accuracy: Share | None = None
    """on the test set, where some class was given it"""


class FleetTraffic(_Part):
    """Bytes of the whole training; a client round is one device's answer to one training round."""

    up_bytes: Count
    down_bytes: Count
    up_bytes_per_client_round: Amount
    dense_up_bytes_per_client_round: Amount
    """that a float32 update of the dense model would have taken"""


class ClassTraffic(_Part):
    """Bytes of a class's devices."""

    up_bytes: Count = 0
    down_bytes: Count = 0


class Virtual(_Part):
    """What the training took by the fleet's own clock."""

    s: Amount
    energy_j: Amount


class Limits(_Part):
    """Budget of a class; None: no limit."""

    flash_bytes: Positive | None = None
    ram_bytes: Positive | None = None
    macs: Positive | None = None
    latency_ms: Positive | None = None


class Artifact(_Part):
    """The file that a class was given."""

    bytes: Count
    params: Count
    nonzero_params: Count | None = None
    """of these, those that are not pruned one by one"""
    macs: Count
    peak_activation_bytes: Count
    latency_ms: Amount | None = None
    sparse_bytes: Count | None = None
    """of a coding that leaves zeros out, where a method's masks are unstructured"""
    sparse_macs: Count | None = None
    """of those, multiplications that are not by zero"""


class ClassSummary(_Part):
    """One device class."""

    devices: Count
    model: str | None
    """Class whose model it was given; None: it was left out."""
    budget: Limits = Limits()
    artifact: Artifact | None = None
    keep: Mapping[str, Count] = {}
    validation_accuracy: Share | None = None
    accuracy: Share | None = None
    """on the test set"""
    own_accuracy: Share | None = None
    """mean over the class's devices, each on samples that it kept back"""
    robustness: Mapping[str, Share] | None = None
    """accuracy by corruption, and on the same samples without any; None: nobody looked"""
    within_budget: bool
    traffic: ClassTraffic = ClassTraffic()


class Before(_Part):
    """The trained model that was cut."""

    accuracy: Share
    """on the test set"""
    robustness: Mapping[str, Share] = {}
    """as a class's"""


class Rung(_Part):
    """A short training of a candidate."""

    rounds: Count
    accuracy: Share
    """on the validation set, mean over classes"""
    classes: Mapping[str, Share] = {}


class Tried(_Part):
    """A candidate for settings that were to be found out."""

    settings: Mapping[str, str]
    """by key; any value of those that are not here"""
    outcome: str
    """`chosen`, `dropped`, `failed` or `refused`"""
    reason: str | None = None
    rungs: tuple[Rung, ...] = ()
    """one after the other"""


class Auto(_Part):
    """What was tried before the run, to find settings out."""

    asked: tuple[str, ...] = Field(min_length=1)
    chosen: Mapping[str, str]
    rounds: Count
    """of all trials"""
    wall_s: Amount = 0.0
    samples: Count
    """of the validation set, that decided"""
    candidates: tuple[Tried, ...]
    left_out: Count = 0
    """for which there were no rounds"""
    next: tuple[Mapping[str, str], ...] = ()
    """the first of them"""


class Summary(_Part):
    """The whole file."""

    schema_: Literal[1] = Field(alias="schema")
    task: str
    method: str
    seed: int
    rounds: Count
    version: str = ""
    """of the program"""
    engine: str = ""
    wall_s: Amount = 0.0
    client_rounds: Count = 0
    dense: Dense
    before: Before | None = None
    """None: the training began with no trained model, or with a new head, or nobody looked"""
    new_head: str | None = None
    """the layer that was new to the trained model: nobody had trained it"""
    auto: Auto | None = None
    """None: nothing had to be found out"""
    traffic: FleetTraffic
    virtual: Virtual
    labels: tuple[str | int, ...] = ()
    input_shape: tuple[int, ...] = ()
    groups: Mapping[str, Count] = {}
    """units of the dense model"""
    partition: Mapping[str, Any] = {}
    settings: Any = None
    classes: Mapping[str, ClassSummary] = Field(min_length=1)
