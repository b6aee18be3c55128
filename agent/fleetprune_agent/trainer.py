"""Local training: the optimiser steps of one task, with all state in NumPy vectors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import FleetpruneError, GraphError, UsageError
from fleetprune.model_payload import ModelPayload
from fleetprune_agent.data import Batches
from fleetprune_agent.sessions import Arrays, Session, require_finite, run_graph

RAREST: Final = 1e-3
"""Share that a label without samples is taken to have, so that its logit stays finite."""


class StoppedError(FleetpruneError):
    """The process is told to end; the work is done again at its next start."""


def never() -> bool:
    """The answer of those who are never told to stop."""
    return False


@dataclass(frozen=True, eq=False)
class Trained:
    """What training made of a model.

    Attributes:
        params: (P,) float32.
        stats: (S,) float32, BatchNorm running means and variances; (0,) where the graphs leave them
            as they are.
        scores: (U,) float32, sum over steps of what the graph says of each unit; None where it
            says nothing.
        steps: Optimiser steps taken.
        loss: Mean over the samples seen; None without steps.
    """

    params: NDArray[np.float32]
    stats: NDArray[np.float32]
    scores: NDArray[np.float32] | None
    steps: int
    loss: float | None


def train(
    steps: Sequence[Session],
    payload: ModelPayload,
    batches: Batches,
    *,
    epochs: int,
    max_steps: int,
    learning_rate: float,
    rng: np.random.Generator | None = None,
    proximal: float = 0.0,
    prior: NDArray[np.float32] | None = None,
    after_step: Callable[[Arrays], None] | None = None,
    stopped: Callable[[], bool] = never,
) -> Trained:
    """Train for some epochs, each step with one of several graphs, drawn evenly.

    The graphs share the weights and differ in what else the step teaches (self-distillation
    partners). Momentum starts at zero: a device is asked again after many rounds, if at all, and
    an old direction would pull away from a model that has moved on.

    Args:
        steps: At least one `train_step` graph, all of one batch size.
        payload: Where training starts; not changed.
        batches: Labelled samples in batches of that size.
        epochs: Passes over the samples.
        max_steps: At most so many steps; 0: as many as the epochs have.
        learning_rate: Of every step.
        rng: Draws the graphs; only a single one needs none.
        proximal: Pull towards where training started, after each step and outside of momentum:
            `w -= learning_rate * proximal * (w - start)` (FedProx, Li et al. 2020, decoupled as
            AdamW decouples weight decay).
        prior: (classes,) for graphs that adjust logits; see `log_frequencies`.
        after_step: Told of `params`, `momentum` and `stats` after each step; may change them in
            place, for instance to hold some weights at zero.
        stopped: Asked before each step.

    Returns:
        The trained model.

    Raises:
        GraphError: The loss or a weight is not finite, or the runtime fails.
        StoppedError: `stopped` said so.
        UsageError: There are several graphs, but no `rng`.
    """
    if rng is None and len(steps) > 1:
        raise UsageError(f"{len(steps)} graphs, but nothing to draw them with")
    total = epochs * len(batches)
    if max_steps:
        total = min(total, max_steps)
    state = {"params": payload.params, "stats": payload.stats}
    state["momentum"] = np.zeros_like(payload.params)
    rate = np.array(learning_rate, np.float32)
    pull = np.float32(learning_rate * proximal)
    constant = {"lr": rate} if prior is None else {"lr": rate, "prior": prior}
    scores: NDArray[np.float64] | None = None
    loss_sum, seen, taken, moved = 0.0, 0, 0, False
    while taken < total:
        for batch in batches:
            if stopped():
                raise StoppedError(f"stopped after {taken} of {total} steps")
            session = steps[int(rng.integers(len(steps)))] if rng and len(steps) > 1 else steps[0]
            feeds: Arrays = {"x": batch.x, "y": batch.y, "sw": batch.sw, **constant, **state}
            out = run_graph(session, feeds)
            taken += 1
            loss = float(out["loss"])
            if not math.isfinite(loss):
                raise GraphError(
                    f"step {taken} of {total}: loss is {loss}, expected a finite number: "
                    f"learning rate {learning_rate:g} may be too high"
                )
            loss_sum += loss * batch.samples
            seen += batch.samples
            state = {k: out.get(f"{k}_out", v) for k, v in state.items()}
            moved = "stats_out" in out
            if pull:
                state["params"] -= pull * (state["params"] - payload.params)
            if after_step is not None:
                after_step(state)
            if "scores" in out:
                score = out["scores"].astype(np.float64)
                scores = score if scores is None else scores + score
            if taken == total:
                break
    for what in ("params", "stats"):
        require_finite(f"{what} after {taken} steps", state[what])
    if scores is not None:
        require_finite(f"scores after {taken} steps", scores)
    return Trained(
        params=state["params"],
        stats=state["stats"] if moved else np.zeros(0, np.float32),
        scores=None if scores is None else scores.astype(np.float32),
        steps=taken,
        loss=loss_sum / seen if seen else None,
    )


def log_frequencies(y: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """Log of each label's share of the samples; `RAREST` stands for a share of 0.

    Args:
        y: (n,) labels, 0 <= y < classes, n > 0.
        classes: Number of classes.

    Returns:
        (classes,) float32.
    """
    shares = np.bincount(y, minlength=classes) / y.size
    return np.log(shares + RAREST).astype(np.float32)
