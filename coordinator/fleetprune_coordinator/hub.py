"""The coordinator's end of the fleet's MQTT topics.

The broker may lose, double and delay anything, so nothing here rests on a delivery: tasks are
announced again until the device acknowledges them and whenever it comes back, results are stored
by task id however often they come, and both sides' presence is retained and renewed.

A device is who the topic says it is: the broker's access list lets a device write below
`up/{device}` only. A message that names another device inside is dropped.
"""

import logging
import random
import re
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from fleetprune.blocks import NotFound, RefusedError, Request
from fleetprune.errors import HostileInputError, MessageError, RegistryError
from fleetprune.files import storage_errors, write_atomic
from fleetprune.messages import (
    MAX_REASON,
    Announcement,
    Certificate,
    Enrol,
    Enrolled,
    Message,
    Progress,
    Task,
    TaskAck,
    Telemetry,
)
from fleetprune.mqtt import QOS, BrokerSettings, Connection, packet_length, packet_size
from fleetprune.retry import Backoff
from fleetprune.topics import Topics
from fleetprune_coordinator.block_reader import read_request
from fleetprune_coordinator.block_sender import BlockSender
from fleetprune_coordinator.block_server import Admission, BlockServer
from fleetprune_coordinator.doorman import Doorman

log = logging.getLogger(__name__)

ANNOUNCE = Backoff(first_s=4.0, most_s=120.0)  # a task is 1-2 kB: rare enough for a metered link
SETTLE_S = 0.5  # a device that comes back says so twice (status, enrol): its ack comes in between
ROOM_S = 1.0  # between two looks whether a sender that waits for the broker is to end
SERVER_GONE_S = 100.0  # three missed `block_process.PRESENCE_S` and a late one
MAX_SERVERS = 1000  # block servers remembered
MAX_DEVICES = 100_000  # names remembered: bounds what invented device names cost us
ONLINE, OFFLINE = b"online", b"offline"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESULTS = "results/"
_BLOBS = "blobs/"
_M = TypeVar("_M", bound=Message)


