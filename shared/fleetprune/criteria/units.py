"""Units and the tensors that they lie in: how element-wise values become one score per unit."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import BudgetError, WireError
from fleetprune.layout import Architecture, Axis, Gate, KeepCounts, Role, Segment, TensorSpec

Tensors = Mapping[str, NDArray[np.float32]]
Scores = dict[str, NDArray[np.float32]]
"""Per group (units,), in the order of the tensors' units; the high ones stay."""

Floats = NDArray[np.float64]
Places = Mapping[str, Sequence[Gate]]
"""Per group the axes over whose elements its units are summed."""


def per_unit(axis: Axis, keep: KeepCounts, values: Floats) -> list[tuple[str, Floats]]:
    """Sum a vector that runs along an axis into the units of each of its segments.

    Args:
        axis: The axis, whose length under `keep` is that of `values`.
        keep: Units per group.
        values: (length,).

    Returns:
        (group, (units,)) for each segment that belongs to a group.
    """
    sums: list[tuple[str, Floats]] = []
    start = 0
    for segment in axis:
        units = segment.kept(keep)
        stop = start + units * segment.block
        if segment.group is not None:
            part = values[start:stop].reshape(units, segment.block)
            sums.append((segment.group, part.sum(axis=1)))
        start = stop
    return sums


def locate(axis: Axis, start: int, keep: KeepCounts) -> tuple[int, Segment] | None:
    """The segment that begins at an index of the uncut axis, and where it begins under `keep`."""
    dense = narrow = 0
    for segment in axis:
        if dense == start:
            return narrow, segment
        dense += segment.units * segment.block
        narrow += segment.kept(keep) * segment.block
    return None


def makers(architecture: Architecture) -> dict[str, tuple[Gate, ...]]:
    """Per group where the weights lie that make its units.

    These are all weights of two or more axes whose outputs run over the group: filters, depthwise
    filters, rows of linear layers, columns of embeddings, and of a transposed convolution what
    leads to one channel. Biases and norms are no part of them.
    """
    found: dict[str, list[Gate]] = {group: [] for group in architecture.groups}
    for spec in architecture.role(Role.PARAMETER):
        if len(spec.axes) < 2:
            continue
        start, axis = 0, _output_axis(architecture, spec)
        for segment in spec.axes[axis]:
            if segment.group is not None:
                found[segment.group].append(Gate(tensor=spec.name, axis=axis, start=start))
            start += segment.units * segment.block
    return {group: tuple(gates) for group, gates in found.items()}


def _output_axis(architecture: Architecture, spec: TensorSpec) -> int:
    """The axis of a weight along which its outputs lie: the first, or the second.

    It is the second where the layer's bias runs along it, where a group there has the layer's
    name, which is that of its first maker, or where the weight is a table that is looked up.
    """
    if spec.name in architecture.observed:  # a layer that reads along the second
        return 0
    first, second = spec.axes[:2]
    path = spec.name.rpartition(".")[0]
    biases = [t.axes[0] for t in architecture.tensors if t.name == f"{path}.bias"]
    if biases and first != second:
        return int(biases[0] == second)
    here, there = ({s.group for s in axis if s.group is not None} for axis in (first, second))
    made = {g for g in here | there if g.partition(":")[0] in (path, spec.name)}
    if made & (there - here):
        return int(not made & here)
    table = len(spec.axes) == 2 and not spec.positions and there and not here
    return int(bool(table) and sum(s.units * s.block for s in first) > 1)


def read(
    architecture: Architecture,
    tensors: Mapping[str, NDArray[Any]],
    name: str,
    keep: KeepCounts | None = None,
) -> Floats:
    """A tensor in float64; WireError if its shape is not that of the layout under `keep`."""
    expected = architecture.tensor(name).shape(architecture.groups if keep is None else keep)
    if tensors[name].shape != expected:
        raise WireError(f"{name}: shape {tensors[name].shape}, expected {expected}")
    return tensors[name].astype(np.float64)


def summed(
    architecture: Architecture,
    places: Places,
    elements: Callable[[str], Floats],
    keep: KeepCounts | None = None,
) -> dict[str, Floats]:
    """Per group (units,): the elements of each unit added up over all its places.

    Args:
        architecture: The model.
        places: `Architecture.gates`, or `makers`.
        elements: Gives the values of a tensor's elements by its name, in the tensor's shape.
        keep: Units per group of the model that the elements are of; None: the dense one.
    """
    keep = architecture.groups if keep is None else keep
    total = {group: np.zeros(keep[group]) for group in architecture.groups}
    for group, gates in places.items():
        for gate in gates:
            found = locate(architecture.tensor(gate.tensor).axes[gate.axis], gate.start, keep)
            if found is None or found[1].group != group:
                continue
            start, segment = found
            values = elements(gate.tensor)
            others = tuple(axis for axis in range(values.ndim) if axis != gate.axis)
            along = values.sum(axis=others)[start : start + keep[group] * segment.block]
            total[group] += along.reshape(keep[group], segment.block).sum(axis=1)
    return total


def finished(criterion: str, scores: Mapping[str, Floats]) -> Scores:
    """Scores as they are used; BudgetError if one is no finite float32."""
    with np.errstate(over="ignore"):
        done = {group: values.astype(np.float32) for group, values in scores.items()}
    for group, values in done.items():
        if not np.isfinite(values).all():
            unit = int(np.argmin(np.isfinite(values)))
            raise BudgetError(
                f"{criterion}: unit {unit} of group {group} scores {values[unit]}, "
                f"expected a finite number: the weights or what was measured are not sound"
            )
    return done
