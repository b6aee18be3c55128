"""Criteria that need forward passes: devices too small to train have their say, unlabelled."""

import numpy as np

from fleetprune.criteria.units import Floats, Scores, Tensors, finished, per_unit, read
from fleetprune.errors import UsageError, WireError
from fleetprune.layout import Architecture


def wanda(architecture: Architecture, params: Tensors, sumsq: Tensors) -> Scores:
    """Weight times activation norm (Sun et al., Wanda, 2024).

    `score_u = sum over consumers, outputs i and taps of |W_iu| * |X_u|_2`, over all weights that
    the unit goes into; high = keep. Runs on devices that only infer. `sumsq` is additive: summed
    over devices it gives exactly the score of their pooled samples.

    Args:
        architecture: The model; its `observed` weights are the consumers.
        params: Dense parameters by name.
        sumsq: Per observed weight (inputs,): sum over samples and positions of the squared input.

    Returns:
        Per group (units,); 0 for a unit without a consumer.

    Raises:
        WireError: A tensor or a vector of `sumsq` has the wrong shape.
        BudgetError: A score is not finite.
    """
    total = {g: np.zeros(n) for g, n in architecture.groups.items()}
    for name in architecture.observed:
        weight = np.abs(read(architecture, params, name))
        outgoing = weight.sum(axis=tuple(a for a in range(weight.ndim) if a != 1))
        scores = outgoing * np.sqrt(_along(architecture, name, sumsq, "activation sums"))
        for group, sums in per_unit(architecture.tensor(name).axes[1], architecture.groups, scores):
            total[group] += sums
    return finished("wanda", total)


def apoz(architecture: Architecture, zeros: Tensors, samples: float) -> Scores:
    """Average percentage of zeros, negated (Hu et al., "Network Trimming", 2016).

    `-(mean over the unit's activations of [x <= 0])`, between -1 and 0; high = keep, since what
    is often zero goes. The activations are those that the layers behind the unit get; where a
    unit has several such inputs, each counts the same. Runs on devices that only infer. `zeros`
    and `samples` are additive: summed over devices they give exactly the score of their pooled
    samples. Behind activations that are never exactly zero (GELU, SiLU) it is the share of those
    that are not positive.

    Args:
        architecture: The model; its `observed` weights are the layers behind.
        zeros: Per observed weight (inputs,): of each sample the share of positions at which the
            input is at most 0, summed over samples.
        samples: How many.

    Returns:
        Per group (units,); -1 for a unit that nothing is behind.

    Raises:
        UsageError: `samples` is not positive.
        WireError: A vector of `zeros` has the wrong length.
        BudgetError: A score is not finite.
    """
    if not samples > 0:
        raise UsageError(f"{samples} samples, expected more than 0")
    total = {g: np.zeros(n) for g, n in architecture.groups.items()}
    inputs = {g: np.zeros(n) for g, n in architecture.groups.items()}
    for name in architecture.observed:
        shares = _along(architecture, name, zeros, "counts of zeros") / samples
        axis = architecture.tensor(name).axes[1]
        for group, sums in per_unit(axis, architecture.groups, shares):
            total[group] += sums
        for group, ones in per_unit(axis, architecture.groups, np.ones_like(shares)):
            inputs[group] += ones
    shares_of = {
        g: np.divide(t, inputs[g], out=np.ones_like(t), where=inputs[g] > 0)
        for g, t in total.items()
    }
    return finished("apoz", {g: -s for g, s in shares_of.items()})


def _along(architecture: Architecture, name: str, vectors: Tensors, what: str) -> Floats:
    """A vector over a weight's inputs in float64; WireError if it has another length."""
    expected = (architecture.tensor(name).shape(architecture.groups)[1],)
    if vectors[name].shape != expected:
        raise WireError(f"{name}: {what} of shape {vectors[name].shape}, expected {expected}")
    return vectors[name].astype(np.float64)
