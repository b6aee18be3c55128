"""PruneFL: one device prunes first, then all say how much each weight is worth for its time.

Jiang et al., "Model Pruning Enables Efficient Federated Learning on Edge Devices", IEEE TNNLS 2022.
A weight's importance is the sum of its squared gradients over steps. In a reconfiguration the
largest weights of each tensor stay for sure; the rest, and all that were pruned before, are taken
by falling importance per time. Initial pruning does this with a single device, which starts from
the dense model; further pruning with what all devices of a round report. Densities per tensor
follow from importance: costly layers thin out.

Left open by the paper or chosen here:

- *Time*: the authors measure a weight's time on their devices, layer by layer: that of computing
  and, the same for all, that of exchanging it. A simulation has no such times; here a weight's is
  its multiply-accumulates and `EXCHANGE`, the relation that their measurements have.
- *When to stop*: at the budget, as for every method here. The paper stops where another weight
  would lower importance per time, for which it also counts a constant time; its code can be given
  a limit of density as well.
- *Initial pruning* is round 1: the device with the most samples trains `INITIAL_EPOCHS` epochs,
  with a reconfiguration after each, down to the budget in equal ratios. The authors' device trains
  outside of the rounds on a few hundred samples, begins to reconfigure once it is half as good
  again as chance, does it every 50 passes over them, and ends when the size has settled. Rounds
  may take `INITIAL_EPOCHS` times as long as those of other methods, or a slow first device, which
  trains the dense model, would always come late.
- *How often*: `remask_every`, to the end but for the last round. The authors reconfigure every 50
  of 3 000 to 20 000 rounds, and never stop either.
- *Importance* is of the round of reconfiguration alone, because devices keep nothing from round to
  round but the mask; squared step by step, as the paper has it. The authors' code adds up all
  rounds since the last reconfiguration, each of which counts as the square of its five steps' sum.
- Every convolution and linear layer is pruned, none is spared; biases and norms stay. That is the
  authors' code, too.
- The FedPruning library has another PruneFL: no initial pruning, densities that never change, and
  as many weights grown by squared gradient as are pruned. This one is the paper's.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import MessageError
from fleetprune.messages import MAX_DEADLINE_S, Task
from fleetprune_coordinator.bounds import Bounds
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.records import DeviceRecord, Phase
from fleetprune_coordinator.round_plan import RoundKey
from fleetprune_sim.methods.method import Plan, with_training
from fleetprune_sim.methods.sparse.budget import keep_counts, uniform
from fleetprune_sim.methods.sparse.frames import (
    SparseResult,
    decode_mask,
    floats,
    section,
)
from fleetprune_sim.methods.sparse.importance import (
    IMPORTANCE,
    INITIAL_EPOCHS,
    SHRINK,
    ImportanceWorker,
    reconfigure,
    shrinking_limits,
)
from fleetprune_sim.methods.sparse.intake import SparseIntake
from fleetprune_sim.methods.sparse.method import SparseMethod
from fleetprune_sim.methods.sparse.prunable import Bools
from fleetprune_sim.methods.sparse.rounds import SparseRounds


class FirstMask(SparseIntake):
    """The answer of the device that prunes first."""

    first: Bools | None = None
    """(n,) that it ended with."""

    def __init__(self, *args: Any, budget: int, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self._budget = budget

    def _own_mask(self, result: SparseResult) -> Bools:
        prunable = self.layout.prunable
        kept = int.from_bytes(section(result, "kept")[:4], "little")
        mask = decode_mask(section(result, "mask"), prunable.n, kept)
        counts = prunable.kept(mask)
        if not all(counts) or self.layout.macs(counts) > self._budget:
            raise MessageError(
                f"answer to {result.header.task} keeps {counts} weights of the tensors: "
                f"more than {self._budget} multiply-accumulates, or none of a tensor"
            )
        self.first = mask
        return mask


class ImportanceIntake(SparseIntake):
    """Weights, and what all of them are worth."""

    def __init__(self, *args: Any, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.importance = np.zeros(self.mask.size)
        """(n,) summed with the devices' weights."""

    def _take(self, result: SparseResult, values: NDArray[np.float32], weight: float) -> None:
        importance = floats(result, "importance", self.mask.size)
        if importance.size and importance.min() < 0:
            raise MessageError(f"answer to {result.header.task} has a negative importance")
        self.importance += weight * importance.astype(np.float64)


class PruneFLRounds(SparseRounds):
    """One device first, then all."""

    def _first_mask(self, weights: NDArray[np.float32]) -> Bools:
        """All: the first device starts from the whole model."""
        keep_counts(self.layout, uniform(self.layout), self.budget)  # BudgetError before training
        return np.ones(weights.size, np.bool_)

    def adjusting(self) -> list[int]:
        """Not round 1, in which one device prunes by itself."""
        return [number for number in super().adjusting() if number > 1]

    def _cohort(self, key: RoundKey) -> list[DeviceRecord]:
        cohort = super()._cohort(key)
        if key.phase is not Phase.TRAIN or key.number > 1:
            return cohort
        devices = self._registry.devices(online=True) or self._registry.devices()
        able = sorted((d for d in devices if d.trains), key=lambda d: (-d.samples, d.id))
        return [able[key.step % len(able)]] if able else cohort

    def _task(self, key: RoundKey, *args: Any) -> Task:
        task = super()._task(key, *args)
        if key.phase is not Phase.TRAIN or key.number > 1:
            return task
        epochs = max(INITIAL_EPOCHS, task.epochs)
        return task.model_copy(update={"epochs": epochs, "max_steps": 0})

    def _ask(self, key: RoundKey) -> tuple[str, tuple[int, ...]]:
        if key.number == 1:
            costs, dense = self.layout.costs, self.layout.macs(self.layout.prunable.sizes)
            limits = shrinking_limits(dense, self.budget, INITIAL_EPOCHS)
            return SHRINK, costs + tuple(limit - self.layout.fixed for limit in limits)
        return (IMPORTANCE, ()) if key.number in self.adjusting() else ("", ())

    def _sparse_intake(self, key: RoundKey, bounds: Bounds) -> SparseIntake:
        ask, _ = self._ask(key)
        if ask == SHRINK:
            return self._new_intake(FirstMask, bounds, budget=self.budget)
        if ask == IMPORTANCE:
            return self._new_intake(ImportanceIntake, bounds)
        return super()._sparse_intake(key, bounds)

    def _next_mask(
        self, key: RoundKey, intake: SparseIntake, weights: NDArray[np.float32]
    ) -> Bools:
        if isinstance(intake, FirstMask) and intake.first is not None:
            return intake.first
        if not isinstance(intake, ImportanceIntake):
            return self.mask
        prunable, costs = self.layout.prunable, self.layout.costs
        limit = self.budget - self.layout.fixed
        return reconfigure(prunable, costs, self.mask, weights, intake.importance, limit=limit)


class PruneFL(SparseMethod):
    """A mask by importance per time."""

    name = "prunefl"
    title = "PruneFL"
    paper = "Jiang et al. 2022"
    exchange = PruneFLRounds
    device = ImportanceWorker

    def plan(self, config: FleetConfig, devices: Mapping[str, int]) -> Plan:
        """One dense layout for all, and time for the first device's epochs."""
        plan = super().plan(config, devices)
        patience = min(MAX_DEADLINE_S, INITIAL_EPOCHS * config.training.round_timeout_s)
        return replace(plan, config=with_training(plan.config, round_timeout_s=patience))
