"""Where every weight of a prunable model lies: tensors, axes, segments, groups.

A *unit* is an output channel or neuron with every slice that is coupled to it; a *group* is a set
of units that must be kept or dropped together (a residual stream, a depthwise chain). An axis of
a tensor is a run of *segments*; a segment belongs to one group or to none. Keeping the first
`k` units of a group keeps the first `k * block` indices of each of its segments, so a narrower
model is an indexed view of the wider one and no two sides ever send indices to each other.

The description is plain data: it is made once from a torch model and then stored, sent and used
without torch.
"""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fleetprune.errors import BudgetError, WireError

T = TypeVar("T", bound=np.generic)

KeepCounts = Mapping[str, int]
"""Units kept per group name."""

Order = Mapping[str, NDArray[np.intp]]
"""Per group name, a permutation of its units, the most important first."""


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Segment(_Plain):
    """A run of one axis: `units` units of `group`, `block` indices each."""

    group: str | None = None
    """None: never cut."""
    units: int = Field(ge=1)
    block: int = Field(default=1, ge=1)

    def kept(self, keep: KeepCounts) -> int:
        """Units left of this segment under `keep`."""
        return self.units if self.group is None else keep[self.group]


Axis = tuple[Segment, ...]


class Role(StrEnum):
    """What a tensor is to training."""

    PARAMETER = "parameter"
    """Trained by gradients."""
    STATISTIC = "statistic"
    """A BatchNorm running mean or variance."""


class TensorSpec(_Plain):
    """One tensor of the model, axis by axis."""

    name: str
    role: Role
    axes: tuple[Axis, ...]
    positions: int = Field(default=0, ge=0)
    """Output positions at which each element is multiplied once (MACs = size * positions)."""
    artifact_bytes: int = Field(default=4, ge=0)
    """Bytes per element in the shipped file; 0 where export folds the tensor into another."""

    def shape(self, keep: KeepCounts) -> tuple[int, ...]:
        """The tensor's shape when `keep` units of each group are left."""
        return tuple(sum(s.kept(keep) * s.block for s in axis) for axis in self.axes)

    def size(self, keep: KeepCounts) -> int:
        """Number of elements under `keep`."""
        return prod(self.shape(keep))

    def groups(self) -> set[str]:
        """Names of the groups that cut this tensor."""
        return {s.group for axis in self.axes for s in axis if s.group is not None}


class Activation(_Plain):
    """Bytes of one intermediate tensor for one sample: `fixed + sum(per_unit[g] * keep[g])`."""

    fixed: int = Field(default=0, ge=0)
    per_unit: dict[str, int] = Field(default_factory=dict)

    def size(self, keep: KeepCounts) -> int:
        """Bytes under `keep`."""
        return self.fixed + sum(b * keep[g] for g, b in self.per_unit.items())


class Multiplication(_Plain):
    """Multiply-accumulates of activations with each other for one sample (attention)."""

    axes: tuple[Axis, ...]
    """Their number is the product of the lengths of these, times `times`."""
    times: int = Field(ge=1)


class Gate(_Plain):
    """A tensor whose elements scale or make the units of a group (see `criteria.taylor`)."""

    tensor: str
    axis: int
    start: int = 0
    """First index on that axis, in the uncut tensor."""


class Architecture(_Plain):
    """A model as plain data: what can be cut, what it costs, and where each weight lies."""

    groups: dict[str, int]
    """Units per group, in a fixed order."""
    tensors: tuple[TensorSpec, ...]
    """Parameters in `named_parameters()` order, then statistics in `named_buffers()` order."""
    gates: dict[str, tuple[Gate, ...]] = Field(default_factory=dict)
    observed: tuple[str, ...] = ()
    """Weights (out, in, ...) whose input activations devices measure for Wanda."""
    activations: tuple[Activation, ...] = ()
    live: tuple[tuple[int, ...], ...] = ()
    """Per executed operator, which activations are in memory at that moment."""
    products: tuple[Multiplication, ...] = ()
    """What is multiplied beside the tensors' `positions`."""
    sizes: dict[str, Axis] = Field(default_factory=dict)
    """Numbers that the model's code keeps, such as "blocks.0.attention.heads", and what each
    counts."""
    uncut: dict[str, str] = Field(default_factory=dict)
    """Per layer whose outputs, or some of them, are in no group: why they must stay."""
    overhead_bytes: int = 0
    """Bytes of the shipped file that are not weights (an upper bound: that of the dense file)."""
    input_shape: tuple[int, ...] = ()
    classes: int = 0

    @model_validator(mode="after")
    def _refer_to_known_groups(self) -> "Architecture":
        used = {g for t in self.tensors for g in t.groups()}
        used |= {g for a in self.activations for g in a.per_unit}
        axes = [*(a for p in self.products for a in p.axes), *self.sizes.values()]
        used |= {s.group for axis in axes for s in axis if s.group is not None}
        if unknown := sorted(used - set(self.groups)):
            raise ValueError(f"tensors refer to unknown groups {unknown}")
        for tensor in self.tensors:
            for axis in tensor.axes:
                for s in axis:
                    if s.group is not None and s.units != self.groups[s.group]:
                        raise ValueError(
                            f"{tensor.name}: segment of {s.units} units, "
                            f"but group {s.group} has {self.groups[s.group]}"
                        )
        return self

    @property
    def dense(self) -> dict[str, int]:
        """Keep counts of the uncut model."""
        return dict(self.groups)

    @property
    def channels(self) -> dict[str, int]:
        """Per group the least that a unit takes of any axis: 1, or the width of a head."""
        least: dict[str, int] = {}
        for segment in (s for t in self.tensors for axis in t.axes for s in axis):
            if (group := segment.group) is not None:
                least[group] = min(least.get(group, segment.block), segment.block)
        return least

    def tensor(self, name: str) -> TensorSpec:
        """The tensor called `name`; KeyError if there is none."""
        for spec in self.tensors:
            if spec.name == name:
                return spec
        raise KeyError(name)

    def role(self, role: Role) -> tuple[TensorSpec, ...]:
        """The tensors of one role, in order."""
        return tuple(t for t in self.tensors if t.role is role)

    def check_keep(self, keep: KeepCounts) -> None:
        """Refuse keep counts that name other groups or are outside 1..units (BudgetError)."""
        if set(keep) != set(self.groups):
            raise BudgetError(f"keep counts for {sorted(keep)}, expected {sorted(self.groups)}")
        for group, units in self.groups.items():
            if not 1 <= keep[group] <= units:
                raise BudgetError(f"group {group}: keep {keep[group]}, expected 1..{units}")

    def identity(self) -> dict[str, NDArray[np.intp]]:
        """The order that changes nothing."""
        return {g: np.arange(n) for g, n in self.groups.items()}


