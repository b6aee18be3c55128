"""The fleet's description, `fleet.toml`: read once, checked whole, refused in one line."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    PrivateAttr,
    StringConstraints,
    model_validator,
)

from fleetprune.budgets import Allocation, Budget
from fleetprune.config_file import LocalPath, Section, load_section
from fleetprune.costs import Costs
from fleetprune.criteria import CATALOGUE, Criterion
from fleetprune.errors import ConfigError, UsageError
from fleetprune.latency import Precision
from fleetprune.messages import MAX_DEADLINE_S, Codec, Name
from fleetprune.mqtt import BrokerSettings
from fleetprune.patterns import Granularity, Pattern
from fleetprune.schedule import Schedule
from fleetprune_coordinator.imports import import_object
from fleetprune_coordinator.rollout_config import RolloutConfig
from fleetprune_coordinator.score_merge import ScoreMerge

Dotted = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]
"""`module:name`, to be imported."""


Share = Annotated[float, Field(gt=0, le=1)]
Multiple = Annotated[int, Field(ge=1)]


def _least(value: object) -> float:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, float) and 0 < value <= 1:
        return value
    raise ValueError("expected a number of units, or a share with a point, up to 1.0")


def _pattern(value: object) -> str:
    try:
        return str(Pattern.parse(str(value)))
    except UsageError as e:  # what was got is said with the key
        raise ValueError(str(e).partition(", ")[2]) from e


def _found_out(value: object) -> object:
    if value == "auto":
        raise ValueError(
            "only a simulation can find this out: run fleetprune simulate with this file first, "
            "and write what it has chosen here"
        )
    return value


_FoundOut = BeforeValidator(_found_out)
PatternText = Annotated[str, PlainValidator(_pattern)]
Least = Annotated[float, PlainValidator(_least)]
"""Units (an int) or a share (a float): the two ways to write 1 mean two things."""


class ModelConfig(Section):
    """The user's model."""

    factory: Dotted
    """Called with `arguments`, returns a `torch.nn.Module`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    input_shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    """Of one sample, without the batch."""
    labels: tuple[str, ...] = ()
    classes: int | None = Field(default=None, ge=2)
    """How many outputs, where they have no names."""
    loss: Annotated[str, StringConstraints(pattern=r"^cross_entropy$|^[\w.]+:[\w.]+$")] = (
        "cross_entropy"
    )
    """`cross_entropy` or `module:function` (logits, targets) -> scalar."""
    initial: LocalPath | None = None
    """A state_dict or safetensors file to start from."""
    head: str | None = None
    """The layer that may start anew where `initial` has other weights for it, or none."""
    freeze: tuple[str, ...] = ()
    """Layers that are not trained: a path, the beginning of one, or a pattern."""

    @model_validator(mode="after")
    def _know_the_outputs(self) -> Self:
        if bool(self.labels) == (self.classes is not None):
            raise ValueError("give either labels or classes")
        if self.labels and len(set(self.labels)) != len(self.labels):
            raise ValueError("labels are not distinct")
        if len(self.labels) == 1:
            raise ValueError("one label, expected at least 2")
        return self

    @model_validator(mode="after")
    def _start_from_something(self) -> Self:
        if self.head is not None and self.initial is None:
            raise ValueError("head says what of initial may be missing: give initial, too")
        return self

    @property
    def outputs(self) -> int:
        """Number of classes that the model tells apart."""
        return self.classes if self.classes is not None else len(self.labels)


class DataConfig(Section):
    """What the coordinator itself has; the training data stays on the devices."""

    test: LocalPath | None = None
    """`.npz` with `x` and `y`: judges each class's model and provides its golden samples."""
    validation: LocalPath | None = None
    """`.npz` with `x` and `y`: a dynamic schedule backs off when accuracy on it falls. Not what
    models are judged by in the end."""


