"""What the answers of a round add up to where devices train under a mask."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import MessageError
from fleetprune.layout import Architecture
from fleetprune.messages import Task
from fleetprune.result import Result
from fleetprune_coordinator.bounds import Bounds
from fleetprune_coordinator.fleet_model import FleetModel
from fleetprune_coordinator.intake import Intake
from fleetprune_coordinator.ledger import Ledger
from fleetprune_sim.methods.sparse.frames import SparseResult, decode_mask, floats, section
from fleetprune_sim.methods.sparse.prunable import Bools, SparseLayout


class SparseIntake(Intake):
    """The mean of each weight over the devices that had it.

    Devices send values, not changes: where their masks differ, a weight may have had no value
    before.
    """

    def __init__(
        self,
        architecture: Architecture,
        model: FleetModel,
        ledger: Ledger,
        bounds: Bounds,
        *,
        layout: SparseLayout,
        mask: Bools,
    ) -> None:
        """Begin a round.

        Args:
            architecture: The model's description.
            model: The state that the round's tasks were made from.
            ledger: Takes in activation sums of devices that do not train.
            bounds: What one answer may weigh at most.
            layout: The prunable weights.
            mask: (n,) of the round's tasks.
        """
        super().__init__(architecture, model, ledger, bounds)
        self.layout, self.mask = layout, mask
        self._sum = np.zeros(layout.prunable.parameters)
        self.covered = np.zeros(layout.prunable.parameters)
        """(P,) weight of the devices that had each parameter."""
        self._answers = 0

    @property
    def trained(self) -> int:
        """How many answers were those of devices that trained."""
        return self._answers

    def mean(self, before: NDArray[np.float32]) -> NDArray[np.float32]:
        """(P,) float32: the mean over the devices that had a parameter, else what it was."""
        mean = before.astype(np.float64)
        np.divide(self._sum, self.covered, out=mean, where=self.covered > 0)
        with np.errstate(over="ignore"):  # what becomes infinite is refused later
            return mean.astype(np.float32)

    def _add_trained(self, task: Task, result: Result, weight: float) -> None:
        assert isinstance(result, SparseResult)
        mask = self._own_mask(result)
        support = self.layout.prunable.support(mask)
        count = int(np.count_nonzero(support))
        values = floats(result, "params", count)
        if "stats" in result.vectors:
            self._trained[task.shape].check(result.vectors["stats"])
        full = np.zeros(support.size, np.float32)
        full[support] = values
        self._take(result, full[self.layout.prunable.index], weight)
        if "stats" in result.vectors:
            self._trained[task.shape].add(result.vectors["stats"], weight)
        self._sum += np.multiply(full, weight, dtype=np.float64)
        self.covered += weight * support
        self._answers += 1

    def _own_mask(self, result: SparseResult) -> Bools:
        """(n,) that the device ended with; HostileInputError if it may not."""
        return self.mask

    def _take(self, result: SparseResult, values: NDArray[np.float32], weight: float) -> None:
        """Add what a method's devices send beside weights; adds nothing if it raises.

        Args:
            result: The answer.
            values: (n,) prunable weights of the device, zero where it pruned them.
            weight: Of the device.
        """


def checked_mask(result: SparseResult, layout: SparseLayout, counts: tuple[int, ...]) -> Bools:
    """The (n,) mask of an answer; HostileInputError unless it keeps `counts` per tensor."""
    data = section(result, "mask")
    mask = decode_mask(data, layout.prunable.n, sum(counts))
    check_counts(result, layout.prunable.kept(mask), counts)
    return mask


def check_counts(result: SparseResult, got: Any, expected: Any) -> None:
    """MessageError if an answer marks other numbers of weights per tensor than it was asked."""
    if tuple(got) != tuple(expected):
        raise MessageError(
            f"answer to {result.header.task} marks {tuple(got)} weights of the tensors, "
            f"expected {tuple(expected)}"
        )
