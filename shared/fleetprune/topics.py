"""MQTT topics: who writes where. `{fleet}` and `{device}` are message `Name`s.

    fleetprune/{fleet}/release                 coordinator, retained   Announcement
    fleetprune/{fleet}/coordinator             coordinator, retained   b"online" | b"offline" (will)
    fleetprune/{fleet}/blocks/{server}         block server, retained  b"online" | b"offline" (will)
    fleetprune/{fleet}/up/{device}/enrol       device                  Enrol
    fleetprune/{fleet}/up/{device}/status      device, retained        b"online" | b"offline" (will)
    fleetprune/{fleet}/up/{device}/ack         device                  TaskAck
    fleetprune/{fleet}/up/{device}/telemetry   device                  Telemetry
    fleetprune/{fleet}/up/{device}/get         device                  a block request
    fleetprune/{fleet}/up/{device}/put         device                  a block of a result
    fleetprune/{fleet}/up/{device}/renew       device                  Renew
    fleetprune/{fleet}/down/{device}/enrolled  coordinator             Enrolled
    fleetprune/{fleet}/down/{device}/task      coordinator             Task
    fleetprune/{fleet}/down/{device}/block     coordinator or block server     a block asked for
    fleetprune/{fleet}/down/{device}/stored    coordinator     which blocks of a result have come
    fleetprune/{fleet}/down/{device}/certificate   coordinator         Certificate

A device writes below `up/{device}` and reads below `down/{device}` only, so a broker's access
list is two patterns. Block servers read `up/+/get`, one of them each message: `shared`.
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

    def blocks(self, server: str) -> str:
        """Retained presence of a block server; `server` may be `+` in a subscription."""
        return f"{ROOT}/{self.fleet}/blocks/{server}"

    @property
    def requests(self) -> str:
        """Subscription to every device's requests for blocks."""
        return self.up("+", "get")

    @property
    def shared_requests(self) -> str:
        """The same, of which every request reaches one of all that subscribe so."""
        return f"$share/blocks/{self.requests}"

    def parse_blocks(self, topic: str) -> str | None:
        """The server whose presence a topic tells; None for any other topic."""
        parts = topic.split("/")
        if len(parts) != 4 or parts[:3] != [ROOT, self.fleet, "blocks"]:
            return None
        return parts[3]

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