class TrainingConfig(Section):
    """How the rounds run; the defaults won on small image and motion tasks."""

    rounds: int = Field(default=20, ge=1)
    devices_per_round: int = Field(default=8, ge=1)
    min_devices: int = Field(default=2, ge=1)
    """Fewer online devices than this: wait."""
    epochs: int = Field(default=1, ge=1)
    max_steps: int = Field(default=0, ge=0)
    """Per task; 0: as many as the epochs have."""
    batch: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=0.1, gt=0)
    final_learning_rate_share: float = Field(default=0.05, ge=0, le=1)
    """Of `learning_rate`, reached in the last round along a cosine."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    codec: Codec = Codec.INT4
    down_codec: Codec = Codec.FP16
    top_k: Share = 1.0
    """Share of values that a device sends."""
    round_timeout_s: float = Field(default=120.0, gt=0, le=MAX_DEADLINE_S)  # seconds
    quorum: Share = 1.0
    """Share of answers that closes a round before its timeout."""
    remask_every: int = Field(default=5, ge=0)
    """Rounds between new masks; 0: never again after the first."""
    last_remask: int | None = Field(default=None, ge=0)
    """No new masks after this round, so that the last ones have time to settle; None: half."""
    regrow: Share = 1.0
    """Share of a class's units that new masks may replace at first, falling along a cosine to none
    in the last round that brings some (RigL's annealing); 1: any number, at any time."""
    criterion: Annotated[Criterion, _FoundOut] = Criterion.TAYLOR
    first_criterion: Annotated[Criterion, _FoundOut] = Criterion.RECONSTRUCTION
    """Of the first masks of a model that comes trained."""
    score_merge: ScoreMerge = ScoreMerge.MEAN
    """How what devices say of a unit becomes one figure. The median and the trimmed mean give every
    device one voice, so that a few that lie or differ are outvoted."""
    refit: bool = True
    """When a model that comes trained is cut, give the weights that stay the values with which they
    best rebuild the uncut layers' outputs."""
    proximal: float = Field(default=1.0, ge=0)
    """Pull towards the received weights while training; 0: none."""
    adjust_logits: float = Field(default=0.5, ge=0, le=1)
    """How far devices train against their own label frequencies, so that a class that they seldom
    see is not unlearned; with `cross_entropy` only. With 1 the model takes all labels for equally
    frequent, which costs accuracy where the whole fleet sees some of them more often."""
    distill_weight: float = Field(default=1.0, ge=0)
    """Of what a class's model teaches the narrower one inside it; 0: classes train alone."""
    student_task_weight: float = Field(default=0.5, ge=0)
    """Of what the labels teach the narrower model directly."""
    mutual_weight: float = Field(default=0.5, ge=0)
    """Of what the narrower model teaches back."""
    fixed_statistics: Share = 1.0
    """Share of the rounds after which BatchNorm normalises by the fleet's own statistics, measured
    then, instead of each batch's; 1: never, they are measured at the end. Where owners differ in
    more than labels, 0.5 is better; some depthwise networks diverge with it."""
    fixed_learning_rate: float = Field(default=0.3, gt=0)
    """Times the learning rate while statistics are fixed."""
    calibration_passes: int = Field(default=8, ge=0)
    calibration_devices: int = Field(default=64, ge=0)
    """How many devices the statistics come from, the same in every pass; 0: all."""
    calibrate_with: Literal["class", "covering"] = "covering"
    """Whose samples a class's statistics come from: its own devices', or also those of every
    device whose model contains the class's."""
    outlier: float = Field(default=10.0, ge=0)
    """How many times the median device one device may be: an answer's weight is cut to so many
    times the median of the samples in its round, the norm of an update to so many times the
    median of its class in the round before, and to that of the model; 0: no bound."""
    seed: int = Field(default=0, ge=0)
    stratified: bool = True
    """Draw from every class in turn instead of from the whole fleet."""

    @property
    def final_remask(self) -> int:
        """The last round that may bring new masks."""
        last = self.rounds // 2 if self.last_remask is None else self.last_remask
        return min(last, self.calibration_round)

    @property
    def calibration_round(self) -> int:
        """The training round after which the BatchNorm statistics are measured."""
        return max(1, round(self.fixed_statistics * self.rounds))

    @model_validator(mode="after")
    def _at_their_time(self) -> Self:
        if not CATALOGUE[self.criterion].later:
            raise ValueError(
                f"criterion {self.criterion} orders the units of a model that comes trained, once: "
                "it can only be the first_criterion"
            )
        if not CATALOGUE[self.first_criterion].first:
            raise ValueError(
                f"first_criterion {self.first_criterion} comes of training, and none has been: "
                "it can only be the criterion"
            )
        return self

    @model_validator(mode="after")
    def _enough_devices(self) -> Self:
        if self.min_devices > self.devices_per_round:
            raise ValueError(
                f"min_devices {self.min_devices} is more than "
                f"devices_per_round {self.devices_per_round}"
            )
        return self


class PruningConfig(Section):
    """How a budget becomes keep counts."""

    channel_multiple: int = Field(default=8, ge=1)
    """Widths are multiples of it; the kernels of most runtimes work on 8 channels or 16 at once."""
    allocation: Allocation = Allocation.UNIFORM
    granularity: Annotated[Granularity, _FoundOut] = Granularity.CHANNEL
    """`channel` cuts units. `weight` prunes single weights until a class's file is within its
    bytes; `hybrid` cuts units for all other limits and prunes single weights for the bytes. Only a
    smaller model is faster: single weights save bytes, on disk and on the way."""
    pattern: PatternText = "1x1"
    """What of a layer's weights goes together: "1x1", a block of outputs x inputs as "4x1", or
    N of every M inputs as "2:4"."""
    weight_allocation: Allocation = Allocation.GLOBAL
    """How the weights to prune are shared out among layers: by what they are worth within what is
    left of their layer, or the same share of each."""
    dense_layers: tuple[str, ...] = ()
    """Layers whose weights all stay, written as in `exclude`."""
    floor: float = Field(default=0.5, ge=0, le=1)
    """With the allocation `global`: no layer falls below this share of what `uniform` would
    leave it."""
    exclude: tuple[str, ...] = ()
    """Layers that stay whole: a path, the beginning of one, or a pattern (`protection.protect`)."""
    minimum: dict[str, Least] = Field(default_factory=dict)
    """Per layer the units that stay at least, in number or as a share."""
    multiple: dict[str, Multiple] = Field(default_factory=dict)
    """Per layer what its width is a multiple of."""
    int8: bool | Literal["auto"] = False
    """Ship quantised files: true also plans budgets for them; "auto" plans for float32 files and
    ships the quantised one where it is good enough."""
    int8_loss: float = Field(default=0.01, ge=0, le=1)
    """Accuracy on the test set that quantising may cost, as a share of all samples."""

    @property
    def precision(self) -> Precision:
        """Of the files that budgets are planned for, latencies among them."""
        return Precision.INT8 if self.int8 is True else Precision.FLOAT32


class ClassConfig(Section):
    """What one device class can hold: absolute figures, or shares of the dense model's."""

    flash_bytes: int | None = Field(default=None, gt=0)
    ram_bytes: int | None = Field(default=None, gt=0)
    macs: int | None = Field(default=None, gt=0)
    latency_ms: float | None = Field(default=None, gt=0)
    rss_mb: float | None = Field(default=None, gt=0)
    """Memory that loading and running the model may add to a process: measured on each device."""
    flash_share: Share | None = None
    ram_share: Share | None = None
    macs_share: Share | None = None
    batch: int = Field(default=1, ge=1)
    """Samples that the class runs at once; counts for the limit of memory."""
    multiple: Multiple | None = None
    """Of this class's widths; None: `pruning.channel_multiple`."""
    trains: bool = True

    @model_validator(mode="after")
    def _say_it_once(self) -> Self:
        for figure, share in (
            ("flash_bytes", "flash_share"),
            ("ram_bytes", "ram_share"),
            ("macs", "macs_share"),
        ):
            if getattr(self, figure) is not None and getattr(self, share) is not None:
                raise ValueError(f"give either {figure} or {share}")
        return self

    def budget(self, dense: Costs) -> Budget:
        """The budget in absolute figures; a share is rounded down."""

        def limit(figure: int | None, share: float | None, of: int) -> int | None:
            return figure if share is None else max(1, math.floor(share * of))

        return Budget(
            flash_bytes=limit(self.flash_bytes, self.flash_share, dense.artifact_bytes),
            ram_bytes=limit(
                self.ram_bytes, self.ram_share, self.batch * dense.peak_activation_bytes
            ),
            macs=limit(self.macs, self.macs_share, dense.macs),
            latency_ms=self.latency_ms,
            batch=self.batch,
        )


class ReleaseConfig(Section):
    """What comes with a release."""

    deltas: bool = True
    """Round weights so little that it does not matter and that the next release is a small file for
    devices that have this one; and make these files."""
    licence: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9 .+()-]{0,64}$")] = ""
    """Of the models, an SPDX expression."""
    min_agreement: float | None = Field(default=None, ge=0, le=1)
    """Share of a device's recent samples on which a release must say what the one before said."""


