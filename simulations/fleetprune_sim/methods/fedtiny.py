"""FedTiny: devices choose the first mask by their BatchNorm, then the mask moves block by block.

Huang et al., "Distributed Pruning Towards Tiny Neural Networks in Federated Learning", ICDCS 2023.
The server prunes the initial model in several ways, with random densities per tensor. Devices
normalise each candidate by their own data and report its loss; the best one is trained on. In a
round of adjustment one block of layers is at stake: devices send the largest gradients of its
pruned weights, as many as will be grown; the server grows the largest mean ones and prunes the
smallest of the others. The share that moves falls along a cosine until a third of the rounds.

Left open by the paper or chosen here:

- *Selection* takes one exchange, which is round 1 of the training. Losses are measured in training
  mode, with each batch's own statistics, on at most `JUDGED` batches: the paper sends statistics
  to and fro once more and judges with the pooled ones.
- *Candidates*: the paper's pool grows as density falls, here there are `POOL`. Their densities per
  tensor differ by factors between `1 - NOISE` and `1 + NOISE`, those of the first are uniform; all
  fit the budget.
- The paper starts from a model pre-trained on a public set; here that is `model.initial`, if there
  is one, else the random model.
- *How often*: `remask_every`. The paper adjusts every 10 of 300 rounds, ten times in all; in our 30
  to 50 rounds there are one to three adjustments.
- *Blocks*: at most `BLOCKS`, and no more than there are adjustments, so that each block has its
  turn; from the output backwards.
- *Which gradient*: that of one batch after training, with the batch's own statistics.
- First and last layer, biases and norms stay, unless the two layers take more than half of the
  budget.
- The FedPruning library, by the same first author, departs from the paper: it adjusts all tensors
  at once, 0.2 of their weights until round 300 of 500; it prunes the ends; its candidates, where
  it has any, are other random models at one density. This one is the paper's.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetprune.messages import Task
from fleetprune_coordinator.bounds import Bounds
from fleetprune_coordinator.records import Phase
from fleetprune_coordinator.round_plan import RoundKey
from fleetprune_sim.methods.sparse.budget import keep_counts
from fleetprune_sim.methods.sparse.candidates import (
    JUDGED,
    POOL,
    SELECT,
    CandidateWorker,
    LossIntake,
)
from fleetprune_sim.methods.sparse.frames import SparseResult, floats
from fleetprune_sim.methods.sparse.grow import GROW, named_weights
from fleetprune_sim.methods.sparse.intake import SparseIntake
from fleetprune_sim.methods.sparse.method import SparseMethod
from fleetprune_sim.methods.sparse.prunable import Bools, Prunable, best_per_tensor
from fleetprune_sim.methods.sparse.rounds import SparseRounds

NOISE = 0.5
"""Largest relative change of a candidate's density per tensor."""
MOVED = 0.3
"""Share of a tensor's weights that changes places at first: 0.15 (1 + cos) in the paper."""
LAST_SHARE = 1 / 3
"""Of the rounds, until which the mask changes: round 100 of 300 in the paper."""
BLOCKS = 5
"""Into which a network is divided: so many has the paper's ResNet-18."""
_STREAM = 2212  # of random numbers; any constant that no other draw has


