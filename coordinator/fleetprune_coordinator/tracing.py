"""From a torch model to plain data: what can be cut, what it costs, where each weight lies.

Which channels are coupled is asked of `couplings`; what runs and what is in memory is recorded
(`recording`, `liveness`); and nothing is believed before `selfcheck` has proved it by computing.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from fleetprune.errors import TraceError
from fleetprune.layout import Architecture, Axis, Gate, Role, Segment, TensorSpec
from fleetprune_coordinator.couplings import Couplings, Member, Slot, weight_of
from fleetprune_coordinator.liveness import FLOAT_BYTES, activations
from fleetprune_coordinator.recording import SUPPORTED, Recording, describe, on_shapes, record
from fleetprune_coordinator.resize import is_depthwise, statistics_of
from fleetprune_coordinator.selfcheck import check_cut_equals_zeroed


@dataclass
class _Labels:
    """Per axis, the group and unit of each index; group -1: none."""

    groups: NDArray[np.intp]
    units: NDArray[np.intp]


def trace(model: nn.Module, example: Tensor) -> Architecture:
    """Describe a model as groups of coupled units, tensors, costs and gates.

    Args:
        model: The dense model; it is not changed.
        example: (1, *shape) one sample, as the model takes it.

    Returns:
        The architecture; `overhead_bytes` is left 0.

    Raises:
        TraceError: Something in the model cannot be cut safely; names the layer or group.
    """
    if example.dim() < 2 or example.shape[0] != 1:
        raise TraceError(f"example of shape {tuple(example.shape)}, expected (1, ...)")
    _check_layers(model)
    record(on_shapes(model), example.to("meta"))  # no branch on values
    plain = copy.deepcopy(model).cpu().eval()
    dense = record(plain, example.cpu())
    shapes = _tensor_shapes(model)
    groups, labels = _find_groups(Couplings(model, example), dense, shapes, model)
    tensors = _tensor_specs(model, dense, shapes, list(groups), labels)
    architecture = Architecture(
        groups=groups,
        tensors=tensors,
        gates=_gates(model, groups, tensors),
        observed=tuple(
            f"{path}.weight"
            for path, layer in _weighted(model)
            if any(s.group for s in _spec(tensors, f"{path}.weight").axes[1])
        ),
        input_shape=tuple(example.shape[1:]),
        classes=dense.output_shape[-1],
    )
    buffers, live = activations(plain, architecture, dense, example.cpu())
    architecture = architecture.model_copy(update={"activations": buffers, "live": live})
    check_cut_equals_zeroed(model, architecture)
    return architecture


def _check_layers(model: nn.Module) -> None:
    """Refuse layers whose weights cannot be cut along channels."""
    owners: dict[int, str] = {}
    for path, layer in model.named_modules():
        named = describe(path, layer)
        for parameter in layer.parameters(recurse=False):
            if (owner := owners.setdefault(id(parameter), named)) != named:
                raise TraceError(f"{named} shares a weight with {owner}, expected its own")
        holds = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        if any(is_lazy(p) for p in holds):
            raise TraceError(f"{named} has no shape yet, expected a model that has run once")
        if isinstance(layer, _ConvTransposeNd):
            raise TraceError(f"{named} is not supported, supported are {SUPPORTED}")
        if isinstance(layer, _ConvNd):
            if layer.groups > 1 and not is_depthwise(layer):
                raise TraceError(
                    f"{named}: groups={layer.groups} with {layer.in_channels} to "
                    f"{layer.out_channels} channels, supported are {SUPPORTED}"
                )
        elif isinstance(layer, _BatchNorm):
            if layer.running_mean is None:
                raise TraceError(f"{named} keeps no running statistics, expected that it does")
        elif isinstance(layer, nn.LayerNorm):
            if len(layer.normalized_shape) != 1:
                raise TraceError(
                    f"{named} normalises over {tuple(layer.normalized_shape)}, expected one axis"
                )
        elif isinstance(layer, nn.Linear | nn.PReLU):
            continue
        elif holds and type(layer).__module__.startswith("torch."):
            raise TraceError(f"{named} is not supported, supported are {SUPPORTED}")


def _tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters, then of all statistics."""
    named = [*model.named_parameters(), *statistics_of(model)]
    return {name: tuple(tensor.shape) for name, tensor in named}


