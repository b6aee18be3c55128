"""What the answers of one round add up to: weights, statistics, scores, accuracy."""

from collections.abc import Mapping
from typing import Any, Final

from fleetprune.errors import MessageError
from fleetprune.layout import Architecture
from fleetprune.messages import ResultHeader, Task, TaskKind
from fleetprune.result import Result
from fleetprune.update import decode_update
from fleetprune_coordinator.aggregate import Aggregate, MomentSums, StatisticsMean
from fleetprune_coordinator.bounds import Bounds
from fleetprune_coordinator.fleet_model import FleetModel, Tensors
from fleetprune_coordinator.gram import GramSums
from fleetprune_coordinator.ledger import Ledger

MOMENTS: Final = ("bn_sum", "bn_sumsq", "bn_count")
"""Sections of BatchNorm sums: all of them, or none."""


class Intake:
    """Adds up the answers to one round's tasks; each is checked against the task first."""

    def __init__(
        self, architecture: Architecture, model: FleetModel, ledger: Ledger, bounds: Bounds
    ) -> None:
        """Begin a round.

        Args:
            architecture: The model's description.
            model: The state that the round's tasks were made from; not changed.
            ledger: Takes in scores and activation sums as they come.
            bounds: What one answer may change at most.
        """
        self._architecture = architecture
        self._model = model
        self._ledger = ledger
        self._bounds = bounds
        self.aggregate = Aggregate(architecture, model.shapes)
        self._trained = {n: StatisticsMean(architecture, k) for n, k in model.shapes.items()}
        self._moments = {n: MomentSums(architecture, k) for n, k in model.shapes.items()}
        self.grams = {n: GramSums(architecture, k) for n, k in model.shapes.items()}
        self._done: set[str] = set()
        self._loss = self._weight = 0.0
        self._right: dict[str, list[int]] = {}
        self.refused = 0

    @property
    def answers(self) -> int:
        """How many answers were added."""
        return len(self._done)

    @property
    def trained(self) -> int:
        """How many of them were those of devices that trained."""
        return sum(self.aggregate.counts.values())

    def answered(self, task: str) -> bool:
        """Whether the answer to a task was added."""
        return task in self._done

    def add(self, result: Result, tasks: Mapping[str, Task], samples: Mapping[str, int]) -> None:
        """Add one answer; nothing is added when it raises."""
        header = result.header
        task = self._match(header, tasks)
        # A device's own word decides its weight, so it is bounded by what it enrolled with.
        weight = self._bounds.weight(min(header.samples, max(1, samples.get(task.device, 1))))
        if task.kind is TaskKind.TRAIN:
            self._add_trained(task, result, weight)
            if header.loss is not None:
                self._loss += weight * header.loss
                self._weight += weight
        else:
            self._add_observed(task, result)
        self._done.add(task.task)

    def _add_trained(self, task: Task, result: Result, weight: float) -> None:
        size = self.aggregate.size(task.shape)
        if result.update is None:
            raise MessageError(f"answer to {task.task} has no update, expected {size} values")
        update = decode_update(result.update, mask_version=task.mask_version, size=size)
        vectors, steps = result.vectors, result.header.steps
        if "stats" in vectors:
            self._trained[task.shape].check(vectors["stats"])
        if "taylor" in vectors and steps:
            keep = self._model.shapes[task.shape]
            self._ledger.add_taylor(keep, vectors["taylor"], steps, weight)
        if "stats" in vectors:
            self._trained[task.shape].add(vectors["stats"], weight)
        change = self._bounds.update(task.shape, update.dense())
        self.aggregate.add(task.shape, change, weight)

    def _add_observed(self, task: Task, result: Result) -> None:
        header, vectors = result.header, result.vectors
        sums = [vectors[name] for name in MOMENTS if name in vectors]
        if sums and len(sums) != len(MOMENTS):
            raise MessageError(
                f"answer to {header.task} has {len(sums)} of the sections {', '.join(MOMENTS)}"
            )
        if sums:
            self._moments[task.shape].check(*sums)
        crossed = "gram" in vectors and task.scores  # else nobody asked, and it is large
        if crossed:
            self.grams[task.shape].check(vectors["gram"])
        if "sumsq" in vectors:
            keep = self._model.shapes[task.shape]
            self._ledger.add_sumsq(keep, vectors["sumsq"], header.samples)
        if crossed:
            self.grams[task.shape].add(vectors["gram"], header.samples)
        if sums:
            self._moments[task.shape].add(*sums)
        if header.correct is not None:
            right = self._right.setdefault(task.shape, [0, 0])
            right[0] += min(header.correct, header.samples)
            right[1] += header.samples

    def _match(self, header: ResultHeader, tasks: Mapping[str, Task]) -> Task:
        task = tasks.get(header.task)
        if task is None:
            raise MessageError(f"answer to {header.task}, which is not a task of this round")
        if header.task in self._done:
            raise MessageError(f"answer to {header.task} came twice; the first one stands")
        said = (header.device, header.kind, header.round, header.mask_version)
        asked = (task.device, task.kind, task.round, task.mask_version)
        if said != asked:
            raise MessageError(
                f"answer to {header.task} says device, kind, round, mask version "
                f"{', '.join(map(str, said))}, expected {', '.join(map(str, asked))}"
            )
        return task

    def statistics(self) -> dict[str, Tensors]:
        """Per class its new BatchNorm statistics; the old ones where nothing was reported."""
        return {
            name: self._trained[name].result() or self._moments[name].result() or dict(old)
            for name, old in self._model.stats.items()
        }

    def metrics(self) -> dict[str, Any]:
        """Counts and means for people."""
        return {
            "answers": self.answers,
            "trained": self.trained,
            "refused": self.refused,
            "loss": round(self._loss / self._weight, 5) if self._weight else None,
            "accuracy": {name: round(r / n, 4) for name, (r, n) in self._right.items()},
        }
