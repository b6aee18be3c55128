"""What a rollout does next: a pure function of its state, its devices and the time.

canaries -> 5 % -> 25 % -> 50 % -> 100 % -> complete, and aborted from everywhere. The engine never
acts on a rollout that a person has paused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from fleetprune.rollout import cohort
from fleetprune_coordinator.rollout_config import RolloutConfig
from fleetprune_coordinator.rollout_fates import Evidence, Verdict, gather, judge
from fleetprune_coordinator.rollout_state import Device, RolloutRecord, Status, stage_name


class Action(StrEnum):
    """What is done, and recorded."""

    DRAW = "draw"
    """Devices for the stage of the canaries."""
    ADVANCE = "advance"
    COMPLETE = "complete"
    HOLD = "hold"
    ABORT = "abort"
    WAIT = "wait"
    """Nothing, and it is not recorded."""


@dataclass(frozen=True, slots=True)
class Step:
    """A decision."""

    action: Action
    rollout: RolloutRecord
    """As it is afterwards."""
    reason: str
    evidence: Evidence
    told: tuple[str, ...] = ()
    """Devices that can know of it now, for the first time."""


@dataclass(frozen=True, slots=True)
class View:
    """What is known of a class at one moment."""

    devices: Sequence[Device]
    rules: RolloutConfig
    """Limits; the stages of a rollout were fixed when it began."""
    now: float
    """Seconds since 1970."""

    def lately(self) -> list[Device]:
        """Devices that are not away."""
        since = self.now - self.rules.away_s
        return [d for d in self.devices if d.online or d.last_seen >= since]


def decide(rollout: RolloutRecord, view: View) -> Step:
    """The next step of a rollout that runs."""
    new = newly_told(rollout, view)
    told = told_of(view, new)
    evidence = gather(rollout, told, view.rules, view.now)
    if rollout.share == 0 and not rollout.canaries:
        return _draw(rollout, view, evidence)
    verdict, reason = judge(rollout, evidence, view.rules, view.now)
    if verdict is not Verdict.ABORT:
        verdict, reason = _unseen(rollout, view, {d.name for d in told}) or (verdict, reason)
    if verdict is Verdict.GO and not view.rules.auto:
        verdict, reason = Verdict.HOLD, f"{reason}; rollout.auto is false: promote it"
    if verdict is Verdict.GO:
        step = advance(rollout, view, reason, evidence)
        return replace(step, told=tuple(dict.fromkeys((*new, *step.told))))
    if verdict is Verdict.ABORT:
        return replace(abort(rollout, view.now, reason, evidence), told=tuple(new))
    held = verdict is Verdict.HOLD
    action = Action.HOLD if held and not rollout.held else Action.WAIT
    return Step(
        action, replace(rollout, held=held, reason=reason), reason, evidence, told=tuple(new)
    )


def newly_told(rollout: RolloutRecord, view: View) -> list[str]:
    """Devices of the cohort that are there, or were since the stage began, for the first time.

    Only who was in contact can have got the release: devices that are away neither hold up a
    stage nor fail it.
    """
    plan = rollout.plan(1)
    return [
        d.name
        for d in view.devices
        if d.told_at is None
        and (d.online or d.last_seen >= rollout.began_at)
        and plan.includes(d.name)
    ]


def told_of(view: View, new: Sequence[str] = ()) -> list[Device]:
    """The devices that were told, and those that are told now."""
    names = set(new)
    told = [replace(d, told_at=view.now) if d.name in names else d for d in view.devices]
    return [d for d in told if d.told_at is not None]


def advance(
    rollout: RolloutRecord, view: View, reason: str, evidence: Evidence, *, first: int | None = None
) -> Step:
    """Go on to the next stage that adds a device, or complete the rollout.

    Args:
        rollout: It is under way.
        view: Its class.
        reason: Why.
        evidence: What was known.
        first: Stages before this one are passed over; None: the next.
    """
    first = rollout.stage + 1 if first is None else first
    stage, skipped = _next_stage(rollout, first, view)
    if skipped:
        names = ", ".join(stage_name(rollout.stages[s]) for s in skipped)
        reason = f"{reason}; {names} skipped: no other device was seen lately"
    changed = replace(rollout, held=False, reason=reason, changed_at=view.now)
    if stage is None:
        return Step(Action.COMPLETE, replace(changed, status=Status.COMPLETE), reason, evidence)
    gone = replace(changed, status=Status.RUNNING, stage=stage, began_at=view.now)
    return Step(Action.ADVANCE, gone, reason, evidence, tuple(newly_told(gone, view)))


def abort(rollout: RolloutRecord, now: float, reason: str, evidence: Evidence) -> Step:
    """End a rollout: its devices go back to the stable release, if there is one."""
    if not rollout.stable:
        reason = f"{reason}; there is no release to go back to: devices that have it keep it"
    ended = replace(rollout, status=Status.ABORTED, held=False, reason=reason, changed_at=now)
    return Step(Action.ABORT, ended, reason, evidence)


def begin(rollout: RolloutRecord, view: View) -> Step:
    """The first step of a rollout that was just made."""
    evidence = gather(rollout, [], view.rules, view.now)
    if rollout.share:
        return advance(rollout, view, "begins", evidence, first=0)
    if not rollout.canaries:
        return _draw(rollout, view, evidence)
    reason = f"begins with the canaries {', '.join(rollout.canaries)}"
    named = replace(rollout, reason=reason)
    return Step(Action.ADVANCE, named, reason, evidence, tuple(newly_told(named, view)))


def _draw(rollout: RolloutRecord, view: View, evidence: Evidence) -> Step:
    """Choose canaries among the devices that are there: the first in the order of cohorts."""
    here = sorted((cohort(d.name, rollout.salt), d.name) for d in view.devices if d.online)
    if not here:
        reason = "no device of the class is online: the first that comes is the canary"
        return Step(Action.WAIT, replace(rollout, reason=reason), reason, evidence)
    most = max(1, min(view.rules.canary_count, len(view.lately()) // 3))
    chosen = tuple(name for _, name in here[:most])
    reason = f"drawn as canaries: {', '.join(chosen)}"
    drawn = replace(rollout, canaries=chosen, began_at=view.now, reason=reason)
    return Step(Action.DRAW, drawn, reason, evidence, tuple(newly_told(drawn, view)))


def _next_stage(rollout: RolloutRecord, first: int, view: View) -> tuple[int | None, list[int]]:
    """The first stage from `first` on that adds a device, if there is one; and those before it."""
    has = rollout.plan(1) if first > rollout.stage else None
    left = [d.name for d in view.lately() if has is None or not has.includes(d.name)]
    skipped: list[int] = []
    for stage in range(first, len(rollout.stages)):
        plan = rollout.plan(1, stage)
        if any(plan.includes(name) for name in left):
            return stage, skipped
        skipped.append(stage)
    return None, skipped


def _unseen(rollout: RolloutRecord, view: View, told: set[str]) -> tuple[Verdict, str] | None:
    """A verdict where none of the devices that the stage adds has been there yet."""
    before = rollout.plan(1, rollout.stage - 1) if rollout.stage else None
    plan = rollout.plan(1)
    names = [d.name for d in view.devices if plan.includes(d.name)]
    added = [name for name in names if before is None or not before.includes(name)]
    if any(name in told for name in added):
        return None
    overdue = view.now >= rollout.began_at + view.rules.deadline_s
    if rollout.share:
        reason = f"none of the {len(added)} devices that the stage adds has been seen yet"
        return None if overdue else (Verdict.WAIT, reason)
    reason = f"of the canaries {', '.join(rollout.canaries)} none has been seen"
    if overdue:
        return Verdict.HOLD, f"{reason}: promote, abort, or start it with others"
    return Verdict.WAIT, reason