class TaskStore(Protocol):
    """What the hub needs of the registry; called from several threads."""

    def open_tasks(self, device: str) -> list[Task]:
        """Tasks that the device is still asked to do."""
        ...

    def save_result(self, task_id: str, device: str, data: bytes) -> bool:
        """Keep a result for good. False: it was there already, or is not wanted."""
        ...

    def result(self, task_id: str) -> bytes | None:
        """A stored result; None: there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """A task has ended."""

    task: str
    device: str
    refused: str | None = None
    """Why the device refused it; None: its result is in the store."""


@dataclass(slots=True)
class _Announced:
    task: Task
    deadline: float
    due: float | None
    """When it is sent (again); None: acknowledged, or nobody is there."""
    attempt: int = 0
    sent_at: float = float("-inf")


class Hub:
    """Serves one fleet through one broker."""

    def __init__(
        self,
        settings: BrokerSettings,
        fleet: str,
        store: TaskStore,
        read: Callable[[str], Path | bytes | None],
        spool: Path,
        *,
        on_enrol: Callable[[Enrol], str | None] = lambda enrol: None,
        on_status: Callable[[str, bool], None] = lambda device, online: None,
        on_telemetry: Callable[[Telemetry], None] = lambda telemetry: None,
        doorman: Doorman | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """Prepare; nothing is opened before `start`.

        Args:
            settings: The broker.
            fleet: Name of the fleet.
            store: Tasks and results.
            read: The repository: file or bytes of `metadata/...`, `targets/...` and `blobs/...`;
                None: there is none.
            spool: Folder for uploads under way and for blobs that `read` does not have.
            on_enrol: Decides on a device; None accepts it, a text is the reason not to.
            on_status: Told when a device comes or goes.
            on_telemetry: Told what a device reports about itself.
            doorman: Decides whom to listen to, and what they may read; None: whoever the broker
                lets in may take part and read everything.
            rng: Jitter of repeated announcements.
        """
        self._topics, self._store, self._repository = Topics(fleet), store, read
        self._on_enrol, self._on_status, self._on_telemetry = on_enrol, on_status, on_telemetry
        self._doorman = doorman
        self._turned_away: set[str] = set()
        self._rng = rng or random.Random()  # noqa: S311  (jitter)
        self._blobs = spool / "blobs"
        with storage_errors("create", spool):
            self._blobs.mkdir(parents=True, exist_ok=True)
        self._server = BlockServer(
            self._read, self._store_result, spool / "results", admit=self._admit
        )
        self._sender = BlockSender(self._server, self._send_block, self._has_room)
        self._block_servers: dict[str, float] = {}  # when each was last heard
        self._changed = threading.Condition()
        self._announced: dict[str, _Announced] = {}
        self._online: dict[str, bool] = {}
        self._counting = threading.Lock()
        self._traffic: dict[str, tuple[int, int]] = {}
        self._watchers: list[Callable[[Outcome], None]] = []
        self._release: int | None = None
        self._stopping = False
        self._announcer: threading.Thread | None = None
        self._handlers: dict[str, Callable[[str, bytes], None]] = {
            "enrol": self._enrol,
            "status": self._status,
            "ack": self._ack,
            "telemetry": self._telemetry,
            "get": self._get,
            "put": self._put,
            "renew": self._renew,
        }
        self.connection = Connection(
            settings,
            f"fleetprune-{fleet}-coordinator",
            on_message=self._receive,
            on_up=self._up,
            will=(self._topics.coordinator, OFFLINE),
        )
        self.connection.subscribe([self._topics.up("+", "#"), self._topics.blocks("+")])

    def start(self) -> None:
        """Connect and serve, in the background."""
        self._stopping = False
        self._announcer = threading.Thread(
            target=self._keep_announcing, name="hub-announce", daemon=True
        )
        self._announcer.start()
        self._sender.start()
        self.connection.start()

    def stop(self) -> None:
        """Say goodbye and disconnect; everything that matters is in store and spool."""
        self.connection.publish(self._topics.coordinator, OFFLINE, retain=True)
        self.connection.stop()
        self._sender.stop()
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._announcer is not None:
            self._announcer.join()
        self._server.close()

    def traffic(self, device: str) -> tuple[int, int]:
        """Bytes of MQTT packets (header, topic, payload) that we saw: (from, to) the device."""
        return self._traffic.get(device, (0, 0))

    def online(self, device: str) -> bool:
        """Whether the device, or the broker on its behalf, last said that it is there."""
        return self._online.get(device, False)

    def watch(self, told: Callable[[Outcome], None]) -> Callable[[], None]:
        """Be told of ended tasks, in the hub's thread; returns how to stop that."""
        self._watchers.append(told)
        return lambda: self._watchers.remove(told)

    def announce(self, task: Task, model: bytes | None = None) -> None:
        """Tell a device of its task until it has acknowledged, answered or missed it.

        Args:
            task: The store must have it: only results of open tasks are taken.
            model: What `task.model` names; kept as `blobs/<sha256>` while announced tasks refer
                to it, if the repository does not have it.
        """
        with self._changed:
            if model is not None and self._read(f"{_BLOBS}{task.model.sha256}") is None:
                write_atomic(self._blobs / task.model.sha256, model)
            self._announce(task, time.monotonic())
            self._changed.notify_all()

    def withdraw(self, tasks: Collection[str]) -> None:
        """Stop announcing; blobs that no other announced task needs are removed."""
        with self._changed:
            for task in tasks:
                self._announced.pop(task, None)
            needed = {a.task.model.sha256 for a in self._announced.values()}
            with storage_errors("tidy", self._blobs):
                for path in self._blobs.iterdir():
                    if path.name not in needed:
                        path.unlink()

    def announce_release(self, release: int) -> None:
        """Hint, retained, that the release repository has something new."""
        self._release = release
        self._publish_release()

    # Announcing.

    def _announce(self, task: Task, now: float) -> None:
        known = self._announced.get(task.task)
        if known is None:
            known = _Announced(task, now + task.deadline_s, now)
            self._announced[task.task] = known
        else:
            known.due, known.attempt = max(now, known.sent_at + SETTLE_S), 0

    def _announce_open(self, device: str) -> None:
        """All open tasks, at a device's return."""
        tasks = self._store.open_tasks(device)
        with self._changed:
            for task in tasks:
                self._announce(task, time.monotonic())
            self._changed.notify_all()

    def _keep_announcing(self) -> None:
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                for announced in list(self._announced.values()):
                    if announced.deadline <= now:
                        del self._announced[announced.task.task]
                    elif announced.due is not None and announced.due <= now:
                        self._send_task(announced, now)
                dues = [a.due for a in self._announced.values() if a.due is not None]
                self._changed.wait(max(0.0, min(dues) - now) if dues else None)

    def _send_task(self, announced: _Announced, now: float) -> None:
        device = announced.task.device
        shut_out = self._doorman is not None and self._doorman.refusal(device) is not None
        if shut_out or not self._online.get(device, True):
            announced.due = None  # it is announced when the device comes back
            return
        if self._send(device, "task", announced.task.to_bytes()):
            announced.sent_at = now
        announced.due = now + ANNOUNCE.half_jitter(announced.attempt, self._rng)
        announced.attempt += 1

    def _publish_release(self) -> None:
        if self._release is not None:
            payload = Announcement(release=self._release).to_bytes()
            self.connection.publish(self._topics.release, payload, retain=True)

    # Messages; all in the connection's dispatcher thread.

    def _up(self) -> None:
        self.connection.publish(self._topics.coordinator, ONLINE, retain=True)
        self._publish_release()
        with self._changed:
            for announced in self._announced.values():
                if announced.due is not None:
                    announced.due, announced.attempt = time.monotonic(), 0
            self._changed.notify_all()

    def _receive(self, topic: str, payload: bytes) -> None:
        server = self._topics.parse_blocks(topic)
        if server is not None:
            self._block_server(server, payload == ONLINE)
            return
        parsed = self._topics.parse_up(topic)
        if parsed is None or not _NAME.fullmatch(parsed[0]):
            log.debug("message on %s ignored", topic)
            return
        device, kind = parsed
        if device not in self._traffic and len(self._traffic) >= MAX_DEVICES:
            log.warning("more than %d device names: %s ignored", MAX_DEVICES, device)
            return
        self._count(device, packet_size(topic, payload), 0)
        handler = self._handlers.get(kind)
        if handler is None:
            log.debug("message on %s ignored", topic)
            return
        if self._turn_away(device, kind, payload):
            return
        try:
            handler(device, payload)
        except HostileInputError as e:
            log.warning("%s of device %s ignored: %s", kind, device, e)

    def _turn_away(self, device: str, kind: str, payload: bytes) -> bool:
        """Whether a device is not listened to; it is told so when it asks to be let in."""
        reason = None if self._doorman is None else self._doorman.refusal(device)
        if reason is None:
            self._turned_away.discard(device)
            return False
        if kind == "enrol":
            answer = Enrolled(accepted=False, reason=reason[:MAX_REASON])
            self._send(device, "enrolled", answer.to_bytes())
        elif kind == "renew":
            self._send(device, "certificate", Certificate(reason=reason[:MAX_REASON]).to_bytes())
        if device not in self._turned_away:
            self._turned_away.add(device)
            log.warning("messages are ignored: %s", reason)
            self._online[device] = False
            self._on_status(device, False)
        return True

    def _send(self, device: str, kind: str, payload: bytes, qos: int = QOS) -> bool:
        topic = self._topics.down(device, kind)
        sent = self.connection.publish(topic, payload, qos=qos)
        if sent:
            self._count(device, 0, packet_size(topic, payload, qos))
        return sent

    def _count(self, device: str, up: int, down: int) -> None:
        with self._counting:
            before = self._traffic.get(device, (0, 0))
            self._traffic[device] = (before[0] + up, before[1] + down)

    def _enrol(self, device: str, payload: bytes) -> None:
        enrol = _own(device, Enrol.from_bytes(payload), lambda m: m.device)
        wrong = None if self._doorman is None else self._doorman.wrong_class(enrol)
        reason = wrong or self._on_enrol(enrol)
        answer = Enrolled(accepted=reason is None, reason=(reason or "")[:MAX_REASON])
        self._send(device, "enrolled", answer.to_bytes())
        if reason is None:
            self._online[device] = True
            self._announce_open(device)

    def _renew(self, device: str, payload: bytes) -> None:
        answer = None if self._doorman is None else self._doorman.renew(device, payload)
        if answer is not None:
            log.info("device %s renews: %s", device, answer.reason or "it has a new certificate")
            self._send(device, "certificate", answer.to_bytes())

    def _status(self, device: str, payload: bytes) -> None:
        if payload not in (ONLINE, OFFLINE):
            raise MessageError(f"status {payload[:20]!r}, expected {ONLINE!r} or {OFFLINE!r}")
        online = payload == ONLINE
        self._online[device] = online
        self._on_status(device, online)
        if online:
            self._announce_open(device)

    def _ack(self, device: str, payload: bytes) -> None:
        ack = _own(device, TaskAck.from_bytes(payload), lambda m: m.device)
        with self._changed:
            announced = self._announced.get(ack.task)
            if announced is None or announced.task.device != device:
                log.info("device %s acknowledged task %s, which is not open", device, ack.task)
                return
            announced.due = None
            if ack.state is Progress.REFUSED:
                del self._announced[ack.task]  # told of once, however often it comes
        if ack.state is Progress.REFUSED:
            self._tell(Outcome(ack.task, device, ack.reason or "no reason given"))

    def _telemetry(self, device: str, payload: bytes) -> None:
        self._on_telemetry(_own(device, Telemetry.from_bytes(payload), lambda m: m.device))

    def _block_server(self, server: str, online: bool) -> None:
        known = self._block_servers.pop(server, None) is not None
        if online and len(self._block_servers) < MAX_SERVERS:
            self._block_servers[server] = time.monotonic()
        if online is not known:
            others = ", ".join(sorted(self._block_servers)) or "this process"
            state = "there" if online else "gone"
            log.info("block server %s is %s; releases come from %s", server, state, others)

    def _others_serve(self) -> bool:
        """Whether a block server was heard lately: a retained "online" may be a dead one's."""
        now = time.monotonic()
        return any(now - heard < SERVER_GONE_S for heard in self._block_servers.values())

    def _get(self, device: str, payload: bytes) -> None:
        request = read_request(payload)
        if self._doorman is not None and not self._doorman.may_read(
            device, request.name, lambda sha256: self._has_task_with(device, sha256)
        ):
            log.info("device %s may not read %s", device, request.name[:MAX_REASON])
            self._send(device, "block", NotFound(request.transfer).encode())
        elif self._others_serve() and not request.name.startswith(_BLOBS):
            self._count(device, 0, self._of_others(device, request))
        else:
            self._sender.ask(device, request)

    def _of_others(self, device: str, request: Request) -> int:
        """Bytes of the packets that a block server answers a request with."""
        topic = self._topics.down(device, "block")
        return sum(packet_length(topic, n, qos=0) for n in self._server.lengths(request))

    def _send_block(self, device: str, block: bytes) -> bool:
        return self._send(device, "block", block, qos=0)  # what is lost is asked for again

    def _has_room(self) -> bool:
        return self.connection.wait_for_room(ROOM_S)

    def _has_task_with(self, device: str, sha256: str) -> bool:
        with self._changed:
            announced = [a.task for a in self._announced.values() if a.task.device == device]
        return any(t.model.sha256 == sha256 for t in announced) or any(
            t.model.sha256 == sha256 for t in self._store.open_tasks(device)
        )

    def _put(self, device: str, payload: bytes) -> None:
        answer = self._server.put(device, payload)
        if answer is not None:
            self._send(device, "stored", answer)

    # What the block server asks.

    def _read(self, name: str) -> Path | bytes | None:
        found = self._repository(name)
        if found is None and name.startswith(_BLOBS):
            path = self._blobs / name.removeprefix(_BLOBS).replace("/", "_")
            return path if path.is_file() else None
        return found

    def _admit(self, device: str, name: str) -> Admission:
        task = name.removeprefix(_RESULTS)
        if task == name or not _NAME.fullmatch(task):
            return Admission.REFUSE
        with self._changed:
            announced = self._announced.get(task)
        if announced is not None and announced.task.device != device:
            return Admission.REFUSE
        if announced is not None or any(t.task == task for t in self._store.open_tasks(device)):
            return Admission.ACCEPT
        return Admission.DONE if self._has_result(task) else Admission.REFUSE

    def _has_result(self, task: str) -> bool:
        with suppress(RegistryError):  # collected long ago: neither here nor wanted again
            return self._store.result(task) is not None
        return False

    def _store_result(self, device: str, name: str, data: bytes) -> None:
        task = name.removeprefix(_RESULTS)
        if not self._store.save_result(task, device, data) and not self._has_result(task):
            raise RefusedError(f"task {task} is not open for device {device}")
        with self._changed:
            self._announced.pop(task, None)
        self._tell(Outcome(task, device))

    def _tell(self, outcome: Outcome) -> None:
        for told in list(self._watchers):
            told(outcome)


def _own(device: str, message: _M, named: Callable[[_M], str]) -> _M:
    """`message` if it names the device that sent it (else MessageError)."""
    if named(message) != device:
        raise MessageError(f"{type(message).__name__} of {named(message)!r}, sent by {device!r}")
    return message
