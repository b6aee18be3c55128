"""The one set of weights that all classes share, and each class's view of it.

Parameters are kept dense and *in order*: the units of every group stand by falling importance, so
that a class's model is a leading part of every tensor. A new mask permutes the tensors once;
nothing else in the system handles unit indices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fleetprune.layout import (
    Architecture,
    FlatLayout,
    KeepCounts,
    Order,
    Role,
    cut,
    reorder,
    tensor_index,
)
from fleetprune.masks import bounded_order, settle_order
from fleetprune_coordinator.records import MaskRecord
from fleetprune_coordinator.snapshot import Snapshot

Tensors = dict[str, NDArray[np.float32]]
Support = Mapping[str, NDArray[np.bool_]]
"""By tensor which weights may be other than zero, of a class's shape; all of those not named."""


@dataclass(frozen=True)
class FleetModel:
    """Weights, masks and statistics at one moment of training."""

    params: Tensors
    """Dense parameters, in the present order of units."""
    stats: Mapping[str, Tensors]
    """Per class its BatchNorm statistics, in that class's shape."""
    shapes: Mapping[str, dict[str, int]]
    """Per class its keep counts."""
    origin: Mapping[str, NDArray[np.intp]]
    """Per group, which unit of the user's model stands at each place."""
    mask_version: int = 0
    supports: Mapping[str, Support] = field(default_factory=dict)
    """Per class whose weights are pruned one by one what is left of them."""

    def support(self, architecture: Architecture, name: str) -> NDArray[np.bool_] | None:
        """(P,): which of a class's flat parameters it has; None: all."""
        kept = self.supports.get(name)
        if not kept:
            return None
        layout = FlatLayout(architecture, self.shapes[name], Role.PARAMETER)
        parts = [
            kept[spec.name].ravel() if spec.name in kept else np.ones(end - start, np.bool_)
            for spec, start, end in zip(
                layout.specs, layout.offsets, layout.offsets[1:], strict=False
            )
        ]
        return np.concatenate(parts)

    def parameters(self, architecture: Architecture, name: str) -> int:
        """How many parameters a class has that are not pruned."""
        if (support := self.support(architecture, name)) is not None:
            return int(np.count_nonzero(support))
        return FlatLayout(architecture, self.shapes[name], Role.PARAMETER).size

    def dense(self, architecture: Architecture, name: str) -> Tensors:
        """The dense parameters, with zeros where a class has pruned single weights."""
        found = dict(self.params)
        for tensor, kept in self.supports.get(name, {}).items():
            spec = architecture.tensor(tensor)
            index = tensor_index(spec, architecture.groups, self.shapes[name])
            found[tensor] = found[tensor].copy()
            found[tensor][index] = np.where(kept, found[tensor][index], np.float32(0))
        return found

    def vectors(
        self, architecture: Architecture, name: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A class's flat parameters (P,) and statistics (S,)."""
        keep = self.shapes[name]
        params = FlatLayout(architecture, keep, Role.PARAMETER)
        stats = FlatLayout(architecture, keep, Role.STATISTIC)
        return (
            params.join(cut(architecture, self.dense(architecture, name), keep, Role.PARAMETER)),
            stats.join(self.stats[name]),
        )


_SUPPORT = "support/"


def support_arrays(model: FleetModel) -> dict[str, NDArray[np.bool_]]:
    """What is left of pruned weights, for a snapshot."""
    return {
        f"{_SUPPORT}{name}/{tensor}": kept
        for name, support in model.supports.items()
        for tensor, kept in support.items()
    }


def restored(snapshot: Snapshot, mask: MaskRecord) -> FleetModel:
    """The state that a snapshot and its mask were made of."""
    supports: dict[str, dict[str, NDArray[np.bool_]]] = {}
    for key, kept in snapshot.extra.items():
        if key.startswith(_SUPPORT):
            name, _, tensor = key.removeprefix(_SUPPORT).partition("/")
            supports.setdefault(name, {})[tensor] = kept
    return FleetModel(
        params=dict(snapshot.params),
        stats={name: dict(tensors) for name, tensors in snapshot.stats.items()},
        shapes={name: dict(keep) for name, keep in mask.keep.items()},
        origin=dict(mask.order),
        mask_version=mask.version,
        supports=supports,
    )


def initial_model(
    architecture: Architecture,
    params: Tensors,
    stats: Tensors,
    shapes: Mapping[str, dict[str, int]],
) -> FleetModel:
    """The user's model as it came, every class cut to its leading units."""
    return FleetModel(
        params=dict(params),
        stats={n: cut(architecture, stats, k, Role.STATISTIC) for n, k in shapes.items()},
        shapes={n: dict(k) for n, k in shapes.items()},
        origin=architecture.identity(),
    )


def remask(
    architecture: Architecture,
    model: FleetModel,
    scores: Mapping[str, NDArray[np.float32]],
    shapes: Mapping[str, dict[str, int]],
    share: float = 1.0,
) -> tuple[FleetModel, Order]:
    """Put the units in the order of `scores` and cut the classes to `shapes`.

    Args:
        architecture: The model's description.
        model: The present state.
        scores: Per group (units,), in the present order.
        shapes: Per class the new keep counts.
        share: Of a class's units that may be replaced (`masks.bounded_order`); 1: any number.

    Returns:
        The new state, all of whose weights are left, and the permutation of the present order that
        was applied. Where neither order nor shapes change, the present state itself (same mask
        version).
    """
    cuts = {g: {k[g] for k in shapes.values()} for g in architecture.groups}
    order = settle_order(scores, cuts) if share >= 1 else bounded_order(scores, cuts, share)
    moved = any((order[g] != np.arange(order[g].size)).any() for g in order)
    if not moved and {n: dict(k) for n, k in shapes.items()} == model.shapes:
        return model, order
    dense = architecture.groups
    params = {
        s.name: reorder(s, model.params[s.name], dense, order)
        for s in architecture.role(Role.PARAMETER)
    }
    stats = {name: _carry(architecture, model, name, shapes[name], order) for name in shapes}
    return (
        replace(
            model,
            params=params,
            stats=stats,
            shapes={n: dict(k) for n, k in shapes.items()},
            origin={g: model.origin[g][order[g]] for g in order},
            mask_version=model.mask_version + 1,
            supports={},
        ),
        order,
    )


def _carry(
    architecture: Architecture, model: FleetModel, name: str, keep: KeepCounts, order: Order
) -> Tensors:
    """A class's statistics in a new shape and order.

    A unit that is new to the class starts from the statistics of the widest class that had it;
    the next observations of the class's own devices replace them.
    """
    donors = sorted(model.stats, key=lambda n: (n == name, -sum(model.shapes[n].values())))
    carried: Tensors = {}
    for spec in architecture.role(Role.STATISTIC):
        start = 1.0 if spec.name.endswith("running_var") else 0.0
        dense = np.full(spec.shape(architecture.groups), start, np.float32)
        for donor in donors:  # narrower ones overwrite, the class itself comes last
            index = tensor_index(spec, architecture.groups, model.shapes[donor])
            dense[index] = model.stats[donor][spec.name]
        ordered = reorder(spec, dense, architecture.groups, order)
        carried[spec.name] = ordered[tensor_index(spec, architecture.groups, keep)].copy()
    return carried
