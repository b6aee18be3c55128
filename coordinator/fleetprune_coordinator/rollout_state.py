"""A class's rollout and the devices it is about, as plain values."""

from dataclasses import dataclass
from enum import StrEnum

from fleetprune.messages import Telemetry
from fleetprune.rollout import Rollout


class Status(StrEnum):
    """What became of a rollout; a class has at most one that is under way or paused."""

    RUNNING = "running"
    PAUSED = "paused"
    COMPLETE = "complete"
    ABORTED = "aborted"
    REPLACED = "replaced"
    """A newer release, or a return to an older one, took its place."""

    @property
    def open(self) -> bool:
        """Whether it may still change."""
        return self in (Status.RUNNING, Status.PAUSED)


@dataclass(frozen=True, slots=True)
class RolloutRecord:
    """One release on its way to one class."""

    id: int
    device_class: str
    candidate: int
    stable: int
    """What the class ran before; 0: nothing."""
    stages: tuple[int, ...]
    """Shares in ten-thousandths; 0 is the stage of the canaries alone."""
    salt: str
    canaries: tuple[str, ...]
    """Empty in the stage of the canaries: they are drawn as soon as devices are there."""
    started_at: float
    began_at: float
    """When its stage began; time in which nobody listened does not count."""
    stage: int = 0
    status: Status = Status.RUNNING
    reason: str = ""
    """Of its last decision."""
    held: bool = False
    """The stage waits for a person."""
    changed_at: float = 0.0
    """When it was paused or ended."""

    @property
    def share(self) -> int:
        """Of the devices, in ten-thousandths."""
        return self.stages[self.stage]

    @property
    def place(self) -> str:
        """The stage in words."""
        return stage_name(self.share)

    def plan(self, serial: int, stage: int | None = None) -> Rollout:
        """The document that devices follow.

        Args:
            serial: Higher than that of the class's last document.
            stage: Another stage than its own.
        """
        if not self.status.open:
            stable = self.candidate if self.status is Status.COMPLETE else self.stable
            return Rollout(device_class=self.device_class, serial=serial, stable=stable)
        return Rollout(
            device_class=self.device_class,
            serial=serial,
            stable=self.stable,
            candidate=self.candidate,
            share=self.stages[self.stage if stage is None else stage],
            salt=self.salt,
            canaries=self.canaries,
            paused=self.status is Status.PAUSED,
        )


def stage_name(share: int) -> str:
    """A share in words."""
    return f"{share / 100:g} %" if share else "canaries"


@dataclass(frozen=True, slots=True)
class Device:
    """A device of the class, as far as the coordinator knows."""

    name: str
    online: bool
    last_seen: float
    telemetry: Telemetry | None = None
    """Its last report."""
    reported_at: float = 0.0
    told_at: float | None = None
    """When it could first know that it is in the cohort; None: it has not been seen since."""
    committed_at: float | None = None
    """When it first said that it runs the candidate."""
    latency_before: float | None = None
    """Milliseconds, of what it ran when it was told."""
