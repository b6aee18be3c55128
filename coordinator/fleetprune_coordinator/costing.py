"""What each tensor and each product of an inference costs, as functions of the keep counts.

Follows from the units along the axes of every tensor; that a narrower model really costs this is
then measured (`check`).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from torch import Tensor, nn

from fleetprune.costs import CostModel
from fleetprune.errors import TraceError
from fleetprune.layout import Activation, Architecture, Axis, KeepCounts, Multiplication
from fleetprune_coordinator.couplings import Couplings
from fleetprune_coordinator.liveness import memory, peak_bytes
from fleetprune_coordinator.program import Call, Program
from fleetprune_coordinator.recording import Recording, record
from fleetprune_coordinator.resize import resize
from fleetprune_coordinator.units import Array


class NotLinearError(Exception):
    """A tensor would be cut along two axes; names a group that cuts one of them."""

    def __init__(self, group: str) -> None:
        super().__init__(group)
        self.group = group


@dataclass(frozen=True)
class Costing:
    """A model's costs, for `Architecture`."""

    activations: tuple[Activation, ...]
    live: tuple[tuple[int, ...], ...]
    positions: dict[str, int]
    products: tuple[Multiplication, ...]


class Estimator:
    """Reads costs off the units along tensors' axes."""

    def __init__(
        self,
        program: Program,
        couplings: Couplings,
        axis_of: Callable[[Array], Axis],
    ) -> None:
        """Prepare.

        Args:
            program: One inference.
            couplings: The units of its tensors.
            axis_of: Turns the unit of each index of an axis into segments.
        """
        self._program = program
        self._couplings = couplings
        self._axis_of = axis_of

    def costing(self, dense: Recording, shapes: Mapping[str, tuple[int, ...]]) -> Costing:
        """All costs.

        Args:
            dense: The recording of the program.
            shapes: Of the weights.

        Raises:
            NotLinearError: An intermediate tensor does not grow linearly with the keep counts.
        """
        plan = memory(dense)
        made = [values[0] for values in plan.buffers]
        positions = {
            name: macs // prod(shapes[name])
            for name, macs in dense.weight_macs().items()
            if macs % prod(shapes[name]) == 0
        }
        return Costing(
            tuple(self._activation(dense.refs[v], dense.item_bytes[v]) for v in made),
            plan.live,
            positions,
            self._products(positions),
        )

    def _axes(self, number: int) -> list[Axis]:
        """A tensor's axes as segments; of several factors along one the first counts."""
        shape = self._couplings.shape(number)
        return [
            self._axis_of(factors[0] if factors else np.zeros(n, np.intp))
            for factors, n in zip(self._couplings.along(number), shape, strict=True)
        ]

    def _activation(self, number: int, item_bytes: int) -> Activation:
        """Bytes of a tensor of which at most one axis is cut."""
        axes = self._axes(number)
        cut = [axis for axis in axes if any(s.group for s in axis)]
        several = any(len(factors) > 1 for factors in self._couplings.along(number))
        if len(cut) > 1 or (cut and several):
            raise NotLinearError(next(s.group for s in cut[0] if s.group))
        scale = item_bytes * prod(_whole(axis) for axis in axes if axis not in cut)
        fixed, per_unit = 0 if cut else scale, Counter[str]()
        for segment in cut[0] if cut else ():
            if segment.group is None:
                fixed += scale * segment.units * segment.block
            else:
                per_unit[segment.group] += scale * segment.block
        return Activation(fixed=fixed, per_unit=dict(per_unit))

    def _products(self, positions: Mapping[str, int]) -> tuple[Multiplication, ...]:
        """All multiplications but those with weights that have `positions`."""
        times: Counter[tuple[Axis, ...]] = Counter()
        for call in self._program.calls:
            if call.factors and call.outputs[0].depends and call.weight not in positions:
                axes = self._multiplied(call)
                cut = tuple(axis for axis in axes if any(s.group for s in axis))
                times[cut] += prod(_whole(axis) for axis in axes if axis not in cut)
        return tuple(Multiplication(axes=axes, times=n) for axes, n in times.items() if n)

    def _multiplied(self, call: Call) -> list[Axis]:
        """Axes whose lengths' product is the number of multiplications."""
        a, b = call.factors
        left, right = self._axes(a.number), self._axes(b.number)
        if call.name == "convolution":
            walked = a if call.arguments["transposed"] else call.outputs[0]
            return [*right[1:], *self._axes(walked.number)]
        return [*left, *(right[-1:] if len(right) > 1 else [])]


def _whole(axis: Axis) -> int:
    """The length of an axis that nothing is cut from."""
    return sum(s.units * s.block for s in axis)


def check(model: nn.Module, architecture: Architecture, example: Tensor) -> dict[str, str]:
    """Hold what narrower models cost against what the architecture says.

    Args:
        model: The dense model, in evaluation mode.
        architecture: Its whole description.
        example: (1, ...) its input.

    Returns:
        Groups with which a narrower model does not run, or costs something else, and why. Empty
        if half of the units of every group cost what they should.
    """
    costs = CostModel(architecture).costs

    def wrong(keep: KeepCounts) -> str | None:
        try:
            narrow = record(resize(model, architecture, keep), example)
        except TraceError as error:
            return str(error)
        expected = costs(keep)
        if narrow.macs() != expected.macs or peak_bytes(narrow) > expected.peak_activation_bytes:
            return (
                f"with {_first(keep, architecture)} it takes {narrow.macs()} multiplications and "
                f"{peak_bytes(narrow)} bytes, expected {expected.macs} and "
                f"{expected.peak_activation_bytes}: its control flow depends on widths"
            )
        return None

    half = {group: max(1, units // 2) for group, units in architecture.groups.items()}
    if (together := wrong(half)) is None:
        return {}
    found = {group: wrong(architecture.dense | {group: half[group]}) for group in half}
    return {g: why for g, why in found.items() if why is not None} or {min(half): together}


def _first(keep: KeepCounts, architecture: Architecture) -> str:
    cut = [g for g, n in keep.items() if n < architecture.groups[g]]
    return f"{keep[cut[0]]} of {architecture.groups[cut[0]]} units of {cut[0]}"
