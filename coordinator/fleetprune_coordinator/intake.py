"""What the answers of one round add up to: weights, statistics, scores, accuracy."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.criteria import Criterion, Needs, moved, needs
from fleetprune.errors import MessageError
from fleetprune.layout import Architecture, FlatLayout, Role, cut
from fleetprune.messages import ResultHeader, Task, TaskKind
from fleetprune.result import Result
from fleetprune.update import decode_update
from fleetprune_coordinator.aggregate import Aggregate, MomentSums, StatisticsMean
from fleetprune_coordinator.bounds import Bounds
from fleetprune_coordinator.fleet_model import FleetModel, Tensors
from fleetprune_coordinator.gram import GramSums
from fleetprune_coordinator.ledger import Ledger
from fleetprune_coordinator.value_ranges import RangeSums

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
        supports = {n: model.support(architecture, n) for n in model.shapes}
        self.aggregate = Aggregate(
            architecture, model.shapes, {n: s for n, s in supports.items() if s is not None}
        )
        self._trained = {n: StatisticsMean(architecture, k) for n, k in model.shapes.items()}
        self._moments = {n: MomentSums(architecture, k) for n, k in model.shapes.items()}
        self.grams = {n: GramSums(architecture, k) for n, k in model.shapes.items()}
        self.ranges: dict[str, RangeSums] = {}
        """Per class whose ranges of values were asked for."""
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
            self._add_observed(task, result, weight)
        self._done.add(task.task)

    def _add_trained(self, task: Task, result: Result, weight: float) -> None:
        size = self.aggregate.size(task.shape)
        if result.update is None:
            raise MessageError(f"answer to {task.task} has no update, expected {size} values")
        update = decode_update(result.update, mask_version=task.mask_version, size=size)
        vectors = result.vectors
        if "stats" in vectors:
            self._trained[task.shape].check(vectors["stats"])
        change = update.dense()
        if task.scores:
            whole = self.aggregate.full(task.shape, change)
            self._add_importance(task, result, weight, whole)
        if "stats" in vectors:
            self._trained[task.shape].add(vectors["stats"], weight)
        change = self._bounds.update(task.shape, change)
        self.aggregate.add(task.shape, change, weight)

    def _add_importance(
        self, task: Task, result: Result, weight: float, change: NDArray[np.float32] | None
    ) -> None:
        """Tell the ledger what an answer says of units, by the task's criterion alone."""
        criterion, keep = Criterion(task.criterion), self._model.shapes[task.shape]
        vectors, header = result.vectors, result.header
        if needs(criterion) is Needs.BACKWARD and "scores" in vectors and header.steps:
            self._ledger.add_scores(criterion, keep, vectors["scores"], header.steps, weight)
        elif criterion is Criterion.MOVEMENT and change is not None:
            self._ledger.add_scores(criterion, keep, self._movement(task, change), 1, weight)
        elif criterion is Criterion.WANDA and "sumsq" in vectors:
            self._ledger.add_sumsq(keep, vectors["sumsq"], header.samples)
        elif criterion is Criterion.APOZ and "zeros" in vectors:
            self._ledger.add_zeros(keep, vectors["zeros"], header.samples)

    def _movement(self, task: Task, change: NDArray[np.float32]) -> NDArray[np.float32]:
        """(U,): how far a device's change moves each unit away from zero."""
        keep = self._model.shapes[task.shape]
        dense = self._model.dense(self._architecture, task.shape)
        start = cut(self._architecture, dense, keep, Role.PARAMETER)
        deltas = FlatLayout(self._architecture, keep, Role.PARAMETER).split(change)
        end = {name: value + deltas[name] for name, value in start.items()}
        scores = moved(self._architecture, start, end, keep)
        return np.concatenate([scores[group] for group in self._architecture.groups])

    def _add_observed(self, task: Task, result: Result, weight: float) -> None:
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
        if task.shape in self.ranges and "ranges" in vectors:
            self.ranges[task.shape].check(vectors["ranges"])
        if task.scores:
            self._add_importance(task, result, 1.0, None)
        if crossed:
            self.grams[task.shape].add(vectors["gram"], header.samples)
        if sums:
            self._moments[task.shape].add(*sums)
        if task.shape in self.ranges and "ranges" in vectors:
            self.ranges[task.shape].add(vectors["ranges"], weight)
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
