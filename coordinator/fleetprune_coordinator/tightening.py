"""How far the classes still are above their budgets, round by round."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fleetprune import dynamic_schedule
from fleetprune.dynamic_schedule import Move, Threshold
from fleetprune.layout import Architecture
from fleetprune.schedule import Curve, Schedule
from fleetprune_coordinator.artifacts import small_model
from fleetprune_coordinator.fleet_model import FleetModel

Watch = Callable[[FleetModel], float]
"""The accuracy that a dynamic schedule must not lose, of a state of the fleet's model."""

_PREFIX = "schedule/"
_BATCH = 500


class Tightening:
    """The schedule, and where a dynamic one stands."""

    def __init__(self, schedule: Schedule, watch: Watch | None = None) -> None:
        """Begin before the first round.

        Args:
            schedule: When to cut how much.
            watch: For a dynamic schedule; None: it goes by the loss alone.
        """
        self._schedule, self._watch = schedule, watch
        self.threshold: Threshold = dynamic_schedule.start()

    @property
    def _dynamic(self) -> bool:
        return self._schedule.curve is Curve.DYNAMIC

    @property
    def slack(self) -> float | None:
        """What a dynamic schedule has left; None: what the curve says."""
        return self.threshold.slack if self._dynamic else None

    def remasks(self, number: int) -> bool:
        """Whether masks may change after a training round for other reasons than the schedule."""
        once = self._schedule.curve is Curve.ONE_SHOT
        return not (once and number >= self._schedule.begin)

    def closed(self, number: int, loss: float | None, model: FleetModel) -> bool:
        """Take in a training round.

        Args:
            number: The round that has been closed.
            loss: Its mean; None: nobody reported one.
            model: The state that it led to.

        Returns:
            Whether the limits of the next round are others than they were.
        """
        before, after = self._schedule.slack(number), self._schedule.slack(number + 1)
        if not self._dynamic or after == 0.0:
            return before != after
        accuracy = None if self._watch is None else self._watch(model)
        old = self.threshold.slack
        self.threshold = dynamic_schedule.step(self._schedule, self.threshold, loss, accuracy)
        return self.threshold.slack != old

    def metrics(self, number: int) -> dict[str, Any]:
        """For people, of a closed round; nothing where all is cut at once."""
        if not self._schedule.settled:
            return {}
        left = self._schedule.slack(number + 1)
        if not self._dynamic:
            return {"slack": round(left, 4)}
        state = self.threshold
        return {"slack": round(min(left, state.slack), 4), "schedule": state.move.value}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Where it stands, for a snapshot."""
        if not self._dynamic:
            return {}
        state = self.threshold
        best = np.nan if state.best is None else state.best
        return {
            f"{_PREFIX}state": np.array([state.slack, best, list(Move).index(state.move)]),
            f"{_PREFIX}losses": np.array(state.losses, np.float64),
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take up what `arrays` gave; without it, stay at the beginning."""
        if f"{_PREFIX}state" not in arrays:
            return
        slack, best, move = (float(v) for v in arrays[f"{_PREFIX}state"])
        self.threshold = Threshold(
            slack,
            tuple(float(v) for v in arrays[f"{_PREFIX}losses"]),
            None if np.isnan(best) else best,
            list(Move)[int(move)],
        )


def narrowest_accuracy(
    network: nn.Module,
    architecture: Architecture,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
) -> Watch:
    """A watch on the class that is cut most, which is hurt first.

    BatchNorm normalises by the statistics of the samples looked at: those that devices track lag
    behind a model whose shape has just changed.

    Args:
        network: The user's model, any weights.
        architecture: Its description.
        x: (n, ...) samples.
        y: (n,) their labels.
    """

    def accuracy(state: FleetModel) -> float:
        name = min(state.shapes, key=lambda n: state.parameters(architecture, n))
        small = small_model(network, architecture, state, name)
        for module in small.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        with torch.no_grad():
            parts = [small(torch.from_numpy(x[i : i + _BATCH])) for i in range(0, len(x), _BATCH)]
        return float((torch.cat(parts).argmax(1).numpy() == y).mean())

    return accuracy
