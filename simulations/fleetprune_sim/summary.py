"""What a finished run came to: every model judged on the test set, and `summary.json`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fleetprune.files import write_atomic
from fleetprune_coordinator.artifacts import accuracy, small_model
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.coordinator import Coordinator, Released
from fleetprune_coordinator.keys import RELEASES
from fleetprune_coordinator.records import Phase
from fleetprune_sim.evaluate import latency_ms, own_accuracy, score
from fleetprune_sim.fleet import Fleet
from fleetprune_sim.history import History, RoundRow
from fleetprune_sim.methods.method import Plan
from fleetprune_sim.robustness import Trial
from fleetprune_sim.settings import SimulationConfig
from fleetprune_sim.wanted import Wanted

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Ended:
    """A run whose training is done."""

    wanted: Wanted
    folder: Path
    plan: Plan
    settings: SimulationConfig
    fleet: Fleet
    counts: Mapping[str, int]
    """devices per class"""
    coordinator: Coordinator
    history: History
    new_head: str | None
    """the layer of a trained model that started anew"""

    def write(self, released: Mapping[str, Released]) -> dict[str, Any]:
        """Judge what was released, once, and write the summary."""
        trial = Trial(self.fleet.x_test, self.fleet.y_test, self.plan.config.training.seed)
        robust = {
            model: trial.of(partial(accuracy, released[model].artifact.onnx))
            for model in dict.fromkeys(self.plan.serves.values())
            if model is not None
        }
        judged = {name: self._judge(name, released, robust) for name in self.wanted.config.classes}
        summary = self._summary(released, judged, self._before(trial))
        write_atomic(self.folder / SUMMARY, json.dumps(summary, indent=1).encode())
        return summary

    def _network(self, name: str) -> nn.Module:
        coordinator = self.coordinator
        return small_model(
            coordinator.network, coordinator.architecture, coordinator.rounds.model, name
        )

    def _settings_for_people(self) -> dict[str, Any]:
        """What decides a run beside its task, method and seed."""
        config = self.plan.config
        initial = config.model.initial
        return {
            **_sections(config, "training", "pruning", "schedule"),
            "simulation": self.settings.model_dump(mode="json"),
            "model": {
                "factory": config.model.factory,
                "arguments": config.model.arguments,
                "initial": None if initial is None else initial.name,  # its folder tells the seed
            },
        }

    def _before(self, trial: Trial) -> dict[str, Any] | None:
        """The trained model that was cut, with the BatchNorm statistics that it came with.

        With a new head there is none: the head would be judged, which nobody trained.
        """
        if self.plan.config.model.initial is None or self.new_head is not None:
            return None
        network = self.coordinator.network
        return {
            "accuracy": score(network, self.fleet.x_test, self.fleet.y_test).accuracy,
            "robustness": trial.of(lambda x, y: score(network, x, y).accuracy),
        }

    def _judge(
        self,
        name: str,
        released: Mapping[str, Released],
        robust: Mapping[str, Mapping[str, float]],
    ) -> dict[str, Any]:
        config, coordinator = self.wanted.config, self.coordinator
        budget = config.classes[name].budget(coordinator.planner.dense)
        model = self.plan.serves[name]
        rows = [r for r in self.history.read(RoundRow) if r.device_class == name]
        entry: dict[str, Any] = {
            "devices": self.counts[name],
            "model": model,
            "budget": {
                "flash_bytes": budget.flash_bytes,
                "ram_bytes": budget.ram_bytes,
                "macs": budget.macs,
                "latency_ms": budget.latency_ms,
            },
            "artifact": None,
            "keep": {},
            "validation_accuracy": None,
            "accuracy": None,
            "own_accuracy": None,
            "robustness": None,
            "within_budget": False,
            "traffic": {
                "up_bytes": sum(r.up_bytes for r in rows),
                "down_bytes": sum(r.down_bytes for r in rows),
            },
            "energy_j": round(sum(r.energy_j for r in rows), 3),
        }
        if model is None:
            return entry
        release, network = released[model], self._network(model)
        path = Path(RELEASES) / name / "model.onnx"
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / path, release.artifact.onnx)
        costs = release.artifact.costs
        fleet = self.fleet
        tests = fleet.own_tests.get(name)
        own = (
            own_accuracy(network, fleet.x_test, fleet.y_test, tests)
            if tests
            else own_accuracy(network, fleet.x, fleet.y, self._held_out(name))
        )
        return entry | {
            "artifact": {
                "path": path.as_posix(),
                "sha256": release.manifest.sha256,
                "bytes": costs.artifact_bytes,
                "params": release.artifact.parameters,
                "nonzero_params": coordinator.rounds.model.parameters(
                    coordinator.architecture, model
                ),
                "macs": costs.macs,
                "peak_activation_bytes": costs.peak_activation_bytes,
                "latency_ms": round(latency_ms(release.artifact.onnx, fleet.x.shape[1:]), 4),
            }
            | coordinator.rounds.figures(model),
            "keep": dict(coordinator.rounds.model.shapes[model]),
            "validation_accuracy": score(network, fleet.x_validation, fleet.y_validation).accuracy,
            "accuracy": release.manifest.accuracy,
            "own_accuracy": own,
            "robustness": dict(robust[model]),
            "within_budget": not budget.violations(costs),
        }

    def _held_out(self, name: str) -> list[np.ndarray[Any, Any]]:
        return [m.test for m in self.fleet.members.values() if m.device_class == name]

    def _summary(
        self,
        released: Mapping[str, Released],
        judged: Mapping[str, Any],
        before: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        wanted, coordinator = self.wanted, self.coordinator
        training = self.plan.config.training
        rows = self.history.read(RoundRow)
        trained = sum(r.answers for r in rows if r.phase == Phase.TRAIN)
        wall_s = sum({(r.number, r.phase, r.step): r.wall_s for r in rows}.values())
        virtual_s = sum({(r.number, r.phase, r.step): r.virtual_s for r in rows}.values())
        up, down = sum(r.up_bytes for r in rows), sum(r.down_bytes for r in rows)
        architecture, dense = coordinator.architecture, coordinator.planner.dense
        parameters = sum(
            int(np.prod(coordinator.rounds.model.params[s].shape))
            for s in coordinator.rounds.model.params
        )
        shapes = coordinator.rounds.model.shapes
        uncut = [
            n
            for n in released
            if dict(shapes[n]) == dict(architecture.groups) and not coordinator.rounds.figures(n)
        ]
        return {
            "schema": 1,
            "task": wanted.task,
            "method": wanted.method,
            "seed": training.seed,
            "rounds": training.rounds,
            "version": version("fleetprune"),
            "engine": wanted.engine,
            "wall_s": round(wall_s, 3),
            "client_rounds": trained,
            "client_rounds_per_s": round(trained / wall_s, 3) if wall_s else 0.0,
            "dense": {
                "params": parameters,
                "bytes": dense.artifact_bytes,
                "macs": dense.macs,
                "accuracy": released[uncut[0]].manifest.accuracy if uncut else None,
            },
            "before": before,
            "new_head": self.new_head,
            "auto": wanted.tried,
            "traffic": {
                "up_bytes": up,
                "down_bytes": down,
                "up_bytes_per_client_round": round(up / max(1, trained), 1),
                "dense_up_bytes_per_client_round": 4.0 * parameters,
            },
            "virtual": {
                "s": round(virtual_s, 3),
                "energy_j": round(sum(r.energy_j for r in rows), 3),
            },
            "labels": list(self.fleet.labels),
            "input_shape": list(self.plan.config.model.input_shape),
            "groups": dict(architecture.groups),
            "partition": self.settings.partition.model_dump(mode="json"),
            "settings": self._settings_for_people(),
            "classes": dict(judged),
            "devices": [],
        }


def _sections(config: FleetConfig, *names: str) -> dict[str, Any]:
    dumped = config.model_dump(mode="json")
    return {name: dumped[name] for name in names}
