"""Importance criteria: one score per unit, the high ones stay.

The criteria follow their papers, not the slips of popular write-ups: magnitude compares absolute
values and keeps the large ones; sensitivity keeps the sensitive.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import WireError
from fleetprune.layout import Architecture, Axis, KeepCounts

Tensors = Mapping[str, NDArray[np.float32]]
Scores = dict[str, NDArray[np.float32]]
"""Per group (units,), in the order of the tensors' units."""


def per_unit(
    axis: Axis, keep: KeepCounts, values: NDArray[np.float64]
) -> list[tuple[str, NDArray[np.float64]]]:
    """Sum a vector that runs along an axis into the units of each of its segments.

    Args:
        axis: The axis, whose length under `keep` is that of `values`.
        keep: Units per group.
        values: (length,).

    Returns:
        (group, (units,)) for each segment that belongs to a group.
    """
    sums: list[tuple[str, NDArray[np.float64]]] = []
    start = 0
    for segment in axis:
        units = segment.kept(keep)
        stop = start + units * segment.block
        if segment.group is not None:
            part = values[start:stop].reshape(units, segment.block)
            sums.append((segment.group, part.sum(axis=1)))
        start = stop
    return sums


def _zeros(architecture: Architecture, keep: KeepCounts) -> dict[str, NDArray[np.float64]]:
    return {g: np.zeros(keep[g]) for g in architecture.groups}


def _float32(scores: Mapping[str, NDArray[np.float64]]) -> Scores:
    return {g: s.astype(np.float32) for g, s in scores.items()}


def magnitude(architecture: Architecture, params: Tensors) -> Scores:
    """L2 norm of the weights that make each unit (Li et al. 2017, with L2 for L1).

    Args:
        architecture: The model.
        params: Dense parameters by name.

    Returns:
        Per group (units,): the root of the summed squares over all weights of two or more axes
        whose first axis runs over the group.
    """
    total = _zeros(architecture, architecture.groups)
    for spec in architecture.tensors:
        if len(spec.axes) < 2 or spec.name not in params:
            continue
        rows = np.square(params[spec.name], dtype=np.float64)
        rows = rows.reshape(rows.shape[0], -1).sum(axis=1)
        for group, sums in per_unit(spec.axes[0], architecture.groups, rows):
            total[group] += sums
    return _float32({g: np.sqrt(s) for g, s in total.items()})


def taylor(architecture: Architecture, params: Tensors, gradients: Tensors) -> Scores:
    """First-order Taylor score of removing each unit (Molchanov et al. 2019).

    `(sum over the unit's gate elements of w * dL/dw)**2`: the squared change of the loss, to
    first order, when the unit is scaled to nothing. A filter before a BatchNorm has no such
    effect (the norm divides its scale away, the sum is 0), so the gate is the norm's own scale
    and shift. Members of a residual group are summed before the square, as they act together.

    Args:
        architecture: The model; its `gates` say which tensors count.
        params: Dense parameters by name.
        gradients: Their gradients by name, of the same shapes.

    Returns:
        Per group (units,).
    """
    total = _zeros(architecture, architecture.groups)
    for group, gates in architecture.gates.items():
        for gate in gates:
            product = params[gate.tensor].astype(np.float64) * gradients[gate.tensor]
            others = tuple(a for a in range(product.ndim) if a != gate.axis)
            axis = architecture.tensor(gate.tensor).axes[gate.axis]
            along = product.sum(axis=others)
            for name, sums in _at(axis, architecture.groups, along, gate.start):
                if name == group:
                    total[group] += sums
    return _float32({g: np.square(s) for g, s in total.items()})


def _at(
    axis: Axis, keep: KeepCounts, values: NDArray[np.float64], start: int
) -> list[tuple[str, NDArray[np.float64]]]:
    """The segment of an axis that begins at `start`, summed into units."""
    offset = 0
    for segment in axis:
        if offset == start:
            length = segment.kept(keep) * segment.block
            return per_unit((segment,), keep, values[offset : offset + length])
        offset += segment.kept(keep) * segment.block
    return []


def wanda(architecture: Architecture, params: Tensors, sumsq: Tensors) -> Scores:
    """Weight times activation norm (Sun et al. 2024), summed over each unit's outgoing weights.

    `score_u = sum over consumers, outputs i and taps of |W_iu| * ||X_u||_2`. `sumsq` is additive:
    summed over devices it gives exactly the score of their pooled samples, so devices too small
    to train still shape the model.

    Args:
        architecture: The model; its `observed` weights are the consumers.
        params: Dense parameters by name.
        sumsq: Per observed weight (inputs,): sum over samples and positions of the squared input.

    Returns:
        Per group (units,).

    Raises:
        WireError: A vector of `sumsq` has the wrong length.
    """
    total = _zeros(architecture, architecture.groups)
    for name in architecture.observed:
        weight = np.abs(params[name].astype(np.float64))
        outgoing = weight.sum(axis=tuple(a for a in range(weight.ndim) if a != 1))
        if sumsq[name].shape != outgoing.shape:
            raise WireError(
                f"{name}: activation sums of shape {sumsq[name].shape}, expected {outgoing.shape}"
            )
        scores = outgoing * np.sqrt(sumsq[name].astype(np.float64))
        axis = architecture.tensor(name).axes[1]
        for group, sums in per_unit(axis, architecture.groups, scores):
            total[group] += sums
    return _float32(total)
