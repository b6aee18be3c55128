"""Which indices of which weights go together: units are followed through one inference.

This is the dependency graph of Fang et al. (DepGraph, CVPR 2023) on single operators instead of
layers, and it errs on the other side: what is not known to be safe is kept whole. What comes out
of here is still a claim, to be proved by `selfcheck`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import nn

from fleetprune_coordinator.chains import Group, Slot, chains
from fleetprune_coordinator.labels import Algebra, Labels, axes_of
from fleetprune_coordinator.program import PRODUCTS, Call, Program, Ref, describe
from fleetprune_coordinator.rules import RULES, Rule, Step, made_up, pointwise, unknown
from fleetprune_coordinator.units import Array, Units


class Couplings:
    """The units of a model's weights, joined as one inference joins them."""

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        tensors: Mapping[str, tuple[int, ...]],
        excluded: Iterable[str] = (),
    ) -> None:
        """Follow the units.

        Args:
            model: Names the layers in reasons.
            program: One inference of it.
            tensors: Names and shapes of all tensors that can be cut.
            excluded: Names of tensors that must stay whole.
        """
        self._layers = dict(model.named_modules())
        self._program = program
        self._units = Units()
        self._algebra = Algebra(self._units)
        self._labels: dict[int, Labels] = {}
        self._touched: dict[str, list[Labels]] = {}
        self._attended: list[Labels] = []
        self.slots: dict[Slot, Array] = {}
        """Per axis the unit of each index (see `live`)."""
        self.makes: dict[Slot, str] = {}
        """The axes of weights along which their outputs lie, and the layers that multiply."""
        self.reads: set[Slot] = set()
        """The axes of weights along which their inputs lie."""
        self._begin(tensors, set(excluded))
        for call in program.calls:
            self._run(call)
        self._end()

    def _begin(self, tensors: Mapping[str, tuple[int, ...]], excluded: set[str]) -> None:
        for name, shape in tensors.items():
            labels = self._algebra.fresh(shape, weight=True)
            for axis, n in enumerate(shape):
                runs = [f.ravel() for f in labels.factors if axes_of(f) == (axis,)]
                self.slots[name, axis] = runs[0] if runs else np.zeros(n, np.intp)
            ref = self._program.tensors.get(name)
            if ref is not None:
                self._labels[ref.number] = labels
            if ref is None or name in excluded:
                self._algebra.why = "it is excluded" if ref else "the output does not depend on it"
                self._algebra.keep(labels)

    def _run(self, call: Call) -> None:
        """Carry the units through one operator."""
        layer = describe(call.layer, self._layers[call.layer])
        function: Rule
        if not call.inputs:
            function = made_up
        elif call.pointwise:
            function = pointwise
        else:
            function = RULES.get(call.name, unknown)
        self._algebra.why = f"{layer} {_reason(call, function is unknown)}"
        step = Step(
            self._algebra,
            {name: self._replaced(value) for name, value in call.arguments.items()},
            tuple(ref.shape for ref in call.outputs),
        )
        made = function(step)
        results = [made] if isinstance(made, Labels) else list(made)
        results += [Labels(ref.shape) for ref in call.outputs[len(results) :]]
        for ref, labels in zip(call.outputs, results, strict=False):
            self._labels[ref.number] = labels
        self._touched.setdefault(call.layer, []).extend([*step.tensors, *results])
        if call.factors and not call.weight:
            self._attended += [step[name] for name in PRODUCTS[call.name]]
        for slot, makes in _roles(call):
            if makes and slot in self.slots:
                self.makes.setdefault(slot, call.layer)
            elif slot in self.slots:
                self.reads.add(slot)

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Ref):
            return self._labels.setdefault(value.number, Labels(value.shape))
        if isinstance(value, (list, tuple)):
            return [self._replaced(v) for v in value]
        return value

    def _end(self) -> None:
        self._algebra.why = "it makes the model's output"
        self._algebra.keep(self._labels[self._program.output.number])
        self._settle()

    def _settle(self) -> None:
        """Until each tensor is cut along single axes.

        Where a factor runs over several, the axis is chosen along which most units are left; of
        equals the first.
        """
        self._algebra.why = "its units would be cut along several axes at once"
        before = -1
        while before != self._units.changes:
            before = self._units.changes
            for labels in self._labels.values():
                self._settle_one(labels)

    def _settle_one(self, labels: Labels) -> None:
        now = self._algebra.settled(labels)
        for factor in now.factors:
            if len(axes := axes_of(factor)) > 1:
                best = max(axes, key=lambda axis: self._left(factor, axis))
                others = [axis for axis in axes if axis != best]
                self._algebra.whole(Labels(now.shape, (factor,)), others)

    @staticmethod
    def _left(factor: Array, axis: int) -> int:
        """How many units are left if only one axis is cut."""
        lines = np.moveaxis(factor, axis, 0).reshape(factor.shape[axis], -1)
        seen: list[set[int]] = []
        for line in lines.tolist():
            units = set(line)
            apart = [s for s in seen if not s & units]
            seen = [*apart, units.union(*(s for s in seen if s & units))]
        return len([s for s in seen if 0 not in s])

    def live(self, slot: Slot) -> Array:
        """Per index of an axis its unit, 0 where it stays."""
        return self._units.live(self.slots[slot])

    def shape(self, number: int) -> tuple[int, ...]:
        """Of a tensor of the program."""
        return self._labels[number].shape

    def along(self, number: int) -> list[list[Array]]:
        """Per axis of a tensor of the program the factors that run along it."""
        labels = self._algebra.settled(self._labels[number])
        return [
            [factor.ravel() for factor in labels.factors if axes_of(factor) == (axis,)]
            for axis in range(len(labels.shape))
        ]

    def groups(self) -> list[Group]:
        """Groups of two units or more, in the order in which the tensors are first read."""
        found = chains({slot: self.live(slot) for slot in self._in_order()})
        return [group for group in found if len(group.units) > 1]

    def _in_order(self) -> Iterator[Slot]:
        """All axes, those of tensors that are read first before others."""
        read = list(self._program.tensors)
        names = dict.fromkeys(name for name, _ in self.slots)
        for name in sorted(names, key=lambda n: read.index(n) if n in read else len(read)):
            yield from (slot for slot in self.slots if slot[0] == name)

    def keep(self, group: Group, why: str) -> None:
        """Keep a group's units whole after all."""
        self._units.keep(np.array(group.units, np.intp), why)
        self._settle()

    def reason(self, slot: Slot) -> str:
        """Why indices of an axis stay; "" if all are cut."""
        reasons = [self._units.reason(int(unit)) for unit in self.slots[slot] if unit]
        return next((reason for reason in reasons if reason), "")

    def attends(self, group: Group) -> bool:
        """Whether a group's units meet in a product of two activations."""
        units = set(group.units)
        return any(
            units & set(self._units.live(f).ravel().tolist())
            for labels in self._attended
            for f in labels.factors
        )

    def lengths(self, group: Group) -> dict[tuple[str, int], Array]:
        """Per layer and length of an axis inside it that the group cuts, its indices' units."""
        found: dict[tuple[str, int], Array] = {}
        for layer, tensors in self._touched.items():
            for labels in tensors:
                for factor in labels.factors:
                    units = self._units.live(factor)
                    axes = [a for a in axes_of(factor) if np.isin(units, group.units).any()]
                    if len(axes) == 1:
                        found.setdefault((layer, units.size), units.ravel())
        return found


