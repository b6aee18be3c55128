"""A registry in memory and a device of few lines, for the tests of hub and grids."""

import hashlib
import threading
from contextlib import suppress

from fleetprune.errors import TransportError
from fleetprune.messages import (
    Blob,
    Enrol,
    Enrolled,
    GraphRef,
    Progress,
    Task,
    TaskAck,
    TaskKind,
)
from fleetprune.mqtt import Connection
from fleetprune.topics import Topics
from fleetprune_agent.transfer import KINDS, BlobClient

MODEL = bytes(range(256)) * 600  # three blocks


def task(name="t1", device="d1", model=MODEL, **options):
    options = {"round": 3, "deadline_s": 60.0, **options}
    return Task(
        task=name,
        device=device,
        kind=TaskKind.TRAIN,
        mask_version=1,
        shape="phone",
        graphs=(GraphRef(target="graphs/a.onnx", sha256="0" * 64),),
        model=Blob(sha256=hashlib.sha256(model).hexdigest(), size=len(model)),
        **options,
    )


class MemoryStore:
    """Implements `TaskStore`."""

    def __init__(self, *tasks):
        self.tasks = {t.task: t for t in tasks}
        self.results = {}
        self.saves = []

    def open_tasks(self, device):
        return [t for t in self.tasks.values() if t.device == device and t.task not in self.results]

    def save_result(self, task_id, device, data):
        self.saves.append((task_id, device))
        known = self.tasks.get(task_id)
        if known is None or known.device != device or task_id in self.results:
            return False
        self.results[task_id] = data
        return True

    def result(self, task_id):
        return self.results.get(task_id)


class FakeDevice:
    """Enrols, acknowledges each task, pulls its model and pushes `work(task, model)`."""

    def __init__(self, settings, device, folder, *, fleet="f", work=None, deaf=0, refuse=None):
        self.topics, self.device, self.folder = Topics(fleet), device, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.work = work or (lambda t, model: b"result of " + t.task.encode())
        self.refuse, self.deaf = refuse, deaf
        self.told, self.enrolled = [], []
        self.connection = Connection(
            settings,
            f"{fleet}-{device}",
            on_message=self._message,
            on_up=self._up,
            will=(self.topics.up(device, "status"), b"offline"),
        )
        self.connection.subscribe([self.topics.down(device, "+")])
        self.abort, self.begun = threading.Event(), set()
        self.client = BlobClient(self.send, device, folder / "parts", abort=self.abort)

    def __enter__(self):
        self.connection.start()
        self.connection.wait_connected(10)
        return self

    def __exit__(self, *exc):
        self.abort.set()
        self.connection.stop()

    def send(self, kind, payload, retain=False):
        return self.connection.publish(self.topics.up(self.device, kind), payload, retain=retain)

    def _up(self):
        self.client.reconnected()
        self.send("status", b"online", retain=True)
        enrol = Enrol(
            device=self.device, device_class="phone", agent_version="1", trains=True, samples=1
        )
        self.send("enrol", enrol.to_bytes())

    def _message(self, topic, payload):
        kind = topic.rsplit("/", 1)[1]
        if kind in KINDS:
            self.client.feed(kind, payload)
        elif kind == "enrolled":
            self.enrolled.append(Enrolled.from_bytes(payload))
        elif kind == "task":
            self.told.append(Task.from_bytes(payload))
            if len(self.told) > self.deaf:
                threading.Thread(target=self._do, args=(self.told[-1],), daemon=True).start()

    def _do(self, todo):
        state = Progress.REFUSED if self.refuse else Progress.ACCEPTED
        ack = TaskAck(task=todo.task, device=self.device, state=state, reason=self.refuse or "")
        self.send("ack", ack.to_bytes())
        if self.refuse:
            return
        if todo.task in self.begun:
            return
        self.begun.add(todo.task)
        into, blob = self.folder / todo.task, todo.model
        with suppress(TransportError):  # the test is over
            self.client.pull(f"blobs/{blob.sha256}", blob.size, blob.sha256, into)
            self.client.push(f"results/{todo.task}", self.work(todo, into.read_bytes()))
