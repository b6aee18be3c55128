"""The rollouts of a fleet: what goes on by itself, and what a person orders.

Every order may be given twice: what is so already is left so, and said.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fleetprune.errors import RolloutError, UsageError
from fleetprune.rollout import WHOLE
from fleetprune_coordinator.rollout_engine import Action, Step, abort, advance, begin, decide
from fleetprune_coordinator.rollout_fates import gather
from fleetprune_coordinator.rollout_ledger import RolloutLedger
from fleetprune_coordinator.rollout_state import RolloutRecord, Status

AUTOMATIC = "automatic"
"""Who decides where no person does."""
GAP_S = 60.0  # seconds without a look after which nobody has listened to devices
LISTEN_S = 20.0  # seconds between notes that somebody listens


@dataclass(frozen=True, slots=True)
class Changed:
    """What an order came to for one class."""

    device_class: str
    release: int
    changed: bool
    """False: it was so already."""
    reason: str


Act = Callable[[RolloutRecord], Step | str]
"""Of an order on one open rollout: what becomes of it, or why it stays as it is."""


class Rollouts:
    """At most one under way per class; methods may be called from several threads."""

    def __init__(self, ledger: RolloutLedger, *, gap_s: float = GAP_S) -> None:
        """Prepare.

        Args:
            ledger: Where decisions are written down and signed.
            gap_s: So long after the last look nobody has listened to devices.
        """
        self.ledger, self._gap_s = ledger, gap_s
        self._registry = ledger.registry

    # ---- by itself

    def ensure(self, release: int, classes: Iterable[str]) -> None:
        """Start the rollout of a release for classes that never had one of it."""
        with self.ledger.change():
            for name in classes:
                if all(r.candidate != release for r in self._registry.rollouts(name)):
                    self._start(name, release, AUTOMATIC, "")

    def tick(self, *, listening: bool = True) -> None:
        """Look at what devices have reported, and go on where that allows it.

        Args:
            listening: False: devices cannot be heard, and clocks stand still.
        """
        with self.ledger.change():
            for rollout in self._registry.open_rollouts().values() if listening else ():
                if rollout.status is Status.RUNNING:
                    self._step(self._listened(rollout))

    def _listened(self, rollout: RolloutRecord) -> RolloutRecord:
        unheard = self._registry.unheard_s(rollout.id)
        if unheard > self._gap_s:
            return self._registry.make_up(rollout.id, unheard)
        if unheard > LISTEN_S:
            self._registry.listened(rollout.id)
        return rollout

    def _step(self, rollout: RolloutRecord) -> None:
        view = self.ledger.view(rollout)
        self.ledger.note_committed(rollout, view)
        step = decide(rollout, view)
        if step.action is not Action.WAIT:
            self.ledger.write(step.action.value, AUTOMATIC, step, view)
            return
        if step.rollout.held != rollout.held:
            self._registry.save_rollout(step.rollout)
        self.ledger.tell(step, view)

    # ---- by a person

    def start(
        self, release: int, classes: Sequence[str] = (), *, who: str, reason: str = ""
    ) -> list[Changed]:
        """Begin to roll a release out; it takes the place of what is under way.

        Args:
            release: Its number.
            classes: Empty: all for which it is signed.
            who: Decides.
            reason: In their words.

        Raises:
            RolloutError: The release is not signed for a class (any more).
        """
        with self.ledger.change():
            return [self._start(n, release, who, reason) for n in self._having(release, classes)]

    def _start(self, name: str, release: int, who: str, reason: str) -> Changed:
        old, stable = self._registry.open_rollouts().get(name), self.ledger.stable(name)
        if old is not None and old.candidate == release:
            return Changed(name, release, False, f"is under way already: {old.place}")
        if old is None and stable == release:
            return Changed(name, release, False, "is what the whole class is told to run already")
        named = self.ledger.named(name)
        stages = self.ledger.rules.shares(named=bool(named))
        salt = None if old is None else old.salt
        if old is not None:
            self._replace(old, f"release {release} takes its place", who)
        rollout = self._add(name, release, stages, named, salt)
        view = self.ledger.view(rollout)
        step = begin(rollout, view)
        said = _join(reason, step.reason)
        if old is not None and old.status is Status.PAUSED and who == AUTOMATIC:
            said = _join(said, f"paused, as that of {old.candidate} was")
            step = replace(step, rollout=self._set(step.rollout, Status.PAUSED, said).rollout)
        step = replace(step, reason=said)
        self.ledger.write("start", who, step, view)
        return Changed(name, release, True, step.reason)

    def pause(self, classes: Sequence[str] = (), *, who: str, reason: str = "") -> list[Changed]:
        """Let every device keep what it runs; clocks stand still."""

        def act(rollout: RolloutRecord) -> Step | str:
            if rollout.status is Status.PAUSED:
                return "is paused already"
            return self._set(rollout, Status.PAUSED, reason or "paused by a person")

        return self._order("pause", classes, act, who)

    def resume(self, classes: Sequence[str] = (), *, who: str, reason: str = "") -> list[Changed]:
        """Go on after a pause, which does not count."""

        def act(rollout: RolloutRecord) -> Step | str:
            if rollout.status is Status.RUNNING:
                return "is not paused"
            gone_on = self._unpaused(rollout)
            return self._set(gone_on, Status.RUNNING, reason or "resumed by a person")

        return self._order("resume", classes, act, who)

    def abort(self, classes: Sequence[str] = (), *, who: str, reason: str = "") -> list[Changed]:
        """Stop: devices go back to the stable release."""

        def act(rollout: RolloutRecord) -> Step | str:
            said, evidence = reason or "stopped by a person", self.ledger.evidence(rollout)
            return abort(rollout, self.ledger.now(), said, evidence)

        return self._order("abort", classes, act, who)

    def promote(
        self,
        classes: Sequence[str] = (),
        *,
        who: str,
        reason: str = "",
        to_all: bool = False,
        seen: Mapping[str, int] | None = None,
    ) -> list[Changed]:
        """Go on to the next stage whatever the gates say; a pause ends.

        Args:
            classes: Empty: all that have a rollout under way.
            who: Decides.
            reason: In their words.
            to_all: Go on to the last stage.
            seen: Per class the stage that the person has seen: where it is another one by now,
                nothing is done.
        """

        def act(rollout: RolloutRecord) -> Step | str:
            if (seen or {}).get(rollout.device_class, rollout.stage) != rollout.stage:
                return f"has gone on already: {rollout.place}"
            gone_on = self._unpaused(rollout)
            first = max(rollout.stage + 1, len(rollout.stages) - 1) if to_all else None
            evidence, view = self.ledger.evidence(gone_on), self.ledger.view(gone_on)
            return advance(gone_on, view, reason or "promoted by a person", evidence, first=first)

        return self._order("promote", classes, act, who)

    def rollback(
        self, release: int, classes: Sequence[str] = (), *, who: str, reason: str = ""
    ) -> list[Changed]:
        """Tell all devices to return to an older release at once.

        Raises:
            RolloutError: It is not signed any more, is not older than what a class is told to run,
                or was stopped when it was rolled out.
        """
        with self.ledger.change():
            names = self._having(release, classes)
            if not classes:
                names = [name for name in names if self._newest(name) >= release]
            if not names:
                raise RolloutError(f"no class is told to run anything newer than release {release}")
            return [self._return(name, release, who, reason) for name in names]

    def _return(self, name: str, release: int, who: str, reason: str) -> Changed:
        old, stable = self._registry.open_rollouts().get(name), self.ledger.stable(name)
        if old is None and stable == release:
            return Changed(name, release, False, "is what the whole class is told to run already")
        newest = self._newest(name)
        if release >= newest:
            raise RolloutError(
                f"release {release} is no return for class {name}, which is told to run {newest}: "
                f"`fleetprune rollout start {release}` rolls it out"
            )
        past = [r for r in self._registry.rollouts(name) if r.candidate == release]
        if past and all(r.status is Status.ABORTED for r in past):
            raise RolloutError(
                f"release {release} was stopped for class {name} ({past[0].reason}): "
                f"`fleetprune rollout start {release}` tries it again, in stages"
            )
        if old is not None:
            self._replace(old, f"class returns to release {release}", who)
        said, now = reason or "returned by a person", self.ledger.now()
        made = self._add(name, release, (WHOLE,), (), None)
        done = replace(made, status=Status.COMPLETE, reason=said, changed_at=now)
        evidence = gather(made, [], self.ledger.rules, now)
        self.ledger.write("rollback", who, Step(Action.COMPLETE, done, said, evidence))
        return Changed(name, release, True, said)

    # ---- how a release fares

    def ended(self, release: int) -> bool:
        """Whether the rollout of a release is complete.

        A class of which no device was seen lately does not count.

        Raises:
            RolloutError: It was stopped for a class, or something else took its place.
        """
        done = True
        for name in self.ledger.classes():
            found = [r for r in self._registry.rollouts(name) if r.candidate == release]
            if not found or found[0].status is Status.COMPLETE:
                continue
            if not found[0].status.open:
                raise RolloutError(
                    f"the rollout of release {release} to class {name} was "
                    f"{found[0].status.value}: {found[0].reason}"
                )
            done = done and not self.ledger.view(found[0]).lately()
        return done

    # ---- inside a change

    def _order(self, action: str, classes: Sequence[str], act: Act, who: str) -> list[Changed]:
        """Do something to the open rollouts of some classes, or of all that have one."""
        self._require_known(classes)
        done = []
        with self.ledger.change():
            open_ = self._registry.open_rollouts()
            for name in classes or self.ledger.classes():
                rollout = open_.get(name)
                if rollout is not None:
                    result = act(rollout)
                    changed = not isinstance(result, str)
                    if not isinstance(result, str):
                        self.ledger.write(action, who, result, self.ledger.view(rollout))
                        result = result.reason
                    done.append(Changed(name, rollout.candidate, changed, result))
                    continue
                last = next(iter(self._registry.rollouts(name)), None)
                if action == "abort" and last is not None and last.status is Status.ABORTED:
                    said = f"was aborted already: {last.reason}"
                    done.append(Changed(name, last.candidate, False, said))
                elif classes:
                    state = (
                        "none was" if last is None else f"that of {last.candidate} is {last.status}"
                    )
                    raise RolloutError(
                        f"class {name} has no rollout under way to {action}: {state}"
                    )
            if not done:
                raise RolloutError(f"no rollout is under way: there is nothing to {action}")
        return done

    def _add(
        self,
        name: str,
        release: int,
        stages: tuple[int, ...],
        canaries: tuple[str, ...],
        salt: str | None,
    ) -> RolloutRecord:
        now, stable = self.ledger.now(), self.ledger.stable(name)
        return self._registry.add_rollout(
            RolloutRecord(
                id=0,
                device_class=name,
                candidate=release,
                stable=stable,
                stages=stages,
                salt=salt or self.ledger.salt(name, release),
                canaries=canaries,
                started_at=now,
                began_at=now,
            )
        )

    def _newest(self, name: str) -> int:
        """The newest release that devices of a class may be running."""
        rollout = self._registry.open_rollouts().get(name)
        return max(self.ledger.stable(name), 0 if rollout is None else rollout.candidate)

    def _replace(self, old: RolloutRecord, reason: str, who: str) -> None:
        step = self._set(old, Status.REPLACED, reason)
        self.ledger.write("replace", who, step)

    def _set(self, rollout: RolloutRecord, status: Status, reason: str) -> Step:
        now = self.ledger.now()
        changed = replace(rollout, status=status, reason=reason, changed_at=now)
        return Step(Action.WAIT, changed, reason, self.ledger.evidence(rollout))

    def _unpaused(self, rollout: RolloutRecord) -> RolloutRecord:
        if rollout.status is Status.RUNNING:
            return rollout
        return self._registry.make_up(rollout.id, self.ledger.now() - rollout.changed_at)

    def _having(self, release: int, classes: Sequence[str]) -> list[str]:
        """The classes that are meant, each of which has the release."""
        self._require_known(classes)
        manifest = self.ledger.repository.manifest
        having = [name for name in self.ledger.classes() if manifest(name, release) is not None]
        lacking = [name for name in classes if name not in having]
        if lacking or not having:
            whom = f" for class {lacking[0]}" if lacking else ""
            raise RolloutError(
                f"release {release} is not signed{whom}, or not any more: "
                "`fleetprune release list` shows those that are"
            )
        return list(dict.fromkeys(classes)) or having

    def _require_known(self, classes: Sequence[str]) -> None:
        known = self.ledger.classes()
        for name in classes:
            if name not in known:
                raise UsageError(f"class {name}: this fleet has {', '.join(known)}")


def _join(*parts: str) -> str:
    return "; ".join(filter(None, parts))
