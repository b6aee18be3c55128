"""What a model costs at given keep counts: file bytes, multiply-accumulates, peak activation bytes.

Exact integers, the same on the coordinator and on a device. The budget solver asks thousands of
times, so a `CostModel` turns the description into a few integer matrices once: every axis length
is linear in the keep counts, a tensor's size is a product of such lengths (`products`), and the
peak is a maximum of linear functions.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from fleetprune.layout import Architecture, Axis, KeepCounts, Role
from fleetprune.products import Ints, Places, Product, Row, Sums, Walk

FIGURES = ("artifact_bytes", "peak_activation_bytes", "macs")
"""Names of the costs, in the order in which `CostWalk` gives them; a latency comes last."""
_PEAK = FIGURES.index("peak_activation_bytes")
_PLACES = (0, _PEAK, 1, 3)
"""Of each figure among those of `CostModel._sizes`, which has no peak but parameters."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What one inference of one model needs."""

    artifact_bytes: int
    """Bytes of the shipped file."""
    macs: int
    """Multiply-accumulates of convolutions, linear layers and attention, for one sample."""
    peak_activation_bytes: int
    """Most bytes of intermediate tensors in memory at once, for one sample."""


def axis_row(axis: Axis, column: Mapping[str, int]) -> Row:
    """An axis's length as coefficients (groups + 1,) of the keep counts; the last is the constant.

    Args:
        axis: The axis.
        column: Place of each group.
    """
    row = [0] * (len(column) + 1)
    for s in axis:
        row[-1 if s.group is None else column[s.group]] += s.block * (
            s.units if s.group is None else 1
        )
    return tuple(row)


class CostModel:
    """The costs of one architecture as integer matrices; make it once, ask it often."""

    def __init__(self, architecture: Architecture, latency: Iterable[Product] = ()) -> None:
        """Prepare the matrices; the architecture is not read again apart from range checks.

        Args:
            architecture: The model.
            latency: Products whose sum is a latency in any unit, one weight each (`latency`).
        """
        self._architecture = architecture
        self.groups = dict(architecture.groups)
        """Units per group of the dense model, in the order of all vectors."""
        self._column = {g: i for i, g in enumerate(architecture.groups)}
        self._overhead = architecture.overhead_bytes
        timed = (Product(p.lengths, (0, 0, 0, *p.weights), p.block) for p in latency)
        self._sizes = Sums(len(self._column), 4, chain(self._tensors(architecture), timed))
        self._sum_live(architecture)

    def _tensors(self, architecture: Architecture) -> Iterator[Product]:
        """Every tensor's size, which counts as bytes, as MACs and as parameters."""
        for spec in architecture.tensors:
            scale, cut_rows = 1, []
            for axis in spec.axes:
                row = axis_row(axis, self._column)
                if any(row[:-1]):
                    cut_rows.append(row)
                else:
                    scale *= row[-1]
            is_parameter = spec.role is Role.PARAMETER
            counted = (spec.artifact_bytes, spec.positions, int(is_parameter), 0)
            yield Product(tuple(cut_rows), tuple(scale * weight for weight in counted))
        for product in architecture.products:
            rows = tuple(axis_row(axis, self._column) for axis in product.axes)
            yield Product(rows, (0, product.times, 0, 0))

    def _sum_live(self, architecture: Architecture) -> None:
        """One row per operator: the bytes in memory; rows that never decide are left out."""
        buffers = np.zeros((len(architecture.activations), len(self._column) + 1), np.int64)
        for i, activation in enumerate(architecture.activations):
            buffers[i, -1] = activation.fixed
            for group, per_unit in activation.per_unit.items():
                buffers[i, self._column[group]] = per_unit
        sums = {tuple(int(v) for v in buffers[list(ids)].sum(axis=0)) for ids in architecture.live}
        rows = np.array(sorted(sums), np.int64).reshape(len(sums), len(self._column) + 1)
        # Rows are distinct, so each is covered by itself and, if it never decides, by another.
        covered = [int((row <= rows).all(axis=1).sum()) > 1 for row in rows]
        kept = rows[~np.array(covered, np.bool_)]
        self._live: Ints = np.ascontiguousarray(kept[:, :-1])
        self._live_constants: Ints = kept[:, -1].copy()
        self._by_group: Ints = self._live.T.copy()
        # Per group the operators that it has a part in, group by group.
        group_of, live_of = np.nonzero(self._live.T)
        self._group_of: NDArray[np.intp] = group_of
        self._live_of: NDArray[np.intp] = live_of
        self._slope_of: Ints = self._live[live_of, group_of]
        self._present, self._starts = np.unique(group_of, return_index=True)
        self._held: dict[int, tuple[Places, Ints]] = {}

    def _held_at(self, operator: int) -> tuple[Places, Ints]:
        """Groups that an operator holds something of, and (operators, groups) of these alone."""
        if operator not in self._held:
            groups = np.flatnonzero(self._live[operator])
            self._held[operator] = groups, np.ascontiguousarray(self._live[:, groups])
        return self._held[operator]

    def with_latency(self, products: Iterable[Product]) -> "CostModel":
        """The same model with another latency."""
        return CostModel(self._architecture, products)

    def vector(self, keep: KeepCounts) -> Ints:
        """Keep counts as (groups,); BudgetError if they are out of range."""
        self._architecture.check_keep(keep)
        return np.array([keep[g] for g in self._column], np.int64)

    def costs(self, keep: KeepCounts) -> Costs:
        """All costs at once; BudgetError if `keep` is out of range."""
        counts = self.vector(keep)
        weights, macs, *_ = map(int, self._sizes.at(counts))
        return Costs(
            artifact_bytes=self._overhead + weights,
            macs=macs,
            peak_activation_bytes=int(self._live_bytes(counts).max(initial=0)),
        )

    def parameters(self, keep: KeepCounts) -> int:
        """Number of trained weights; BudgetError if `keep` is out of range."""
        return int(self._sizes.at(self.vector(keep))[2])

    def figures(self, counts: Ints) -> list[int]:
        """The costs in the order of `FIGURES`, then the latency, at counts (groups,) in range."""
        weights, macs, _, latency = map(int, self._sizes.at(counts))
        peak = int(self._live_bytes(counts).max(initial=0))
        return [self._overhead + weights, peak, macs, latency]

    def walk(self, counts: Ints, steps: Ints) -> "CostWalk":
        """A place to step from: `counts` (groups,) in range; see `Walk` for `steps`."""
        return CostWalk(self, counts, steps)

    def _live_bytes(self, counts: Ints) -> Ints:
        """(operators,) bytes in memory."""
        return self._live @ counts + self._live_constants


