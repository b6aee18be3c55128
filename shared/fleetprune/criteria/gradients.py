"""Criteria that need gradients: training devices compute them in the course of their steps.

A device sends sums over its steps; the mean over steps takes the place of the expectation. None
of them is additive over devices (the square, or the absolute value, of a sum is not the sum of the
squares), so devices' reports are first brought to one scale and then merged
(`fleetprune_coordinator.score_merge`).
"""

from collections.abc import Mapping

import numpy as np

from fleetprune.criteria.units import Floats, Scores, Tensors, finished, makers, read, summed
from fleetprune.layout import Architecture


def _gated(architecture: Architecture, params: Tensors, gradients: Tensors) -> Mapping[str, Floats]:
    """Per group (units,): the sum of w * dL/dw over each unit's gates."""
    return summed(
        architecture,
        architecture.gates,
        lambda n: read(architecture, params, n) * read(architecture, gradients, n),
    )


def taylor(architecture: Architecture, params: Tensors, gradients: Tensors) -> Scores:
    """First-order Taylor score of removing each unit (Molchanov et al. 2019).

    `(sum over the unit's gate elements of w * dL/dw)**2`: the squared change of the loss, to
    first order, when the unit is scaled to nothing; high = keep. A filter before a BatchNorm has
    no such effect (the norm divides its scale away, the sum is 0), so the gate is the norm's own
    scale and shift. Members of a residual group are summed before the square, as they act
    together. Runs on training devices; not additive over devices.

    Args:
        architecture: The model; its `gates` say which tensors count.
        params: Dense parameters by name.
        gradients: Their gradients by name, of the same shapes.

    Returns:
        Per group (units,).

    Raises:
        WireError: A tensor has another shape.
        BudgetError: A score is not finite.
    """
    sums = _gated(architecture, params, gradients)
    return finished("taylor", {g: np.square(s) for g, s in sums.items()})


def taylor_abs(architecture: Architecture, params: Tensors, gradients: Tensors) -> Scores:
    """The same without the square (Molchanov et al. 2017).

    `|sum over the unit's gate elements of w * dL/dw|`; high = keep. Of one step it gives the order
    that `taylor` gives; over many, steps with a large loss weigh less. Runs on training devices;
    not additive over devices.

    Args, returns and errors as `taylor`.
    """
    sums = _gated(architecture, params, gradients)
    return finished("taylor_abs", {g: np.abs(s) for g, s in sums.items()})


def sensitivity(architecture: Architecture, gradients: Tensors) -> Scores:
    """How much the loss moves when a unit's weights do (after Mozer and Smolensky 1989).

    `sum of |dL/dw|` over the weights that make the unit; high = keep: the *insensitive* go. It
    does not say what the loss loses when the unit goes (that is `taylor`): a weight of 0 may have
    a large gradient. Behind a norm, units with small weights have large gradients. Runs on
    training devices; not additive over devices.

    Args:
        architecture: The model.
        gradients: By name, of the dense parameters' shapes.

    Returns:
        Per group (units,), over the weights that make the unit (`makers`).

    Raises:
        WireError: A tensor has another shape.
        BudgetError: A score is not finite.
    """
    sums = summed(
        architecture, makers(architecture), lambda n: np.abs(read(architecture, gradients, n))
    )
    return finished("sensitivity", sums)


def fisher(architecture: Architecture, params: Tensors, squared: Tensors) -> Scores:
    """Second-order change of the loss (OBD, LeCun et al. 1990; Theis et al. 2018).

    `sum of E[g**2] * w**2 / 2` over the weights that make the unit, the squared gradient standing
    in for the Hessian's diagonal; high = keep. A device squares the gradient of each batch, not of
    each sample, so its figure is smaller than that of the papers by about the batch size, for all
    units alike. Runs on training devices; not additive over devices.

    Args:
        architecture: The model.
        params: Dense parameters by name.
        squared: The mean of their squared gradients by name, of the same shapes.

    Returns:
        Per group (units,), over the weights that make the unit (`makers`).

    Raises:
        WireError: A tensor has another shape.
        BudgetError: A score is not finite.
    """
    sums = summed(
        architecture,
        makers(architecture),
        lambda n: np.square(read(architecture, params, n)) * read(architecture, squared, n) / 2,
    )
    return finished("fisher", sums)


