"""From a torch model to plain data: what can be cut, what it costs, where each weight lies.

Which units go together is asked of `couplings`; what runs and what is in memory is recorded
(`recording`, `liveness`); and nothing is believed before `selfcheck` has proved it by computing.
What cannot be proved is left whole, and `Architecture.uncut` says why.
"""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fleetprune.errors import TraceError
from fleetprune.layout import Architecture, Axis, Gate, Role, Segment, TensorSpec
from fleetprune_coordinator.attention import with_cuttable_heads
from fleetprune_coordinator.chains import Group
from fleetprune_coordinator.costing import Costing, Estimator, NotLinearError, check
from fleetprune_coordinator.couplings import Couplings
from fleetprune_coordinator.program import describe, on_shapes, run_program
from fleetprune_coordinator.recording import recording_of
from fleetprune_coordinator.resize import is_depthwise, statistics_of
from fleetprune_coordinator.selfcheck import disproved
from fleetprune_coordinator.shipping import artifact_bytes
from fleetprune_coordinator.supported import KNOWN, check_layers
from fleetprune_coordinator.units import Array

SHOWN = 3
"""Reasons that an error gives of many."""
NORMS = (_NormBase, nn.GroupNorm)


def trace(model: nn.Module, example: Tensor, exclude: Collection[str] = ()) -> Architecture:
    """Describe a model as groups of coupled units, tensors, costs and gates.

    Args:
        model: The dense model; it is not changed.
        example: (1, *shape) one sample, as the model takes it.
        exclude: Paths of layers whose tensors must stay whole, with all that they contain;
            patterns with `*`, `?` or `[...]` too.

    Returns:
        The architecture; `overhead_bytes` is left 0.

    Raises:
        TraceError: The model does not run in one fixed way, a layer is not supported, or nothing
            can be cut; names the layer and says what to do.
    """
    if example.dim() < 2 or example.shape[0] != 1:
        raise TraceError(f"example of shape {tuple(example.shape)}, expected (1, ...)")
    excluded = _excluded(model, exclude)
    check_layers(model, excluded)
    plain = with_cuttable_heads(copy.deepcopy(model).cpu().eval())
    run_program(on_shapes(plain), example.to("meta"))  # no branch on values
    tracer = _Tracer(plain, example.cpu(), excluded)
    while True:
        architecture = tracer.describe()
        if not architecture.groups:
            raise TraceError(tracer.nothing(architecture))
        if not (wrong := tracer.prove(architecture)):
            return architecture
        tracer.give_way(architecture, wrong)


def _excluded(model: nn.Module, paths: Collection[str]) -> set[str]:
    """Names of all parameters and statistics below some layers."""
    layers = dict(model.named_modules())
    first = {id(p): name for name, p in model.named_parameters()}  # of a shared one
    found: set[str] = set()
    for pattern in paths:
        matching = [path for path in layers if path and fnmatchcase(path, pattern)]
        if not matching:
            raise TraceError(f"exclude {pattern!r}: the model has no such layer")
        for path in matching:
            own = (*layers[path].named_parameters(), *layers[path].named_buffers())
            for name, tensor in own:
                found |= {f"{path}.{name}", first.get(id(tensor), "")}
    return found


