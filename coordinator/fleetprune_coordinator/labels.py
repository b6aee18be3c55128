"""Which unit each element of a tensor belongs to.

A tensor's labels are *factors*: arrays of unit numbers that broadcast against the tensor. An
element is there as long as all its units are. A weight (out, in) has two factors, its rows' and
its columns'; an activation (1, channels, h, w) one, along its channels. A factor that runs over
several axes at once (a flat axis that was split into heads and their width) is not settled yet:
in the end each axis must be cut by itself, so what asks for one of the axes joins units along the
others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from fleetprune_coordinator.units import Array, Units


@dataclass(frozen=True, eq=False)
class Labels:
    """The factors of a tensor of a known shape."""

    shape: tuple[int, ...]
    factors: tuple[Array, ...] = ()
    """Each with as many axes as the tensor, of its length or of length 1."""
    weight: bool = False
    """Whether the tensor holds elements of a parameter and nothing else."""


def axes_of(factor: Array) -> tuple[int, ...]:
    """The axes along which a factor runs."""
    return tuple(i for i, n in enumerate(factor.shape) if n > 1)


class Algebra:
    """What operators do to labels; joins and keeps units on the way."""

    def __init__(self, units: Units) -> None:
        self.units = units
        self.why = ""
        """Reason given for units that must stay."""

    def fresh(self, shape: Sequence[int], *, weight: bool = False) -> Labels:
        """New units for every index of every axis; an axis of length 1 has none."""
        factors = tuple(
            self.units.new(n).reshape([n if i == axis else 1 for i in range(len(shape))])
            for axis, n in enumerate(shape)
            if n > 1
        )
        return Labels(tuple(shape), factors, weight)

    def settled(self, labels: Labels) -> Labels:
        """The same with joined units under one number, and no factor longer than it need be.

        A tensor cannot go altogether: a unit that all elements have is kept.
        """
        factors: dict[bytes, Array] = {}
        for factor in labels.factors:
            short = _shortened(self.units.live(factor))
            if short.size == 1:
                self.units.keep(short, self.why)
            elif short.any():
                factors.setdefault(short.tobytes() + str(short.shape).encode(), short)
        return Labels(labels.shape, tuple(factors.values()), labels.weight)

    def whole(self, labels: Labels, axes: Iterable[int]) -> Labels:
        """Nothing is cut along some axes: units join along them, or are kept."""
        chosen = {axis % len(labels.shape) for axis in axes} if labels.shape else set()
        for factor in self.settled(labels).factors:
            along = sorted(chosen & set(axes_of(factor)))
            if along == list(axes_of(factor)):
                self.units.keep(factor, self.why)
            elif along:
                lines = np.moveaxis(factor, along, range(len(along)))
                lines = lines.reshape(prod(lines.shape[: len(along)]), -1)
                self.units.join(lines[:1], lines[1:], self.why)
        return self.settled(labels)

    def keep(self, labels: Labels) -> None:
        """Nothing is cut along any axis."""
        for factor in labels.factors:
            self.units.keep(factor, self.why)

    def combine(self, operands: Sequence[Labels]) -> Labels:
        """What an operator gives that treats aligned elements alike (broadcast as in numpy).

        Where two operands run along an axis, both must be cut at the same places of it.
        """
        result = operands[0]
        for other in operands[1:]:
            result = self._pair(result, other)
        return self.settled(Labels(result.shape, result.factors))

    def _pair(self, a: Labels, b: Labels) -> Labels:
        a, b = _padded(a, len(b.shape)), _padded(b, len(a.shape))
        while True:
            a, b = self.settled(a), self.settled(b)
            if not (self._align(a, b) or self._align(b, a)):
                shape = tuple(np.broadcast_shapes(a.shape, b.shape))
                return Labels(shape, a.factors + b.factors)

    def _align(self, a: Labels, b: Labels) -> bool:
        """Make one factor of `a` fit `b`; False if all do."""
        for factor in a.factors:
            axes = set(axes_of(factor))
            firm = {axis for axis in axes if b.shape[axis] > 1}
            met = [g for g in b.factors if firm & set(axes_of(g))]
            if not firm:
                continue
            if not met:
                self.whole(Labels(a.shape, (factor,)), firm)
                return True
            for other in met:
                if set(axes_of(other)) != axes:
                    self._choose(Labels(a.shape, (factor,)), Labels(b.shape, (other,)))
                    return True
                if factor.tobytes() != other.tobytes():
                    self.units.join(factor, other, self.why)
                    return True
        return False

    def _choose(self, a: Labels, b: Labels) -> None:
        """Decide along which axis two factors are cut that share some of their axes.

        It is the first: a flat axis is split into heads and their width, in this order.
        """
        (f,), (g,) = a.factors, b.factors
        axes, others = set(axes_of(f)), set(axes_of(g))
        first = min(axes | others)
        if first in axes & others:
            self.whole(a, axes - others)
            self.whole(b, others - axes)
        else:
            self.whole(a, axes & others)
            self.whole(b, axes & others)

    def reduced(self, labels: Labels, axes: Iterable[int], *, keep: bool = False) -> Labels:
        """What is left of a tensor that was summed up, or looked at, along some axes."""
        chosen = sorted({axis % len(labels.shape) for axis in axes})
        return without(self.whole(labels, chosen), chosen, keep=keep)

    def product(self, a: Labels, b: Labels, axis: int) -> Labels:
        """The sum over one axis of a * b; both have all axes.

        Columns of a weight that are cut are zeros in the uncut one: a sum over them is right. A
        sum over cut activations would need zeros there too, so those are kept.
        """
        both = self.combine([a, b])
        if a.weight or b.weight:
            summed = tuple(f for f in both.factors if axes_of(f) != (axis,))
            both = Labels(both.shape, summed)
        return self.reduced(both, [axis])

    def joined(self, parts: Sequence[Labels], axis: int) -> Labels:
        """Tensors end to end along an axis."""
        axis %= len(parts[0].shape)
        parts = [self.settled(p) for p in parts]
        across = [
            Labels(
                (*p.shape[:axis], 1, *p.shape[axis + 1 :]),
                tuple(f for f in p.factors if f.shape[axis] == 1),
            )
            for p in parts
        ]
        shared = self.combine(across).factors
        along = [[f for f in p.factors if f.shape[axis] > 1] for p in parts]
        shape = list(parts[0].shape)
        shape[axis] = sum(p.shape[axis] for p in parts)
        factors = []
        for place in range(max(map(len, along))):
            pieces = [
                fs[place] if place < len(fs) else np.zeros([1] * len(shape), np.intp)
                for fs in along
            ]
            wide = np.broadcast_shapes(
                *((*f.shape[:axis], 1, *f.shape[axis + 1 :]) for f in pieces)
            )
            factors.append(
                np.concatenate(
                    [
                        np.broadcast_to(f, (*wide[:axis], p.shape[axis], *wide[axis + 1 :]))
                        for f, p in zip(pieces, parts, strict=True)
                    ],
                    axis,
                )
            )
        weight = all(p.weight for p in parts)
        return self.settled(Labels(tuple(shape), (*shared, *factors), weight))

    def reshaped(self, labels: Labels, shape: Sequence[int]) -> Labels:
        """The same elements in the same order under another shape."""
        labels = self.settled(labels)
        factors = tuple(_reshaped(f, labels.shape, tuple(shape)) for f in labels.factors)
        return self.settled(Labels(tuple(shape), factors, labels.weight))


def permuted(labels: Labels, order: Sequence[int]) -> Labels:
    """The axes in another order."""
    rank = len(labels.shape)
    order = [axis % rank for axis in order]
    shape = tuple(labels.shape[axis] for axis in order)
    return Labels(shape, tuple(f.transpose(order) for f in labels.factors), labels.weight)


def taken(labels: Labels, axis: int, places: slice) -> Labels:
    """A part of the tensor along one axis."""
    axis %= len(labels.shape)
    index = (slice(None),) * axis + (places,)
    shape = list(labels.shape)
    shape[axis] = len(range(*places.indices(shape[axis])))
    factors = tuple(f[index] if f.shape[axis] > 1 else f for f in labels.factors)
    return Labels(tuple(shape), factors, labels.weight)


def grown(labels: Labels, axis: int, before: int, after: int) -> Labels:
    """With so many places more at both ends of an axis, never cut; negative: fewer."""
    labels = taken(labels, axis, slice(max(0, -before), labels.shape[axis] - max(0, -after)))
    widths = [(0, 0)] * len(labels.shape)
    widths[axis] = (max(0, before), max(0, after))
    factors = tuple(np.pad(f, widths) if f.shape[axis] > 1 else f for f in labels.factors)
    shape = list(labels.shape)
    shape[axis] += sum(widths[axis])
    return Labels(tuple(shape), factors)


def without(labels: Labels, axes: Sequence[int], *, keep: bool = False) -> Labels:
    """Axes along which no factor runs taken away, or left with length 1."""
    shape = tuple(
        1 if i in axes else n for i, n in enumerate(labels.shape) if keep or i not in axes
    )
    factors = labels.factors if keep else tuple(f.squeeze(tuple(axes)) for f in labels.factors)
    return Labels(shape, factors, labels.weight)


def broadcast(labels: Labels, shape: Sequence[int]) -> Labels:
    """Repeated along axes of length 1, and along new leading axes."""
    padded = _padded(labels, len(shape))
    return Labels(tuple(shape), padded.factors, labels.weight)


def tiled(labels: Labels, repeats: Sequence[int]) -> Labels:
    """Repeated end to end along each axis; the shape may gain leading axes."""
    padded = _padded(labels, len(repeats))
    factors = tuple(
        np.tile(f, [r if n > 1 else 1 for r, n in zip(repeats, f.shape, strict=True)])
        for f in padded.factors
    )
    shape = tuple(r * n for r, n in zip(repeats, padded.shape, strict=True))
    return Labels(shape, factors, labels.weight)


def _padded(labels: Labels, rank: int) -> Labels:
    missing = (1,) * (rank - len(labels.shape))
    factors = tuple(f.reshape(missing + f.shape) for f in labels.factors)
    return Labels(missing + labels.shape, factors, labels.weight)


def _shortened(factor: Array) -> Array:
    """With length 1 along every axis along which it is constant."""
    for axis in axes_of(factor):
        first = factor.take([0], axis)
        if (factor == first).all():
            factor = first
    return factor


def _reshaped(factor: Array, old: tuple[int, ...], new: tuple[int, ...]) -> Array:
    """The factor of a reshaped tensor, no longer than the axes that were split or merged ask."""
    shape: list[int] = []
    spread: list[int] = []
    for before, after in _blocks(old, new):
        runs = any(factor.shape[i] > 1 for i in before)
        spread += [old[i] if runs else 1 for i in before]
        shape += [new[i] if runs else 1 for i in after]
    return np.broadcast_to(factor, spread).reshape(shape)


def _blocks(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[range, range]]:
    """Runs of axes that hold the same number of elements before and after a reshape."""
    blocks = []
    i = j = 0
    while i < len(old) or j < len(new):
        first, second = i, j
        left = right = 1
        while i == first or j == second or left != right:
            if (left <= right and i < len(old)) or j == len(new):
                if i == len(old):
                    break
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        blocks.append((range(first, i), range(second, j)))
    return blocks