def axis_indices(
    axis: Axis, wide: KeepCounts, keep: KeepCounts, order: Order | None = None
) -> NDArray[np.intp]:
    """Indices on an axis of the `wide` model that the `keep` model has.

    Args:
        axis: The axis.
        wide: Units per group of the model that is indexed.
        keep: Units per group that are kept, at most `wide`.
        order: Per group, the units of `wide` in the order in which they are kept; None: as is.

    Returns:
        (n,) indices, in the kept order.
    """
    parts: list[NDArray[np.intp]] = []
    start = 0
    for s in axis:
        kept = s.kept(keep)
        units = np.arange(kept) if order is None or s.group is None else order[s.group][:kept]
        parts.append((start + units[:, None] * s.block + np.arange(s.block)).ravel())
        start += s.kept(wide) * s.block
    return np.concatenate(parts).astype(np.intp)


Index = tuple[slice | NDArray[np.intp], ...]


def tensor_index(spec: TensorSpec, wide: KeepCounts, keep: KeepCounts) -> Index:
    """How to index a tensor of the `wide` model to get (or to add to) the `keep` model's part.

    Leading slices where every axis is one segment (a view, no copy), else an open mesh.
    """
    if all(len(axis) == 1 for axis in spec.axes):
        return tuple(slice(0, n) for n in spec.shape(keep))
    return np.ix_(*(axis_indices(axis, wide, keep) for axis in spec.axes))


def reorder(spec: TensorSpec, tensor: NDArray[T], wide: KeepCounts, order: Order) -> NDArray[T]:
    """The tensor with each group's units put in `order` (a copy; nothing is cut)."""
    if not spec.axes:
        return tensor.copy()
    mesh = np.ix_(*(axis_indices(axis, wide, wide, order) for axis in spec.axes))
    return np.ascontiguousarray(tensor[mesh])


class FlatLayout:
    """The tensors of one role under given keep counts, laid end to end in one vector."""

    def __init__(self, architecture: Architecture, keep: KeepCounts, role: Role) -> None:
        """Lay out the tensors of `role`; BudgetError if `keep` is out of range."""
        architecture.check_keep(keep)
        self.keep = dict(keep)
        self.specs = architecture.role(role)
        self.shapes = tuple(s.shape(keep) for s in self.specs)
        ends = np.cumsum([prod(shape) for shape in self.shapes], dtype=np.int64)
        self.offsets = (0, *(int(e) for e in ends))
        self.size = self.offsets[-1]

    def split(self, flat: NDArray[T]) -> dict[str, NDArray[T]]:
        """Views of a (size,) vector, one per tensor name; WireError if the length differs."""
        if flat.shape != (self.size,):
            raise WireError(f"vector of shape {flat.shape}, expected ({self.size},)")
        return {
            spec.name: flat[a:b].reshape(shape)
            for spec, shape, a, b in zip(
                self.specs, self.shapes, self.offsets, self.offsets[1:], strict=False
            )
        }

    def join(self, tensors: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """A (size,) float32 vector of the tensors; WireError if a shape differs."""
        out = np.empty(self.size, np.float32)
        for spec, shape, a, b in zip(
            self.specs, self.shapes, self.offsets, self.offsets[1:], strict=False
        ):
            if tensors[spec.name].shape != shape:
                raise WireError(f"{spec.name}: shape {tensors[spec.name].shape}, expected {shape}")
            out[a:b] = tensors[spec.name].ravel()
        return out


def cut(
    architecture: Architecture,
    tensors: Mapping[str, NDArray[np.float32]],
    keep: KeepCounts,
    role: Role,
) -> dict[str, NDArray[np.float32]]:
    """The `keep` model's tensors of one role out of the dense model's (copies)."""
    architecture.check_keep(keep)
    return {
        spec.name: tensors[spec.name][tensor_index(spec, architecture.groups, keep)].copy()
        for spec in architecture.role(role)
    }


def unit_slices(architecture: Architecture, keep: KeepCounts) -> Iterator[tuple[str, slice]]:
    """Where each group's units lie in a (sum of kept units,) vector of per-unit scores."""
    start = 0
    for group in architecture.groups:
        yield group, slice(start, start + keep[group])
        start += keep[group]
