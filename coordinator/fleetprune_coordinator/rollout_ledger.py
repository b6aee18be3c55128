"""Writes down what is decided about rollouts, and signs what devices are to be told of it.

The registry goes first. One transaction holds a decision, its evidence, what the rollout is then,
and the document that says so to devices; only then is the document signed and published. A kill in
between leaves a document that is not signed yet, and the next start signs it: no device is ever
told what the registry does not know.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fleetprune.rollout import Rollout
from fleetprune_coordinator.events import EventLog
from fleetprune_coordinator.registry import Registry
from fleetprune_coordinator.releases import ReleaseRepository
from fleetprune_coordinator.rollout_config import RolloutConfig
from fleetprune_coordinator.rollout_engine import Step, View, told_of
from fleetprune_coordinator.rollout_fates import Evidence, gather
from fleetprune_coordinator.rollout_state import Device, RolloutRecord
from fleetprune_coordinator.rollout_tables import LogEntry


class RolloutLedger:
    """Registry and release repository, kept in step; may be used from several threads."""

    def __init__(
        self,
        registry: Registry,
        repository: ReleaseRepository,
        rules: RolloutConfig,
        events: EventLog,
        now: Callable[[], float],
    ) -> None:
        """Prepare; `reconcile` takes up what a predecessor left.

        Args:
            registry: Opened for writing.
            repository: Has the key of the role `rollouts`.
            rules: Stages and limits.
            events: Where decisions are told.
            now: Seconds since 1970.
        """
        self.registry, self.repository, self.rules = registry, repository, rules
        self.now, self._events = now, events
        self.announce: Callable[[int], None] = lambda release: None
        """Hints to devices that a new document is signed; gets a release."""
        self._lock = threading.RLock()
        self._entries: list[tuple[LogEntry, str]] = []
        self._unsigned = True

    def reconcile(self) -> None:
        """Sign what was decided before a kill; take over what was signed by other means."""
        with self.change():
            documents, open_ = self.registry.documents(), self.registry.open_rollouts()
            for name in self.classes():
                signed, known = self.repository.rollout(name), documents.get(name)
                newer = signed is not None and (known is None or signed.serial > known.serial)
                if signed is not None and newer and name not in open_:
                    self.registry.set_document(signed)
            self._unsigned = True

    @contextmanager
    def change(self) -> Iterator[None]:
        """One thread at a time: all that is written inside, or nothing; then it is signed."""
        with self._lock:
            self._entries.clear()
            with self.registry.transaction():
                yield
            for entry, stage in self._entries:
                self._events.emit(
                    "rollout",
                    action=entry.action,
                    device_class=entry.device_class,
                    release=entry.release,
                    stage=stage,
                    who=entry.who,
                    reason=entry.reason,
                )
            self._entries.clear()
            self._sign()

    # ---- what is known

    def classes(self) -> list[str]:
        """The fleet's classes."""
        rows = self.registry.query("SELECT name FROM classes WHERE active ORDER BY name")
        return [r["name"] for r in rows]

    def stable(self, name: str) -> int:
        """What a class runs where it is in no cohort; 0: nothing."""
        document = self.registry.documents().get(name)
        return 0 if document is None else document.stable

    def view(self, rollout: RolloutRecord) -> View:
        """A rollout's class now."""
        devices = self.registry.rollout_devices(rollout.device_class, rollout.id)
        return View(devices, self.rules, self.now())

    def evidence(self, rollout: RolloutRecord) -> Evidence:
        """What is known about a rollout now."""
        view = self.view(rollout)
        return gather(rollout, told_of(view), self.rules, view.now)

    def named(self, name: str) -> tuple[str, ...]:
        """The canaries that the rules name in a class; one that never enrolled is in none."""
        known = {d.name for d in self.registry.devices() if d.device_class == name}
        return tuple(device for device in self.rules.canaries if device in known)

    def salt(self, name: str, release: int) -> str:
        """Of a cohort: another one each time, so that not always the same devices go first."""
        text = f"{self.registry.run}/{name}/{release}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # ---- inside `change`

    def write(self, action: str, who: str, step: Step, view: View | None = None) -> None:
        """Write a decision down, with all that follows from it.

        Args:
            action: What is done.
            who: Decides.
            step: Its result.
            view: Whose devices are told.
        """
        rollout = step.rollout
        self.registry.save_rollout(rollout)
        if view is not None:
            self.tell(step, view)
        name = rollout.device_class
        before = self.registry.documents().get(name)
        document = rollout.plan(1 if before is None else before.serial + 1)
        if before is None or document != before.model_copy(update={"serial": document.serial}):
            self.registry.set_document(document)
            self._unsigned = True
        evidence = step.evidence.as_json()
        entry = LogEntry(
            name, rollout.candidate, action, who, step.reason, evidence, rollout=rollout.id
        )
        self.registry.add_log(entry)
        self._entries.append((entry, rollout.place))

    def tell(self, step: Step, view: View) -> None:
        """Note which devices can know of a rollout, with the latency of what they run."""
        named = {d.name: d for d in view.devices}
        told = {name: _latency(named[name], step.rollout.candidate) for name in step.told}
        if told:
            self.registry.tell(step.rollout.id, told)

    def note_committed(self, rollout: RolloutRecord, view: View) -> None:
        """Note when devices that were told first said that they run the candidate."""
        new = {
            d.name: d.reported_at
            for d in view.devices
            if d.told_at is not None
            and d.committed_at is None
            and d.telemetry is not None
            and (d.telemetry.release, d.telemetry.state) == (rollout.candidate, "committed")
        }
        if new:
            self.registry.note_committed(rollout.id, new)

    def _sign(self) -> None:
        """Publish the documents that are not signed yet; a failure is made up for later."""
        if not self._unsigned:
            return
        changed: list[Rollout] = []
        for name, document in self.registry.documents().items():
            signed = self.repository.rollout(name)
            if document == signed:
                continue
            newest = 0 if signed is None else signed.serial
            serial = max(document.serial, newest + 1)
            changed.append(document.model_copy(update={"serial": serial}))
            self.registry.set_document(changed[-1])
        if changed:
            self.repository.publish_rollout(*changed)
        self._unsigned = False
        if changed:
            self.announce(max(d.candidate or d.stable for d in changed))


def _latency(device: Device, candidate: int) -> float | None:
    t = device.telemetry
    return None if t is None or t.release in (0, candidate) else t.latency_ms
