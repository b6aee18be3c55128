"""FedDST: every device moves its own mask; the server averages what overlaps and prunes again.

Bibikar et al., "Federated Dynamic Sparse Training: Computing Less, Communicating Less, Yet Learning
Better", AAAI 2022. Densities per tensor follow the Erdős–Rényi kernel and never change. In a round
of readjustment each device drops the smallest of its weights and grows as many with the largest
gradients, from zero; one that has just been dropped may be among them. The server divides each
weight's sum by the devices that had it and keeps the largest, tensor by tensor. The share that
moves falls along a cosine until half of the rounds are done.

Left open by the paper or chosen here:

- *When a device readjusts*: after half of its steps. The authors' code does it after the last of
  ten epochs, which sends new weights back as zeros, the first that the server prunes; FedPruning,
  the library in which FedRTS was compared with all of these methods, before the first of five, or
  after half of them.
- *Which gradient*: that of one batch, the last before readjusting. Here it is taken in the step
  itself; the authors' code computes it once more, on the same batch after the step.
- *What may grow*: what is pruned once the smallest are dropped, as in that library. In the authors'
  code weights that have stayed take part as well, and those among the largest are set to zero.
- *How many move* (`MOVED`): 0.2, the library's default for all methods, of each tensor's weights.
  The authors' examples have 0.01, in trainings of 400 rounds with a readjustment every 10 or 15;
  in our 30 to 50 rounds there are two to four, which would change next to nothing.
- *Densities* are in proportion to the kernel, as Evci et al. and the library have it. The authors'
  code scales sparsities by one factor instead, which leaves all but small tensors nearly uniform.
- Every convolution and linear layer is pruned, none is spared; biases and norms stay.
- No proximal term, which the paper has as a variant; as large models as the budget allows at
  all times (the code can also thin out over time).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fleetprune_agent.data import Batches
from fleetprune_agent.sessions import Arrays, Graph
from fleetprune_agent.trainer import Trained
from fleetprune_coordinator.bounds import Bounds
from fleetprune_coordinator.round_plan import RoundKey
from fleetprune_sim.methods.sparse.device import GradientMasking, MaskedWorker, Masking
from fleetprune_sim.methods.sparse.frames import SparsePayload, SparseResult, encode_mask
from fleetprune_sim.methods.sparse.intake import SparseIntake, checked_mask
from fleetprune_sim.methods.sparse.method import SparseMethod
from fleetprune_sim.methods.sparse.prunable import Bools, Prunable, best_per_tensor
from fleetprune_sim.methods.sparse.rounds import SparseRounds

READJUST = "readjust"
MOVED = 0.2
"""Share of a tensor's weights that a device drops and grows at first."""
LAST_SHARE = 0.5
"""Of the rounds, until which devices readjust (R_end of the paper)."""
HALFWAY = 2
"""A task's steps are divided by this: readjustment comes after the first part."""


def readjust(
    prunable: Prunable,
    mask: Bools,
    weights: NDArray[np.float32],
    gradient: NDArray[np.float32],
    counts: Sequence[int],
) -> tuple[Bools, Bools]:
    """Drop the smallest weights of each tensor, and grow as many with the largest gradients.

    Args:
        prunable: The tensors.
        mask: (n,) until now.
        weights: (n,).
        gradient: (n,); that of weights which stay does not count.
        counts: Per tensor how many are dropped, and how many grow.

    Returns:
        (n,) what stays, and (n,) what grows: together as many per tensor as before.
    """
    stay = mask & ~best_per_tensor(prunable, -np.abs(weights), mask, counts)
    return stay, best_per_tensor(prunable, np.abs(gradient), ~stay, counts)


class Readjusting(GradientMasking):
    """Moves the mask once, halfway through a task."""

    def __init__(self, payload: SparsePayload, momentum: float, after: int) -> None:
        """Readjust after so many steps; how many weights per tensor comes with the model."""
        super().__init__(payload, momentum)
        self._counts, self._left = payload.header.counts, after

    def __call__(self, state: Arrays) -> None:
        """Hold pruned weights at zero; new ones begin there."""
        gradient = self._gradient(state)
        super().__call__(state)
        self._left -= 1
        if self._left == 0:
            weights = state["params"][self.prunable.index]
            self.mask, grown = readjust(self.prunable, self.mask, weights, gradient, self._counts)
            self._hold(state)
            self.mask = self.mask | grown


class ReadjustingWorker(MaskedWorker):
    """Readjusts its mask where it is asked to, and then sends it along."""

    def _masking(self, graph: Graph, payload: SparsePayload, steps: int) -> Masking:
        if payload.header.ask != READJUST:
            return super()._masking(graph, payload, steps)
        after = max(1, steps // HALFWAY)
        return Readjusting(payload, graph.meta.momentum, after)

    def _report(
        self,
        graph: Graph,
        payload: SparsePayload,
        trained: Trained,
        masking: Masking,
        batches: Batches,
    ) -> dict[str, bytes]:
        return {"mask": encode_mask(masking.mask)} if payload.header.ask == READJUST else {}


class DevicesMasks(SparseIntake):
    """Answers whose devices have moved their masks."""

    def _own_mask(self, result: SparseResult) -> Bools:
        return checked_mask(result, self.layout, self.layout.prunable.kept(self.mask))


class FedDSTRounds(SparseRounds):
    """Prunes the union of the devices' masks back to size."""

    erk = True
    last_share = LAST_SHARE

    def _ask(self, key: RoundKey) -> tuple[str, tuple[int, ...]]:
        if key.number not in self.adjusting():
            return "", ()
        return READJUST, self._moving(key.number, MOVED)

    def _sparse_intake(self, key: RoundKey, bounds: Bounds) -> SparseIntake:
        if key.number not in self.adjusting():
            return super()._sparse_intake(key, bounds)
        return self._new_intake(DevicesMasks, bounds)

    def _next_mask(
        self, key: RoundKey, intake: SparseIntake, weights: NDArray[np.float32]
    ) -> Bools:
        had = intake.covered[self.layout.prunable.index] > 0
        return best_per_tensor(self.layout.prunable, np.abs(weights), had, self.kept)


class FedDST(SparseMethod):
    """Masks that devices move."""

    name = "feddst"
    title = "FedDST"
    paper = "Bibikar et al. 2022"
    exchange = FedDSTRounds
    device = ReadjustingWorker
