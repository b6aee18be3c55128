"""The agent: one process that learns, installs and reports, and survives being killed.

    dispatcher (of the connection)   notes messages, feeds blocks to the transfers
    this thread                      enrols, acknowledges, keeps the timers
    `Jobs`                           one job at a time: a task, an installation, a report
    `Courier`                        brings answers and reports to the coordinator

Training and installation never run at the same time, because each alone may need most of a small
device's memory. All that must outlive the process lies below `config.state`:

    tasks/       accepted, not answered          answers.bin   answers and residual (`feedback`)
    outbox/      answers not confirmed           graphs/       verified by hash, reusable
    trust/       signed metadata                 slots/        installed models
    parts/       interrupted transfers           incoming/     on its way to one of the above
    last.json    the last report, for `status`   lock          held while the agent runs
    recent.npy   samples seen in service, only where `recent_samples` asks for it
    device.pem   the renewed certificate         pending.key   of one that has not come yet
"""

import logging
import math
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Final, Literal

from fleetprune.errors import FleetpruneError, MessageError
from fleetprune.messages import Announcement, Enrol, Enrolled, Progress, Task, TaskAck
from fleetprune.mqtt import Connection, Phase
from fleetprune.outbox import Outbox
from fleetprune.retry import Backoff
from fleetprune.topics import Topics
from fleetprune_agent.config import AgentConfig
from fleetprune_agent.courier import Courier
from fleetprune_agent.data import split
from fleetprune_agent.duties import Duties
from fleetprune_agent.fallback import FallbackSource, Road
from fleetprune_agent.feedback import OnDisk
from fleetprune_agent.http_source import HttpSource, HttpsSettings
from fleetprune_agent.inbox import TaskInbox
from fleetprune_agent.jobs import Jobs
from fleetprune_agent.memory import quiet_malloc, rss_mb, trim
from fleetprune_agent.pacing import Limit
from fleetprune_agent.readers import load_samples
from fleetprune_agent.renewal import Renewal
from fleetprune_agent.sessions import Graphs
from fleetprune_agent.slots import Slots
from fleetprune_agent.sources import DeviceSource
from fleetprune_agent.starts import STEADY_S
from fleetprune_agent.state import locked, read_root
from fleetprune_agent.statefile import tidy_folder
from fleetprune_agent.telemetry import Traffic
from fleetprune_agent.transfer import KINDS, BlobClient
from fleetprune_agent.trust import TrustedRepository
from fleetprune_agent.worker import Worker, WorkerSettings

log = logging.getLogger(__name__)

STOPPED: Final = 0
REFUSED: Final = 3  # exit code; the systemd unit does not restart after it
ENROL: Final = Backoff(first_s=5.0, most_s=300.0)
RETRY: Final = Backoff(first_s=5.0, most_s=300.0)  # of jobs that found nobody at the other end
SPREAD_S: Final = 2.0  # an announcement reaches the whole fleet in one moment
LOOK_S: Final = 30.0  # after a start, where releases do not come over the broker alone
QUIET_S: Final = 5.0  # between two looks for a release, however many are announced
POLL_S: Final = 1.0  # between looks at the stop event
INBOX: Final = 64  # messages that wait to be acted upon: a flood must not take the memory
END_S: Final = 20.0  # for what is under way when the agent is told to stop

_DOWN: Final = ("enrolled", "task", "certificate", *KINDS)


