"""FedRTS: every weight has a posterior of being worth its place, and masks are drawn from them.

Huang et al., "FedRTS: Federated Robust Pruning via Combinatorial Thompson Sampling", NeurIPS 2025.
Each weight has a Beta distribution. A round's outcome lies in 0..1: for a weight in the mask,
whether it is among the largest of its tensor, in the mean model and in the devices' own; for a
pruned one, whether it has one of the largest gradients on the devices. In a round of adjustment
one number is drawn for each weight, and the highest of a tensor are the new mask. Devices send
the places of gradients, not their values.

With `k` the weights of a tensor that may change places (a share that falls along a cosine until
three fifths of the rounds) and `K` those it keeps, the outcomes are:

    in the mask     (1 - GAMMA) [among the K - k largest of the mean]
                    + GAMMA sum(p_device [among the K - k largest of the device])
    pruned          (1 - GAMMA) / 2 + GAMMA sum(p_device [among the k largest gradients])

and `alpha += LAMBDA outcome`, `beta += LAMBDA (1 - outcome)`: in every round for weights in the
mask, in rounds of adjustment for pruned ones; from Beta(1, 1).

Left open by the paper or chosen here:

- GAMMA and LAMBDA are the same in the paper and in the authors' code, the FedPruning library. The
  share that moves is the paper's 0.4; the code's default is 0.2. GAMMA weighs the devices as in the
  code: in the paper it weighs the mean, which at one half is the same.
- *How often*: `remask_every`. The paper adjusts every 10 of 500 rounds; with ours a weight in the
  mask has been judged five times instead of ten between two draws. The code also draws in the very
  round in which the share has fallen to none, which would only add noise here.
- Posteriors are never forgotten, as in that code; after the last adjustment they rest.
- Densities per tensor follow the Erdős–Rényi kernel and never change. The first mask has the
  largest weights of the initial model, as in the code; the paper prunes at random. Every
  convolution and linear layer is pruned, none is spared; biases and norms stay.
- *Which gradient*: that of one batch after training, as in the code.
- A weight that comes back begins at zero; in the code it may have a trace of the last step, since
  its devices hold pruned weights at zero before a step and not after it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetprune_coordinator.bounds import Bounds
from fleetprune_coordinator.round_plan import RoundKey
from fleetprune_sim.methods.sparse.frames import SparseResult
from fleetprune_sim.methods.sparse.grow import GROW, GradientWorker, named_weights
from fleetprune_sim.methods.sparse.intake import SparseIntake
from fleetprune_sim.methods.sparse.method import SparseMethod
from fleetprune_sim.methods.sparse.prunable import Bools, Prunable, best_per_tensor
from fleetprune_sim.methods.sparse.rounds import SparseRounds

GAMMA = 0.5
"""Share of an outcome that the single devices have; the mean model has the rest."""
LAMBDA = 10.0
"""Observations that one outcome counts for."""
MOVED = 0.4
"""Share of a tensor's weights that may change places at first."""
LAST_SHARE = 0.6
"""Of the rounds, until which the mask changes: round 300 of 500 in the paper."""
STREAM = 2501  # of random numbers; any constant that no other draw has

Floats = NDArray[np.float64]


def kept_outcome(mean_is_large: Bools, votes: Floats) -> Floats:
    """Outcomes of weights in the mask.

    Args:
        mean_is_large: (n,) whether a weight is among the largest of the mean model.
        votes: (n,) share of the devices' samples where it is among the largest of the device.
    """
    outcome: Floats = (1 - GAMMA) * mean_is_large + GAMMA * votes
    return outcome


def pruned_outcome(votes: Floats) -> Floats:
    """Outcomes of pruned weights.

    Args:
        votes: (n,) share of the devices' samples where its gradient is among the largest.
    """
    outcome: Floats = (1 - GAMMA) * 0.5 + GAMMA * votes
    return outcome