def block_of(turn: int, tensors: int, blocks: int) -> range:
    """The tensors that are adjusted in the `turn`-th adjustment, counted from 0.

    Args:
        turn: Of the adjustment.
        tensors: Prunable tensors of the network.
        blocks: Into how many runs they are divided, as evenly as may be.

    Returns:
        A run of tensors: the last one first.
    """
    edges = [tensors * i // blocks for i in range(blocks + 1)]
    place = blocks - 1 - turn % blocks
    return range(edges[place], edges[place + 1])


def grow_and_prune(
    prunable: Prunable,
    mask: Bools,
    weights: NDArray[np.float32],
    gradient: NDArray[np.float64],
    counts: Sequence[int],
) -> Bools:
    """Grow pruned weights with the largest gradients, prune the smallest that were there before.

    Args:
        prunable: The tensors.
        mask: (n,) until now.
        weights: (n,).
        gradient: (n,) summed over devices; 0 for what none of them sent.
        counts: Per tensor how many move.

    Returns:
        (n,) with as many weights per tensor as before.
    """
    grown = best_per_tensor(prunable, np.abs(gradient), ~mask, counts)
    pruned = best_per_tensor(prunable, -np.abs(weights), mask, counts)
    return (mask & ~pruned) | grown


class GradientIntake(SparseIntake):
    """Weights, and the largest gradients of pruned ones."""

    def __init__(self, *args: Any, counts: Sequence[int], **rest: Any) -> None:
        super().__init__(*args, **rest)
        self._counts = counts
        self.gradient = np.zeros(self.mask.size)
        """(n,) summed with the devices' weights."""

    def _take(self, result: SparseResult, values: NDArray[np.float32], weight: float) -> None:
        places = named_weights(result, self.layout.prunable, self.mask, self._counts)
        self.gradient[places] += weight * floats(result, "gradient", places.size).astype(np.float64)


class FedTinyRounds(SparseRounds):
    """Selects, then adjusts block by block."""

    spare_ends = True
    last_share = LAST_SHARE

    def _first_mask(self, weights: NDArray[np.float32]) -> Bools:
        """All: the candidates are cut from the whole model, when round 1 is planned."""
        return np.ones(weights.size, np.bool_)

    def candidates(self) -> tuple[Bools, ...]:
        """Masks of the initial model, (n,) each."""
        rng = np.random.default_rng([self._settings.seed, _STREAM])
        weights = np.abs(self._params()[self.layout.prunable.index])
        every = np.ones(weights.size, np.bool_)
        masks = []
        for i in range(POOL):
            noise = rng.uniform(-NOISE, NOISE, len(self.layout.shapes)) * (i > 0)
            counts = keep_counts(self.layout, (1 + noise).tolist(), self.budget)
            masks.append(best_per_tensor(self.layout.prunable, weights, every, counts))
        return tuple(masks)

    def adjusting(self) -> list[int]:
        """Not round 1, which selects."""
        return [number for number in super().adjusting() if number > 1]

    def _task(self, key: RoundKey, *args: Any) -> Task:
        task = super()._task(key, *args)
        if key.phase is not Phase.TRAIN or key.number > 1:
            return task
        # As much work as judging is: the fleet's clock goes by a task's steps.
        return task.model_copy(update={"epochs": POOL, "max_steps": POOL * JUDGED})

    def _ask(self, key: RoundKey) -> tuple[str, tuple[int, ...]]:
        turns = self.adjusting()
        if key.number not in turns:
            return "", ()
        tensors = len(self.layout.shapes)
        blocks = min(BLOCKS, tensors, len(turns))
        block = block_of(turns.index(key.number), tensors, blocks)
        moving = self._moving(key.number, MOVED)
        return GROW, tuple(k if i in block else 0 for i, k in enumerate(moving))

    def _payload(self, key: RoundKey, name: str, known: bool) -> bytes:
        if key.phase is not Phase.TRAIN or key.number > 1:
            return super()._payload(key, name, known)
        masks = self.candidates()
        union = np.logical_or.reduce(masks)
        return self._encode(key, name, union, ask=SELECT, candidates=masks)

    def _sparse_intake(self, key: RoundKey, bounds: Bounds) -> SparseIntake:
        if key.number == 1:
            return self._new_intake(LossIntake, bounds)
        ask, counts = self._ask(key)
        if not ask:
            return super()._sparse_intake(key, bounds)
        return self._new_intake(GradientIntake, bounds, counts=counts)

    def _next_mask(
        self, key: RoundKey, intake: SparseIntake, weights: NDArray[np.float32]
    ) -> Bools:
        if isinstance(intake, LossIntake):
            return self.candidates()[int(np.argmin(intake.losses))]
        if isinstance(intake, GradientIntake):
            _, counts = self._ask(key)
            return grow_and_prune(self.layout.prunable, self.mask, weights, intake.gradient, counts)
        return self.mask


class FedTiny(SparseMethod):
    """A mask that devices select and move."""

    name = "fedtiny"
    title = "FedTiny"
    paper = "Huang et al. 2023"
    exchange = FedTinyRounds
    device = CandidateWorker
