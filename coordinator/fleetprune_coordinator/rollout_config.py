"""The section `[rollout]` of `fleet.toml`: how a release reaches its devices, and what stops it."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from fleetprune.config_file import Section
from fleetprune.messages import Name
from fleetprune.rollout import MAX_CANARIES, WHOLE

DAY = 24 * 3600.0  # seconds
Part = Annotated[float, Field(gt=0, le=1)]


class RolloutConfig(Section):
    """Stages and gates; every class goes through them by itself."""

    canaries: tuple[Name, ...] = Field(default=(), max_length=MAX_CANARIES)
    """Devices that take a release first, each that of its class."""
    canary_count: int = Field(default=3, ge=0, le=MAX_CANARIES)
    """How many are drawn in a class that has none of `canaries`, but at most a third of its
    devices; 0: none, and the first stage is the first of `stages`."""
    stages: tuple[Part, ...] = Field(default=(0.05, 0.25, 0.5, 1.0), min_length=1, max_length=32)
    """Shares of a class's devices, rising to 1. With 1 alone nobody is drawn as a canary."""
    soak_s: float = Field(default=3600.0, ge=0)
    """Seconds that a stage lasts at least, and that a device must be seen after its installation
    to count as one that runs the release well."""
    deadline_s: float = Field(default=DAY, gt=0)
    """Seconds after which a device that was told of a release and has not got there counts as
    failed."""
    away_s: float = Field(default=7 * DAY, gt=0)
    """A device that was not seen for so long is not waited for."""
    max_failures: float = Field(default=0.02, ge=0, lt=1)
    """Share of devices that may fail."""
    max_crashes: int = Field(default=3, ge=0)
    """Of one device while it runs the release (power cuts are among them); more, and it failed."""
    max_accuracy_loss: float = Field(default=0.02, ge=0, lt=1)
    """As a share of held-out samples, against what the device ran before."""
    max_latency_rise: float = Field(default=0.5, ge=0)
    """Of most devices, as a share of their latency before."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """How sure a gate must be to abort."""
    auto: bool = True
    """False: stages advance only when a person promotes them; gates abort all the same."""

    @model_validator(mode="after")
    def _rise_to_all(self) -> Self:
        if self.stages[-1] != 1 or list(self.stages) != sorted(set(self.stages)):
            raise ValueError(f"stages {list(self.stages)}, expected shares that rise to 1.0")
        if self.deadline_s <= self.soak_s:
            raise ValueError(
                f"deadline_s {self.deadline_s:g} is within soak_s {self.soak_s:g}: nobody could "
                "have soaked by then"
            )
        return self

    def shares(self, *, named: bool) -> tuple[int, ...]:
        """The stages in ten-thousandths of the devices; 0 is that of the canaries.

        Args:
            named: Whether the class has any of `canaries`.
        """
        shares = tuple(max(1, round(WHOLE * share)) for share in self.stages)
        drawn = self.canary_count > 0 and len(shares) > 1
        return (0, *shares) if named or drawn else shares
