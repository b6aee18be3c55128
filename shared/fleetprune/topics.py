"""MQTT topics: who writes where. `{fleet}` and `{device}` are message `Name`s.

    fleetprune/{fleet}/release                 coordinator, retained   Announcement
    fleetprune/{fleet}/coordinator             coordinator, retained   b"online" | b"offline" (will)
    fleetprune/{fleet}/up/{device}/enrol       device                  Enrol
    fleetprune/{fleet}/up/{device}/status      device, retained        b"online" | b"offline" (will)
    fleetprune/{fleet}/up/{device}/ack         device                  TaskAck
    fleetprune/{fleet}/up/{device}/telemetry   device                  Telemetry
    fleetprune/{fleet}/up/{device}/get         device                  a block request
    fleetprune/{fleet}/up/{device}/put         device                  a block of a result
    fleetprune/{fleet}/up/{device}/renew       device                  Renew
    fleetprune/{fleet}/down/{device}/enrolled  coordinator             Enrolled
    fleetprune/{fleet}/down/{device}/task      coordinator             Task
    fleetprune/{fleet}/down/{device}/block     coordinator             a block that was asked for
    fleetprune/{fleet}/down/{device}/stored    coordinator     which blocks of a result have come
    fleetprune/{fleet}/down/{device}/certificate   coordinator         Certificate

A device writes below `up/{device}` and reads below `down/{device}` only, so a broker's access
list is two patterns.
"""

from dataclasses import dataclass

ROOT = "fleetprune"


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of one fleet."""

    fleet: str

    @property
    def release(self) -> str:
        """Retained announcement."""
        return f"{ROOT}/{self.fleet}/release"

    @property
    def coordinator(self) -> str:
        """Retained presence of the coordinator."""
        return f"{ROOT}/{self.fleet}/coordinator"

    def up(self, device: str, kind: str) -> str:
        """What a device writes; `device` may be `+` in a subscription."""
        return f"{ROOT}/{self.fleet}/up/{device}/{kind}"

    def down(self, device: str, kind: str) -> str:
        """What a device reads; `kind` may be `+` in a subscription."""
        return f"{ROOT}/{self.fleet}/down/{device}/{kind}"

    def parse_up(self, topic: str) -> tuple[str, str] | None:
        """(device, kind) of a topic that a device of this fleet writes; None for any other."""
        parts = topic.split("/")
        if len(parts) != 5 or parts[:3] != [ROOT, self.fleet, "up"]:
            return None
        return parts[3], parts[4]
