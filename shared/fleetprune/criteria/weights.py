"""The criteria for single weights: arrays shaped like the weight, the high ones stay.

Papers, and where each one runs, stand with the functions for units. Where a criterion compares
whole filters (FPGM), activations (APoZ) or norms (gamma), it has no form for single weights.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import BudgetError, UsageError, WireError

Weight = NDArray[np.floating[Any]]
"""(outputs, inputs, ...)."""
Result = NDArray[np.float32]
"""Of the weight's shape."""


def magnitude(weight: Weight) -> Result:
    """`|w|`: absolute values, never signed ones."""
    return _done("magnitude", np.abs(weight.astype(np.float64)))


def threshold(weight: Weight) -> Result:
    """`|w| / std(layer)`: the largest `t` with which `threshold_mask` keeps the weight.

    A layer whose weights are all equal has no deviation: all score 0.
    """
    deviation = float(np.std(weight, dtype=np.float64))
    if deviation == 0:
        return np.zeros(weight.shape, np.float32)
    return _done("threshold", np.abs(weight.astype(np.float64)) / deviation)


def threshold_mask(weight: Weight, t: float) -> NDArray[np.bool_]:
    """Keep `|w| >= t * std(layer)`: the large weights stay, whatever their sign.

    Args:
        weight: Of one layer.
        t: At least 0. A layer whose weights are all equal is kept whole.

    Returns:
        Of the weight's shape; true: kept.

    Raises:
        UsageError: `t` is negative or not finite.
    """
    if not 0 <= t < np.inf:
        raise UsageError(f"threshold {t}, expected a finite number of at least 0")
    large: NDArray[np.bool_] = np.abs(weight.astype(np.float64)) >= t * np.std(
        weight, dtype=np.float64
    )
    return large


def synflow(weight: Weight, gradient: Weight) -> Result:
    """`|w * dR/d|w||`, with the gradient of the flow (see `data_free.synflow`)."""
    return _done("synflow", np.abs(_product(weight, gradient)))


def wanda(weight: Weight, sumsq: Weight) -> Result:
    """`|W_ij| * |X_j|_2`, to be compared within each output row (`keep_per_row`).

    Args:
        weight: (outputs, inputs, ...).
        sumsq: (inputs,): sum over samples and positions of the squared input; additive over
            devices.
    """
    if sumsq.shape != weight.shape[1:2]:
        raise WireError(f"activation sums of shape {sumsq.shape}, expected {weight.shape[1:2]}")
    norms = np.sqrt(sumsq.astype(np.float64)).reshape(-1, *(1,) * (weight.ndim - 2))
    return _done("wanda", np.abs(weight.astype(np.float64)) * norms)


def keep_per_row(scores: Weight, keep: int) -> NDArray[np.bool_]:
    """Keep the same number of weights in every output row, the highest; ties to the lower index.

    Args:
        scores: (outputs, ...) finite.
        keep: Weights to keep per row.

    Returns:
        Of the same shape, with exactly `keep` true per row.

    Raises:
        BudgetError: `keep` is out of range, or a score is not finite.
    """
    rows = scores.reshape(scores.shape[0], -1).astype(np.float64)
    size = rows.shape[1]
    if not 0 <= keep <= size:
        raise BudgetError(f"keep {keep} of {size} weights per row, expected 0..{size}")
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise BudgetError(f"scores: row {int(np.argmin(finite))} is not finite")
    mask = np.zeros(rows.shape, np.bool_)
    best = np.argsort(-rows, axis=1, kind="stable")[:, :keep]
    np.put_along_axis(mask, best, values=True, axis=1)
    return mask.reshape(scores.shape)


def taylor(weight: Weight, gradient: Weight) -> Result:
    """`(w * g)**2`: the squared change of the loss, to first order, when the weight goes."""
    return _done("taylor", np.square(_product(weight, gradient)))


def taylor_abs(weight: Weight, gradient: Weight) -> Result:
    """`|w * g|`."""
    return _done("taylor_abs", np.abs(_product(weight, gradient)))


def sensitivity(gradient: Weight) -> Result:
    """`|dL/dw|`: the sensitive stay."""
    return _done("sensitivity", np.abs(gradient.astype(np.float64)))


def fisher(weight: Weight, squared: Weight) -> Result:
    """`E[g**2] * w**2 / 2`, with the mean of the squared gradients."""
    return _done("fisher", _product(np.square(weight.astype(np.float64)), squared) / 2)


def snip(weights: Mapping[str, Weight], gradients: Mapping[str, Weight]) -> dict[str, Result]:
    """`|g * w|` of each weight, divided by the sum over the whole network.

    Args:
        weights: The network's prunable weights by name.
        gradients: By the same names, of the same shapes.

    Returns:
        By name; all together add up to 1, or are 0 without any gradient.
    """
    products = {n: np.abs(_product(w, gradients[n])) for n, w in weights.items()}
    total = sum(float(p.sum()) for p in products.values()) or 1.0
    return {n: _done("snip", p / total) for n, p in products.items()}


def movement(weight: Weight, gradient: Weight) -> Result:
    """`-w * g` of one step, to be summed over the steps: negative where the weight shrinks."""
    return _done("movement", -_product(weight, gradient))


def moved(start: Weight, end: Weight) -> Result:
    """The same of a whole training from its two ends: `(end**2 - start**2) / 2`.

    That is the sum over steps times the learning rate, which changes no order.
    """
    _check_alike(start, end)
    first, last = start.astype(np.float64), end.astype(np.float64)
    return _done("movement", (np.square(last) - np.square(first)) / 2)


def growth(gradient: Weight, mask: NDArray[np.bool_]) -> Result:
    """`|g|` among the pruned weights: the highest grow again (RigL).

    Args:
        gradient: Of the dense weight.
        mask: Of the same shape; true: kept.

    Returns:
        Of the same shape; -1, below every other, where the weight is kept already.
    """
    _check_alike(gradient, mask)
    return _done("growth", np.where(mask, -1.0, np.abs(gradient.astype(np.float64))))


def _product(weight: Weight, other: Weight) -> NDArray[np.float64]:
    _check_alike(weight, other)
    return weight.astype(np.float64) * other


def _check_alike(one: NDArray[Any], other: NDArray[Any]) -> None:
    """Nothing is broadcast."""
    if one.shape != other.shape:
        raise WireError(f"arrays of shapes {one.shape} and {other.shape}, expected the same")


def _done(criterion: str, values: NDArray[np.float64]) -> Result:
    """As float32; BudgetError if one is not finite."""
    with np.errstate(over="ignore"):
        done = values.astype(np.float32)
    if not np.isfinite(done).all():
        place = np.unravel_index(int(np.argmin(np.isfinite(done))), done.shape)
        raise BudgetError(
            f"{criterion}: the weight at {tuple(map(int, place))} scores {done[place]}, "
            f"expected a finite number"
        )
    return done
