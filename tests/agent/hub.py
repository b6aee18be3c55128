"""A real mosquitto, and the coordinator's end of the wire as a test wants it to be."""

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

from repositories import MemoryRepository

from fleetprune.blocks import NotFoundError
from fleetprune.local_port import free_port
from fleetprune.messages import Announcement, Enrol, Enrolled, Task, TaskAck, Telemetry
from fleetprune.mqtt import BrokerSettings, Connection
from fleetprune.topics import Topics
from fleetprune_coordinator.block_server import BlockServer

FLEET = "f"
PATIENCE_S = 20.0


@contextmanager
def broker(folder: Path) -> Iterator[int]:
    """Mosquitto on a free port of this machine."""
    program = shutil.which("mosquitto")
    if program is None:
        raise RuntimeError("these tests need mosquitto: apt-get install mosquitto")
    port = free_port()
    settings = folder / "mosquitto.conf"
    settings.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    process = subprocess.Popen(
        [program, "-c", str(settings)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: _listens(port), "the broker")
        yield port
    finally:
        process.terminate()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come within {seconds:g} s")
        time.sleep(0.01)


class Hub:
    """Answers enrolments, serves blobs, keeps what it is sent."""

    def __init__(self, port: int, folder: Path, repository: MemoryRepository) -> None:
        self.repository = repository
        self.accepts = True
        self.blobs: dict[str, bytes] = {}
        self.results: dict[str, bytes] = {}
        self.enrolled: SimpleQueue[Enrol] = SimpleQueue()
        self.acks: SimpleQueue[TaskAck] = SimpleQueue()
        self.telemetry: SimpleQueue[Telemetry] = SimpleQueue()
        self.presence: list[bytes] = []
        self._lock = threading.Lock()
        self._topics = Topics(FLEET)
        self._server = BlockServer(self._read, self._store, folder)
        self.connection = Connection(BrokerSettings(port=port), "hub", on_message=self._take)
        self.connection.subscribe([self._topics.up("+", kind) for kind in _KINDS])
        self.connection.start()
        self.connection.wait_connected(PATIENCE_S)
        self.connection.publish(self._topics.coordinator, b"online", retain=True)

    def close(self) -> None:
        self.connection.stop()
        self._server.close()

    def send(self, task: Task) -> None:
        self.connection.publish(self._topics.down(task.device, "task"), task.to_bytes())

    def announce(self, release: int) -> None:
        message = Announcement(release=release).to_bytes()
        self.connection.publish(self._topics.release, message, retain=True)

    def _take(self, topic: str, payload: bytes) -> None:
        device, kind = self._topics.parse_up(topic)
        if kind == "get":
            for block in self._server.get(payload):
                self.connection.publish(self._topics.down(device, "block"), block)
        elif kind == "put":
            answer = self._server.put(device, payload)
            if answer is not None:
                self.connection.publish(self._topics.down(device, "stored"), answer)
        elif kind == "enrol":
            self.enrolled.put(Enrol.from_bytes(payload))
            answer = Enrolled(
                accepted=self.accepts, reason="" if self.accepts else "not on the list"
            )
            self.connection.publish(self._topics.down(device, "enrolled"), answer.to_bytes())
        elif kind == "ack":
            self.acks.put(TaskAck.from_bytes(payload))
        elif kind == "telemetry":
            self.telemetry.put(Telemetry.from_bytes(payload))
        elif kind == "status":
            self.presence.append(payload)

    def _read(self, name: str) -> bytes | None:
        if name in self.blobs:
            return self.blobs[name]
        try:
            return self.repository.read(name, 2**30)
        except NotFoundError:
            return None

    def _store(self, device: str, name: str, data: bytes) -> None:
        self.results[name] = data


_KINDS = ("enrol", "ack", "telemetry", "status", "get", "put")


def until(received: SimpleQueue, wanted: Callable[[object], bool], what: str):
    """The first that is wanted; AssertionError after `PATIENCE_S`."""
    end = time.monotonic() + PATIENCE_S
    while (left := end - time.monotonic()) > 0:
        try:
            message = received.get(timeout=left)
        except Empty:
            break
        if wanted(message):
            return message
    raise AssertionError(f"{what} did not come within {PATIENCE_S:g} s")
