"""Flower's Grid of a simulated fleet: real tasks and answers, simulated time.

The strategy sees the messages that it would see over MQTT. Answers that come after the round's
timeout, or after its quorum, are dropped as the real coordinator drops them.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message

from fleetprune.messages import Task
from fleetprune_coordinator.flower_messages import (
    error_reply,
    read_instruction,
    result_reply,
    task_json,
)
from fleetprune_coordinator.records import Phase
from fleetprune_coordinator.task_grid import TaskGrid
from fleetprune_sim.clock import Clock, Closing, Timing, Work, close_round
from fleetprune_sim.engines import Engine
from fleetprune_sim.history import GraphRow, History, RoundRow
from fleetprune_sim.memories import Memories
from fleetprune_sim.station import Done, Job
from fleetprune_sim.tally import Tally

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rule:
    """When a round ends."""

    timeout_s: float
    quorum: float


@dataclass(frozen=True)
class _Outcome:
    """What became of one task."""

    to: Message
    """what to reply to"""
    task: Task
    done: Done
    down: int
    """bytes that reached the device"""
    timing: Timing

    @property
    def sent(self) -> int:
        """Bytes that the device sent; 0 if it fell silent or refused."""
        frame = self.done.frame
        return 0 if frame is None or self.timing.seconds == math.inf else len(frame)


class SimulatedGrid(TaskGrid):
    """A grid whose nodes are simulated devices."""

    def __init__(
        self,
        nodes: Mapping[str, int],
        classes: Mapping[str, str],
        *,
        engine: Engine,
        clock: Clock,
        rule: Rule,
        work: Callable[[Task], float],
        graph_bytes: Callable[[Task], Mapping[str, int]],
        history: History,
        memories: Memories,
    ) -> None:
        """Make a grid.

        Args:
            nodes: Node ids by device name.
            classes: Device classes by device name.
            engine: Does the devices' work.
            clock: Says how long it takes them.
            rule: When a round ends.
            work: Multiply-accumulates of a task.
            graph_bytes: Graphs that a device needs for a task, with their size.
            history: Is told of every round.
            memories: What devices remember between their tasks.
        """
        super().__init__(lambda: nodes)
        self._ids, self._classes = nodes, classes
        self._engine, self._clock, self._rule = engine, clock, rule
        self._work, self._graph_bytes = work, graph_bytes
        self._history, self._memories = history, memories
        self.last: Tally | None = None
        """Of the round before this moment; None while one is in progress, or was broken off."""
        self.asked = self.failed = 0
        self.first_failure = ""
        """Whose, when and why."""
        self._has = {
            (r.device, r.sha256): (r.number, r.phase, r.step) for r in history.read(GraphRow)
        }

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Not used: a round's answers depend on each other's time."""
        raise NotImplementedError("a simulated fleet answers to send_and_receive alone")

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Not used."""
        raise NotImplementedError("a simulated fleet answers to send_and_receive alone")

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Let the devices do a round's tasks; yield the answers that come in time.

        `timeout` is real time and ignored; the fleet's own is in the rule.
        """
        started = time.perf_counter()
        self.last = None
        asked = [(m, *read_instruction(m)) for m in messages]
        for message, task, _ in asked:
            self._check_node(task.device, message)
        if not asked:
            return
        memories = self._memories.load(task.device for _, task, _ in asked)
        jobs = [
            Job(task.device, task_json(message), model, memories.get(task.device, b""))
            for message, task, model in asked
        ]
        outcomes: list[_Outcome] = []
        for (message, task, _), job, done in zip(asked, jobs, self._engine.run(jobs), strict=True):
            down = self._down(job, task)
            timing = self._timing(task, done, down)
            outcomes.append(_Outcome(message, task, done, down, timing))
        self._memories.save(
            {o.task.device: o.done.memory for o in outcomes if o.done.memory is not None}
        )
        seconds = [o.timing.seconds for o in outcomes]
        closing = close_round(seconds, self._rule.timeout_s, self._rule.quorum)
        for outcome, in_time in zip(outcomes, closing.in_time, strict=True):
            task, done = outcome.task, outcome.done
            if done.frame is None:
                log.debug("device %s failed in task %s: %s", task.device, task.task, done.reason)
                yield error_reply(outcome.to, done.reason)
            elif in_time:
                yield result_reply(outcome.to, done.frame)
        # Before the round is closed in the registry: a run killed in between tells it again.
        self._note(outcomes, closing, time.perf_counter() - started)
        self._count(outcomes, closing)

    def _down(self, job: Job, task: Task) -> int:
        """Bytes that reach the device: task, model, and graphs that it does not have yet."""
        now = _key(task)
        total = len(job.task) + len(job.model)
        for sha256, size in self._graph_bytes(task).items():
            if self._has.setdefault((task.device, sha256), now) == now:
                total += size
        return total

    def _timing(self, task: Task, done: Done, down: int) -> Timing:
        up = 0 if done.frame is None else len(done.frame)
        device = self._ids[task.device]
        work = Work(self._work(task), up, down)
        step = _key(task)[2]
        return self._clock.timing(self._classes[task.device], device, task.round, step, work)

    def _note(self, outcomes: list[_Outcome], closing: Closing, wall_s: float) -> None:
        number, phase, step = _key(outcomes[0].task)
        by_class: dict[str, list[tuple[_Outcome, bool]]] = {}
        for outcome, in_time in zip(outcomes, closing.in_time, strict=True):
            name = self._classes[outcome.task.device]
            by_class.setdefault(name, []).append((outcome, in_time))
        self._history.write(
            GraphRow(device, sha256, *key)
            for (device, sha256), key in self._has.items()
            if key == (number, phase, step)
        )
        self._history.write(
            RoundRow(
                number,
                phase,
                step,
                name,
                tasks=len(ended),
                answers=sum(in_time and o.sent > 0 for o, in_time in ended),
                late=sum(not in_time and o.sent > 0 for o, in_time in ended),
                lost=sum(o.sent == 0 for o, _ in ended),
                up_bytes=sum(o.sent for o, _ in ended),
                down_bytes=sum(o.down for o, _ in ended),
                virtual_s=closing.seconds,
                energy_j=sum(o.timing.energy_j for o, _ in ended),
                wall_s=wall_s,
            )
            for name, ended in by_class.items()
        )

    def _count(self, outcomes: list[_Outcome], closing: Closing) -> None:
        failed = [o for o in outcomes if o.done.frame is None]
        sent = [in_time for o, in_time in zip(outcomes, closing.in_time, strict=True) if o.sent]
        self.asked += len(outcomes)
        self.failed += len(failed)
        number = outcomes[0].task.round
        if failed and not self.first_failure:
            first = failed[0]
            self.first_failure = f"of {first.task.device} in round {number}: {first.done.reason}"
        self.last = Tally(
            number,
            answers=sum(sent),
            failed=len(failed),
            late=len(sent) - sum(sent),
            silent=len(outcomes) - len(failed) - len(sent),
            reason=failed[0].done.reason if failed else "",
        )


_PHASES = {p.value[0]: p.value for p in Phase}


def _key(task: Task) -> tuple[int, str, int]:
    """Round, phase and step, as the task's name has them."""
    _, number, step, *_ = task.task.split(".")
    return task.round, _PHASES[number[0]], int(step)
