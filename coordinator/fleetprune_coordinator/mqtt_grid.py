"""Flower's Grid over MQTT: a strategy's messages become tasks, stored results become replies.

Replies are yielded as they come in, so that a strategy can add each one to its running aggregate
and let it go; a fleet's updates never lie in memory together.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message

from fleetprune.errors import RegistryError
from fleetprune_coordinator.flower_messages import (
    error_reply,
    read_instruction,
    result_reply,
    stub,
)
from fleetprune_coordinator.hub import Hub, Outcome, TaskStore
from fleetprune_coordinator.task_grid import TaskGrid

log = logging.getLogger(__name__)

LOOK_S = 0.2  # between two looks whether to stop; answers are noticed at once


@dataclass(slots=True)
class _Pending:
    stub: Message
    outcome: Outcome | None = None


class MqttGrid(TaskGrid):
    """A grid whose nodes are devices behind a `Hub`."""

    def __init__(
        self,
        hub: Hub,
        store: TaskStore,
        nodes: Callable[[], Mapping[str, int]],
        check_stop: Callable[[], None] = lambda: None,
        *,
        quorum: float = 1.0,
    ) -> None:
        """Listen to `hub`; starting it is the caller's.

        Args:
            hub: Carries tasks and answers.
            store: Where the hub keeps answers.
            nodes: Gives node ids by device name.
            check_stop: Called now and then while waiting for answers; what it raises ends the
                wait, and the tasks are left as they are.
            quorum: Share of a round's tasks whose results are enough: the slow rest is then not
                waited for.
        """
        super().__init__(nodes)
        self._hub, self._store, self._check_stop = hub, store, check_stop
        self._quorum = quorum
        self._changed = threading.Condition()
        self._pending: dict[str, _Pending] = {}
        self._over: set[str] = set()
        """Pending tasks that have ended: kept so that a wait need not look at the whole fleet."""
        self._unwatch = hub.watch(self._ended)

    def close(self) -> None:
        """Stop listening to the hub."""
        self._unwatch()

    def _ended(self, outcome: Outcome) -> None:
        with self._changed:
            pending = self._pending.get(outcome.task)
            if pending is not None:
                pending.outcome = outcome
                self._over.add(outcome.task)
                self._changed.notify_all()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Announce the messages' tasks, but for those that the store has an answer to.

        Returns:
            Task ids, which are the message ids.

        Raises:
            MessageError: A message carries no task.
            UsageError: A task is addressed to another device's node.
        """
        ids: list[str] = []
        for message in messages:
            task, model = read_instruction(message)
            self._check_node(task.device, message)
            pending = _Pending(stub(message, task.task))
            with self._changed:  # before the question below: an answer may come in between
                self._pending[task.task] = pending
            if self._result(task.task) is not None:
                self._ended(Outcome(task.task, task.device))
            else:
                self._hub.announce(task, model)
            ids.append(task.task)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that have come; each is handed out once."""
        replies = (self._reply(task) for task in message_ids)
        return [r for r in replies if r is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Announce now; then yield replies as they come, until enough have or time is up.

        Args:
            messages: Instructions (`flower_messages.instruction`).
            timeout: Seconds from now; None: wait for all.

        Returns:
            To be iterated once. Tasks without an answer at the end are not announced any more;
            whether a late answer is still stored is the store's decision.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        return self._replies(self.push_messages(messages), deadline)

    def _replies(self, ids: list[str], deadline: float | None) -> Iterator[Message]:
        waiting = dict.fromkeys(ids)
        wanted = math.ceil(self._quorum * len(ids) - 1e-9)
        answers = 0
        try:
            while waiting and answers < wanted:
                ended = self._wait(waiting, deadline)
                if not ended:
                    log.info("%d of %d tasks were not answered in time", len(waiting), len(ids))
                    return
                for task in ended:
                    del waiting[task]
                    reply = self._reply(task)
                    if reply is not None:
                        answers += reply.has_content()
                        yield reply
        finally:
            self._hub.withdraw(ids)
            with self._changed:
                for task in ids:
                    self._forget(task)

    def _forget(self, task: str) -> None:
        self._pending.pop(task, None)
        self._over.discard(task)

    def _wait(self, waiting: dict[str, None], deadline: float | None) -> set[str]:
        """Tasks that have ended, at least one unless the deadline has passed."""
        with self._changed:
            while not (ended := self._over & waiting.keys()):
                self._check_stop()
                left = LOOK_S if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, LOOK_S))
            return ended

    def _reply(self, task: str) -> Message | None:
        with self._changed:
            pending = self._pending.get(task)
            if pending is None or pending.outcome is None:
                return None
            self._forget(task)
        if pending.outcome.refused is not None:
            return error_reply(pending.stub, pending.outcome.refused)
        frame = self._result(task)
        if frame is None:
            return error_reply(pending.stub, f"result of task {task} has been collected")
        return result_reply(pending.stub, frame)

    def _result(self, task: str) -> bytes | None:
        try:
            return self._store.result(task)
        except RegistryError:
            return None