class _Tracer:
    """One model on its way to an architecture."""

    def __init__(self, model: nn.Module, example: Tensor, excluded: set[str]) -> None:
        self._model = model
        self._example = example
        self._layers = dict(model.named_modules())
        self._program = run_program(model, example)
        self._dense = recording_of(self._program, self._layers)
        named = [*model.named_parameters(), *statistics_of(model)]
        self._shapes = {name: tuple(tensor.shape) for name, tensor in named}
        self._couplings = Couplings(model, self._program, self._shapes, excluded)
        self._sizes: dict[str, Array] = {}
        self._named: dict[str, Group] = {}

    # What is claimed.

    def describe(self) -> Architecture:
        """The architecture as it is claimed by now."""
        costing = self._cost()
        statistics = {name for name, _ in statistics_of(self._model)}
        shipped = artifact_bytes(self._model, self._dense)
        tensors = tuple(
            TensorSpec(
                name=name,
                role=Role.STATISTIC if name in statistics else Role.PARAMETER,
                axes=tuple(
                    self._axis(self._couplings.live((name, axis))) for axis in range(len(shape))
                ),
                positions=costing.positions.get(name, 0),
                artifact_bytes=shipped.get(name, 4),
            )
            for name, shape in self._shapes.items()
        )
        return Architecture(
            groups={name: len(group.units) for name, group in self._named.items()},
            tensors=tensors,
            gates={name: self._gates(name, group, tensors) for name, group in self._named.items()},
            observed=tuple(
                spec.name
                for spec in tensors
                if self._is_observed(spec.name) and any(s.group for s in spec.axes[1])
            ),
            activations=costing.activations,
            live=costing.live,
            products=costing.products,
            sizes={name: self._axis(units) for name, units in self._sizes.items()},
            uncut=self._uncut(),
            input_shape=tuple(self._example.shape[1:]),
            classes=self._program.output.shape[-1],
        )

    def _cost(self) -> Costing:
        """Settle what is cut, so that costs grow linearly, and what it costs."""
        while True:
            self._named = self._names(self._couplings.groups())
            estimator = Estimator(self._program, self._couplings, self._axis)
            try:
                return estimator.costing(self._dense, self._shapes)
            except NotLinearError as error:
                why = "an intermediate tensor would be cut along two axes at once"
                self._couplings.keep(self._named[error.group], why)

    def _names(self, groups: Sequence[Group]) -> dict[str, Group]:
        """Groups by name: that of the layer that makes their units first."""
        named: dict[str, Group] = {}
        for group in groups:
            made = [slot for slot in self._couplings.makes if slot in group.slots]
            first = self._owner([*made, *group.slots][0][0])
            named[next(n for n in _numbered(first) if n not in named)] = group
        return named

    def _owner(self, tensor: str) -> str:
        """What to call the maker of a weight: its layer, or itself where that has several."""
        path, _, leaf = tensor.rpartition(".")
        known = isinstance(self._layers[path], KNOWN) or leaf in ("weight", "bias")
        return path if path and known else tensor

    def _axis(self, units: Array) -> Axis:
        """An axis as segments, from the unit of each of its indices."""
        places = {group.units[0]: (name, group) for name, group in self._named.items()}
        segments: list[Segment] = []
        start, loose = 0, 0
        while start < units.size:
            if (found := places.get(int(units[start]))) is None:
                start, loose = start + 1, loose + 1
                continue
            if loose:
                segments.append(Segment(units=loose))
            name, group = found
            block = int(np.flatnonzero(np.append(units[start:], -1) != units[start])[0])
            segments.append(Segment(group=name, units=len(group.units), block=block))
            start, loose = start + block * len(group.units), 0
        return tuple([*segments, Segment(units=loose)] if loose else segments)

    def _is_observed(self, tensor: str) -> bool:
        """Whether it is the weight of a layer that is called with samples on the first axis."""
        path, _, leaf = tensor.rpartition(".")
        layer = self._layers[path]
        plain = isinstance(layer, nn.Linear | _ConvNd) and not isinstance(layer, _ConvTransposeNd)
        called = self._program.batches.get(path) == {1}
        return leaf == "weight" and plain and not is_depthwise(layer) and called

    def _gates(self, name: str, group: Group, tensors: tuple[TensorSpec, ...]) -> tuple[Gate, ...]:
        """The norms' scales and shifts on a group's units; else the weights that make them.

        Where what several weights make is multiplied (queries with keys, a gate with a value),
        it is the weights that read the units: only there all of a unit is one factor.
        """
        kinds: dict[str, list[Gate]] = {"norm": [], "makes": [], "reads": [], "": []}
        repeated = self._couplings.attends(group)
        for spec in tensors:
            layer = self._layers[spec.name.rpartition(".")[0]]
            if spec.role is not Role.PARAMETER or is_depthwise(layer):
                continue
            for axis, segments in enumerate(spec.axes):
                gates = [
                    Gate(tensor=spec.name, axis=axis, start=start)
                    for start, s in _starts(segments)
                    if s.group == name
                ]
                kind = self._kind(spec.name, axis)
                kinds[kind] += gates
                repeated |= kind == "makes" and len(gates) > 1
        if kinds["norm"]:
            return tuple(kinds["norm"])
        return tuple((repeated and kinds["reads"]) or kinds["makes"] or kinds["reads"])

    def _kind(self, tensor: str, axis: int) -> str:
        """What the units along an axis of a weight are to it."""
        path, _, leaf = tensor.rpartition(".")
        layer = self._layers[path]
        if isinstance(layer, NORMS):
            return "norm"
        bias = isinstance(layer, nn.Linear | _ConvNd) and leaf == "bias"
        if bias or (tensor, axis) in self._couplings.makes:
            return "makes"
        return "reads" if (tensor, axis) in self._couplings.reads else ""

    def _uncut(self) -> dict[str, str]:
        """Why layers' outputs are in no group."""
        cut = {unit for group in self._named.values() for unit in group.units}
        reasons: dict[str, str] = {}
        for slot in self._couplings.makes:
            if not set(self._couplings.live(slot).tolist()) <= cut:
                found = self._couplings.reason(slot)
                found = found or (SCATTERED if self._couplings.slots[slot].size > 1 else ALONE)
                reasons.setdefault(self._owner(slot[0]), found)
        return reasons

    def nothing(self, architecture: Architecture) -> str:
        """The error if there is no group."""
        reasons = [
            f"{describe(path, self._layers[path]) if path in self._layers else path}: {why}"
            for path, why in architecture.uncut.items()
        ]
        more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
        return (
            f"{describe('', self._model)} has no layer whose outputs can be cut: "
            f"{'; '.join(reasons[:SHOWN])}{more}"
        )

    # What is proved.

    def prove(self, architecture: Architecture) -> dict[str, str]:
        """Groups that cannot be cut as the architecture says, and why; empty if all can."""
        wrong = check(self._model, architecture, self._example)
        return wrong or disproved(self._model, architecture, self._example)

    def give_way(self, architecture: Architecture, wrong: Mapping[str, str]) -> None:
        """Change what is claimed: sizes that the code keeps are cut too, or groups stay whole."""
        for name, why in wrong.items():
            group = self._named[name]
            if sizes := self._kept_sizes(architecture, name, group):
                self._sizes |= sizes
            else:
                self._couplings.keep(group, why)

    def _kept_sizes(self, architecture: Architecture, name: str, group: Group) -> dict[str, Array]:
        """Numbers in the model's own code with which a group can be cut; empty if none help."""
        known: dict[str, Array] = {}
        for (path, length), units in self._couplings.lengths(group).items():
            layer = self._layers[path]
            if type(layer).__module__.startswith("torch.nn."):
                continue
            for attribute, value in vars(layer).items():
                place = f"{path}.{attribute}" if path else attribute
                if type(value) is int and value == length and place not in self._sizes:
                    known[place] = units

        def holds(sizes: Mapping[str, Array]) -> bool:
            axes = {place: self._axis(units) for place, units in sizes.items()}
            claimed = architecture.model_copy(update={"sizes": {**architecture.sizes, **axes}})
            return not disproved(self._model, claimed, self._example, [name])

        tries = [known, *({place: units} for place, units in known.items())]
        return next((sizes for sizes in tries if sizes and holds(sizes)), {})


ALONE = "it has one unit, expected at least two"
SCATTERED = "its units lie scattered, expected whole, contiguous blocks of channels"


def _numbered(path: str) -> Iterator[str]:
    yield path
    yield from (f"{path}:{i}" for i in range(2, 1_000_000))


def _starts(axis: Axis) -> Iterator[tuple[int, Segment]]:
    """Each segment of an axis with its first index."""
    start = 0
    for segment in axis:
        yield start, segment
        start += segment.units * segment.block
