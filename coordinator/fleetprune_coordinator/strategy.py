"""Flower's view of the rounds: a `Strategy` that any `Grid` can run.

All decisions are `Rounds`'; this module turns them into Flower messages and back.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from fleetprune_coordinator.flower_messages import instruction, read_result
from fleetprune_coordinator.rounds import Rounds

log = logging.getLogger(__name__)


def _warn(node: int, error: str) -> None:
    log.warning("no answer from node %d: %s", node, error)


class NestedStrategy(Strategy):
    """Per-class submodels out, coverage-weighted updates in, masks by importance."""

    def __init__(
        self,
        rounds: Rounds,
        on_round: Callable[[dict[str, Any]], None] = lambda metrics: None,
        ready: Callable[[], None] = lambda: None,
        *,
        unanswered: Callable[[int, str], None] = _warn,
    ) -> None:
        """Wrap rounds that have been started.

        Args:
            rounds: What to run.
            on_round: Told of every closed round's metrics.
            ready: Called before a round is planned; returns when there are devices to ask.
            unanswered: Told of every node that could not do its task, and why.
        """
        self._unanswered = unanswered
        self._ready = ready
        self._rounds = rounds
        self._on_round = on_round

    def arrays(self) -> ArrayRecord:
        """The dense parameters, in the present order of units."""
        return ArrayRecord({k: Array(v) for k, v in self._rounds.model.params.items()})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per task of the next round; none when nothing is left to do."""
        self._ready()
        return [instruction(a.task, a.model, a.node_id) for a in self._rounds.begin()]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take in answers as the grid yields them, one in memory at a time."""
        metrics = self._rounds.finish(self._answers(replies))
        if not metrics:
            return None, None
        self._on_round(metrics)
        record = MetricRecord()
        for name, value in metrics.items():
            if isinstance(value, int | float):
                record[name] = value
        return self.arrays(), record

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: observing devices report their accuracy as part of the round."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Nothing to take in."""
        return None

    def summary(self) -> None:
        """Log what is left to do."""
        log.info("%d rounds to go", len(self._rounds.remaining()))

    def _answers(self, replies: Iterable[Message]) -> Iterator[bytes]:
        for reply in replies:
            if reply.has_error():
                self._unanswered(reply.metadata.src_node_id, str(reply.error))
            else:
                yield read_result(reply)


def server_app(strategy: NestedStrategy, rounds: Rounds, timeout_s: float) -> ServerApp:
    """A Flower `ServerApp` that runs what is left of a training.

    Args:
        strategy: The strategy of `rounds`.
        rounds: What to run.
        timeout_s: Seconds after which a round goes on without the devices that are silent.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        # A round may turn out to be the last before its number is up (calibration that has
        # settled); Flower's loop then finds no messages to send, which takes no time. Or there
        # are more than were counted, because one is tried again.
        while left := rounds.remaining():
            strategy.start(
                grid=grid,
                initial_arrays=strategy.arrays(),
                num_rounds=len(left),
                timeout=timeout_s,
            )

    return app


def run_app(app: ServerApp, grid: Grid) -> None:
    """Run a `ServerApp` on a grid of ours, in this process, without a SuperLink."""
    app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}))
