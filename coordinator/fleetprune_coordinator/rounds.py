"""The rounds of one training: what each device is asked, and what its answers change.

Every round is opened in the registry with all its tasks and closed with the state that it led to,
each in one transaction; between the two nothing but answers is added. So a coordinator killed at
any instant finds either no round, and plans it, or an open one, and waits for the rest of it.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetprune.criteria import MEASURED, Criterion, Needs, needs
from fleetprune.errors import BudgetError, FleetpruneError, TransportError
from fleetprune.layout import Architecture, Role
from fleetprune.messages import Blob, GraphRef, Task, TaskKind
from fleetprune.model_payload import encode_model
from fleetprune.result import Result, decode_result
from fleetprune_coordinator.bounds import Bounds, length
from fleetprune_coordinator.cohort import choose
from fleetprune_coordinator.config import TrainingConfig
from fleetprune_coordinator.cutting import Cutting
from fleetprune_coordinator.events import EventLog
from fleetprune_coordinator.fleet_model import (
    FleetModel,
    Tensors,
    initial_model,
    remask,
    restored,
    support_arrays,
)
from fleetprune_coordinator.gram import GramSums, reordered
from fleetprune_coordinator.graph_library import GraphLibrary
from fleetprune_coordinator.intake import Intake
from fleetprune_coordinator.ledger import Ledger
from fleetprune_coordinator.plan import Planner
from fleetprune_coordinator.policy import Policy
from fleetprune_coordinator.reconstruction import reconstruction, refit
from fleetprune_coordinator.records import (
    DeviceRecord,
    MaskRecord,
    Phase,
    RoundRecord,
    RoundState,
    TaskState,
)
from fleetprune_coordinator.registry import Registry
from fleetprune_coordinator.snapshot import Snapshot
from fleetprune_coordinator.tightening import Watch
from fleetprune_coordinator.time_round import TimeRound
from fleetprune_coordinator.value_ranges import RangeSums

log = logging.getLogger(__name__)

TRIES = 3
"""Training rounds without a trained answer, one after another, at which training stops."""
CALIBRATED = 1e-3
"""Largest change of a BatchNorm mean, in standard deviations, at which calibration may stop."""

SCORES, GRAMS = 0, 1
"""Steps of a trained model's measuring round: its units' scores, then its layers' Gram matrices."""

RANGES = 0
"""The last step of calibration, where files are to be quantised; the others count from 1."""

_NORM = "norm/"
_RANGES = "ranges/"


@dataclass(frozen=True)
class RoundKey:
    """Which round: training rounds count up, calibration steps belong to the last of them."""

    phase: Phase
    number: int
    step: int = 0


@dataclass(frozen=True)
class Assignment:
    """One task with what it needs, for one node."""

    node_id: int
    task: Task
    model: bytes