ACROSS = frozenset({
    "sum", "mean", "prod", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean",
    "norm", "linalg_vector_norm", "logsumexp", "any", "all", "argmax", "argmin", "median",
    "_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp", "sort",
    "topk", "flip", "roll", "native_layer_norm", "native_group_norm", "renorm",
})  # fmt: skip
"""Operators that compute along axes."""


def _reason(call: Call, unfollowed: bool) -> str:
    """What an operator does with units that must stay."""
    name = call.name.strip("_").removeprefix("native_")
    if unfollowed:
        return f"calls {name}, through which units are not followed"
    if call.name in ACROSS:
        return f"calls {name} across its units"
    if call.name in ("select", "unbind", "index", "index_select", "slice"):
        return "picks single units by their place"
    if call.name in PRODUCTS:
        return "sums over its units, or reads what is never cut"
    return f"combines its units with what is never cut ({name})"


def _roles(call: Call) -> Iterator[tuple[Slot, bool]]:
    """Axes of parameters along which an operator's outputs lie, or (false) its inputs."""
    bias = call.arguments.get("bias" if call.name == "convolution" else "self")
    if call.name == "embedding":
        yield (call.arguments["weight"].weight, 1), True
    elif call.name == "convolution":
        grouped = call.arguments["groups"] > 1
        outputs = 1 if call.arguments["transposed"] and not grouped else 0
        yield (call.weight, outputs), True
        if not grouped:
            yield (call.weight, 1 - outputs), False
    else:
        for place, ref in enumerate(call.factors):
            if ref.weight and len(ref.shape) == 2:
                outputs = (1 - place) if ref.turned else place
                yield (ref.weight, outputs), True
                yield (ref.weight, 1 - outputs), False
    if call.weight and isinstance(bias, Ref) and bias.name:
        yield (bias.name, 0), True
