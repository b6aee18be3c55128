"""What an agent does, job by job, without knowing when: tasks, releases, reports."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fleetprune.errors import (
    DataError,
    FleetpruneError,
    InstallError,
    MessageError,
    TransportError,
)
from fleetprune.files import write_atomic
from fleetprune.messages import Progress, Task, TaskAck, Telemetry
from fleetprune.outbox import Kind
from fleetprune_agent.config import AgentConfig
from fleetprune_agent.data import Split
from fleetprune_agent.inbox import TaskInbox
from fleetprune_agent.slots import Slots
from fleetprune_agent.telemetry import Measured, Traffic, measure, one_line, report
from fleetprune_agent.trainer import StoppedError
from fleetprune_agent.trust import TrustedRepository
from fleetprune_agent.worker import Worker

log = logging.getLogger(__name__)

LAST_REPORT: Final = "last.json"


@dataclass(frozen=True)
class Duties:
    """The work of one agent; every method is one job, and they never run at the same time.

    Attributes:
        config: The agent's.
        split: The device's samples.
        worker: Does tasks.
        inbox: Accepted tasks.
        slots: Installed models.
        repository: Gives the release repository.
        deliver: Keeps something in the outbox.
        acknowledge: Tells the coordinator what became of a task.
        traffic: Bytes on the wire so far.
    """

    config: AgentConfig
    split: Split
    worker: Worker
    inbox: TaskInbox
    slots: Slots
    repository: Callable[[], TrustedRepository]
    deliver: Callable[[Kind, str, bytes], None]
    acknowledge: Callable[[TaskAck], None]
    traffic: Callable[[], Traffic]

    def task(self, task: Task) -> bool:
        """Do an accepted task.

        Returns:
            False if it is to be tried again later.
        """
        try:
            if self.inbox.expired(task) and self.worker.answer(task.task) is None:
                log.info("task %s is past its deadline and dropped", task.task)
            else:
                answer = self.worker.handle(task)
                self.deliver(Kind.RESULT, f"results/{task.task}", answer)
                log.info("task %s is answered with %d bytes", task.task, len(answer))
        except StoppedError:
            return True  # the agent ends; the task is in the inbox
        except TransportError as e:
            log.warning("task %s: %s; it is tried again", task.task, e)
            return False
        except FleetpruneError as e:
            self._refuse(task, str(e))
        except Exception as e:
            log.exception("task %s failed", task.task)
            self._refuse(task, f"{type(e).__name__}: {e}")
        self.inbox.done(task)
        return True

    def _refuse(self, task: Task, reason: str) -> None:
        line = one_line(reason)
        log.warning("task %s is refused: %s", task.task, line)
        self.acknowledge(
            TaskAck(task=task.task, device=task.device, state=Progress.REFUSED, reason=line)
        )

    def refresh(self) -> bool:
        """Look for a new release of our class and install it; report what came of it.

        Returns:
            False if the repository could not be reached: try again soon.
        """
        repository = self.repository()
        try:
            if self._up_to_date(repository):
                return True
            # Imported here: it loads onnxruntime, which an agent without work does not need.
            from fleetprune_agent.install import Checks, Status, install  # noqa: PLC0415

            outcome = install(
                repository,
                self.slots,
                self.config.device_class,
                Checks(threads=self.config.threads),
                device=self.config.device,
            )
        except TransportError as e:
            log.info("no look for a new release: %s", e)
            return False
        except FleetpruneError as e:
            log.warning("no release is installed: %s", e)
            self.report(error=str(e))
            return True
        if outcome.status is Status.INSTALLED:
            log.info("release %d is installed, on trial", outcome.release)
            self.report()
        elif outcome.status is Status.REJECTED:
            log.warning("release %d is rejected: %s", outcome.release, outcome.reason)
            self.report(error=f"release {outcome.release}: {outcome.reason}")
        return True

    def _up_to_date(self, repository: TrustedRepository) -> bool:
        """Whether the release that is wanted of us is the one that runs, or there is none."""
        repository.refresh()
        active = self.slots.active()
        device_class = self.config.device_class
        rollout = repository.rollout(device_class)
        if rollout is None:
            log.info("class %s has no release yet", device_class)
            return True
        wanted = rollout.wanted(self.config.device, active.release if active else 0)
        if active is not None:
            return repository.manifest(device_class, wanted) == active.manifest
        return not wanted

    def report(self, error: str = "") -> None:
        """Measure the installed model and report; a model that fails here is rolled back."""
        measured = Measured()
        if self.slots.active() is not None:
            from fleetprune_agent.serving import Predictor  # noqa: PLC0415  (onnxruntime)

            try:
                measured = measure(Predictor(self.slots, self.config.threads).predict, self.split)
            except (DataError, InstallError) as e:
                error = error or str(e)
        message = report(
            self.config.device,
            self.config.device_class,
            self.slots,
            measured=measured,
            traffic=self.traffic(),
            error=error,
        )
        self._send(message.to_bytes())

    def repeat_report(self) -> None:
        """Send the last report again, without measuring.

        There is none before the first one, and none of a release that was installed just before
        the agent was killed: these are measured now.
        """
        try:
            data = (self.config.state / LAST_REPORT).read_bytes()
            told = Telemetry.from_bytes(data).release
        except (OSError, MessageError):
            told = None
        active = self.slots.active()
        if told == (0 if active is None else active.release):
            self._send(data)
        else:
            self.report()

    def _send(self, data: bytes) -> None:
        try:
            write_atomic(self.config.state / LAST_REPORT, data)
            self.deliver(Kind.TELEMETRY, "telemetry", data)
        except InstallError as e:
            log.warning("the report is not kept: %s", e)
