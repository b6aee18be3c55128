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
from fleetprune_agent.install import Checks, Status, install
from fleetprune_agent.recent import read_recent
from fleetprune_agent.slots import Slots
from fleetprune_agent.telemetry import Measured, Traffic, measure, one_line, report
from fleetprune_agent.trainer import StoppedError
from fleetprune_agent.trial import Evidence, InChild, Trial
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
        may_fetch: Why a release of so many bytes may not be downloaded now; empty: it may.
        stopped: Whether the agent ends.
        trial: Where a release is tried; None: in a process of its own.
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
    may_fetch: Callable[[int], str] = lambda _bytes: ""
    stopped: Callable[[], bool] = lambda: False
    trial: Trial | None = None

    def task(self, task: Task) -> bool:
        """Do an accepted task.

        Returns:
            False if it is to be tried again later.
        """
        try:
            known = self.worker.answer(task.task)
            if known is not None:  # asked again by somebody who has not got it
                self.deliver(Kind.RESULT, f"results/{task.task}", known)
                log.info("the answer to task %s is sent again", task.task)
            elif self.inbox.expired(task):
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
        """Look for the release that we are to run and install it; report what came of it.

        Returns:
            False if the repository could not be reached: try again soon.
        """
        config = self.config
        checks = Checks(
            threads=config.threads,
            trial=self.trial or InChild(config.check_s, self.stopped),
            may_fetch=self.may_fetch,
        )
        kept = read_recent(config.state, self.split.train.shape) if config.recent_samples else None
        try:
            outcome = install(
                self.repository(),
                self.slots,
                config.device_class,
                checks,
                device=config.device,
                evidence=Evidence.of(self.split, kept),
            )
        except TransportError as e:
            log.info("no look for a new release: %s", e)
            return False
        except FleetpruneError as e:
            log.warning("no release is installed: %s", e)
            self.report(error=str(e))
            return True
        if outcome.status is Status.INSTALLED:
            log.info("release %d is installed", outcome.release)
            self.report()
        elif outcome.status is Status.REJECTED:
            log.warning("release %d is rejected: %s", outcome.release, outcome.reason)
            self.report()
        elif outcome.status is Status.POSTPONED and not self.stopped():
            log.info("release %d is not fetched now: %s", outcome.release, outcome.reason)
            self.report()
        elif outcome.status is Status.NONE:
            log.info("class %s has no release for this device yet", config.device_class)
        return True

    def report(self, error: str = "") -> None:
        """Measure the installed model and report; a model that fails here is rolled back."""
        measured = Measured()
        if self.slots.active() is not None:
            from fleetprune_agent.serving import Predictor  # noqa: PLC0415  (onnxruntime)

            try:
                measured = measure(Predictor(self.slots, self.config.threads).predict, self.split)
            except (DataError, InstallError) as e:
                error = error or str(e)
        self._send(self._account(measured, error).to_bytes())

    def _account(self, measured: Measured, error: str = "") -> Telemetry:
        return report(
            self.config.device,
            self.config.device_class,
            self.slots,
            measured=measured,
            traffic=self.traffic(),
            error=error,
        )

    def repeat_report(self) -> None:
        """Send the last report again, without measuring, while what it says is true.

        It is not where the agent was killed between an installation, or a rollback, and its
        report; there is none before the first one. These are measured now.
        """
        try:
            data = (self.config.state / LAST_REPORT).read_bytes()
            told = _told(Telemetry.from_bytes(data))
        except (OSError, MessageError):
            told = None
        if told == _told(self._account(Measured())):
            self._send(data)
        else:
            self.report()

    def _send(self, data: bytes) -> None:
        """Keep a report; what it is about stands, whether the report can be kept or not."""
        try:
            write_atomic(self.config.state / LAST_REPORT, data)
            self.deliver(Kind.TELEMETRY, "telemetry", data)
        except FleetpruneError as e:
            log.warning("the report is not kept: %s", e)


def _told(message: Telemetry) -> dict[str, object]:
    """What a report says of releases."""
    return message.model_dump(
        include={"release", "sha256", "variant", "state", "plan", "failed", "postponed", "crashes"}
    )
