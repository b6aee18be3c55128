"""Devices and rollouts for the tests of the engine."""

from dataclasses import replace

from fleetprune.messages import Telemetry
from fleetprune_coordinator.rollout_config import RolloutConfig
from fleetprune_coordinator.rollout_engine import View, begin, decide
from fleetprune_coordinator.rollout_state import Device, RolloutRecord

HOUR, DAY = 3600.0, 86400.0


def report(name, release=1, state="committed", **fields):
    return Telemetry(device=name, device_class="phone", release=release, state=state, **fields)


def device(name, seen=0.0, *, online=True, **fields):
    telemetry = report(name, **fields) if fields else None
    return Device(name, online, seen, telemetry, reported_at=seen)


def record(**fields):
    base = RolloutRecord(
        id=1,
        device_class="phone",
        candidate=2,
        stable=1,
        stages=RolloutConfig().shares(named=False),
        salt="00112233aabbccdd",
        canaries=(),
        started_at=0.0,
        began_at=0.0,
    )
    return replace(base, **fields)


class Class:
    """A device class that follows the engine: decisions are applied at once."""

    def __init__(self, devices, rules=None, now=0.0, **fields):
        self.rules, self.now = rules or RolloutConfig(), now
        self.devices = {d.name: d for d in devices}
        self.rollout = record(
            stages=self.rules.shares(named=bool(fields.get("canaries"))), **fields
        )
        self.log = []
        self._apply(begin(self.rollout, self.view))

    @property
    def view(self):
        return View(list(self.devices.values()), self.rules, self.now)

    def _apply(self, step):
        self.rollout = step.rollout
        self.log.append((step.action.value, step.reason))
        for name in step.told:
            self.devices[name] = replace(self.devices[name], told_at=self.now)
        return step

    def step(self, after=0.0):
        """Some time later: one decision."""
        self.now += after
        if not self.rollout.status.open:
            raise AssertionError(f"the rollout has ended: {self.rollout}")
        return self._apply(decide(self.rollout, self.view))

    def cohort(self):
        plan = self.rollout.plan(1)
        return [name for name in self.devices if plan.includes(name)]

    def says(self, name, **fields):
        """A device reports."""
        d = self.devices[name]
        telemetry = report(name, **fields)
        committed = d.committed_at
        if (telemetry.release, telemetry.state) == (self.rollout.candidate, "committed"):
            committed = committed if committed is not None else self.now
        self.devices[name] = replace(
            d,
            telemetry=telemetry,
            last_seen=self.now,
            reported_at=self.now,
            committed_at=committed,
        )

    def leaves(self, name):
        self.devices[name] = replace(self.devices[name], online=False, last_seen=self.now)

    def comes(self, name):
        self.devices[name] = replace(self.devices[name], online=True, last_seen=self.now)

    def install(self, **fields):
        """All of the cohort that are there run the candidate well."""
        for name in self.cohort():
            if self.devices[name].online:
                self.says(name, **{"release": self.rollout.candidate, **fields})
