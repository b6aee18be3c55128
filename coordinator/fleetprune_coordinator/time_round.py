"""One round before all others: how long models take on the devices of classes with such a limit."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from fleetprune.errors import FleetpruneError, MessageError
from fleetprune.latency import LatencyModel, LatencyTable, Precision
from fleetprune.layout import Architecture
from fleetprune.messages import Task
from fleetprune.result import Result, decode_result
from fleetprune_coordinator.graph_library import GraphLibrary
from fleetprune_coordinator.plan import Planner
from fleetprune_coordinator.records import DeviceRecord
from fleetprune_coordinator.registry import Registry
from fleetprune_coordinator.timing import (
    Answer,
    digest,
    read_times,
    shapes_to_time,
    tables,
    timers,
    timing_task,
)

log = logging.getLogger(__name__)

SWEEPS = 3
"""Over all graphs: with at most a second for each of 24, a slow device takes little over a minute,
which is within the time that a round waits."""
STEPS = (Precision.FLOAT32, Precision.INT8)
"""By the step of the round that asks: what was asked decides what answers are, and a fleet that
comes to ship other files is asked again."""


class TimeRound:
    """Asks once per class, architecture and precision; what devices measured is in the registry."""

    def __init__(
        self,
        architecture: Architecture,
        planner: Planner,
        library: GraphLibrary,
        registry: Registry,
        precision: Precision,
    ) -> None:
        """Teach the planner what the registry knows already.

        Args:
            architecture: Of the model.
            planner: Gets to know latencies.
            library: Makes the graphs that are timed.
            registry: Where tables are kept.
            precision: Of the files that budgets are planned for.

        Raises:
            BudgetError: A limit of latency is out of reach of what was measured.
        """
        self._architecture, self._planner = architecture, planner
        self._library, self._registry, self._precision = library, registry, precision
        self._digest = digest(architecture)
        self.teach()

    def teach(self) -> None:
        """Let what the registry knows decide keep counts.

        Raises:
            BudgetError: A limit of latency is out of reach of what was measured.
        """
        learned = {}
        for name, budget in self._planner.budgets.items():
            if budget.latency_ms is None:
                continue
            if (table := self._known(name)) is not None:
                learned[name] = LatencyModel.fit(self._architecture, table)
                log.info(
                    "class %s: %d devices timed %d shapes in %s; predictions are within %.0f %%",
                    name, table.devices, len(table.points), table.precision,
                    100 * learned[name].error,
                )  # fmt: skip
        self._planner.learn_latency(learned)

    def _known(self, name: str) -> LatencyTable | None:
        return self._registry.latency(name, self._digest, self._precision)

    @property
    def step(self) -> int:
        """Of the round that asks."""
        return STEPS.index(self._precision)

    @property
    def wanted(self) -> list[str]:
        """Classes with a limit of latency of which nothing is known."""
        budgets, known = self._planner.budgets, self._planner.latency
        return [n for n, b in budgets.items() if b.latency_ms is not None and n not in known]

    def _shapes(self, name: str) -> list[dict[str, int]]:
        return shapes_to_time(self._architecture, self._planner.grids[name])

    def plan(
        self, devices: Iterable[DeviceRecord], run: str, mask_version: int, deadline_s: float
    ) -> list[tuple[DeviceRecord, Task]]:
        """Who is asked what.

        Args:
            devices: Of the fleet.
            run: Begins the tasks' names.
            mask_version: The present one.
            deadline_s: Of the tasks.
        """
        asked = timers(devices, self.wanted)
        graphs = {
            name: [self._library.timed(keep, self._precision) for keep in self._shapes(name)]
            for name in {device.device_class for device in asked}
        }
        return [
            (
                device,
                timing_task(
                    f"{run}.m0.{self.step}.{device.id}",
                    device.name,
                    device.device_class,
                    graphs[device.device_class],
                    mask_version=mask_version,
                    sweeps=SWEEPS,
                    deadline_s=deadline_s,
                ),
            )
            for device in asked
        ]

    def take_in(
        self, answers: Iterable[bytes], tasks: Mapping[str, Task], step: int
    ) -> dict[str, Any]:
        """Keep what devices measured; `teach` lets it decide.

        Args:
            answers: Frames of kind RSLT, unverified; a bad one is noted and left out.
            tasks: Of the round, by name.
            step: Of the round. It may have been opened when other files were to ship.

        Returns:
            Counts for people.
        """
        by_class: dict[str, list[Answer]] = {}
        done: set[str] = set()
        refused = 0
        for frame in answers:
            try:
                result = decode_result(frame)
                task = _matched(result, tasks, done)
                by_class.setdefault(task.shape, []).append(read_times(result, len(task.graphs)))
                done.add(task.task)
            except FleetpruneError as e:
                log.warning("an answer is refused: %s", e)
                self._registry.add_event("refused", str(e))
                refused += 1
        for name, measured in by_class.items():
            for table in tables(name, STEPS[step], self._shapes(name), measured):
                self._registry.set_latency(table, self._digest)
        for name in self.wanted:
            if name not in by_class:
                log.warning(
                    "class %s: nobody has measured how long models take; its latency_ms is "
                    "checked by each device when it installs, and decides no keep counts",
                    name,
                )
        return {"answers": len(done), "trained": 0, "refused": refused, "timed": sorted(by_class)}


def _matched(result: Result, tasks: Mapping[str, Task], done: set[str]) -> Task:
    """The task that an answer is to; MessageError if it is none of this round's."""
    header = result.header
    task = tasks.get(header.task)
    if task is None or (header.device, header.kind) != (task.device, task.kind):
        raise MessageError(f"answer to {header.task}, which is not a task of this round")
    if header.task in done:
        raise MessageError(f"answer to {header.task} came twice; the first one stands")
    return task