def _weighted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and convolutions that are not depthwise."""
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | _ConvNd) and not is_depthwise(layer):
            yield path, layer


def _find_groups(
    couplings: Couplings,
    dense: Recording,
    shapes: Mapping[str, tuple[int, ...]],
    model: nn.Module,
) -> tuple[dict[str, int], dict[Slot, _Labels]]:
    """Name the groups and label every index that belongs to one."""
    weighted = dict(_weighted(model))
    order = [path for path in dense.layers() if path in weighted]
    labels = {
        (name, axis): _Labels(np.full(n, -1, np.intp), np.zeros(n, np.intp))
        for name, shape in shapes.items()
        for axis, n in enumerate(shape)
    }
    seen = {path: np.zeros(couplings.outputs_of(path), np.bool_) for path in order}
    groups: dict[str, int] = {}
    for path in order:
        todo = np.flatnonzero(~seen[path])
        if not todo.size:
            continue
        members, _ = couplings.of(path, todo)
        for units in _runs(members, todo):
            run, boundary = couplings.of(path, units)
            _check_independent(couplings, path, model, run, units)
            producers = [m for m in run if m.producer in seen]
            for member in producers:
                seen[str(member.producer)][member.indices] = True
            if boundary or units.size < 2:
                continue
            first = min((str(m.producer) for m in producers), key=order.index)
            name = next(n for n in _names(first) if n not in groups)
            _label(labels, len(groups), name, run, units)
            groups[name] = int(units.size)
    if not groups:
        raise TraceError(
            f"{describe('', model)} has no layer whose outputs can be cut, expected at least one "
            f"Conv or Linear layer besides the output"
        )
    return groups, labels


def _names(path: str) -> Iterator[str]:
    yield path
    yield from (f"{path}:{i}" for i in range(2, 1_000_000))


def _runs(members: list[Member], units: NDArray[np.intp]) -> Iterator[NDArray[np.intp]]:
    """Split a layer's outputs into runs that are coupled to the same axes."""
    place = {int(u): i for i, u in enumerate(units)}
    coupled = np.zeros((units.size, len(members)), np.intp)
    for column, member in enumerate(members):
        np.add.at(coupled, ([place[int(u)] for u in member.units], column), 1)
    changes = (coupled[1:] != coupled[:-1]).any(axis=1) | (np.diff(units) != 1)
    yield from np.split(units, np.flatnonzero(changes) + 1)


def _check_independent(
    couplings: Couplings, path: str, model: nn.Module, run: list[Member], units: NDArray[np.intp]
) -> None:
    """Refuse a layer whose outputs are coupled with one another (TraceError)."""

    def touched(members: list[Member]) -> set[tuple[Slot, int]]:
        return {
            (slot, int(i))
            for m in members
            for i, u in zip(m.indices, m.units, strict=True)
            for slot in m.slots
            if u == units[0]
        }

    if touched(run) != touched(couplings.of(path, units[:1])[0]):
        raise TraceError(
            f"{describe(path, model.get_submodule(path))}: its outputs are coupled with one "
            f"another, expected whole, contiguous blocks of channels (no chunks that meet again)"
        )


def _label(
    labels: dict[Slot, _Labels],
    number: int,
    name: str,
    run: list[Member],
    units: NDArray[np.intp],
) -> None:
    """Write one group's units onto every axis that they lie on."""
    for member in run:
        for slot in member.slots:
            if slot not in labels:
                continue  # a buffer that inference does not read
            label = labels[slot]
            outside = member.indices.max(initial=0) >= label.groups.size
            if outside or (label.groups[member.indices] >= 0).any():
                raise TraceError(
                    f"group {name}: its units do not fit {slot[0]} (axis {slot[1]} of "
                    f"{label.groups.size}), expected whole, contiguous blocks of channels"
                )
            label.groups[member.indices] = number
            label.units[member.indices] = member.units - units[0]