class Rounds:
    """Plans rounds and takes in their answers; knows nothing of transports or of Flower."""

    def __init__(
        self,
        settings: TrainingConfig,
        architecture: Architecture,
        planner: Planner,
        library: GraphLibrary,
        *,
        registry: Registry,
        events: EventLog,
        run: str,
        policy: Policy | None = None,
        watch: Watch | None = None,
        ranges: bool = False,
        timing: TimeRound | None = None,
    ) -> None:
        """Prepare; call `start` next.

        Args:
            settings: Rounds, learning rate, codecs and so on.
            architecture: The model's description.
            planner: Keep counts per class.
            library: Graphs per shape.
            registry: Where everything is kept.
            events: Where progress is told.
            run: A name for this training, part of every task id.
            policy: What is sent and trained; None: ours.
            watch: The accuracy that a dynamic schedule must not lose; None: it goes by loss alone.
            ranges: Measure at the end which values each class's file works with.
            timing: Asks devices how long models take; None: nobody is asked.
        """
        self._settings = settings
        self._policy = policy or Policy()
        self._architecture = architecture
        self._planner = planner
        self._library = library
        self._registry = registry
        self._events = events
        self._run = run
        self._calibrated = False
        self.cutting = Cutting(
            settings, architecture, planner, self._policy, watch=watch, flow=library.flow
        )
        self._timing = timing
        self._ranged = ranges
        self.ranges: dict[str, NDArray[np.float32]] = {}
        """Per class (tensors, 2), as `quantise` takes them; of the model as it stands."""
        self._silent = 0
        self._norms: dict[str, float] = {}

    def start(self, params: Tensors, stats: Tensors, *, trained: bool) -> None:
        """Take up the training where the registry left it, or begin it.

        Args:
            params: The user's parameters by name.
            stats: The user's BatchNorm statistics by name.
            trained: The parameters are worth keeping, so units are ordered by magnitude at once.
        """
        architecture = self._architecture
        snapshot = self._registry.latest_snapshot()
        self._measuring = self._measuring_steps() if trained else ()
        if snapshot is None:
            scores = {g: np.zeros(n, np.float32) for g, n in architecture.groups.items()}
            self.cutting.start(None)
            settings, first = self._settings, self._settings.first_criterion
            if settings.remask_every and needs(settings.criterion) is Needs.NOTHING:
                self.ledger.scores(settings.criterion, params)  # refused now or never
            later = first in MEASURED or first is Criterion.RECONSTRUCTION
            first = Criterion.MAGNITUDE if later else first
            if trained:
                scores = self.ledger.scores(first, params)
            model = initial_model(architecture, params, stats, self._planner.shapes(1, scores))
            if trained:
                model, _ = remask(architecture, model, scores, model.shapes)
            self.cutting.start(model)
            self.model = self.cutting.prune_weights(model, 0, before=model, criterion=first)
            self._begin()
            self._registry.save_mask(self._mask(0), self._snapshot(0))
            return
        self.model = restored(snapshot, self._registry.mask(snapshot.mask_version))
        self.cutting.start(self.model, snapshot.ledger)
        self._calibrated = bool(snapshot.extra.get("calibrated", np.zeros(1)).any())
        self.ranges = ranges_in(snapshot)
        self.cutting.restore(snapshot.extra)
        self._norms = {
            name.removeprefix(_NORM): float(value[0])
            for name, value in snapshot.extra.items()
            if name.startswith(_NORM)
        }
        self._resume(snapshot)
        begun = any(r.phase is not Phase.TIME for r in self._registry.rounds())
        if self._planner.latency and not begun and self._recut():
            self._registry.save_mask(self._mask(0), self._snapshot(0))

    @property
    def ledger(self) -> Ledger:
        """What devices have reported of importance."""
        return self.cutting.ledger

    def _begin(self) -> None:
        """What else a new training starts from; it goes into the first snapshot."""

    def _resume(self, snapshot: Snapshot) -> None:
        """Take up what `_extra` kept."""

    def _extra(self) -> dict[str, NDArray[Any]]:
        """What else the next round starts from, for the snapshot."""
        return {}

    # ---- where we are

    def remaining(self) -> list[RoundKey]:
        """Rounds still to do, the open one first."""
        settings = self._settings
        seen = {_key(r): r for r in self._registry.rounds()}
        left = [
            RoundKey(Phase.TRAIN, number, tries)
            for number in range(1, settings.rounds + 1)
            if (tries := _tries(seen.values(), number)) is not None
        ]
        at = self._calibration_round
        before = [key for key in left if key.number <= at]
        went_on = any(k.phase is Phase.TRAIN and k.number > at for k in seen)
        if before or not (self._calibrated or went_on):
            steps = (
                RoundKey(Phase.CALIBRATE, at, s) for s in range(1, settings.calibration_passes + 1)
            )
            before += [key for key in steps if key not in seen]
        left = before + [key for key in left if key.number > at]
        last = RoundKey(Phase.CALIBRATE, settings.rounds, RANGES)
        if self._ranged and last not in seen:
            left.append(last)
        measuring = [RoundKey(Phase.SCORE, 0, step) for step in self._measuring]
        left = [key for key in measuring if key not in seen] + left
        times = RoundKey(Phase.TIME, 0)
        if self._timing is not None and self._timing.wanted and times not in seen:
            left.insert(0, times)
        return [key for key, r in seen.items() if r.state is RoundState.OPEN] + left

    def _measuring_steps(self) -> tuple[int, ...]:
        """What has to be measured before a trained model is cut; nothing if it stays whole."""
        groups, rounds = self._architecture.groups, self._settings.rounds
        flat = {g: np.zeros(n, np.float32) for g, n in groups.items()}
        if all(keep == groups for keep in self._planner.shapes(rounds + 1, flat).values()):
            return ()
        first = self._settings.first_criterion
        crossed = first is Criterion.RECONSTRUCTION or self._settings.refit
        return (SCORES,) * (first in MEASURED) + (GRAMS,) * crossed

    # ---- asking

    def prepare(self) -> None:
        """Export every graph that the present shapes need, so that no round waits for it."""
        if not self.remaining():
            return
        devices = self._registry.devices()
        for name, keep in self.model.shapes.items():
            self._library.observe(keep, self._settings.criterion)
            if self._ranged:
                self._library.ranges(keep)
            trainers = [d for d in devices if d.device_class == name and d.trains]
            for block in sorted({0} | {d.block for d in trainers}) if trainers else ():
                for fixed in {False, self._calibration_round < self._settings.rounds}:
                    self._train_steps(name, block, self._settings.criterion, fixed=fixed)

    @property
    def _calibration_round(self) -> int:
        """The training round after which statistics are measured; the last if it has none."""
        measured = any(self._architecture.role(Role.STATISTIC))
        return self._settings.calibration_round if measured else self._settings.rounds

    def _fixed(self, key: RoundKey) -> bool:
        """Whether a round trains with statistics that do not change."""
        return key.phase is Phase.TRAIN and key.number > self._calibration_round

    def _partners(self, name: str) -> list[dict[str, int] | None]:
        return self._policy.partners(self._settings, self.model.shapes, name)

    def _criterion(self, key: RoundKey) -> Criterion:
        """What devices are asked for in a round."""
        if key.phase is not Phase.SCORE:
            return self._settings.criterion
        return self._settings.first_criterion if key.step == SCORES else Criterion.RECONSTRUCTION

    def _train_steps(
        self, name: str, block: int, criterion: Criterion, *, fixed: bool
    ) -> tuple[GraphRef, ...]:
        keep, partners = self.model.shapes[name], self._partners(name)
        return self._library.train_steps(keep, partners, block, fixed=fixed, criterion=criterion)

    def begin(self) -> list[Assignment]:
        """Open the next round, or find the one that was open; empty when there is none left."""
        left = self.remaining()
        if not left:
            return []
        key = left[0]
        if self._registry.open_round() is None:
            planned = self._plan(key)
            self._registry.begin_round(
                key.number,
                key.phase,
                self.model.mask_version,
                [(a.task, a.model) for a in planned],
                step=key.step,
            )
            return planned
        records = self._registry.tasks(key.number, key.phase, step=key.step)
        return [
            Assignment(r.node_id, r.task, self._registry.blob(r.task.model.sha256))
            for r in records
            if r.state is not TaskState.REFUSED
        ]

    def _plan(self, key: RoundKey) -> list[Assignment]:
        payloads: dict[tuple[str, bool, bool], tuple[bytes, Blob]] = {}
        graphs: dict[tuple[str, int], tuple[GraphRef, ...]] = {}

        def train_steps(name: str, block: int) -> tuple[GraphRef, ...]:
            if (name, block) not in graphs:
                criterion, fixed = self._criterion(key), self._fixed(key)
                graphs[name, block] = self._train_steps(name, block, criterion, fixed=fixed)
            return graphs[name, block]

        if key.phase is Phase.TIME:
            return self._plan_timing()
        planned = []
        for device in self._cohort(key):
            for name in self._shapes_for(key, device):
                kind = (name, self._knows(device), self._fixed(key) and device.trains)
                if kind not in payloads:
                    fixed = kind[2]
                    model = (
                        self._fixed_payload(key, name) if fixed else self._payload(key, *kind[:2])
                    )
                    payloads[kind] = (model, Blob.of(model))
                model, blob = payloads[kind]
                task = self._task(key, device, name, blob, train_steps)
                planned.append(Assignment(device.id, task, model))
        return planned

    def _plan_timing(self) -> list[Assignment]:
        assert self._timing is not None
        devices, version = self._registry.devices(), self.model.mask_version
        limit = self._settings.round_timeout_s
        planned = self._timing.plan(devices, self._run, version, limit)
        return [Assignment(device.id, task, b"") for device, task in planned]

    def _knows(self, device: DeviceRecord) -> bool:
        """Whether a device has kept what the present mask version stands for."""
        return False

    def _payload(self, key: RoundKey, name: str, known: bool) -> bytes:
        """The frame of a class's model as devices get it.

        Args:
            key: Of the round.
            name: Of the class.
            known: What `_knows` says of the device.
        """
        return self._encoded(key, name, self.model.vectors(self._architecture, name)[1])

    def _fixed_payload(self, key: RoundKey, name: str) -> bytes:
        """As `_payload`, with the statistics of every model that the class teaches."""
        own = self.model.vectors(self._architecture, name)[1]
        return self._encoded(key, name, np.concatenate([own, *self._narrower_statistics(name)]))

    def _encoded(self, key: RoundKey, name: str, stats: NDArray[np.float32]) -> bytes:
        model, codec = self.model, self._settings.down_codec
        params, support = model.vectors(self._architecture, name)[0], None
        if name in model.supports:
            support = model.support(self._architecture, name)
        return encode_model(model.mask_version, key.number, params, stats, codec, support=support)

    def _narrower_statistics(self, name: str) -> list[NDArray[np.float32]]:
        """Flat statistics of the narrower models, in the order of the class's partners."""
        shapes = self.model.shapes
        owners = [
            next(owner for owner, keep in shapes.items() if dict(keep) == partner)
            for partner in self._partners(name)
            if partner is not None
        ]
        return [self.model.vectors(self._architecture, owner)[1] for owner in owners]

    def _cohort(self, key: RoundKey) -> list[DeviceRecord]:
        devices = self._registry.devices(online=True) or self._registry.devices()
        if key.phase is Phase.SCORE:  # who holds less knows nothing of the rest
            widths = {name: sum(keep.values()) for name, keep in self.model.shapes.items()}
            widest = max(widths.values())
            devices = [d for d in devices if widths[d.device_class] == widest]
        if key.phase is not Phase.TRAIN:
            size = self._settings.calibration_devices or len(devices)
            # The same devices in every pass: else no pass could tell that the last one settled.
            rng = np.random.default_rng([self._settings.seed, self._settings.rounds + 1])
            return choose(devices, size, rng, stratified=True)
        rng = np.random.default_rng([self._settings.seed, key.number])
        size = self._settings.devices_per_round
        return choose(devices, size, rng, stratified=self._settings.stratified)

    def _shapes_for(self, key: RoundKey, device: DeviceRecord) -> list[str]:
        """Shapes a device works on: its own; when calibrating also all that lie within it."""
        own = device.device_class
        if key.phase is not Phase.CALIBRATE or self._settings.calibrate_with == "class":
            return [own]
        wide = self.model.shapes[own]
        return [
            name
            for name, keep in self.model.shapes.items()
            if all(keep[g] <= wide[g] for g in wide)
        ]

    def _task(
        self,
        key: RoundKey,
        device: DeviceRecord,
        name: str,
        model: Blob,
        train_steps: Callable[[str, int], tuple[GraphRef, ...]],
    ) -> Task:
        settings, shapes, criterion = self._settings, self.model.shapes, self._criterion(key)
        train = key.phase is not Phase.CALIBRATE and device.trains
        if key.phase is Phase.SCORE:
            train &= needs(criterion) is Needs.BACKWARD
        place, listens, look = list(shapes).index(name), self._listens(key), None
        if train:
            graphs = train_steps(name, device.block)
            portable = train_steps(name, 0) if device.block else ()
            if listens and needs(criterion) is Needs.FORWARD:
                look = self._library.observe(shapes[name], criterion)
        else:
            graphs, portable = (self._library.observe(shapes[name], criterion),), ()
            if _is_ranges(key):
                graphs = (self._library.ranges(shapes[name])[0],)
        seed = np.random.SeedSequence([settings.seed, key.number, key.step, device.id])
        return Task(
            task=f"{self._run}.{key.phase.value[0]}{key.number}.{key.step}.{device.id}.{place}",
            device=device.name,
            kind=TaskKind.TRAIN if train else TaskKind.OBSERVE,
            round=key.number,
            mask_version=self.model.mask_version,
            shape=name,
            graphs=graphs,
            portable=portable,
            look=look,
            model=model,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            learning_rate=0.0 if key.phase is Phase.SCORE else self._learning_rate(key.number),
            proximal=settings.proximal,
            seed=int(seed.generate_state(1)[0]),
            codec=settings.codec,
            top_k=settings.top_k,
            scores=listens,
            criterion=criterion,
            deadline_s=settings.round_timeout_s,
        )

    def _listens(self, key: RoundKey) -> bool:
        if key.phase is Phase.TRAIN:
            return self._policy.listens(self._settings, key.number)
        return key.phase is Phase.SCORE

    def _learning_rate(self, number: int) -> float:
        """Cosine from the learning rate down to a share of it (Loshchilov and Hutter 2017)."""
        share = self._settings.final_learning_rate_share
        progress = (number - 1) / max(1, self._settings.rounds - 1)
        wave = 0.5 * (1 + math.cos(math.pi * progress))
        fixed = number > self._calibration_round
        peak = self._settings.learning_rate
        peak *= self._settings.fixed_learning_rate if fixed else 1.0
        return peak * (share + (1 - share) * wave)

    # ---- taking in

    def finish(self, answers: Iterable[bytes]) -> dict[str, Any]:
        """Take in the open round's answers, one at a time, and close it.

        An answer that is malformed, hostile or not asked for changes nothing; it is noted in the
        registry and the round goes on without it.

        Args:
            answers: Frames of kind RSLT, as they arrive; each is forgotten after use.

        Returns:
            The round's metrics.
        """
        opened = self._registry.open_round()
        if opened is None:
            return {}
        key = _key(opened)
        tasks = {
            record.task.task: record.task
            for record in self._registry.tasks(key.number, key.phase, step=key.step)
        }
        if key.phase is Phase.TIME:
            return self._finish_timing(key, answers, tasks)
        samples = self._registry.samples(task.device for task in tasks.values())
        bounds = self._bounds(samples.get(task.device, 1) for task in tasks.values())
        intake = self._intake(key, bounds)
        for answer in answers:
            try:
                intake.add(self._read(answer), tasks, samples)
            except FleetpruneError as e:
                log.warning("an answer is refused: %s", e)
                self._registry.add_event("refused", str(e))
                intake.refused += 1
        self.ledger.close_round()
        self._norms = bounds.norms()
        if bounds.cut:
            log.warning("%d updates were cut: too long beside those before", bounds.cut)
        self.ranges = {}  # of the model before the round
        mask = self._apply(key, intake, tasks.values())
        metrics = intake.metrics() | {"mask_version": self.model.mask_version}
        if key.phase is Phase.TRAIN:
            metrics |= self.cutting.tightening.metrics(key.number)
        self._registry.close_round(
            key.number,
            key.phase,
            self._snapshot(key.number),
            step=key.step,
            mask=mask,
            metrics=metrics,
        )
        if mask is not None:
            self._events.emit("remask", round=key.number, mask_version=mask.version)
        if key.phase is Phase.TRAIN:
            self._give_up_on_silence(key, trained=metrics["trained"])
        return metrics | {"phase": key.phase.value, "round": key.number, "step": key.step}

    def _finish_timing(
        self, key: RoundKey, answers: Iterable[bytes], tasks: Mapping[str, Task]
    ) -> dict[str, Any]:
        assert self._timing is not None
        metrics = self._timing.take_in(answers, tasks)
        unreachable = None
        try:
            self._timing.teach()
        except BudgetError as e:  # what was measured holds for any other limit as well
            unreachable = e
        mask = self._mask(0) if self._recut() else None
        metrics["mask_version"] = self.model.mask_version
        self._registry.close_round(
            0, key.phase, self._snapshot(0), step=key.step, mask=mask, metrics=metrics
        )
        if unreachable is not None:
            raise unreachable
        return metrics | {"phase": key.phase.value, "round": 0, "step": key.step}

    def _recut(self) -> bool:
        """Cut to what is known of latency by now; whether that changed anything."""
        return self._adopt(self.cutting.to_limits(self.model))

    def _adopt(self, model: FleetModel) -> bool:
        """Take a state for the present one; whether its masks are others."""
        before, self.model = self.model.mask_version, model
        return model.mask_version != before

    def _intake(self, key: RoundKey, bounds: Bounds) -> Intake:
        """What adds up the answers of a round."""
        intake = Intake(self._architecture, self.model, self.ledger, bounds)
        if _is_ranges(key):
            lengths = {n: self._library.ranges(keep)[1] for n, keep in self.model.shapes.items()}
            intake.ranges = {name: RangeSums(length) for name, length in lengths.items()}
        return intake

    def _read(self, answer: bytes) -> Result:
        """An unverified answer, taken apart; HostileInputError if it cannot be."""
        return decode_result(answer)

    def _give_up_on_silence(self, key: RoundKey, trained: int) -> None:
        """A round that nobody trained in is tried again, but not for ever."""
        self._silent = 0 if trained else self._silent + 1
        if self._silent >= TRIES:
            raise TransportError(
                f"round {key.number}: no device has trained in {TRIES} tries; "
                "`fleetprune coordinator status` says what they reported"
            )

    def _bounds(self, samples: Iterable[int]) -> Bounds:
        start = {
            name: length(self.model.vectors(self._architecture, name)[0])
            for name in self.model.shapes
        }
        return Bounds(self._settings.outlier, samples, self._norms, start)

    def _apply(self, key: RoundKey, intake: Intake, asked: Iterable[Task]) -> MaskRecord | None:
        """Move the state on by the answers to the tasks `asked`; the record of a new mask."""
        model = self.model
        if _is_ranges(key):
            found = {name: sums.result() for name, sums in intake.ranges.items()}
            self.ranges = {name: values for name, values in found.items() if values is not None}
            return None
        self._calibrated = False
        with np.errstate(over="ignore", invalid="ignore"):  # refused on the next lines
            deltas, coverage = intake.aggregate.result()
            params = {name: model.params[name] + delta for name, delta in deltas.items()}
            stats = intake.statistics()
        if not self._finite(params, *stats.values()):
            params, stats = model.params, dict(model.stats)
        if self._fixed(key):
            stats = dict(model.stats)  # observing devices measure them all the same
        if key.phase is Phase.SCORE:
            params = model.params  # what rounding made of changes of 0
        if key.phase is Phase.CALIBRATE and intake.answers:
            moved = _largest_move(model.stats, stats)
            self._calibrated = moved < CALIBRATED
            log.info("calibration step %d moved a mean by %.2g sd", key.step, moved)
        if key.phase is Phase.TRAIN:
            self.cutting.trained(model.params, params, coverage)
        self.model = replace(model, params=params, stats=stats)
        if key.phase is Phase.CALIBRATE:
            return None
        return self._remask(key, intake)

    def _finite(self, *models: Tensors) -> bool:
        """Whether all values are finite; noted if not."""
        if all(np.isfinite(values).all() for model in models for values in model.values()):
            return True
        text = "a round's answers add up to values that are not finite; the model stays"
        log.warning("%s", text)
        self._registry.add_event("refused", text)
        return False

    def _remask(self, key: RoundKey, intake: Intake) -> MaskRecord | None:
        settings, number = self._settings, key.number
        if key.phase is Phase.SCORE and key.step == GRAMS:
            return self._rebuild(intake)
        after = self.model
        if key.phase is Phase.TRAIN:
            after = self.cutting.after_round(number, intake.metrics()["loss"], after)
        elif self.ledger.ready(first := settings.first_criterion):
            scores = self.ledger.scores(first, after.params)
            after = self.cutting.by_scores(scores, number, after, weights=first)
        # Else nobody answered: the order by magnitude stands.
        return self._mask(number) if self._adopt(after) else None

    def _rebuild(self, intake: Intake) -> MaskRecord | None:
        """Cut a trained model by what the Gram matrices of its layers' inputs say."""
        before = model = self.model
        widest = max(model.shapes.values(), key=lambda keep: sum(keep.values()))
        pooled = GramSums(self._architecture, widest)
        for name, keep in model.shapes.items():
            if keep == widest:
                pooled.include(intake.grams[name])
        grams = pooled.result()
        if self._settings.first_criterion is Criterion.RECONSTRUCTION and grams:
            scores = reconstruction(self._architecture, model.params, grams)
            model, order = self.cutting.by_units(scores, 0, model)
            if model is not before:
                grams = reordered(grams, self._architecture, order)
        if self._settings.refit:
            params = refit(self._architecture, model.params, grams, model.shapes)
            if self._finite(params):
                model = replace(model, params=params)
        model = self.cutting.prune_weights(model, 0, before=before)
        return self._mask(0) if self._adopt(model) else None

    # ---- keeping

    def _mask(self, number: int) -> MaskRecord:
        return MaskRecord(self.model.mask_version, number, self.model.origin, self.model.shapes)

    def _snapshot(self, number: int) -> Snapshot:
        return Snapshot(
            round=number,
            mask_version=self.model.mask_version,
            params=self.model.params,
            stats=self.model.stats,
            ledger=self.ledger.arrays(),
            extra={"calibrated": np.array([self._calibrated])}
            | {f"{_NORM}{name}": np.array([norm]) for name, norm in self._norms.items()}
            | {f"{_RANGES}{name}": values for name, values in self.ranges.items()}
            | support_arrays(self.model)
            | self.cutting.arrays()
            | self._extra(),
        )

    def figures(self, name: str) -> dict[str, float]:
        """Figures of a class's model that its file does not show, for whoever compares methods."""
        return {}


