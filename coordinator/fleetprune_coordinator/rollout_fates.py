"""What became of a release on each device of a cohort, and what that says about the release."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from fleetprune_coordinator.rollout_config import RolloutConfig
from fleetprune_coordinator.rollout_gates import Loss, Paired, accuracy_loss, share_above
from fleetprune_coordinator.rollout_state import Device, RolloutRecord

INTERIM = 0.999
"""How sure a gate on accuracy or latency must be while devices are still awaited: looks before
the last one must cost next to nothing (Haybittle 1971; Peto et al. 1976)."""
DOUBTFUL = 0.8  # a loss that is as probable as this is waited on until the deadline
JITTER_MS = 1.0  # by which latency may differ from one day to the next, whatever the model
SHOWN = 20  # devices whose reasons are kept with a decision


class Fate(StrEnum):
    """Of a device that was told."""

    GOOD = "good"
    FAILED = "failed"
    SILENT = "silent"
    """Counts as failed: the deadline has passed."""
    WAITING = "waiting"
    EXCUSED = "excused"
    """It says why it does not fetch the release, and goes on saying so: it does not count."""


def fate(device: Device, candidate: int, rules: RolloutConfig, now: float) -> tuple[Fate, str]:
    """What became of a release on a device that was told of it, and why that is thought.

    Args:
        device: It has `told_at`.
        candidate: The release.
        rules: Deadline, soak time, crashes.
        now: Seconds since 1970.
    """
    t, told = device.telemetry, device.told_at or 0.0
    if t is not None and t.release == candidate:
        if t.variant is not None:
            return (
                Fate.FAILED,
                f"runs the model of class {t.variant}: {t.error or 'its own failed'}",
            )
        if t.crashes > rules.max_crashes:
            return Fate.FAILED, f"crashed {t.crashes} times, allowed are {rules.max_crashes}"
        if t.state == "committed":
            return _soaking(device, rules, now)
    elif t is not None and t.failed == candidate:
        way = "rolled back" if t.state == "rolled_back" else "refused it"
        return Fate.FAILED, f"{way}: {t.error or 'no reason given'}"
    if now < told + rules.deadline_s:
        if t is not None and t.release == candidate:
            return Fate.WAITING, "has it on trial"
        return Fate.WAITING, (t.postponed if t is not None else "") or "has not installed it yet"
    if t is not None and t.postponed and now < device.reported_at + rules.deadline_s:
        return Fate.EXCUSED, t.postponed
    if device.last_seen < now - rules.deadline_s:
        return Fate.SILENT, "has not been heard of since it was told"
    return Fate.SILENT, f"gave no result within {rules.deadline_s:g} s"


def _soaking(device: Device, rules: RolloutConfig, now: float) -> tuple[Fate, str]:
    """Of a device that has committed: it must be seen again after the soak time."""
    due = (device.committed_at or device.reported_at) + rules.soak_s
    if now >= due and (device.online or device.last_seen >= due):
        return Fate.GOOD, "runs it"
    if now < due + rules.deadline_s:
        return Fate.WAITING, "runs it" + ("" if now < due else ", but has not been seen since")
    return Fate.SILENT, "ran it, and has not been heard of since"


@dataclass(frozen=True, slots=True)
class Evidence:
    """A cohort's answer; `counted` devices count, the excused do not."""

    counted: int
    good: int
    failed: int
    """With the silent ones."""
    waiting: int
    excused: int
    failure_doubt: float
    """Probability that more devices fail than may, if none of those that are awaited does."""
    accuracy: Loss | None
    slow: int
    timed: int
    latency_doubt: float
    """Probability that most devices are slower than they may be."""
    crashes: int
    reasons: dict[str, str]
    """Of some devices that failed or are awaited."""

    def as_json(self) -> dict[str, Any]:
        """For the audit log."""
        return asdict(self)