class Agent:
    """One device's agent."""

    def __init__(
        self,
        config: AgentConfig,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        rng: random.Random | None = None,
    ) -> None:
        """Prepare; `run` does everything.

        Args:
            config: Checked configuration.
            now: Timezone-aware UTC; expiry of signed metadata is judged by it.
            rng: Spreads retries.
        """
        self.config, self._now = config, now
        self._rng = rng or random.Random()  # noqa: S311  (jitter)
        self._topics = Topics(config.fleet)
        self._events: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self._attempts: dict[str, int] = {}
        self._https: HttpSource | None = None
        self._enrolled = False
        self._refused: str | None = None
        self._enrol_at = self._refresh_at = self._report_at = 0.0
        self._steady_at = math.inf
        self._running: tuple[int, int, int] | None = None
        self._last_look = -QUIET_S

    def run(self, stop: threading.Event) -> int:
        """Work until `stop` is set.

        Returns:
            Exit code: `STOPPED`, or `REFUSED` if the coordinator does not want this device.

        Raises:
            ConfigError: The state folder is in use or cannot be made, or the root is unusable.
            DataError: There are no usable samples.
            InstallError: The disk refuses.
        """
        quiet_malloc()
        with locked(self.config.state):
            self._prepare(stop)
            self._jobs.start()
            self._courier.start()
            self._connection.start()
            try:
                code = self._loop(stop)
            finally:
                self._end(stop)
            self._slots.stop()
            return code

    def _prepare(self, stop: threading.Event) -> None:
        config, state = self.config, self.config.state
        root = read_root(config.root)
        self._block = probe()
        self._split = split(load_samples(config.data), config.data.held_out)
        self._renewal = Renewal(
            config.device,
            config.broker,
            state,
            now=lambda: self._now().timestamp(),
            rng=self._rng,
            send=lambda data: self._publish("renew", data),
            use=lambda file: self._connection.use_certificate(file),  # noqa: PLW0108  (made below)
        )
        self._connection = Connection(
            self._renewal.settings,
            f"{config.fleet}-{config.device}",
            on_message=self._note,
            on_up=lambda: self._events.put(("up", b"")),
            will=(self._topics.up(config.device, "status"), b"offline"),
        )
        self._connection.subscribe([self._topics.release, self._topics.coordinator])
        self._connection.subscribe(self._topics.down(config.device, kind) for kind in _DOWN)
        limit = Limit(config.pacing.bytes_per_s, time.monotonic)
        self._client = BlobClient(
            self._publish, config.device, state / "parts", time.monotonic, abort=stop, limit=limit
        )
        outbox = Outbox(state / "outbox", config.max_outbox_bytes)
        self._courier = Courier(
            outbox, self._client.push, lambda data: self._publish("telemetry", data), self._rng
        )
        self._inbox = TaskInbox(state / "tasks")
        self._slots = Slots(state)
        self._slots.start()
        tidy_folder(state / "trust")
        source = self._client if config.https is None else self._roads(config.https, limit, stop)
        repository = TrustedRepository(state / "trust", root, source, self._now)
        graphs = Graphs(threads=config.threads, folder=state / "graphs")
        worker = Worker(
            WorkerSettings(config.device, config.trains, config.max_task_s),
            self._split.train,
            graphs,
            OnDisk(state / "answers.bin"),
            source=DeviceSource(lambda: repository, self._client, state / "incoming"),
            stopped=stop.is_set,
        )
        self._duties = Duties(
            config=config,
            split=self._split,
            worker=worker,
            inbox=self._inbox,
            slots=self._slots,
            repository=lambda: repository,
            deliver=self._courier.put,
            acknowledge=self._acknowledge,
            traffic=self._traffic,
            stopped=stop.is_set,
            may_fetch=lambda size: config.pacing.may_fetch(self._now().astimezone(), size),
        )

        def tidy() -> None:
            graphs.release()
            trim()

        self._jobs = Jobs(after_each=tidy)
        trim()  # reading the samples took twice their size

    def _traffic(self) -> Traffic:
        up, down = self._connection.bytes_sent, self._connection.bytes_received
        if self._https is not None:
            up, down = up + self._https.traffic_up, down + self._https.traffic_down
        return Traffic(up, down)

    def _roads(
        self, settings: HttpsSettings, limit: Limit, stop: threading.Event
    ) -> FallbackSource:
        """MQTT and HTTPS, the preferred one first; tasks and answers go over MQTT alone."""
        connection = self._connection
        mqtt = Road(
            "MQTT", self._client, lambda: "" if connection.phase is Phase.UP else connection.status
        )
        self._https = HttpSource(settings, self._client.parts, abort=stop, limit=limit)
        roads = [mqtt, Road("HTTPS", self._https)]
        if settings.first:
            roads.reverse()
        return FallbackSource(roads, time.monotonic, self._rng, stop)

    def _loop(self, stop: threading.Event) -> int:
        for task in self._inbox.waiting():
            self._queue_task(task)
        now = time.monotonic()
        self._report_at = now + self.config.telemetry_s
        # The first look is made when connected; with a second road it need not wait for that.
        wait = self.config.refresh_s if self.config.https is None else self._rng.uniform(0, LOOK_S)
        self._refresh_at = now + wait
        while not stop.is_set():
            try:
                kind, payload = self._events.get(timeout=POLL_S)
            except queue.Empty:
                kind, payload = "", b""
            try:
                self._take(kind, payload)
            except FleetpruneError as e:
                log.warning("message on %s: %s", kind, e)
            if self._refused is not None:
                log.error("enrolment refused by the coordinator: %s", self._refused)
                return REFUSED
            self._keep_timers(time.monotonic())
        return STOPPED

    def _end(self, stop: threading.Event) -> None:
        """Leave everything as the next start expects it; that would be so after a kill, too."""
        stop.set()
        self._publish("status", b"offline", retain=True)
        if not self._jobs.stop(END_S):
            log.warning("a job did not end within %g s; it is done again at the next start", END_S)
        self._courier.stop(END_S)
        self._connection.stop()
        if self._https is not None:
            self._https.close()

    # The dispatcher's thread: note and return.

    def _note(self, topic: str, payload: bytes) -> None:
        kind = topic.rsplit("/", 1)[-1]
        if kind in KINDS:
            self._client.feed(kind, payload)
        elif self._events.qsize() < INBOX:
            self._events.put((kind, payload))
        else:
            log.warning("%d messages are waiting: one on %s is dropped", INBOX, kind)

    # This thread.

    def _take(self, kind: str, payload: bytes) -> None:
        """Act on a noted message, unverified."""
        if kind == "up":
            self._enrolled = False
            self._publish("status", b"online", retain=True)
            self._meet_coordinator()
            self._jobs.put("report", self._duties.repeat_report)
            for task in self._inbox.waiting():
                self._accept(task)
        elif kind == "coordinator" and payload == b"online":
            self._meet_coordinator()
        elif kind == "enrolled":
            answer = Enrolled.from_bytes(payload)
            self._enrolled = answer.accepted
            self._refused = None if answer.accepted else (answer.reason or "no reason given")
        elif kind == "release":
            Announcement.from_bytes(payload)
            self._look_soon()
        elif kind == "certificate":
            self._renewal.take(payload)
        elif kind == "task":
            self._take_task(Task.from_bytes(payload))

    def _meet_coordinator(self) -> None:
        """Somebody may be there again: enrol, deliver, look for releases.

        A coordinator that was restarted has not seen what its predecessor was asked for, so
        transfers ask again instead of waiting for timeouts that grew while nobody was there.
        """
        self._client.reconnected()
        self._attempts["enrol"] = 0
        self._enrol_at = time.monotonic()
        self._courier.wake()
        self._look_soon()

    def _look_soon(self) -> None:
        """Look for a release within `SPREAD_S`, but `QUIET_S` after the last look."""
        now = time.monotonic()
        at = max(now + self._rng.uniform(0, SPREAD_S), self._last_look + QUIET_S)
        self._jobs.put("refresh", self._refresh, at - now)

    def _take_task(self, task: Task) -> None:
        if task.device != self.config.device:
            raise MessageError(f"task {task.task} is for {task.device}")
        if self._inbox.add(task):
            self._accept(task)
            self._queue_task(task)
        else:
            self._acknowledge(self._ack(task, Progress.REFUSED, "busy with earlier tasks"))

    def _accept(self, task: Task) -> None:
        self._acknowledge(self._ack(task, Progress.ACCEPTED))

    def _ack(self, task: Task, state: Progress, reason: str = "") -> TaskAck:
        return TaskAck(task=task.task, device=task.device, state=state, reason=reason)

    def _queue_task(self, task: Task, delay_s: float = 0.0) -> None:
        key = f"task {task.task}"
        if not self._jobs.knows(key) or delay_s:
            self._jobs.put(key, lambda: self._do(key, task), delay_s)

    def _keep_timers(self, now: float) -> None:
        if not self._enrolled and now >= self._enrol_at:
            attempt = self._attempts.get("enrol", 0)
            self._attempts["enrol"] = attempt + 1
            self._enrol_at = now + ENROL.half_jitter(attempt, self._rng)
            self._enrol()
        self._renewal.keep(now)
        if now >= self._refresh_at:
            self._refresh_at = now + self.config.refresh_s
            self._jobs.put("refresh", self._refresh)
        if now >= self._report_at:
            self._report_at = now + self.config.telemetry_s
            self._jobs.put("report", self._duties.report)
        running = self._slots.version()
        if running != self._running:
            self._running, self._steady_at = running, now + STEADY_S
        elif now >= self._steady_at:
            self._steady_at = math.inf
            self._jobs.put("steady", self._slots.steady)

    def _enrol(self) -> None:
        config = self.config
        self._publish(
            "enrol",
            Enrol(
                device=config.device,
                device_class=config.device_class,
                agent_version=_version(),
                trains=config.trains and self._split.train.y is not None,
                samples=len(self._split.train),
                block=self._block,
                rss_mb=round(rss_mb(), 1),
            ).to_bytes(),
        )

    # The jobs' thread.

    def _do(self, key: str, task: Task) -> None:
        if self._duties.task(task):
            self._attempts.pop(key, None)
        else:
            self._queue_task(task, self._later(key))

    def _refresh(self) -> None:
        self._last_look = time.monotonic()
        if self._duties.refresh():
            self._attempts.pop("refresh", None)
        else:
            self._jobs.put("refresh", self._refresh, self._later("refresh"))

    def _later(self, key: str) -> float:
        attempt = self._attempts.get(key, 0)
        self._attempts[key] = attempt + 1
        return RETRY.half_jitter(attempt, self._rng)

    # Any thread.

    def _acknowledge(self, ack: TaskAck) -> None:
        self._publish("ack", ack.to_bytes())

    def _publish(self, kind: str, payload: bytes, *, retain: bool = False) -> bool:
        topic = self._topics.up(self.config.device, kind)
        return self._connection.publish(topic, payload, retain=retain)


def probe() -> Literal[0, 8, 16]:
    """Channel block of this processor, asked in a process of its own.

    Loading onnxruntime costs 30 MB for as long as a process lives; an agent that only waits does
    not need it. 0, which is right everywhere, if the other process fails.
    """
    code = "from fleetprune_agent.runtime import probe_block as p; print(p())"
    try:
        done = subprocess.run(  # noqa: S603  (our own interpreter and code)
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as e:
        log.warning("the processor's memory layout is not known: %s", e)
        return 0
    answers: dict[str, Literal[8, 16]] = {"8": 8, "16": 16}
    return answers.get(done.stdout.strip(), 0)


def _version() -> str:
    try:
        return version("fleetprune")
    except PackageNotFoundError:
        return "unknown"