class CostWalk:
    """The costs at one point, and what each group's next step would add to them.

    All steps lead up, or all lead down.
    """

    def __init__(self, model: CostModel, counts: Ints, steps: Ints) -> None:
        self._model, self._steps = model, steps.copy()
        self._sizes = Walk(model._sizes, counts, steps)
        self._live = model._live_bytes(counts)
        self._top = int(self._live.max(initial=0))
        self._down = bool((steps < 0).any())

    def figures(self) -> list[int]:
        """The costs in the order of `FIGURES`, then the latency."""
        weights, macs, _, latency = self._sizes.figures.tolist()
        return [self._model._overhead + weights, self._top, macs, latency]

    def added(self, figure: int) -> Ints:
        """(groups,) what one group's step alone adds to one of `figures`, by its place there."""
        if figure == _PEAK:  # asked for only where it is limited: it takes longer than the others
            return self._peaks() - self._top
        added: Ints = self._sizes.added[_PLACES[figure]]
        return added

    def move(self, group: int, then: int) -> None:
        """Take a group's step; `then` units is its next one."""
        self._live = self._live + self._model._by_group[group] * self._steps[group]
        self._top = int(self._live.max(initial=0))
        self._steps[group] = then
        self._sizes.move(group, then)

    def _peaks(self) -> Ints:
        """(groups,) the peak after each group's step."""
        m, top = self._model, self._top
        peaks = np.full(self._steps.shape, top, np.int64)
        if not m._starts.size:
            return peaks
        if self._down:  # only a group of which the operator at the peak holds something matters
            lower, live = m._held_at(int(self._live.argmax()))
            moved = self._live[:, None] + live * self._steps[lower]
            peaks[lower] = moved.max(axis=0)
        else:
            moved = self._live[m._live_of] + m._slope_of * self._steps[m._group_of]
            peaks[m._present] = np.maximum(top, np.maximum.reduceat(moved, m._starts))
        return peaks


def costs(architecture: Architecture, keep: KeepCounts) -> Costs:
    """All costs of `keep`; BudgetError if it is out of range.

    A solver that asks often keeps a `CostModel` instead.
    """
    return CostModel(architecture).costs(keep)


def macs(architecture: Architecture, keep: KeepCounts) -> int:
    """Multiply-accumulates of one inference; BudgetError if `keep` is out of range."""
    return costs(architecture, keep).macs


def parameters(architecture: Architecture, keep: KeepCounts) -> int:
    """Number of trained weights; BudgetError if `keep` is out of range."""
    return CostModel(architecture).parameters(keep)


def artifact_bytes(architecture: Architecture, keep: KeepCounts) -> int:
    """Bytes of the shipped file: weights that it holds plus the overhead; may raise BudgetError."""
    return costs(architecture, keep).artifact_bytes


def peak_activation_bytes(architecture: Architecture, keep: KeepCounts) -> int:
    """Most bytes of intermediate tensors at once, for one sample; may raise BudgetError."""
    return costs(architecture, keep).peak_activation_bytes