def _segments(name: str, label: _Labels, groups: list[str], sizes: Mapping[int, int]) -> Axis:
    """Read an axis's labels as segments (TraceError if a group's units are not whole blocks)."""
    segments: list[Segment] = []
    start, n = 0, label.groups.size
    while start < n:
        number = int(label.groups[start])
        differs = np.flatnonzero(label.groups[start:] != number)
        stop = start + int(differs[0]) if differs.size else n
        if number < 0:
            segments.append(Segment(units=stop - start))
            start = stop
            continue
        units = label.units[start:stop]
        block = int(np.flatnonzero(np.append(units, -1) != units[0])[0])
        length = sizes[number] * block
        expected = np.repeat(np.arange(sizes[number]), block)
        if not np.array_equal(units[:length], expected):
            raise TraceError(
                f"group {groups[number]}: its units lie scattered in {name}, expected whole, "
                f"contiguous blocks of channels (no channel shuffle)"
            )
        segments.append(Segment(group=groups[number], units=sizes[number], block=block))
        start += length
    return tuple(segments)


def _tensor_specs(
    model: nn.Module,
    dense: Recording,
    shapes: Mapping[str, tuple[int, ...]],
    groups: list[str],
    labels: Mapping[Slot, _Labels],
) -> tuple[TensorSpec, ...]:
    """All tensors, axis by axis, with what they cost."""
    sizes = {
        i: 1 + max(int(x.units[x.groups == i].max(initial=0)) for x in labels.values())
        for i in range(len(groups))
    }
    rows = {
        path: len(weight_of(layer))
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear | _ConvNd)
    }
    positions = {f"{path}.weight": n for path, n in dense.positions(rows).items()}
    shipped = _artifact_bytes(model, dense)
    statistics = {name for name, _ in statistics_of(model)}
    return tuple(
        TensorSpec(
            name=name,
            role=Role.STATISTIC if name in statistics else Role.PARAMETER,
            axes=tuple(
                _segments(name, labels[name, axis], groups, sizes) for axis in range(len(shape))
            ),
            positions=positions.get(name, 0),
            artifact_bytes=shipped.get(name, FLOAT_BYTES),
        )
        for name, shape in shapes.items()
    )


def _artifact_bytes(model: nn.Module, dense: Recording) -> dict[str, int]:
    """Bytes per element of the tensors that export does not ship as they are.

    A BatchNorm that is folded into the layer before it leaves nothing but that layer's bias, which
    is counted with the norm if the layer has none. A layer that runs several times is shipped once
    per norm that it is folded with.
    """
    calls, folded = dense.calls(), dense.folded()
    norms = Counter(dense.operators[i].layer for i in folded)
    layers = Counter(folded.values())
    shipped: dict[str, int] = {}
    for norm, count in norms.items():
        leaves = ("weight", "bias", "running_mean", "running_var")
        shipped |= {f"{norm}.{leaf}": FLOAT_BYTES * (calls[norm] > count) for leaf in leaves}
    for layer, count in layers.items():
        copies = count + (calls[layer] > count)
        shipped |= {f"{layer}.{leaf}": FLOAT_BYTES * copies for leaf in ("weight", "bias")}
    for i, layer in folded.items():
        if model.get_submodule(layer).bias is None:
            norm = dense.operators[i].layer
            has_bias = model.get_submodule(norm).bias is not None
            shipped[f"{norm}.{'bias' if has_bias else 'running_mean'}"] += FLOAT_BYTES
    return shipped


def _spec(tensors: tuple[TensorSpec, ...], name: str) -> TensorSpec:
    return next(t for t in tensors if t.name == name)


def _gates(
    model: nn.Module, groups: Mapping[str, int], tensors: tuple[TensorSpec, ...]
) -> dict[str, tuple[Gate, ...]]:
    """Per group the norm layers' weights and biases on it, or what makes its units."""
    layers = dict(model.named_modules())

    def gates(group: str, kinds: tuple[type[nn.Module], ...]) -> Iterator[Gate]:
        for spec in tensors:
            path, _, _ = spec.name.rpartition(".")
            layer = layers[path]
            if spec.role is not Role.PARAMETER or not isinstance(layer, kinds):
                continue
            start = 0
            for s in spec.axes[0] if not is_depthwise(layer) else ():
                if s.group == group:
                    yield Gate(tensor=spec.name, axis=0, start=start)
                start += s.units * s.block

    return {
        group: tuple(gates(group, (_BatchNorm, nn.LayerNorm)))
        or tuple(gates(group, (nn.Linear, _ConvNd)))
        for group in groups
    }
