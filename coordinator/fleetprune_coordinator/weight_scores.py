"""What single weights are worth, from what the coordinator has anyway.

Devices report of units: figures of every weight would cost as many bytes as the model. Where a
criterion needs gradients, the fleet's mean change of a round stands for them (the pseudo-gradient
of Reddi et al., "Adaptive Federated Optimization", ICLR 2021); Wanda needs only norms of inputs,
which devices send per unit, so its scores of single weights are exactly those of all samples.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.criteria import CATALOGUE, Criterion, weights
from fleetprune.layout import Architecture, Order, reorder
from fleetprune_coordinator.fleet_model import Tensors
from fleetprune_coordinator.ledger import Flow

FOLLOWED: Final = frozenset({
    Criterion.TAYLOR, Criterion.TAYLOR_ABS, Criterion.SENSITIVITY, Criterion.FISHER,
    Criterion.SNIP, Criterion.MOVEMENT,
})  # fmt: skip
"""Criteria that look at how training changes weights."""
DECAY: Final = 0.8
"""Share of the old average that stays, as in the ledger."""
_PREFIX: Final = "changes/"


class Changes:
    """How training has changed each weight, as the criterion wants to know it."""

    def __init__(self, criterion: Criterion, names: tuple[str, ...]) -> None:
        """Follow these weights for a criterion; nothing is kept where it needs no changes."""
        self.names = names
        self._criterion = criterion
        self._followed = names if criterion in FOLLOWED else ()
        self._known: dict[str, NDArray[np.float64]] = {}

    def add(self, before: Tensors, after: Tensors, coverage: Tensors) -> None:
        """Take in a round: a weight that nobody trained keeps its value.

        Args:
            before: Dense parameters.
            after: The same after the round.
            coverage: Per parameter who trained it; 0: nobody.
        """
        for name in self._followed:
            seen = coverage[name] > 0
            change = after[name].astype(np.float64) - before[name]
            old = self._known.get(name)
            if self._criterion is Criterion.MOVEMENT:  # a sum over the whole training
                new = weights.moved(before[name], after[name]) + (0.0 if old is None else old)
            else:
                now = np.square(change) if self._criterion is Criterion.FISHER else -change
                new = now if old is None else DECAY * old + (1 - DECAY) * now
            self._known[name] = np.where(seen, new, 0.0 if old is None else old)

    @property
    def known(self) -> bool:
        """Whether there is anything to score by."""
        return bool(self._known)

    def scores(self, params: Tensors) -> dict[str, NDArray[np.float32]]:
        """By name the scores of all weights, dense."""
        known = self._known
        by_both: Mapping[Criterion, Callable[[Any, Any], NDArray[np.float32]]] = {
            Criterion.TAYLOR: weights.taylor,
            Criterion.TAYLOR_ABS: weights.taylor_abs,
            Criterion.FISHER: weights.fisher,
        }
        if self._criterion is Criterion.SNIP:
            return weights.snip({n: params[n] for n in known}, known)
        if self._criterion is Criterion.SENSITIVITY:
            return {n: weights.sensitivity(g) for n, g in known.items()}
        if self._criterion is Criterion.MOVEMENT:
            # Masks take scores of at least 0: what shrank most of its layer has none.
            return {n: (m - m.min(initial=0.0)).astype(np.float32) for n, m in known.items()}
        return {n: by_both[self._criterion](params[n], g) for n, g in known.items()}

    def reorder(self, architecture: Architecture, order: Order) -> None:
        """Follow a new order of units."""
        for name, values in self._known.items():
            spec = architecture.tensor(name)
            self._known[name] = reorder(spec, values, architecture.groups, order)

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """For a snapshot."""
        return {f"{_PREFIX}{name}": values for name, values in self._known.items()}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take up what `arrays` gave."""
        for name in self._followed:
            if (values := arrays.get(f"{_PREFIX}{name}")) is not None:
                self._known[name] = values.astype(np.float64)


def weight_scores(
    criterion: Criterion,
    params: Tensors,
    changes: Changes,
    *,
    norms: Mapping[str, NDArray[np.float32]],
    flow: Flow | None,
) -> dict[str, NDArray[np.float32]]:
    """Scores of all prunable weights.

    Args:
        criterion: Which. Where it has no form for weights, or nothing has been reported yet, it is
            magnitude.
        params: Dense prunable weights by name, and all others.
        changes: What training has done.
        norms: Per observed weight (inputs,) mean sums of squares, as far as they are known.
        flow: For `synflow`.

    Returns:
        By name, dense, finite and not negative; the high ones stay.
    """
    names = changes.names
    plain = {name: weights.magnitude(params[name]) for name in names}
    if not CATALOGUE[criterion].weights:
        return plain
    if criterion is Criterion.NONE:
        return {name: _by_chance(params[name].shape) for name in names}
    if criterion is Criterion.THRESHOLD:
        return {name: weights.threshold(params[name]) for name in names}
    if criterion is Criterion.SYNFLOW and flow is not None:
        found = flow(params)
        return {name: weights.synflow(params[name], found[name]) for name in names}
    if criterion is Criterion.WANDA:
        found = {n: weights.wanda(params[n], norms[n]) for n in names if n in norms}
        return plain | {n: within_rows(scores) for n, scores in found.items()}
    return plain | (changes.scores(params) if changes.known else {})


def within_rows(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores that compare weights of one output alone, as Wanda does.

    Args:
        scores: (outputs, ...).

    Returns:
        Of the same shape: the share of its row that each weight is worth at least as much as (of
        equal ones, the lower index more), so that all rows thin out alike.
    """
    rows = scores.reshape(scores.shape[0], -1)
    order = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")
    shares = np.empty(rows.shape, np.float32)
    falling = np.arange(rows.shape[1], 0, -1, dtype=np.float32) / np.float32(rows.shape[1])
    np.put_along_axis(shares, order, np.broadcast_to(falling, rows.shape), axis=1)
    return shares.reshape(scores.shape)


def _by_chance(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The same random scores whenever a weight has this shape: the control."""
    return np.random.default_rng(list(shape)).random(shape, np.float32)
