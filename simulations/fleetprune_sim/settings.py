"""The table `simulation` of `fleet.toml`: who is in the simulated fleet, and how fast it is."""

from typing import Annotated, Any

from pydantic import Field, ValidationError

from fleetprune.config_file import Section, explain
from fleetprune.errors import ConfigError
from fleetprune.messages import Name
from fleetprune_coordinator.config import FleetConfig
from fleetprune_sim.data.partition import PartitionSpec

Rate = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class DeviceProfile(Section):
    """How fast, how well connected and how reliable the devices of one class are.

    The defaults are a small Linux board on a home network. None of the figures changes what is
    learned unless a device is away, falls silent, or comes after the round's timeout.
    """

    share: float = Field(default=1.0, gt=0)
    """Of the fleet's devices, in proportion to the other classes' shares."""
    kind: str = ""
    """Hardware in the data's own terms; devices of this class own samples of it only."""
    macs_per_s: Rate = 2e9
    """Multiply-accumulates per second in training and inference."""
    up_bytes_per_s: Rate = 500_000.0
    down_bytes_per_s: Rate = 2_000_000.0
    latency_s: float = Field(default=0.05, ge=0)
    """Of each of a task's exchanges: announcement, model, answer."""
    jitter: float = Field(default=0.2, ge=0)
    """Standard deviation of the logarithm of a task's duration."""
    available: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability that a device is online when a round begins."""
    drop_out: Probability = 0.0
    """Probability that a device that was asked falls silent."""
    compute_w: float = Field(default=3.0, ge=0)
    """Power while it computes, in watts above idle."""
    radio_w: float = Field(default=1.0, ge=0)
    """Power while it sends or receives, in watts above idle."""


class SimulationConfig(Section):
    """All of `[simulation]`."""

    task: str = ""
    """Name of a task, or `module:factory` of the user's own."""
    devices: int = Field(default=100, ge=1)
    samples_per_device: int | None = Field(default=None, ge=1)
    """In the mean; None: all samples are dealt out."""
    held_out: float = Field(default=0.15, ge=0, lt=1)
    """Share of its samples that a device judges its model by."""
    partition: PartitionSpec = Field(default_factory=PartitionSpec)
    classes: dict[Name, DeviceProfile] = Field(default_factory=dict)
    evaluate_every: int = Field(default=5, ge=0)
    """Training rounds between evaluations on the validation set; 0: at the end only."""
    evaluation_samples: int = Field(default=2000, ge=1)
    """Of the validation set, for evaluations during training."""
    auto_rounds: float = Field(default=2.0, gt=0)
    """Rounds that may be spent on finding out what is "auto", in trainings' `training.rounds`."""


def simulation_of(config: FleetConfig) -> SimulationConfig:
    """The simulation that a fleet's description asks for.

    Raises:
        ConfigError: A key is unknown or has a wrong value, or a class is none of the fleet's.
    """
    try:
        found = SimulationConfig.model_validate(config.simulation)
    except ValidationError as e:
        raise ConfigError(f"simulation: {explain(e, SimulationConfig)}") from e
    if unknown := sorted(found.classes.keys() - config.classes.keys()):
        raise ConfigError(
            f"simulation.classes.{unknown[0]}: no such class, "
            f"expected one of {', '.join(config.classes)}"
        )
    profiles: dict[str, Any] = {n: found.classes.get(n, DeviceProfile()) for n in config.classes}
    return found.model_copy(update={"classes": profiles})