class AccessConfig(Section):
    """The fleet's certificate authority (`fleetprune access`)."""

    broker_names: tuple[str, ...] = ()
    """Host names and addresses by which clients know the broker; empty: `broker.host`."""
    device_days: int = Field(default=180, ge=2, le=3650)
    """Life of a device's certificate; it is renewed in the last third."""
    own_days: int = Field(default=730, ge=2, le=3650)
    """Life of the certificates of broker, join endpoint, coordinator and block servers."""
    ca_days: int = Field(default=7300, ge=30, le=36500)
    """Life of the authority itself."""
    deployed: LocalPath | None = None
    """The broker's folder that `fleetprune deploy mosquitto` has filled: its access list and
    revocation list are kept up to date."""
    reload: tuple[str, ...] = ()
    """Command that makes the broker read them, run after each change."""


class JoinConfig(Section):
    """Where devices join, with a token."""

    host: str = "0.0.0.0"  # noqa: S104  (devices come from outside)
    """Address to listen on."""
    port: int = Field(default=8443, ge=0, le=65535)
    names: tuple[str, ...] = ()
    """Host names and addresses by which devices know the endpoint; empty: `access.broker_names`."""
    broker_host: str | None = None
    """Where devices find the broker; None: the first of `access.broker_names`, or `broker.host`."""
    broker_port: int | None = Field(default=None, ge=1, le=65535)
    """None: `broker.port`."""


