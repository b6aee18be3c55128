"""What is known about rollouts and devices, each state with its reason; read only."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from fleetprune.messages import Telemetry
from fleetprune.rollout import Rollout, cohort
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.registry import Registry
from fleetprune_coordinator.rollout_engine import View, decide, told_of
from fleetprune_coordinator.rollout_fates import fate, gather
from fleetprune_coordinator.rollout_state import Device, RolloutRecord, Status, stage_name


@dataclass(frozen=True, slots=True)
class _Class:
    """A device class at one moment."""

    name: str
    document: Rollout | None
    last: RolloutRecord | None
    """The rollout that is under way, or else the last one."""
    evidence: Mapping[str, Any] | None
    """Of the last decision about `last`."""
    view: View


def _classes(registry: Registry, fleet: FleetConfig, now: float) -> list[_Class]:
    documents, found = registry.documents(), []
    for name in fleet.classes:
        last = next(iter(registry.rollouts(name)), None)
        devices = registry.rollout_devices(name, None if last is None else last.id)
        decided = None if last is None else registry.last_decision(last.id)
        evidence = None if decided is None else decided.evidence
        view = View(devices, fleet.rollout, now)
        found.append(_Class(name, documents.get(name), last, evidence, view))
    return found


def rollout_report(registry: Registry, fleet: FleetConfig, now: float) -> dict[str, Any]:
    """Every class: what it is told to run, how far that has come, and why no further."""
    known = {d.name for d in registry.devices()}
    return {
        "fleet": fleet.fleet,
        "classes": [_class(c) for c in _classes(registry, fleet, now)],
        "canaries_not_enrolled": [name for name in fleet.rollout.canaries if name not in known],
    }


def _class(c: _Class) -> dict[str, Any]:
    devices = c.view.devices
    runs = Counter(0 if d.telemetry is None else d.telemetry.release for d in devices)
    return {
        "class": c.name,
        "devices": len(devices),
        "online": sum(d.online for d in devices),
        "stable": 0 if c.document is None else c.document.stable,
        "runs": {str(release): n for release, n in sorted(runs.items())},
        "rollout": None if c.last is None else _rollout(c.last, c),
    }


def _rollout(rollout: RolloutRecord, c: _Class) -> dict[str, Any]:
    """A rollout; one that has ended as it was decided, one that is under way as it stands now."""
    view, plan, reason = c.view, rollout.plan(1), rollout.reason
    evidence: Mapping[str, Any] | None = c.evidence
    if rollout.status.open or evidence is None:
        evidence = gather(rollout, told_of(view), view.rules, view.now).as_json()
    if rollout.status is Status.RUNNING:
        reason = decide(rollout, view).reason
    return {
        "release": rollout.candidate,
        "before": rollout.stable,
        "status": "held" if rollout.held and rollout.status.open else rollout.status.value,
        "reason": reason,
        "stage": rollout.stage,
        "stages": [stage_name(share) for share in rollout.stages],
        "canaries": list(rollout.canaries),
        "cohort": sum(plan.includes(d.name) for d in view.devices),
        "started_at": rollout.started_at,
        "stage_began_at": rollout.began_at,
        "soaks_until": rollout.began_at + view.rules.soak_s,
        "changed_at": rollout.changed_at,
        "evidence": evidence,
    }


def device_report(
    registry: Registry, fleet: FleetConfig, now: float, names: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Devices of the fleet's classes, or some of them by name: what each runs, and why.

    Args:
        registry: Opened in any way.
        fleet: Its description.
        now: Seconds since 1970.
        names: Empty: all.
    """
    return [
        _device(device, c)
        for c in _classes(registry, fleet, now)
        for device in c.view.devices
        if not names or device.name in names
    ]


def _device(device: Device, c: _Class) -> dict[str, Any]:
    t, last, name = device.telemetry, c.last, device.name
    runs = 0 if t is None else t.release
    told = last is not None and device.told_at is not None
    return {
        "device": name,
        "class": c.name,
        "online": device.online,
        "last_seen": device.last_seen,
        "release": runs,
        "wanted": 0 if c.document is None else c.document.wanted(name, runs),
        "state": "unknown" if t is None else t.state,
        "variant": None if t is None else t.variant,
        "reason": _why(device, c),
        "cohort": None if last is None else cohort(name, last.salt),
        "stage": None if last is None or not last.status.open else _stage(name, last),
        "fate": fate(device, last.candidate, c.view.rules, c.view.now)[0].value
        if last is not None and told
        else None,
        "told_at": device.told_at,
        "failed": 0 if t is None else t.failed,
        "postponed": "" if t is None else t.postponed,
        "error": "" if t is None else t.error,
        "accuracy": None if t is None else t.accuracy,
        "accuracy_before": None if t is None else t.accuracy_before,
        "samples": 0 if t is None else t.samples,
        "agreement": None if t is None else t.agreement,
        "latency_ms": None if t is None else t.latency_ms,
        "latency_before": device.latency_before,
        "crashes": 0 if t is None else t.crashes,
        "reported_at": device.reported_at or None,
    }


def _stage(name: str, rollout: RolloutRecord) -> str:
    """The first stage that a device is in."""
    for stage, share in enumerate(rollout.stages):
        if rollout.plan(1, stage).includes(name):
            return stage_name(share)
    return "none"


def _why(device: Device, c: _Class) -> str:
    """Why a device runs what it runs."""
    t, document, last = device.telemetry, c.document, c.last
    if t is None:
        return "has not reported yet"
    wanted = 0 if document is None else document.wanted(device.name, t.release)
    if document is None or not wanted:
        return "no release yet" if not t.release else f"is told nothing, and runs {t.release}"
    if t.release == wanted:
        return _settled(device, t, document, last)
    if t.failed == wanted:
        return f"runs {_release(t)}, since {wanted} failed: {t.error or 'no reason given'}"
    seen = "" if device.online else f"; not seen since {utc(device.last_seen)}"
    if last is not None and device.told_at is not None and wanted == last.candidate:
        why = fate(device, wanted, c.view.rules, c.view.now)[1]
        return f"runs {_release(t)}; of {wanted}: {why}{seen}"
    return f"runs {_release(t)}; {wanted} is wanted{seen or ', and not reported yet'}"


def _settled(device: Device, t: Telemetry, document: Rollout, last: RolloutRecord | None) -> str:
    """Of a device that runs what it is to run."""
    runs = f"runs {t.release}"
    if t.variant is not None:
        return f"{runs} as the model of class {t.variant}: {t.error or 'its own failed'}"
    if document.candidate and t.release != document.candidate and last is not None:
        if document.paused:
            return f"{runs}: the rollout of {document.candidate} is paused"
        return f"{runs}: its turn for {document.candidate} is {_stage(device.name, last)}"
    return f"{runs}, as it is told" + (", on trial" if t.state == "trial" else "")


def _release(t: Telemetry) -> str:
    return str(t.release) if t.release else "nothing"


def log_report(registry: Registry, device_class: str | None, limit: int) -> list[dict[str, Any]]:
    """Decisions with their evidence, the oldest first."""
    return [asdict(entry) for entry in registry.rollout_log(device_class, limit)]


def utc(seconds: float) -> str:
    """A time for people."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
