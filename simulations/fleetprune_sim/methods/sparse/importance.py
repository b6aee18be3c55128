"""What weights are worth for their time, and how a device prunes by that (see `prunefl`)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fleetprune_agent.data import Batches
from fleetprune_agent.sessions import Arrays, Graph
from fleetprune_agent.trainer import Trained
from fleetprune_sim.methods.sparse.device import GradientMasking, MaskedWorker, Masking
from fleetprune_sim.methods.sparse.frames import SparsePayload, encode_mask, pack
from fleetprune_sim.methods.sparse.prunable import Bools, Prunable, best_of, best_per_tensor

SHRINK, IMPORTANCE = "shrink", "importance"
DECREASE = 0.3
"""Share of a tensor's weights, the smallest, that one reconfiguration may drop. The authors halve
it every 10 000 rounds, which our trainings never come to."""
EXCHANGE = 30
"""Multiply-accumulates per sample that take as long as exchanging one weight. By the times that the
authors give for CIFAR-10 and FEMNIST it is 26 to 32, where a convolution has 64 positions or more
and is not the first; their devices train on 100 samples a round."""
INITIAL_EPOCHS = 10
"""Of the device that prunes first: at 0.7 per reconfiguration, enough for a density of 3 %."""


def reconfigure(
    prunable: Prunable,
    costs: Sequence[int],
    mask: Bools,
    weights: NDArray[np.float32],
    importance: NDArray[np.float64],
    *,
    limit: int,
) -> Bools:
    """The weights that are worth most for their time, within a limit of costs.

    Args:
        prunable: The tensors.
        costs: Of one weight, per tensor.
        mask: (n,) until now.
        weights: (n,).
        importance: (n,) at least 0.
        limit: Of the costs of all weights kept, at least that of one weight of each tensor.

    Returns:
        (n,): of each tensor's weights all but the `DECREASE` smallest (fewer, in proportion, where
        they alone exceed the limit), then all others by falling importance per time, which is cost
        and `EXCHANGE`, until one does not fit.
    """
    cost = np.repeat(np.array(costs, np.int64), prunable.sizes)
    stay = [k - int(DECREASE * k) for k in prunable.kept(mask)]
    total = sum(k * c for k, c in zip(stay, costs, strict=True))
    if total > limit:  # one weight of each tensor stays in any case
        least = sum(costs)
        stay = [1 + (k - 1) * (limit - least) // (total - least) for k in stay]
    chosen = best_per_tensor(prunable, np.abs(weights), mask, stay)
    worth = importance / (cost + EXCHANGE)
    order = np.flatnonzero(~chosen)
    order = order[np.argsort(-worth[order], kind="stable")]
    room = limit - int(cost[chosen].sum())
    fitting = int(np.searchsorted(np.cumsum(cost[order]), room, side="right"))
    return chosen | best_of(worth, ~chosen, fitting)


def shrinking_limits(dense: int, budget: int, times: int) -> tuple[int, ...]:
    """Limits from `dense` down to `budget` in `times` equal ratios, rounded down; the last exact.

    Args:
        dense: Multiply-accumulates of the dense model.
        budget: Of the pruned one, at most `dense`.
        times: How many limits.
    """
    ratio = budget / dense
    return (*(int(dense * ratio ** (i / times)) for i in range(1, times)), budget)


class Importance(GradientMasking):
    """Adds up the squared gradients of all prunable weights."""

    def __init__(self, payload: SparsePayload, momentum: float) -> None:
        """Start where a task starts, with the momentum that the graph was made with."""
        super().__init__(payload, momentum)
        self.total = np.zeros(self.prunable.n)
        """(n,)"""

    def __call__(self, state: Arrays) -> None:
        """Add a step's, and hold pruned weights at zero."""
        self.total += np.square(self._gradient(state), dtype=np.float64)
        super().__call__(state)


class Shrinking(Importance):
    """Reconfigures several times during a task."""

    def __init__(self, payload: SparsePayload, momentum: float, every: int) -> None:
        """Reconfigure after every so many steps; costs and limits come with the model."""
        super().__init__(payload, momentum)
        tensors = len(self.prunable.runs)
        self._costs = payload.header.counts[:tensors]
        self._limits = list(payload.header.counts[tensors:])
        self._every, self._steps = every, 0

    def __call__(self, state: Arrays) -> None:
        """Reconfigure if it is time."""
        super().__call__(state)
        self._steps += 1
        if self._steps % self._every or not self._limits:
            return
        limit = self._limits.pop(0)
        self.mask = reconfigure(
            self.prunable, self._costs, self.mask, self._params, self.total, limit=limit
        )
        self._hold(state)
        self.total[:] = 0


class ImportanceWorker(MaskedWorker):
    """Prunes by itself, or says what weights are worth."""

    def _masking(self, graph: Graph, payload: SparsePayload, steps: int) -> Masking:
        ask = payload.header.ask
        if ask == SHRINK:
            every = max(1, steps // INITIAL_EPOCHS)
            return Shrinking(payload, graph.meta.momentum, every)
        if ask == IMPORTANCE:
            return Importance(payload, graph.meta.momentum)
        return super()._masking(graph, payload, steps)

    def _report(
        self,
        graph: Graph,
        payload: SparsePayload,
        trained: Trained,
        masking: Masking,
        batches: Batches,
    ) -> dict[str, bytes]:
        if isinstance(masking, Shrinking):
            kept = int(np.count_nonzero(masking.mask))
            return {"mask": encode_mask(masking.mask), "kept": kept.to_bytes(4, "little")}
        if isinstance(masking, Importance):
            return {"importance": pack(masking.total.astype(np.float32))}
        return {}
