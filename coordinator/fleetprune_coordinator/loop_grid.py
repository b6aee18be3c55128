"""Flower's Grid in one process: each device is a function, called when its reply is wanted.

The same messages as over MQTT, so a strategy cannot tell them apart; one device after another, so
a run is reproducible to the bit.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

from flwr.app import Message

from fleetprune.blocks import NotFoundError
from fleetprune_coordinator.flower_messages import (
    error_reply,
    read_instruction,
    result_reply,
    stub,
)
from fleetprune_coordinator.task_grid import TaskGrid

log = logging.getLogger(__name__)

Read = Callable[[str], bytes]
"""Content behind a name; NotFoundError if there is none."""
Device = Callable[[bytes, Read], bytes]
"""(task as JSON, read) to a frame of kind RSLT."""


def _nothing(name: str) -> bytes:
    raise NotFoundError(f"the coordinator has no {name}")


class LoopGrid(TaskGrid):
    """A grid whose nodes are functions."""

    def __init__(
        self,
        devices: Mapping[str, Device],
        nodes: Mapping[str, int] | None = None,
        read: Read = _nothing,
    ) -> None:
        """Make a grid.

        Args:
            devices: By device name.
            nodes: Node ids by device name; None: 1000, 1001, ... in the order of `devices`.
            read: What devices read besides their task's model: `targets/...`, `metadata/...`.
        """
        ids = dict(nodes) if nodes is not None else {d: 1000 + i for i, d in enumerate(devices)}
        super().__init__(lambda: ids)
        self._devices, self._read = devices, read
        self._replies: dict[str, Message] = {}
        self._traffic: dict[str, tuple[int, int]] = {}

    def traffic(self, device: str) -> tuple[int, int]:
        """Bytes of payload (from, to) the device: tasks and what it read, and its results."""
        return self._traffic.get(device, (0, 0))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Let the devices do the messages' tasks, now.

        Raises:
            MessageError: A message carries no task.
            UsageError: A task is addressed to another device's node.
        """
        ids: list[str] = []
        for message in messages:
            reply = self._do(message)
            self._replies[reply.metadata.reply_to_message_id] = reply
            ids.append(reply.metadata.reply_to_message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies; each is handed out once."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Let one device after another do its task, whenever the next reply is asked for.

        `timeout` is ignored: nothing here waits for anybody.
        """
        return (self._do(message) for message in messages)

    def _do(self, message: Message) -> Message:
        task, model = read_instruction(message)
        self._check_node(task.device, message)
        up, down = self.traffic(task.device)
        to = stub(message, task.task)

        def read(name: str) -> bytes:
            nonlocal down
            data = model if name == f"blobs/{task.model.sha256}" else self._read(name)
            down += len(data)
            return data

        request = task.to_bytes()
        down += len(request)
        try:
            frame = self._devices[task.device](request, read)
        except Exception as e:
            log.warning("device %s failed in task %s: %s", task.device, task.task, e)
            reply = error_reply(to, f"{type(e).__name__}: {e}")
        else:
            up += len(frame)
            reply = result_reply(to, frame)
        self._traffic[task.device] = (up, down)
        return reply
