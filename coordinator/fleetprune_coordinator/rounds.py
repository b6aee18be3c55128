"""The rounds of one training: what each device is asked, and what its answers change.

Every round is opened in the registry with all its tasks and closed with the state that it led to,
each in one transaction; between the two nothing but answers is added. So a coordinator killed at
any instant finds either no round, and plans it, or an open one, and waits for the rest of it.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetprune.criteria import MEASURED, Criterion, Needs, needs
from fleetprune.errors import BudgetError, FleetpruneError, TransportError
from fleetprune.layout import Architecture
from fleetprune.messages import Task
from fleetprune.result import Result, decode_result
from fleetprune_coordinator.bounds import Bounds, length
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
from fleetprune_coordinator.int8 import Int8
from fleetprune_coordinator.intake import Intake
from fleetprune_coordinator.ledger import Ledger
from fleetprune_coordinator.plan import Planner
from fleetprune_coordinator.policy import Policy
from fleetprune_coordinator.reconstruction import reconstruction, refit
from fleetprune_coordinator.records import (
    MaskRecord,
    Phase,
)
from fleetprune_coordinator.registry import Registry
from fleetprune_coordinator.round_plan import GRAMS, RoundKey, RoundPlanning, is_ranges, key_of
from fleetprune_coordinator.snapshot import Snapshot
from fleetprune_coordinator.tightening import Watch
from fleetprune_coordinator.time_round import TimeRound
from fleetprune_coordinator.value_ranges import RangeSums

log = logging.getLogger(__name__)

TRIES = 3
"""Training rounds without a trained answer, one after another, at which training stops."""
CALIBRATED = 1e-3
"""Largest change of a BatchNorm mean, in standard deviations, at which calibration may stop."""

_NORM = "norm/"
_RANGES = "ranges/"


class Rounds(RoundPlanning):
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
        ranges: Int8 = False,
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
            ranges: `pruning.int8`: whether to measure at the end which values each class's file
                works with; "auto": as far as that can be done.
            timing: Asks devices how long models take; None: nobody is asked.
        """
        super().__init__(
            settings,
            architecture,
            planner,
            library,
            registry=registry,
            run=run,
            policy=policy or Policy(),
            ranges=ranges,
            timing=timing,
        )
        self._events = events
        self.cutting = Cutting(
            settings, architecture, planner, self._policy, watch=watch, flow=library.flow
        )
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
            by = first if trained else None
            self.model = self.cutting.prune_weights(model, 0, before=model, criterion=by)
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
        key = key_of(opened)
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
        metrics = self._timing.take_in(answers, tasks, key.step)
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
        if is_ranges(key):
            graphs = {name: self._ranges(name) for name in self.model.shapes}
            intake.ranges = {name: RangeSums(g[1]) for name, g in graphs.items() if g is not None}
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
        if is_ranges(key):
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


def ranges_in(snapshot: Snapshot) -> dict[str, NDArray[np.float32]]:
    """Per class what a snapshot knows of its file's values (see `Rounds.ranges`)."""
    return {
        name.removeprefix(_RANGES): value
        for name, value in snapshot.extra.items()
        if name.startswith(_RANGES)
    }


def _largest_move(before: Mapping[str, Tensors], after: Mapping[str, Tensors]) -> float:
    """Largest change of a running mean, in units of its standard deviation."""
    worst = 0.0
    for name, tensors in after.items():
        for key, new in tensors.items():
            if key.endswith("running_mean"):
                spread = np.sqrt(tensors[key.removesuffix("mean") + "var"]) + 1e-5
                worst = max(worst, float(np.max(np.abs(new - before[name][key]) / spread)))
    return worst