@dataclass(frozen=True)
class Posterior:
    """A Beta distribution per weight."""

    alpha: Floats
    """(n,)"""
    beta: Floats
    """(n,)"""

    def seen(self, outcome: Floats, where: Bools) -> "Posterior":
        """After outcomes (n,) in 0..1 of the weights `where` (n,) says."""
        return Posterior(
            self.alpha + LAMBDA * outcome * where, self.beta + LAMBDA * (1 - outcome) * where
        )

    def draw(self, prunable: Prunable, counts: Sequence[int], rng: np.random.Generator) -> Bools:
        """(n,): one number is drawn per weight, and the highest `counts` of each tensor kept."""
        drawn = rng.beta(self.alpha, self.beta)
        return best_per_tensor(prunable, drawn, np.ones(drawn.size, np.bool_), counts)


class VoteIntake(SparseIntake):
    """Weights, and which of them the single devices would keep or have."""

    def __init__(
        self,
        *args: Any,
        large: Sequence[int],
        named: Sequence[int] | None,
        **rest: Any,
    ) -> None:
        """As `SparseIntake`.

        Args:
            *args: As `SparseIntake`.
            large: Per tensor, how many of its weights in the mask a device votes for.
            named: Per tensor, how many pruned weights a device names; None: it does not.
            **rest: As `SparseIntake`.
        """
        super().__init__(*args, **rest)
        self._large, self._named = large, named
        self._votes = np.zeros(self.mask.size)
        self._weights = 0.0

    @property
    def votes(self) -> Floats:
        """(n,) in 0..1, of the largest weights and of the largest gradients."""
        return self._votes / self._weights

    def _take(self, result: SparseResult, values: NDArray[np.float32], weight: float) -> None:
        prunable = self.layout.prunable
        if self._named is not None:
            self._votes[named_weights(result, prunable, self.mask, self._named)] += weight
        self._votes += weight * best_per_tensor(prunable, np.abs(values), self.mask, self._large)
        self._weights += weight


class FedRTSRounds(SparseRounds):
    """Keeps the posteriors."""

    erk = True
    last_share = LAST_SHARE

    def _begin(self) -> None:
        super()._begin()
        self.posterior = Posterior(np.ones(self.mask.size), np.ones(self.mask.size))

    def _large(self, number: int) -> tuple[int, ...]:
        moving = self._moving(number, MOVED)
        return tuple(kept - k for kept, k in zip(self.kept, moving, strict=True))

    def _ask(self, key: RoundKey) -> tuple[str, tuple[int, ...]]:
        if key.number not in self.adjusting():
            return "", ()
        return GROW, self._moving(key.number, MOVED)

    def _sparse_intake(self, key: RoundKey, bounds: Bounds) -> SparseIntake:
        ask, counts = self._ask(key)
        named = counts if ask else None
        return self._new_intake(VoteIntake, bounds, large=self._large(key.number), named=named)

    def _next_mask(
        self, key: RoundKey, intake: SparseIntake, weights: NDArray[np.float32]
    ) -> Bools:
        assert isinstance(intake, VoteIntake)
        turns = self.adjusting()
        if not turns or key.number > turns[-1]:
            return self.mask
        prunable = self.layout.prunable
        large = best_per_tensor(prunable, np.abs(weights), self.mask, self._large(key.number))
        outcome = np.where(
            self.mask, kept_outcome(large, intake.votes), pruned_outcome(intake.votes)
        )
        if key.number not in turns:  # devices have said nothing of pruned weights
            self.posterior = self.posterior.seen(outcome, self.mask)
            return self.mask
        self.posterior = self.posterior.seen(outcome, np.ones_like(self.mask))
        rng = np.random.default_rng([self._settings.seed, STREAM, key.number])
        return self.posterior.draw(prunable, self.kept, rng)

    def _state(self) -> dict[str, NDArray[Any]]:
        return {"alpha": self.posterior.alpha, "beta": self.posterior.beta}

    def _take_up(self, state: Mapping[str, NDArray[Any]]) -> None:
        self.posterior = Posterior(state["alpha"], state["beta"])


class PlacesWorker(GradientWorker):
    """Names weights without their gradients."""

    with_values = False


class FedRTS(SparseMethod):
    """A mask drawn from posteriors."""

    name = "fedrts"
    title = "FedRTS"
    paper = "Huang et al. 2025"
    exchange = FedRTSRounds
    device = PlacesWorker