def gather(
    rollout: RolloutRecord, told: Sequence[Device], rules: RolloutConfig, now: float
) -> Evidence:
    """The evidence of the devices that were told.

    Args:
        rollout: Which release.
        told: Devices with `told_at`.
        rules: The limits.
        now: Seconds since 1970.
    """
    found = [(d, *fate(d, rollout.candidate, rules, now)) for d in told]
    counts = Counter(f for _, f, _ in found)
    failed, waiting = counts[Fate.FAILED] + counts[Fate.SILENT], counts[Fate.WAITING]
    counted = len(found) - counts[Fate.EXCUSED]
    running = [
        (d, d.telemetry)
        for d in told
        if d.telemetry is not None
        and d.telemetry.release == rollout.candidate
        and d.telemetry.variant is None
    ]
    pairs = [
        Paired(t.accuracy_before, t.accuracy, t.samples, t.agreement)
        for _, t in running
        if t.accuracy is not None and t.accuracy_before is not None
    ]
    timed = [
        t.latency_ms > JITTER_MS + d.latency_before * (1 + rules.max_latency_rise)
        for d, t in running
        if t.latency_ms is not None and d.latency_before
    ]
    order = (Fate.FAILED, Fate.SILENT, Fate.WAITING, Fate.EXCUSED)
    told_why = [(d.name, why) for kind in order for d, f, why in found if f is kind]
    over = counted > 0 and failed / counted > rules.max_failures
    return Evidence(
        counted=counted,
        good=counts[Fate.GOOD],
        failed=failed,
        waiting=waiting,
        excused=counts[Fate.EXCUSED],
        failure_doubt=share_above(failed, counted, rules.max_failures) if over else 0.0,
        accuracy=accuracy_loss(pairs, rules.max_accuracy_loss),
        slow=sum(timed),
        timed=len(timed),
        latency_doubt=share_above(sum(timed), len(timed), 0.5) if any(timed) else 0.0,
        crashes=sum(t.crashes for _, t in running),
        reasons=dict(told_why[:SHOWN]),
    )


class Verdict(StrEnum):
    """What the gates say."""

    GO = "go"
    WAIT = "wait"
    HOLD = "hold"
    """Only a person can tell."""
    ABORT = "abort"


def judge(
    rollout: RolloutRecord, evidence: Evidence, rules: RolloutConfig, now: float
) -> tuple[Verdict, str]:
    """What a stage's evidence comes to, and the reason in a sentence.

    Failures are counted as if all awaited devices would succeed before they abort, and as if all
    would fail before the stage goes on: whatever comes, the verdict would be the same (curtailed
    sampling; Lan, Simon and Halperin 1982), so that looking often costs nothing.
    """
    e, surely = evidence, f"{100 * rules.confidence:g} %"
    allowed = f"{100 * rules.max_failures:g} % may"
    over = e.counted > 0 and e.failed / e.counted > rules.max_failures
    if over and e.failure_doubt >= rules.confidence:
        return Verdict.ABORT, f"{_failed(e)}, {allowed}"
    enough = e.counted == 0 or (e.failed + e.waiting) / e.counted <= rules.max_failures
    sure = rules.confidence if enough or not e.waiting else max(INTERIM, rules.confidence)
    loss = e.accuracy
    if loss is not None and loss.doubt >= sure:
        return Verdict.ABORT, (
            f"accuracy fell by {100 * loss.loss:.1f} points on {loss.samples} samples of "
            f"{_devices(loss.devices)}, {100 * rules.max_accuracy_loss:g} may be lost"
        )
    if e.latency_doubt >= sure:
        return Verdict.ABORT, (
            f"{e.slow} of {e.timed} devices need more than {100 * rules.max_latency_rise:g} % "
            "longer than before"
        )
    if e.waiting and not enough:
        return Verdict.WAIT, f"{e.good} of {e.counted} devices run it well, {e.waiting} awaited"
    if over:
        return Verdict.HOLD, (
            f"{_failed(e)}, {allowed}, but not with {surely} confidence: promote or abort"
        )
    soaked = rollout.began_at + rules.soak_s
    if now < soaked:
        return Verdict.WAIT, f"{e.good} of {e.counted} devices run it well, it soaks"
    doubts = (0.0 if loss is None else loss.doubt, e.latency_doubt)
    last = rollout.stage == len(rollout.stages) - 1  # nobody is spared by waiting
    if max(doubts) >= DOUBTFUL and not last and now < rollout.began_at + rules.deadline_s:
        what = "accuracy" if doubts[0] >= DOUBTFUL else "latency"
        return Verdict.WAIT, f"{what} may have got worse: more reports are awaited"
    return Verdict.GO, f"{e.good} of {e.counted} devices run it well"


def _failed(e: Evidence) -> str:
    shown = "; ".join(f"{name} {why}" for name, why in list(e.reasons.items())[: min(e.failed, 2)])
    more = f"; and {e.failed - 2} more" if e.failed > 2 else ""
    return f"{e.failed} of {e.counted} devices failed ({shown}{more})"


def _devices(n: int) -> str:
    return "1 device" if n == 1 else f"{n} devices"
