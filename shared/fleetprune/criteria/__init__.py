"""Importance criteria: one score per unit or per weight, the high ones stay.

The criteria follow their papers, not the slips of popular write-ups: magnitude compares absolute
values and keeps the large ones; sensitivity keeps the sensitive (docs/criteria.md). `weights` has
the forms for single weights; `catalogue` says what each criterion asks of devices.
"""

from fleetprune.criteria import weights
from fleetprune.criteria.activations import apoz, wanda
from fleetprune.criteria.catalogue import CATALOGUE, MEASURED, Criterion, Facts, Needs, needs
from fleetprune.criteria.data_free import (
    fpgm,
    gamma,
    magnitude,
    magnitude_l1,
    synflow,
    threshold,
)
from fleetprune.criteria.gradients import (
    fisher,
    growth,
    moved,
    movement,
    sensitivity,
    snip,
    taylor,
    taylor_abs,
)
from fleetprune.criteria.median import geometric_median
from fleetprune.criteria.units import Places, Scores, Tensors, locate, makers, per_unit

__all__ = [
    "CATALOGUE",
    "MEASURED",
    "Criterion",
    "Facts",
    "Needs",
    "Places",
    "Scores",
    "Tensors",
    "apoz",
    "fisher",
    "fpgm",
    "gamma",
    "geometric_median",
    "growth",
    "locate",
    "magnitude",
    "magnitude_l1",
    "makers",
    "moved",
    "movement",
    "needs",
    "per_unit",
    "sensitivity",
    "snip",
    "synflow",
    "taylor",
    "taylor_abs",
    "threshold",
    "wanda",
    "weights",
]
