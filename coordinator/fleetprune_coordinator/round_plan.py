"""Which rounds of a training are left, and what each of them asks of whom."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetprune.criteria import MEASURED, Criterion, Needs, needs
from fleetprune.layout import Architecture, Role
from fleetprune.messages import Blob, GraphRef, Task, TaskKind
from fleetprune.model_payload import encode_model
from fleetprune_coordinator.cohort import choose
from fleetprune_coordinator.config import TrainingConfig
from fleetprune_coordinator.fleet_model import FleetModel
from fleetprune_coordinator.graph_library import GraphLibrary
from fleetprune_coordinator.int8 import Int8
from fleetprune_coordinator.plan import Planner
from fleetprune_coordinator.policy import Policy
from fleetprune_coordinator.range_graphs import RangeGraphs
from fleetprune_coordinator.records import DeviceRecord, Phase, RoundRecord, RoundState, TaskState
from fleetprune_coordinator.registry import Registry
from fleetprune_coordinator.time_round import TimeRound

SCORES, GRAMS = 0, 1
"""Steps of a trained model's measuring round: its units' scores, then its layers' Gram matrices."""

RANGES = 0
"""The last step of calibration, where files are to be quantised; the others count from 1."""


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


class RoundPlanning:
    """Plans rounds; `Rounds` takes in what they are answered."""

    model: FleetModel

    def __init__(
        self,
        settings: TrainingConfig,
        architecture: Architecture,
        planner: Planner,
        library: GraphLibrary,
        *,
        registry: Registry,
        run: str,
        policy: Policy,
        ranges: Int8,
        timing: TimeRound | None,
    ) -> None:
        """Prepare; see `Rounds`."""
        self._settings, self._architecture, self._planner = settings, architecture, planner
        self._library, self._registry, self._run = library, registry, run
        self._policy, self._timing = policy, timing
        self._int8, self._range_graphs = ranges, RangeGraphs(library, ranges)
        self._calibrated = False
        self._measuring: tuple[int, ...] = ()

    # ---- where we are

    def remaining(self) -> list[RoundKey]:
        """Rounds still to do, the open one first."""
        settings = self._settings
        seen = {key_of(r): r for r in self._registry.rounds()}
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
        if self._int8 and last not in seen and (left or any(map(self._ranges, self.model.shapes))):
            left.append(last)
        measuring = [RoundKey(Phase.SCORE, 0, step) for step in self._measuring]
        left = [key for key in measuring if key not in seen] + left
        timing = self._timing
        if timing is not None and timing.wanted:
            times = RoundKey(Phase.TIME, 0, timing.step)
            left = [times] * (times not in seen) + left
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
            self._ranges(name)
            trainers = [d for d in devices if d.device_class == name and d.trains]
            for block in sorted({0} | {d.block for d in trainers}) if trainers else ():
                for fixed in {False, self._calibration_round < self._settings.rounds}:
                    self._train_steps(name, block, self._settings.criterion, fixed=fixed)

    def _ranges(self, name: str) -> tuple[GraphRef, int] | None:
        """The graph that counts the values of a class's file, and how many numbers it makes."""
        return self._range_graphs.graph(name, self.model.shapes[name])

    def why_unranged(self, name: str) -> str:
        """Why the ranges of a class's file are not known."""
        return self._range_graphs.why_none(name, self.model.shapes[name])

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
        """Shapes a device works on: its own; when calibrating also all that lie within it.

        Where ranges are measured: of these the ones that have any.
        """
        own = device.device_class
        if key.phase is not Phase.CALIBRATE or self._settings.calibrate_with == "class":
            inside = [own]
        else:
            wide = self.model.shapes[own]
            inside = [
                name
                for name, keep in self.model.shapes.items()
                if all(keep[g] <= wide[g] for g in wide)
            ]
        return [name for name in inside if not is_ranges(key) or self._ranges(name)]

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
            if is_ranges(key) and (counting := self._ranges(name)) is not None:
                graphs = (counting[0],)
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


def _tries(records: Iterable[RoundRecord], number: int) -> int | None:
    """How often a training round was tried in vain; None: it is open or done."""
    tries = [r for r in records if r.phase is Phase.TRAIN and r.number == number]
    if any(r.state is RoundState.OPEN or r.metrics.get("trained") for r in tries):
        return None
    return len(tries)


def is_ranges(key: RoundKey) -> bool:
    """Whether a round measures which values files work with."""
    return key.phase is Phase.CALIBRATE and key.step == RANGES


def key_of(record: RoundRecord) -> RoundKey:
    """The key of a round in the registry."""
    return RoundKey(record.phase, record.number, record.step)
