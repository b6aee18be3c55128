"""Criteria that need no device and no sample: the coordinator has the weights."""

import numpy as np

from fleetprune.criteria import weights as single
from fleetprune.criteria.median import geometric_median
from fleetprune.criteria.units import (
    Floats,
    Scores,
    Tensors,
    finished,
    locate,
    makers,
    read,
    summed,
)
from fleetprune.errors import BudgetError
from fleetprune.layout import Architecture, Gate


def magnitude(architecture: Architecture, params: Tensors) -> Scores:
    """L2 norm of the weights that make each unit (Li et al. 2017, with L2 for L1).

    `sqrt(sum of w**2)`; high = keep. Runs on the coordinator.

    Args:
        architecture: The model.
        params: Dense parameters by name.

    Returns:
        Per group (units,): over all weights of two or more axes whose outputs run over the group
        (`makers`).

    Raises:
        WireError: A tensor has another shape.
        BudgetError: A score is not finite.
    """
    squares = summed(
        architecture, makers(architecture), lambda n: np.square(read(architecture, params, n))
    )
    return finished("magnitude", {g: np.sqrt(s) for g, s in squares.items()})


def magnitude_l1(architecture: Architecture, params: Tensors) -> Scores:
    """L1 norm of the weights that make each unit (Li et al., "Pruning Filters", 2017).

    `sum of |w|`; high = keep. Runs on the coordinator.

    Args, returns and errors as `magnitude`.
    """
    sums = summed(
        architecture, makers(architecture), lambda n: np.abs(read(architecture, params, n))
    )
    return finished("l1", sums)


def gamma(architecture: Architecture, params: Tensors) -> Scores:
    """Scale of a unit's norms (Liu et al., "Network Slimming", 2017).

    `mean of |gamma|` over the norm layers on the unit; high = keep. A unit without a norm has a
    scale of 1, so a group without one stays in its order. Runs on the coordinator.

    Args:
        architecture: The model; the norms are among its `gates`.
        params: Dense parameters by name.

    Returns:
        Per group (units,).

    Raises:
        WireError: A tensor has another shape.
        BudgetError: No group has a norm, or a score is not finite.
    """
    scales = {
        group: [gate for gate in gates if _is_scale(architecture, gate)]
        for group, gates in architecture.gates.items()
    }
    if not any(scales.values()):
        raise BudgetError("gamma: no norm layer scales any unit; choose magnitude")
    sums = summed(architecture, scales, lambda n: np.abs(read(architecture, params, n)))
    counts = summed(architecture, scales, lambda n: np.ones(params[n].shape))
    means = {
        g: np.divide(s, counts[g], out=np.ones_like(s), where=counts[g] > 0)
        for g, s in sums.items()
    }
    return finished("gamma", means)


def _is_scale(architecture: Architecture, gate: Gate) -> bool:
    """Whether a gate is a norm's scale: other gates are shifts, or weights of two or more axes."""
    one_axis = len(architecture.tensor(gate.tensor).axes) == 1
    return one_axis and gate.tensor.rpartition(".")[2] == "weight"


def threshold(architecture: Architecture, params: Tensors) -> Scores:
    """Mean of a unit's weights in standard deviations of their layer (as in Han et al. 2015).

    `mean of |w| / std(layer)`; high = keep. Threshold pruning keeps the weights with
    `|w| >= t * std(layer)`; this is the share of the unit that it keeps, added up over all `t`,
    so that no `t` has to be chosen. Runs on the coordinator. A layer whose weights are all equal
    has no deviation and scores 0.

    Args, returns and errors as `magnitude`.
    """
    places = makers(architecture)
    sums = summed(
        architecture,
        places,
        lambda n: single.threshold(read(architecture, params, n)).astype(np.float64),
    )
    counts = summed(architecture, places, lambda n: np.ones(params[n].shape))
    return finished("threshold", {g: s / np.maximum(counts[g], 1) for g, s in sums.items()})


def fpgm(architecture: Architecture, params: Tensors) -> Scores:
    """Distance to the geometric median of the group's units (He et al., FPGM, 2019).

    `|w_u - median|`, where the median is the point with the least sum of distances to all units;
    high = keep. What lies near it can be stood in for by the others, however large it is. A
    unit's point are all weights that make it, so a residual group has one median. Runs on the
    coordinator.

    Args, returns and errors as `magnitude`.
    """
    scores: dict[str, Floats] = {}
    for group, gates in makers(architecture).items():
        units = architecture.groups[group]
        parts = [np.zeros((units, 0))]
        for gate in gates:
            axis = architecture.tensor(gate.tensor).axes[gate.axis]
            found = locate(axis, gate.start, architecture.groups)
            if found is None:
                continue
            start, segment = found
            rows = np.moveaxis(read(architecture, params, gate.tensor), gate.axis, 0)
            parts.append(rows[start : start + units * segment.block].reshape(units, -1))
        points = np.concatenate(parts, axis=1)
        scores[group] = np.linalg.norm(points - geometric_median(points), axis=1)
    return finished("fpgm", scores)


def synflow(architecture: Architecture, params: Tensors, gradients: Tensors) -> Scores:
    """Synaptic flow through each unit (Tanaka et al., SynFlow, 2020).

    `sum of |w * dR/d|w||`, where R is the sum of the network's outputs for an input of ones, with
    all weights replaced by their absolute values; high = keep. Needs no data. What flows into a
    unit flows out of it, so it does not matter on which side one sums. Runs on the coordinator
    (the gradient is torch's: `fleetprune_coordinator.synflow`).

    Args:
        architecture: The model.
        params: Dense parameters by name.
        gradients: dR/d|w| by name, of the same shapes.

    Returns:
        Per group (units,), over the weights that make the unit (`makers`).

    Raises:
        WireError: A tensor has another shape.
        BudgetError: A score is not finite.
    """
    flows = summed(
        architecture,
        makers(architecture),
        lambda n: np.abs(read(architecture, params, n) * read(architecture, gradients, n)),
    )
    return finished("synflow", flows)
