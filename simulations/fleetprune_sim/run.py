"""One simulated training: a folder that holds all of it, and can be taken up at any time."""

import json
import logging
import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast

import numpy as np
import torch

from fleetprune.errors import TransportError
from fleetprune.messages import Enrol, GraphRef, Task, TaskKind
from fleetprune.schedule import Curve
from fleetprune_agent.runtime import probe_block
from fleetprune_coordinator.artifacts import small_model
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.coordinator import Coordinator
from fleetprune_coordinator.events import EventLog
from fleetprune_coordinator.initial_weights import starts_anew
from fleetprune_coordinator.keys import RELEASES, init_repository
from fleetprune_coordinator.records import Phase
from fleetprune_coordinator.rounds import TRIES
from fleetprune_coordinator.strategy import NestedStrategy, run_app, server_app
from fleetprune_sim import memories
from fleetprune_sim.clock import TRAINING, Clock
from fleetprune_sim.engines import Engine, make_engine
from fleetprune_sim.evaluate import recalibrated, score
from fleetprune_sim.fleet import DEVICES, FOLDER, Fleet, build_fleet, save_whole
from fleetprune_sim.grid import Rule, SimulatedGrid
from fleetprune_sim.history import FILE, DeviceRow, EvaluationRow, History
from fleetprune_sim.memories import Memories
from fleetprune_sim.methods import find_method
from fleetprune_sim.settings import SimulationConfig, simulation_of
from fleetprune_sim.station import STATE, graph_path
from fleetprune_sim.summary import Ended
from fleetprune_sim.wanted import Wanted

log = logging.getLogger(__name__)

FLEET_FILE = "fleet.json"
SECONDS_PER_DAY = 86_400
CALIBRATION = 1000  # samples that tell a model's statistics during training