def snip(architecture: Architecture, params: Tensors, gradients: Tensors) -> Scores:
    """Connection sensitivity as a share of the network's (Lee et al., SNIP, 2019).

    `sum of |w * g|` over the weights that make the unit, divided by that over the whole network;
    high = keep. Meant for the start of training. Runs on training devices; not additive over
    devices.

    Args:
        architecture: The model.
        params: Dense parameters by name.
        gradients: Their gradients by name, of the same shapes.

    Returns:
        Per group (units,), adding up to 1 over all groups; 0 everywhere without any gradient.

    Raises:
        WireError: A tensor has another shape.
        BudgetError: A score is not finite.
    """
    sums = summed(
        architecture,
        makers(architecture),
        lambda n: np.abs(read(architecture, params, n) * read(architecture, gradients, n)),
    )
    total = sum(float(s.sum()) for s in sums.values()) or 1.0
    return finished("snip", {g: s / total for g, s in sums.items()})


def growth(architecture: Architecture, gradients: Tensors, keep: Mapping[str, int]) -> Scores:
    """What a pruned unit would bring (RigL, Evci et al. 2020).

    `sum of |g|` over the weights that would make the unit; high = grow. A unit that is kept
    already scores -1, below every other. Runs on training devices that hold the pruned units too
    (a wider class); not additive over devices.

    Args:
        architecture: The model.
        gradients: By name, of the dense parameters' shapes.
        keep: Units per group that are kept: the leading ones.

    Returns:
        Per group (units,), over the weights that make the unit (`makers`).

    Raises:
        WireError: A tensor has another shape.
        BudgetError: `keep` is out of range, or a score is not finite.
    """
    architecture.check_keep(keep)
    sums = summed(
        architecture, makers(architecture), lambda n: np.abs(read(architecture, gradients, n))
    )
    outside = {g: np.where(np.arange(s.size) < keep[g], -1.0, s) for g, s in sums.items()}
    return finished("growth", outside)


def movement(architecture: Architecture, params: Tensors, gradients: Tensors) -> Scores:
    """How one step moves each unit away from zero (Sanh et al., movement pruning, 2020).

    `-(sum over the unit's gate elements of w * dL/dw)`; summed over the steps of training:
    high = keep, negative: the unit shrinks. Unlike magnitude it looks at where weights go, not at
    where they are. Runs wherever training runs; with `moved`, on the coordinator.

    Args:
        architecture: The model; its `gates` say which tensors count.
        params: Dense parameters by name.
        gradients: Their gradients by name, of the same shapes.

    Returns:
        Per group (units,).

    Raises:
        WireError: A tensor has another shape.
        BudgetError: A score is not finite.
    """
    sums = _gated(architecture, params, gradients)
    return finished("movement", {g: -s for g, s in sums.items()})


def moved(
    architecture: Architecture,
    start: Tensors,
    end: Tensors,
    keep: Mapping[str, int] | None = None,
) -> Scores:
    """`movement` of a whole training, from its two ends.

    A step of gradient descent is `-lr * g`, so `-sum of w * g` is the sum of `w * step` divided by
    the learning rate; over small steps that is `(end**2 - start**2) / 2`, which is the change times
    the mean of both ends, whatever way the weights took. High = keep, negative: the unit shrinks.
    Runs on the coordinator, from the updates that devices send anyway; not additive over devices,
    whose learning rates and steps differ.

    Args:
        architecture: The model; its `gates` say which tensors count.
        start: Parameters by name, in the shapes of `keep`; those of the gates suffice.
        end: The same after training.
        keep: Units per group; None: the dense model's.

    Returns:
        Per group (kept units,).

    Raises:
        WireError: A tensor has another shape.
        BudgetError: A score is not finite.
    """
    sums = summed(
        architecture,
        architecture.gates,
        lambda n: (
            (
                np.square(read(architecture, end, n, keep))
                - np.square(read(architecture, start, n, keep))
            )
            / 2
        ),
        keep,
    )
    return finished("movement", sums)
