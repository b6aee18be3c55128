"""Whom the coordinator and its block servers listen to, and what they hand to whom."""

from collections.abc import Callable, Collection

from fleetprune.errors import FleetpruneError
from fleetprune.messages import MAX_REASON, Certificate, Enrol, Renew
from fleetprune_coordinator.gate import Gate
from fleetprune_coordinator.road_access import may_read


class Doorman:
    """What the fleet's authority says, for those who get messages."""

    def __init__(
        self,
        gate: Gate,
        smaller: Callable[[str], Collection[str]] = lambda _device_class: (),
        renew: Callable[[str, str], str] | None = None,
    ) -> None:
        """Nothing is asked yet.

        Args:
            gate: Who may take part.
            smaller: Per class those whose models its devices may fall back to (`smaller_classes`).
            renew: Makes a new certificate (PEM) from a device's name and request, as
                `Access.renew`; None: not here.
        """
        self._gate, self._smaller, self._renew = gate, smaller, renew

    def refusal(self, device: str) -> str | None:
        """Why a device's messages are not to be acted upon; None: they are."""
        return self._gate.refusal(device)

    def wrong_class(self, enrol: Enrol) -> str | None:
        """Why a device is not of the class that it says; None: it is."""
        joined = self._gate.device_class(enrol.device)
        if joined == enrol.device_class:
            return None
        return (
            f"device {enrol.device} joined as class {joined}, "
            f"its configuration says {enrol.device_class}"
        )

    def may_read(self, device: str, name: str, has_task_with: Callable[[str], bool]) -> bool:
        """Whether a device may read a name of the road; see `road_access.may_read`."""
        if self._gate.refusal(device) is not None:
            return False
        joined = self._gate.device_class(device)
        return joined is not None and may_read(
            name, joined, lambda: self._smaller(joined), has_task_with
        )

    def renew(self, device: str, payload: bytes) -> Certificate | None:
        """The answer to an unverified `Renew`; None: it is not made here.

        Raises:
            MessageError: It is malformed.
        """
        asked = Renew.from_bytes(payload)
        if self._renew is None:
            return None
        try:
            return Certificate(certificate=self._renew(device, asked.request))
        except FleetpruneError as e:
            return Certificate(reason=str(e)[:MAX_REASON])
