"""Which devices of a class run which release: `rollouts/<class>.json`, a signed target.

Every device decides for itself, from its name alone, so a stage costs the same for ten devices
and for ten million. The names are hashed together with a salt that is new for each rollout, or the
same devices would always go first.
"""

import hashlib
from typing import Annotated

from pydantic import Field, StringConstraints

from fleetprune.messages import Count, Message, Name

WHOLE = 10_000
"""All devices, in the unit of `Rollout.share`."""
MAX_CANARIES = 64
Salt = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]


class Rollout(Message):
    """What devices of one class are told to run."""

    device_class: Name
    serial: int = Field(ge=1, le=2**32 - 1)
    """Rises with every change; a device refuses to go back."""
    stable: Count = 0
    """Release of the devices that are not in the cohort; 0: they keep what they have."""
    candidate: Count = 0
    """Release that is being rolled out; 0: none."""
    share: int = Field(default=0, ge=0, le=WHOLE)
    """Size of the cohort in ten-thousandths."""
    salt: Salt = "0" * 16
    canaries: tuple[Name, ...] = Field(default=(), max_length=MAX_CANARIES)
    """In the cohort, whatever their hash."""
    paused: bool = False
    """Devices that run a model keep it, whatever else stands here."""

    def wanted(self, device: str, installed: int) -> int:
        """The release that a device is to run; 0: whatever it has.

        Args:
            device: Its name.
            installed: The release that it runs; 0: none.
        """
        if self.paused and installed:
            return installed
        return (self.candidate if self.includes(device) else self.stable) or installed

    def includes(self, device: str) -> bool:
        """Whether a device is in the cohort of the candidate."""
        if not self.candidate:
            return False
        return device in self.canaries or cohort(device, self.salt) < self.share


def cohort(device: str, salt: str) -> int:
    """A device's place among all, uniform in 0..9999: it is in every share that is larger."""
    digest = hashlib.sha256(f"{salt}/{device}".encode()).digest()
    return int.from_bytes(digest[:8], "big") * WHOLE >> 64


def rollout_path(device_class: str) -> str:
    """Target path of a class's rollout."""
    return f"rollouts/{device_class}.json"
