"""A registry and a release repository on disk with devices that report; no broker, own time."""

import json
from datetime import UTC, datetime
from pathlib import Path

from fleetprune.files import write_atomic
from fleetprune.messages import Enrol, Telemetry
from fleetprune_coordinator.events import EventLog
from fleetprune_coordinator.keys import RELEASES, init_repository
from fleetprune_coordinator.registry import Registry
from fleetprune_coordinator.releases import ReleaseContent, ReleaseRepository
from fleetprune_coordinator.rollout_config import RolloutConfig
from fleetprune_coordinator.rollout_ledger import RolloutLedger
from fleetprune_coordinator.rollouts import Rollouts

START = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()
CLASSES = ("phone", "watch")
RULES = RolloutConfig(canary_count=1, stages=(0.5, 1.0), soak_s=60, deadline_s=600)


def content(text):
    return ReleaseContent(onnx=text.encode(), golden=b"golden", input_shape=(4,))


def write_fast(path, data):
    """Survives a kill, though not a power cut."""
    write_atomic(path, data, sync=False)


class Fleet:
    """Opened anew, it goes on where the last one stopped."""

    def __init__(self, folder: Path, rules=RULES, now=START, write=write_fast, gap_s=1e9):
        self.folder, self.moment = folder, now
        if not (folder / RELEASES).is_dir():
            init_repository(folder / RELEASES, datetime.fromtimestamp(START, UTC))
        self.repository = ReleaseRepository(
            folder / RELEASES, lambda: datetime.fromtimestamp(self.moment, UTC), write=write
        )
        self.registry = Registry.open(folder, lambda: self.moment, durable=False)
        with self.registry.transaction() as db:  # so that cohorts are the same in every run
            db.execute("UPDATE meta SET value = '00000007' WHERE key = 'run'")
        self.registry.set_classes(dict.fromkeys(CLASSES, True))
        self.events = folder / "events.jsonl"
        self.log = EventLog(self.events, lambda: self.moment)
        self.announced = []
        ledger = RolloutLedger(self.registry, self.repository, rules, self.log, lambda: self.moment)
        ledger.announce = self.announced.append
        self.rollouts = Rollouts(ledger, gap_s=gap_s)

    def __enter__(self):
        self.rollouts.ledger.reconcile()
        return self

    def __exit__(self, *error):
        self.registry.close()
        self.log.__exit__(None, None, None)

    def publish(self, number, classes=CLASSES):
        self.repository.publish_release(number, {c: content(f"{c} {number}") for c in classes})

    def enrol(self, *names, device_class="phone"):
        for name in names:
            self.registry.enrol(
                Enrol(
                    device=name,
                    device_class=device_class,
                    agent_version="1",
                    trains=True,
                    samples=9,
                )
            )

    def report(self, name, release, device_class="phone", state="committed", **fields):
        self.registry.record_telemetry(
            Telemetry(
                device=name, device_class=device_class, release=release, state=state, **fields
            )
        )

    def obey(self, device_class="phone"):
        """Every device of the class runs what it is told to run, and says so."""
        document = self.repository.rollout(device_class)
        for d in self.registry.rollout_devices(device_class):
            runs = d.telemetry.release if d.telemetry else 0
            if wanted := document.wanted(d.name, runs):
                self.report(d.name, wanted, device_class)

    def finish(self, device_class="phone", most=50):
        """Look and obey until no rollout of the class is open."""
        for _ in range(most):
            if device_class not in self.registry.open_rollouts():
                return
            self.obey(device_class)
            self.tick(61)
        raise AssertionError("the rollout does not end")

    def tick(self, after=0.0):
        self.moment += after
        self.rollouts.tick()

    def wanted(self, name, installed=0, device_class="phone"):
        """From what is signed."""
        return self.repository.rollout(device_class).wanted(name, installed)

    def decisions(self, device_class="phone"):
        return [(e.action, e.release, e.who) for e in self.registry.rollout_log(device_class)]

    def told(self):
        lines = [json.loads(line) for line in self.events.read_text().splitlines()]
        return [(e["action"], e["device_class"], e["release"], e["stage"]) for e in lines]
