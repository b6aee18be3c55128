"""All criteria by name, and what the coordinator has to ask devices for each of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Criterion(StrEnum):
    """How the importance of a unit is measured; formulas and papers stand with the functions."""

    NONE = "none"
    """The order in which the user's model has them: the control that any other must beat."""
    MAGNITUDE = "magnitude"
    """L2 norm of its weights."""
    L1 = "l1"
    """L1 norm of its weights."""
    GAMMA = "gamma"
    """Scale of its norm layers."""
    THRESHOLD = "threshold"
    """Its weights in standard deviations of their layer."""
    FPGM = "fpgm"
    """Distance of its weights to the geometric median of its group's."""
    SYNFLOW = "synflow"
    """Its share of the flow from inputs to outputs, over absolute weights."""
    WANDA = "wanda"
    """Weights behind it times norms of its activations."""
    APOZ = "apoz"
    """How seldom it is zero."""
    TAYLOR = "taylor"
    """Squared change of the loss, to first order, when the unit goes."""
    TAYLOR_ABS = "taylor_abs"
    """The same, not squared."""
    SENSITIVITY = "sensitivity"
    """Gradients of its weights."""
    FISHER = "fisher"
    """Change of the loss to second order, by squared gradients."""
    SNIP = "snip"
    """Its weights times their gradients, as a share of the network's."""
    MOVEMENT = "movement"
    """How far training moves it away from zero."""
    RECONSTRUCTION = "reconstruction"
    """How well the layers behind can be rebuilt from it."""


class Needs(StrEnum):
    """What a criterion asks of devices."""

    NOTHING = "nothing"
    """The coordinator has the weights."""
    FORWARD = "forward"
    """Forward passes: any device can, without labels."""
    BACKWARD = "backward"
    """Gradients: training devices, in the course of their steps."""
    TRAINING = "training"
    """The updates that devices send anyway."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What there is to know about a criterion."""

    needs: Needs
    section: str = ""
    """Section of a device's answer that carries it; "": none."""
    additive: bool = False
    """Whether sums over devices give exactly what their pooled samples would."""
    signed: bool = False
    """Whether what is reported may be negative."""
    first: bool = True
    """Whether it can order the units of a model that comes trained, before the first cut."""
    later: bool = True
    """Whether it can order them again in the course of training."""
    weights: bool = True
    """Whether it has a form for single weights."""


_TRAINED: Final = Facts(Needs.BACKWARD, "scores")

CATALOGUE: Final[Mapping[Criterion, Facts]] = {
    Criterion.NONE: Facts(Needs.NOTHING),
    Criterion.MAGNITUDE: Facts(Needs.NOTHING),
    Criterion.L1: Facts(Needs.NOTHING),
    Criterion.GAMMA: Facts(Needs.NOTHING, weights=False),
    Criterion.THRESHOLD: Facts(Needs.NOTHING),
    Criterion.FPGM: Facts(Needs.NOTHING, weights=False),
    Criterion.SYNFLOW: Facts(Needs.NOTHING),
    Criterion.WANDA: Facts(Needs.FORWARD, "sumsq", additive=True),
    Criterion.APOZ: Facts(Needs.FORWARD, "zeros", additive=True, weights=False),
    Criterion.TAYLOR: _TRAINED,
    Criterion.TAYLOR_ABS: _TRAINED,
    Criterion.SENSITIVITY: _TRAINED,
    Criterion.FISHER: _TRAINED,
    Criterion.SNIP: _TRAINED,
    Criterion.MOVEMENT: Facts(Needs.TRAINING, signed=True, first=False),
    Criterion.RECONSTRUCTION: Facts(
        Needs.FORWARD, "gram", additive=True, later=False, weights=False
    ),
}

MEASURED: Final = frozenset(
    criterion
    for criterion, facts in CATALOGUE.items()
    if facts.needs is not Needs.NOTHING and facts.later
)
"""Criteria that need devices to have looked at the model, round after round."""


def needs(criterion: Criterion) -> Needs:
    """What a criterion asks of devices."""
    return CATALOGUE[criterion].needs
