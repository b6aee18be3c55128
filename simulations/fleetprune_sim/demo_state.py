"""What the demo knows about its fleet, folded from the coordinator's events."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Event = Mapping[str, Any]

MAKING_GRAPHS = "everyone is here; making each class's graphs takes a while"
"""Between the last enrolment and the first round; there is no event for it."""
_REPORTED = ("release", "accuracy", "latency_ms", "rss_mb")


@dataclass(frozen=True)
class DeviceState:
    """One device, as far as the coordinator has heard of it."""

    device_class: str
    trains: bool
    doing: str = "starting"
    report: Mapping[str, Any] = field(default_factory=dict)
    """Of its latest report: release, accuracy, latency_ms, rss_mb."""


@dataclass(frozen=True)
class FleetState:
    """The whole fleet at one moment."""

    devices: Mapping[str, DeviceState]
    rounds: int
    """Rounds that the run will have."""
    done: int = 0
    """Rounds that are over."""
    timed: int = 0
    """Rounds among them that this run has seen; a resumed coordinator begins later."""
    seconds: float = 0.0
    """These took so long."""
    loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    news: str = "starting"
    """The latest event in words."""

    @property
    def left_s(self) -> float | None:
        """Seconds until the last round is over, at the present pace."""
        if not self.timed:
            return None
        return (self.rounds - self.done) * self.seconds / self.timed


def apply(state: FleetState, event: Event) -> FleetState:
    """The state after an event; what an older or newer coordinator omits or adds does no harm."""
    state = replace(state, news=describe(event) or state.news)
    match event.get("event"):
        case "enrolled":
            state = _update(state, event, "enrolled")
            if all(device.doing == "enrolled" for device in state.devices.values()):
                return replace(state, news=MAKING_GRAPHS)
            return state
        case "round":
            state = replace(
                state,
                news=f"round {event.get('round')} took {float(event.get('seconds') or 0.0):.1f} s",
                done=int(event.get("round", state.done)),
                rounds=int(event.get("of", state.rounds)),
                timed=state.timed + 1,
                seconds=state.seconds + float(event.get("seconds") or 0.0),
                loss=event.get("loss"),
                bytes_up=state.bytes_up + int(event.get("bytes_up") or 0),
                bytes_down=state.bytes_down + int(event.get("bytes_down") or 0),
            )
            return _everyone(state, "training", "observing")
        case "calibrate":
            return _everyone(state, "calibrating", "calibrating")
        case "release":
            return _everyone(state, "updating", "updating")
        case "installed":
            doing = f"runs release {event.get('release', '?')}"
            if event.get("state") == "rolled_back":
                doing = f"rolled back: {event.get('error') or 'no reason given'}"
            return _update(state, event, doing)
    return state


def describe(event: Event) -> str:
    """An event in one line; empty for an event that this version does not know."""
    match event.get("event"):
        case "waiting":
            return f"waiting for devices: {event.get('devices')} of {event.get('expected')}"
        case "enrolled":
            return f"{event.get('device')} enrolled as {event.get('device_class')}"
        case "round":
            loss = event.get("loss")
            parts = [
                f"round {event.get('round')}/{event.get('of')}",
                f"loss {loss:.3f}" if isinstance(loss, int | float) else "loss -",
                f"{float(event.get('seconds') or 0.0):.1f} s",
                f"up {size(event.get('bytes_up'))}",
                f"down {size(event.get('bytes_down'))}",
                f"{event.get('devices', '?')} devices",
            ]
            return "  ".join(parts)
        case "remask":
            return f"masks solved again: version {event.get('mask_version', '?')}"
        case "calibrate":
            step, of = event.get("step", "?"), event.get("of", "?")
            return f"BatchNorm statistics calibrated: pass {step} of at most {of}"
        case "release":
            return f"release {event.get('number', '?')} signed and announced"
        case "installed":
            accuracy = event.get("accuracy")
            own = f", {accuracy:.1%} right on its own data" if accuracy is not None else ""
            return f"{event.get('device')} runs release {event.get('release', '?')}{own}"
        case "done":
            return "every device runs the release made for its class"
        case "stopping":
            return "stopping every process"
    return ""


def strangers(summary: Mapping[str, Any], devices: Mapping[str, str]) -> list[str]:
    """Devices that did not report running the artifact made for their class.

    Args:
        summary: With the keys `classes` and `devices`.
        devices: The fleet: device to class.
    """
    installed = {d["id"]: d.get("installed_sha256") for d in summary.get("devices", [])}
    made = {name: group["artifact"]["sha256"] for name, group in summary["classes"].items()}
    return [
        device
        for device, name in devices.items()
        if installed.get(device) is None or installed[device] != made.get(name)
    ]


class EventReader:
    """Reads the lines that were appended to a file since the last call."""

    def __init__(self, path: Path) -> None:
        """The file need not exist yet."""
        self._path = path
        self._offset = 0

    def read(self) -> list[Event]:
        """New events; a line that is still being written comes with a later call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        events: list[Event] = []
        for line in whole.splitlines():
            event = json.loads(line)
            if isinstance(event, dict):
                events.append(event)
        return events


def size(count: float | None) -> str:
    """Bytes for people: 0 B, 999 B, 1.2 kB, 34 kB, 5.6 MB."""
    return scaled(count, ("B", "kB", "MB", "GB", "TB"))


def scaled(count: float | None, units: tuple[str, ...]) -> str:
    """A count with two significant digits below ten of a unit, else as an integer."""
    if count is None:
        return "-"
    value, step = float(count), 0
    while value >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    digits = 1 if step and value < 9.95 else 0
    return f"{value:.{digits}f} {units[step]}".rstrip()


def _update(state: FleetState, event: Event, doing: str) -> FleetState:
    """A device's own event."""
    name = str(event.get("device"))
    known = state.devices.get(name)
    if known is None:
        known = DeviceState(str(event.get("device_class", "?")), bool(event.get("trains", True)))
    report = {k: event[k] for k in _REPORTED if k in event}
    device = replace(known, doing=doing, report={**known.report, **report})
    return replace(state, devices={**state.devices, name: device})


def _everyone(state: FleetState, training: str, other: str) -> FleetState:
    return replace(
        state,
        devices={
            name: replace(device, doing=training if device.trains else other)
            for name, device in state.devices.items()
        },
    )