def _tries(records: Iterable[RoundRecord], number: int) -> int | None:
    """How often a training round was tried in vain; None: it is open or done."""
    tries = [r for r in records if r.phase is Phase.TRAIN and r.number == number]
    if any(r.state is RoundState.OPEN or r.metrics.get("trained") for r in tries):
        return None
    return len(tries)


def ranges_in(snapshot: Snapshot) -> dict[str, NDArray[np.float32]]:
    """Per class what a snapshot knows of its file's values (see `Rounds.ranges`)."""
    return {
        name.removeprefix(_RANGES): value
        for name, value in snapshot.extra.items()
        if name.startswith(_RANGES)
    }


def _is_ranges(key: RoundKey) -> bool:
    return key.phase is Phase.CALIBRATE and key.step == RANGES


def _key(record: RoundRecord) -> RoundKey:
    return RoundKey(record.phase, record.number, record.step)


def _largest_move(before: Mapping[str, Tensors], after: Mapping[str, Tensors]) -> float:
    """Largest change of a running mean, in units of its standard deviation."""
    worst = 0.0
    for name, tensors in after.items():
        for key, new in tensors.items():
            if key.endswith("running_mean"):
                spread = np.sqrt(tensors[key.removesuffix("mean") + "var"]) + 1e-5
                worst = max(worst, float(np.max(np.abs(new - before[name][key]) / spread)))
    return worst
