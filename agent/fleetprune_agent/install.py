"""Installing a release: nothing that was not verified and tried becomes active.

rollout -> manifest -> can it run here? -> may it be fetched, is there room? -> pull into the idle
slot (a delta where one fits) -> verify -> trial -> switch -> (first good runs: `Predictor`
commits; failures: rolled back)

Every step may be killed and is simply begun again at the next start: what was downloaded is
kept, the active slot is not touched before the switch. The journal follows, for people and for
reports; where it is behind, the slots are right.

A model that failed here is not tried again. Where its manifest names a smaller class, that class's
model of the same release is installed instead, by the same steps and within our own budget.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, cast

from fleetprune.errors import GraphError, InstallError, TrustError
from fleetprune.files import free_bytes
from fleetprune.manifest import Manifest
from fleetprune.rollout import Rollout
from fleetprune_agent.compatibility import Machine, shortfall, this_machine, undemanding
from fleetprune_agent.fetch import (
    ApplyDelta,
    Fetch,
    apply_lazily,
    bytes_to_fetch,
    is_there,
    room_needed,
)
from fleetprune_agent.journal import Phase
from fleetprune_agent.slot_files import MODEL, Installed
from fleetprune_agent.slots import MAX_STARTS, Slots
from fleetprune_agent.trial import (
    Evidence,
    Finding,
    Limits,
    Request,
    Trial,
    TrialStoppedError,
    in_process,
)
from fleetprune_agent.trust import TrustedRepository

MAX_SMALLER: Final = 8  # classes that are tried instead of ours, one after the other


@dataclass(frozen=True, slots=True)
class Checks:
    """How a release is tried before it may become active, and when it may be fetched."""

    runs: int = 5
    """Timed runs of one sample; the median counts."""
    threads: int = 1
    reserve_bytes: int = 1024 * 1024
    """Left free on the disk for everything else on the device."""
    trial: Trial = in_process
    """Where a release is tried: `InChild()` on a device."""
    machine: Callable[[], Machine] = this_machine
    """What models may require."""
    may_fetch: Callable[[int], str] = lambda _bytes: ""
    """Why nothing large may be downloaded now; empty: it may."""
    apply_delta: ApplyDelta = apply_lazily


class Status(StrEnum):
    """What an attempt to install came to."""

    INSTALLED = "installed"
    CURRENT = "current"
    REJECTED = "rejected"
    POSTPONED = "postponed"
    NONE = "none"
    """Nothing is rolled out to this device."""


@dataclass(frozen=True, slots=True)
class InstallOutcome:
    """Result of `install`."""

    status: Status
    release: int
    """The release that this device is to run; 0: none."""
    reason: str = ""
    """Why it was rejected, now or earlier, or is not fetched now."""
    finding: Finding | None = None
    """What the trial found, where there was one."""

    @property
    def latency_ms(self) -> float | None:
        """Median of one sample on this device, where the release was tried."""
        return None if self.finding is None else self.finding.latency_ms


def install(
    repository: TrustedRepository,
    slots: Slots,
    device_class: str,
    checks: Checks | None = None,
    *,
    device: str = "",
    evidence: Evidence | None = None,
) -> InstallOutcome:
    """Bring the release that this device is to run into service, on trial.

    Args:
        repository: Verified access to releases.
        slots: Where they are installed.
        device_class: Ours.
        checks: How to try a release.
        device: Our name, which decides whether we are in a cohort.
        evidence: Our samples, to compare a release with the one that runs.

    Returns:
        What came of it. INSTALLED also says that the other slot's proven release runs again.

    Raises:
        TrustError: The repository, or what it sent, is not to be trusted.
        TransportError: It does not answer; progress is kept, call again later.
        InstallError: The disk is full or refuses. In all three the active release is untouched.
    """
    checks, evidence = checks or Checks(), evidence or Evidence()
    repository.refresh()
    rollout = _rollout(repository, slots, device_class)
    active = slots.active()
    wanted = 0 if rollout is None else rollout.wanted(device, active.release if active else 0)
    if rollout is None or not wanted:
        slots.journal.note(phase=Phase.IDLE, release=0, reason="")
        return InstallOutcome(Status.NONE, 0)
    if active is not None and active.release == wanted and _settled(slots, active, device_class):
        _require_same(repository, active)
        _note_arrival(slots, active)
        return InstallOutcome(Status.CURRENT, wanted)
    attempt = _Attempt(repository, slots, device_class, checks, evidence, rollout.serial, wanted)
    return attempt.run()


def _rollout(repository: TrustedRepository, slots: Slots, device_class: str) -> Rollout | None:
    """The verified rollout; what was heard is remembered before it is acted upon."""
    origin = repository.origin
    heard = slots.heard(origin)
    rollout = repository.rollout(device_class, serial=heard)
    if rollout is None:
        return None
    if rollout.serial < heard:
        raise TrustError(
            f"rollout {rollout.serial} for {device_class} is older than {heard}, "
            "which this device has seen"
        )
    slots.journal.note(origin=origin, serial=rollout.serial)
    return rollout


def _settled(slots: Slots, active: Installed, device_class: str) -> bool:
    """Whether the model of the wanted release is the right one: ours, or instead of ours."""
    own = active.manifest.model_copy(update={"device_class": device_class})
    return active.manifest.device_class == device_class or slots.refusal(own) is not None


def _require_same(repository: TrustedRepository, active: Installed) -> None:
    """TrustError if another model is signed now under the number that is installed."""
    signed = repository.describe(active.manifest.model)
    if signed.sha256 != active.manifest.sha256:
        raise TrustError(
            f"release {active.release} has model {signed.sha256}, "
            f"but the installed release of that number has {active.manifest.sha256}"
        )


def _note_arrival(slots: Slots, active: Installed) -> None:
    slots.journal.note(
        phase=Phase(active.state.value),
        release=active.release,
        device_class=active.manifest.device_class,
        reason="",
    )


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One wanted release: our own class's model, or else a smaller one's."""

    repository: TrustedRepository
    slots: Slots
    device_class: str
    checks: Checks
    evidence: Evidence
    serial: int
    wanted: int

    def run(self) -> InstallOutcome:
        """Try one model after the other, from our own class's downwards."""
        own = self.repository.manifest(self.device_class, self.wanted)
        limits, manifest = Limits.of(own), cast("Manifest | None", own)
        reasons: list[str] = []
        seen: set[str] = set()
        while manifest is not None and len(seen) <= MAX_SMALLER:
            seen.add(manifest.device_class)
            reason, outcome = self._model(manifest, limits)
            if outcome is not None:
                return outcome
            theirs = f"{manifest.device_class}'s model: " if reasons else ""
            reasons.append(theirs + reason)
            smaller = manifest.smaller
            manifest = None
            if smaller is not None and smaller not in seen:
                try:
                    manifest = self.repository.manifest(smaller, self.wanted)
                except TrustError as e:  # our own was tried all the same, and that is to be told
                    reasons.append(f"{smaller}'s model: {e}")
        reason = "; ".join(reasons)
        self._note(Phase.REJECTED, reason=reason[:1000])
        return InstallOutcome(Status.REJECTED, self.wanted, reason)

    def _model(self, manifest: Manifest, limits: Limits) -> tuple[str, InstallOutcome | None]:
        """Install one model; or why it cannot be, and None."""
        active = self.slots.active()
        if active is not None and active.manifest == manifest:
            _note_arrival(self.slots, active)
            return "", InstallOutcome(Status.CURRENT, self.wanted)
        refusal = self.slots.refusal(manifest)
        if refusal is not None:
            return refusal.reason, None
        self._note(Phase.WANTED, device_class=manifest.device_class)
        resumed = self.slots.resume(manifest)
        if resumed is not None:
            _note_arrival(self.slots, resumed)
            return "", InstallOutcome(Status.INSTALLED, self.wanted)
        lacks = "" if undemanding(manifest) else shortfall(manifest, self.checks.machine())
        if lacks:
            return lacks, None
        later = self._not_now(manifest)
        if later:
            self._note(Phase.WANTED, reason=later)
            return "", InstallOutcome(Status.POSTPONED, self.wanted, later)
        folder = self._fetch(manifest)
        return self._try(manifest, folder, limits)

    def _not_now(self, manifest: Manifest) -> str:
        """Why the release is not fetched now; InstallError if it does not fit."""
        folder = self.slots.staged(manifest)
        if folder is not None and is_there(folder / MODEL, manifest):
            return ""
        need = room_needed(self.repository, manifest)
        room = free_bytes(self.slots.folder) + self.slots.reclaimable()
        if need + self.checks.reserve_bytes > room:
            why = (
                f"disk full: release {manifest.release} needs {need} bytes and "
                f"{self.checks.reserve_bytes} in reserve, {room} bytes free in {self.slots.folder}"
            )
            self._note(Phase.WANTED, reason=why)
            raise InstallError(why)
        active = self.slots.active()
        return self.checks.may_fetch(bytes_to_fetch(self.repository, manifest, active))

    def _fetch(self, manifest: Manifest) -> Path:
        self._note(Phase.DOWNLOADING)
        folder = self.slots.stage(manifest)
        try:
            Fetch(
                self.repository,
                self.slots,
                manifest,
                folder,
                self.checks.apply_delta,
                spare=self.checks.reserve_bytes,
                verifying=lambda: self._note(Phase.VERIFYING),
            ).run()
        except InstallError:
            # a disk kept full by half a release could not even take the next metadata
            self.slots.unstage()
            raise
        return folder

    def _try(
        self, manifest: Manifest, folder: Path, limits: Limits
    ) -> tuple[str, InstallOutcome | None]:
        """The health check, and the switch."""
        self._note(Phase.CHECKING)
        active = self.slots.active()
        try:
            finding = self._trial(manifest, folder, limits, active)
        except GraphError as e:
            self.slots.reject(manifest, str(e))
            return str(e), None
        except TrialStoppedError:
            self.slots.forget_check(manifest)
            return "", InstallOutcome(
                Status.POSTPONED, self.wanted, "the agent ended during the health check"
            )
        self.slots.journal.note(model=manifest.sha256, finding=finding)
        _note_arrival(self.slots, self.slots.switch(manifest, self.repository.origin, self.serial))
        return "", InstallOutcome(Status.INSTALLED, self.wanted, finding=finding)

    def _trial(
        self, manifest: Manifest, folder: Path, limits: Limits, active: Installed | None
    ) -> Finding:
        if self.slots.begin_check(manifest) > MAX_STARTS:
            raise GraphError(f"the health check did not finish in {MAX_STARTS} attempts")
        if active is not None and active.release > manifest.release:
            # a release that is being withdrawn is not what its successor must agree with
            limits = limits.model_copy(update={"agreement": None})
        request = Request(
            folder=str(folder),
            manifest=manifest,
            limits=limits,
            incumbent=None if active is None else str(active.model),
            incumbent_shape=() if active is None else active.manifest.input_shape,
            incumbent_labels=() if active is None else active.manifest.labels,
            runs=self.checks.runs,
            threads=self.checks.threads,
        )
        return self.checks.trial(request, self.evidence)

    def _note(self, phase: Phase, *, reason: str = "", device_class: str | None = None) -> None:
        journal = self.slots.journal
        device_class = device_class or journal.read().device_class
        journal.note(phase=phase, release=self.wanted, reason=reason, device_class=device_class)