class Simulation:
    """A run in its folder."""

    def __init__(
        self,
        wanted: Wanted,
        folder: Path,
        on_round: Callable[[dict[str, Any]], None],
        exported: MutableMapping[str, bytes] | None = None,
    ) -> None:
        """Open a run, or begin it.

        Args:
            wanted: What to simulate.
            folder: Where everything is kept.
            on_round: Told of every closed round, with the evaluation if there was one.
            exported: Graphs of this process's earlier runs, which this one adds to.

        Raises:
            ConfigError: The folder holds another run, or a description is wrong.
            DataError: The data set is missing or cannot be split.
            BudgetError: A class's budget cannot be met.
        """
        self.wanted, self.folder, self._on_round = wanted, folder, on_round
        self._exported = exported
        self._known_macs: dict[tuple[int, str], tuple[float, float]] = {}
        self._graph_sizes: dict[str, int] = {}
        self.settings: SimulationConfig = simulation_of(wanted.config)
        self.method = find_method(wanted.method)
        folder.mkdir(parents=True, exist_ok=True)
        self.fleet = self._fleet()
        self.counts = dict.fromkeys(wanted.config.classes, 0)
        for member in self.fleet.members.values():
            self.counts[member.device_class] += 1
        self.plan = self.method.plan(wanted.config, self.counts)
        self._open = ExitStack()
        with ExitStack() as opening:
            self._open_parts(opening)
            self._open = opening.pop_all()

    def _open_parts(self, opening: ExitStack) -> None:
        """Everything that must be closed again, also if the next of it fails to open."""
        wanted, folder = self.wanted, self.folder
        self.history = opening.enter_context(History(folder / FILE))
        self._memories = Memories(folder / memories.FILE)
        opening.callback(self._memories.close)
        self.history.write(
            DeviceRow(m.name, m.device_class, len(m.train), json.dumps(self._label_counts(m.train)))
            for m in self.fleet.members.values()
        )
        state = folder / STATE
        if not (state / RELEASES).exists():
            init_repository(state / RELEASES, datetime.now(UTC))
        self.coordinator = opening.enter_context(
            Coordinator(
                self._model_config(),
                time.time,
                EventLog(None, time.time),
                policy=self.method.policy(),
                rounds=self.method.rounds(wanted.config),
                exported=self._exported,
                durable=False,
                times=False,
            )
        )
        self._new_head = self._head_that_is_new()
        self._enrol()
        self._engine: Engine = self._make_engine()
        opening.callback(self._engine.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    # ---- opening

    def _fleet(self) -> Fleet:
        folder = self.folder / FOLDER
        if not (folder / DEVICES).exists():
            seed = self.wanted.config.training.seed
            build_fleet(self.wanted.corpus, self.settings, seed).save(folder)
        return Fleet.load(folder)

    def _label_counts(self, places: np.ndarray[Any, Any]) -> list[int]:
        labels = len(self.fleet.labels)
        counts: list[int] = np.bincount(self.fleet.y[places], minlength=labels).tolist()
        return counts

    def _model_config(self) -> FleetConfig:
        """What the coordinator runs: the method's models on the fleet's task."""
        test = self.folder / FOLDER / "test.npz"
        if not test.exists():
            save_whole(test, {"x": self.fleet.x_test, "y": self.fleet.y_test})
        config = self.plan.config
        data = {"test": test}
        if config.schedule.curve is Curve.DYNAMIC:
            data["validation"] = self.folder / FOLDER / "validation.npz"
            if not data["validation"].exists():
                judged = {"x": self.fleet.x_validation, "y": self.fleet.y_validation}
                save_whole(data["validation"], judged)
        update = {
            "state": self.folder / STATE,
            "data": config.data.model_copy(update=data),
        }
        return config.model_copy(update=update)

    def _enrol(self) -> None:
        registry = self.coordinator.registry
        if registry.devices():
            return
        block = cast(Literal[0, 8, 16], probe_block())
        registry.enrol_all(
            Enrol(
                device=member.name,
                device_class=model,
                agent_version="simulated",
                trains=self.wanted.config.classes[member.device_class].trains,
                samples=len(member.train),
                block=block,
            )
            for member in self.fleet.members.values()
            if (model := self.plan.serves[member.device_class]) is not None
        )

    def _make_engine(self) -> Engine:
        trains = frozenset(n for n, c in self.wanted.config.classes.items() if c.trains)
        wanted = self.wanted
        return make_engine(wanted.engine, self.folder, wanted.method, trains, wanted.workers)

    def _head_that_is_new(self) -> str | None:
        """Asked while the file that the training began with is certainly there."""
        model = self.plan.config.model
        if model.initial is None or model.head is None:
            return None
        anew = starts_anew(self.coordinator.network, model.initial, model.head)
        return model.head if anew else None

    # ---- training

    def train(self) -> None:
        """Do the rounds that are left.

        Raises:
            TransportError: No device trains, or a process of the engine was killed.
        """
        coordinator, training = self.coordinator, self.plan.config.training
        devices = coordinator.registry.devices()
        grid = SimulatedGrid(
            {d.name: d.id for d in devices},
            {m.name: m.device_class for m in self.fleet.members.values()},
            engine=self._engine,
            clock=Clock(self.settings.classes, training.seed),
            rule=Rule(training.round_timeout_s, training.quorum),
            work=self._work,
            graph_bytes=self._graph_bytes,
            history=self.history,
            memories=self._memories,
        )
        self._catch_up()
        self._judge_start()
        strategy = NestedStrategy(
            coordinator.rounds,
            self._closed,
            self._set_present,
            unanswered=lambda node, error: None,  # the grid counts them
        )
        try:
            run_app(server_app(strategy, coordinator.rounds, SECONDS_PER_DAY), grid)
        except TransportError as e:
            if grid.last is None:
                raise
            raise TransportError(
                f"round {grid.last.number}: no device has trained in {TRIES} tries; "
                f"{grid.last.why_nobody_trained()}"
            ) from e
        if grid.failed:
            log.warning(
                "%s seed %d: %d of %d tasks failed, first that %s",
                self.wanted.method,
                training.seed,
                grid.failed,
                grid.asked,
                grid.first_failure,
            )

    def _set_present(self) -> None:
        """Say who is online in the round that is planned next."""
        if all(profile.available >= 1 for profile in self.settings.classes.values()):
            return
        coordinator, members = self.coordinator, self.fleet.members
        left = coordinator.rounds.remaining()
        clock = Clock(self.settings.classes, self.plan.config.training.seed)
        coordinator.registry.set_present(
            device.name
            for device in coordinator.registry.devices()
            if left and clock.online(members[device.name].device_class, device.id, left[0].number)
        )

    def _work(self, task: Task) -> float:
        """Multiply-accumulates of a task."""
        training = self.plan.config.training
        samples = len(self.fleet.members[task.device].train)
        own, taught = self._macs(task)
        if task.kind is TaskKind.OBSERVE:
            return own * samples
        steps = task.epochs * -(-samples // training.batch)
        steps = min(steps, task.max_steps) if task.max_steps else steps
        looked = own * samples if task.look is not None else 0.0
        return TRAINING * (own + taught) * steps * training.batch + looked

    def _macs(self, task: Task) -> tuple[float, float]:
        """Of one sample: of the task's model, and in the mean of what it teaches."""
        key = task.mask_version, task.shape
        if key not in self._known_macs:
            costs, shapes = self.coordinator.planner.costs, self.coordinator.rounds.model.shapes
            training = self.plan.config.training
            partners = self.method.policy().partners(training, shapes, task.shape)
            taught = [0.0 if p is None else float(costs(p).macs) for p in partners]
            own = float(costs(shapes[task.shape]).macs)
            self._known_macs[key] = own, sum(taught) / len(taught)
        return self._known_macs[key]

    def _graph_bytes(self, task: Task) -> Mapping[str, int]:
        looks = () if task.look is None else (task.look,)
        return {ref.sha256: self._graph_size(ref) for ref in (*task.graphs, *looks)}

    def _graph_size(self, ref: GraphRef) -> int:
        if ref.sha256 not in self._graph_sizes:
            path = graph_path(self.folder / STATE, ref)
            self._graph_sizes[ref.sha256] = path.stat().st_size
        return self._graph_sizes[ref.sha256]

    def _closed(self, metrics: dict[str, Any]) -> None:
        self.coordinator.registry.collect_garbage(grace_s=0.0)
        evaluated: list[EvaluationRow] = []
        if metrics["phase"] == Phase.TRAIN and self._due(metrics["round"]):
            evaluated = self.evaluate(metrics["round"])
        self._judge_start()
        self._on_round(metrics | {"evaluated": {e.device_class: e.accuracy for e in evaluated}})

    def _judge_start(self) -> None:
        """Evaluate a trained model as it was cut, once, before the first round trains it."""
        initial, left = self.plan.config.model.initial, self.coordinator.rounds.remaining()
        if initial is None or self.settings.evaluate_every == 0 or not left:
            return
        begins = left[0].phase is Phase.TRAIN and left[0].number == 1
        if begins and 0 not in {e.round for e in self.history.read(EvaluationRow)}:
            self.evaluate(0)

    def _due(self, number: int) -> bool:
        every, last = self.settings.evaluate_every, self.plan.config.training.rounds
        return number == last or (every > 0 and number % every == 0)

    def _catch_up(self) -> None:
        """The evaluation that a kill came in between."""
        closed = [r for r in self.coordinator.registry.rounds() if r.closed_at is not None]
        if not closed or closed[-1].phase is not Phase.TRAIN:
            return
        number = closed[-1].number
        if self._due(number) and number not in {e.round for e in self.history.read(EvaluationRow)}:
            self.evaluate(number)

    def evaluate(self, number: int) -> list[EvaluationRow]:
        """Judge every class's model on the validation set, and write it down."""
        most = self.settings.evaluation_samples
        x, y = self.fleet.x_validation[:most], self.fleet.y_validation[:most]
        found = {model: score(self._judged(model, number), x, y) for model in self._models()}
        rows = [
            EvaluationRow(number, name, found[model].accuracy, found[model].loss)
            for name, model in self.plan.serves.items()
            if model is not None
        ]
        self.history.write(rows)
        return rows

    def _judged(self, name: str, number: int) -> torch.nn.Module:
        """A model as it would be released after a round.

        Statistics that devices have tracked lag behind the weights, so what a release would
        measure anew is taken from the training samples of the model's devices.
        """
        model = self._model(name)
        if number > self.plan.config.training.calibration_round:
            return model  # trained with the statistics that it has
        members = self.fleet.members.values()
        held = [m.train for m in members if self.plan.serves[m.device_class] == name]
        places = np.concatenate(held)
        most = min(CALIBRATION, places.size)
        chosen = np.random.default_rng(number).choice(places, most, replace=False)
        return recalibrated(model, self.fleet.x[np.sort(chosen)])

    def _models(self) -> list[str]:
        return list(self.plan.config.classes)

    def _model(self, name: str) -> torch.nn.Module:
        coordinator = self.coordinator
        return small_model(
            coordinator.network, coordinator.architecture, coordinator.rounds.model, name
        )

    # ---- ending

    def finish(self) -> dict[str, Any]:
        """Release every model, judge it once on the test set, and write the summary."""
        released = self.coordinator.release()
        ended = Ended(
            self.wanted,
            self.folder,
            self.plan,
            self.settings,
            self.fleet,
            self.counts,
            self.coordinator,
            self.history,
            self._new_head,
        )
        return ended.write(released)