class FleetConfig(Section):
    """All of `fleet.toml`."""

    fleet: Name
    state: LocalPath = Field(default="state", validate_default=True)
    """Folder of the registry and the releases."""
    broker: BrokerSettings = Field(default_factory=BrokerSettings)
    model: ModelConfig
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    schedule: Schedule = Field(default_factory=Schedule)
    """Cuts at once unless it says otherwise."""
    pruning: PruningConfig = Field(default_factory=PruningConfig)
    release: ReleaseConfig = Field(default_factory=ReleaseConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    classes: dict[Name, ClassConfig] = Field(min_length=1)
    access: AccessConfig = Field(default_factory=AccessConfig)
    join: JoinConfig | None = None
    """None: the coordinator itself has no endpoint where devices join."""
    simulation: dict[str, Any] = Field(default_factory=dict)
    """For `fleetprune simulate` alone, which checks it."""

    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if not any(c.trains for c in self.classes.values()):
            raise ValueError("no class trains: at least one must")
        self._check_weights()
        if self.schedule.settled > self.training.rounds:
            raise ValueError(
                f"schedule ends in round {self.schedule.settled}, "
                f"but training has {self.training.rounds} rounds"
            )
        return self

    def _check_weights(self) -> None:
        pruning, criterion = self.pruning, self.training.criterion
        if not pruning.granularity.weights:
            if pruning.pattern != "1x1" or pruning.dense_layers:
                key = "pattern" if pruning.pattern != "1x1" else "dense_layers"
                raise ValueError(
                    f'pruning.{key} is about single weights: set pruning.granularity = "weight" or '
                    '"hybrid"'
                )
            return
        limited = [c for c in self.classes.values() if c.flash_bytes or c.flash_share]
        if not limited and not Pattern.parse(pruning.pattern).m:
            raise ValueError(
                f"pruning.granularity {pruning.granularity} prunes weights down to flash_bytes or "
                "flash_share, and no class has one: give it to those that have limits, or choose a "
                'pattern as "2:4"'
            )
        if pruning.granularity is Granularity.WEIGHT and not CATALOGUE[criterion].weights:
            raise ValueError(
                f"training.criterion {criterion} tells units apart, not weights: choose another, "
                'or pruning.granularity = "hybrid"'
            )

    @property
    def broker_names(self) -> tuple[str, ...]:
        """Host names and addresses by which clients know the broker."""
        return self.access.broker_names or (self.broker.host,)

    @property
    def folder(self) -> Path:
        """Where `fleet.toml` lies: its paths start there, and its modules are found there."""
        return self._folder

    def import_object(self, dotted: str, what: str) -> Any:
        """What `module:name` names, looked for in `folder` first; ConfigError if it is not there.

        Args:
            dotted: `module:name`.
            what: The key that says so, for messages.
        """
        return import_object(dotted, what, self._folder)


def load_fleet_config(path: Path, data: Mapping[str, Any] | None = None) -> FleetConfig:
    """Read and check a `fleet.toml`.

    Args:
        path: The file.
        data: What it says, where that has been read already.

    Returns:
        The description; its paths are absolute.

    Raises:
        ConfigError: The file cannot be read or parsed, a key is unknown, missing or has a wrong
            value; one line with the file and the key.
    """
    config = load_section(path, FleetConfig, data)
    for key, file in (
        ("model.initial", config.model.initial),
        ("data.test", config.data.test),
        ("data.validation", config.data.validation),
    ):
        if file is not None and not file.is_file():
            raise ConfigError(f"{path}: {key}: no file {file}")
    config._folder = path.absolute().parent
    return config
