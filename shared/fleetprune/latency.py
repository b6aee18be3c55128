"""How long one inference takes at given keep counts, from what a class's devices measured.

A device times the graphs of a few shapes. What they share with all other shapes are operators, so
a time is fitted as a sum over kinds of operators: of multiply-accumulates, of elements read and
written, and of a constant for what does not depend on widths, each with a coefficient that is not
negative. Kernels work on whole blocks of channels, so each of these counts twice: as it is, and
with channels rounded up to a block, whose size is the one that predicts best. Coefficients that are
not negative make a prediction that never falls when a group grows, which a solver relies on.

The error is stated by the table itself: each of its shapes is predicted from all others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fleetprune.costs import axis_row
from fleetprune.errors import BudgetError
from fleetprune.layout import Architecture, KeepCounts, TensorSpec
from fleetprune.products import Ints, Product, Sums

BLOCKS = (1, 4, 8, 16, 32)
"""Channels that kernels may work on at once: what processors' vectors hold, once or twice."""
LEAST_POINTS = 5
STATED = 0.9
"""Share of the table's own shapes that the stated error holds for."""
_DENSE = 2**48
"""The dense model's latency in a model's own unit: fine enough, and far from 64 bits."""

Floats = NDArray[np.float64]


class Precision(StrEnum):
    """What numbers a file computes with: one takes other times than the other."""

    FLOAT32 = "float32"
    INT8 = "int8"


class LatencyPoint(BaseModel):
    """What one shape takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    keep: dict[str, int]
    median_ms: float = Field(gt=0)
    """Median over the devices that measured it."""
    spread_ms: float = Field(default=0.0, ge=0)
    """Between the quartiles of a device's runs; median over devices."""


class LatencyTable(BaseModel):
    """What devices of one class measured with one version of one runtime, in one precision."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    device_class: str
    runtime: str
    version: str
    precision: Precision
    """Of the files that were timed."""
    devices: int = Field(ge=1)
    """How many measured."""
    points: tuple[LatencyPoint, ...]


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Predicts a class's latency; made by `fit`."""

    groups: tuple[str, ...]
    products: tuple[Product, ...]
    """Their sum is the latency in units of `unit_ms`."""
    unit_ms: float
    error: float
    """Relative: `STATED` of the table's shapes, left out, were predicted within it."""
    worst: float
    """Relative: the largest of these errors."""
    block: int
    """Channels that this runtime seems to work on at once; 1: any number is as good."""

    @classmethod
    def fit(cls, architecture: Architecture, table: LatencyTable) -> Self:
        """Fit a table.

        Args:
            architecture: The model whose shapes were timed.
            table: Their times.

        Returns:
            The model with the block size whose left-out predictions are best; the smaller of two
            that are as good.

        Raises:
            BudgetError: The table has too few shapes, or shapes of another model.
        """
        if len(table.points) < LEAST_POINTS:
            raise BudgetError(
                f"latency table of class {table.device_class}: {len(table.points)} shapes, "
                f"expected at least {LEAST_POINTS}"
            )
        for point in table.points:
            architecture.check_keep(point.keep)
        counts = np.array(
            [[p.keep[g] for g in architecture.groups] for p in table.points], np.int64
        )
        times = np.array([p.median_ms for p in table.points])
        features = _Features(architecture)
        values = features.at(counts)
        tried = [(_left_out(values[:, features.with_block(b)], times), b) for b in BLOCKS]
        # To a tenth of a per cent: what is closer is noise, and then the smaller block is it.
        errors, block = min(tried, key=lambda t: (round(float((t[0] ** 2).mean() ** 0.5), 3), t[1]))
        chosen = features.with_block(block)
        coefficients = np.zeros(values.shape[1])
        coefficients[chosen] = fit_relative(values[:, chosen], times)
        products, unit = features.weighted(coefficients)
        return cls(
            groups=tuple(architecture.groups),
            products=products,
            unit_ms=unit,
            error=float(np.quantile(errors, STATED, method="higher")),
            worst=float(errors.max()),
            block=block,
        )

    def predict(self, keep: KeepCounts) -> float:
        """Milliseconds of one sample, the stated error not added."""
        counts = np.array([keep[g] for g in self.groups], np.int64)
        return self.ms(int(self._sum.at(counts)[0]))

    @cached_property
    def _sum(self) -> Sums:
        return Sums(len(self.groups), 1, self.products)

    def at_most(self, keep: KeepCounts) -> float:
        """Milliseconds of one sample with the stated error: what a limit is held against."""
        return self.predict(keep) * (1.0 + self.error)

    def ms(self, figure: int) -> float:
        """A sum of `products` in milliseconds."""
        return figure * self.unit_ms

    def cap(self, limit_ms: float) -> int:
        """The largest sum of `products` that is within a limit together with the stated error."""
        return int(limit_ms / (1.0 + self.error) / self.unit_ms)


def _kind(spec: TensorSpec) -> str:
    """Which sort of operator multiplies by a weight (out, in, ...)."""
    if len(spec.axes) < 3:
        return "linear"
    fixed = [sum(s.units * s.block for s in axis) for axis in spec.axes]
    if fixed[1] == 1:
        return "depthwise"
    return "pointwise" if max(fixed[2:]) == 1 else "convolution"


class _Features:
    """Of one architecture, for every block size at once."""

    def __init__(self, architecture: Architecture) -> None:
        found = list(_products(architecture))
        self._products = tuple(product for _, product in found)
        features = list(dict.fromkeys(feature for feature, _ in found))
        self._blocks = np.array([block for _, block in features])
        self._place = [features.index(feature) for feature, _ in found]
        self._dense = np.array([list(architecture.groups.values())], np.int64)
        one_hot = np.eye(len(features), dtype=np.int64)
        spread = (
            Product(p.lengths, tuple(int(v) for v in p.weights[0] * one_hot[place]), p.block)
            for p, place in zip(self._products, self._place, strict=True)
        )
        self._sums = Sums(len(architecture.groups), len(features), spread)

    def at(self, counts: Ints) -> Floats:
        """Features (points, features) of shapes (points, groups)."""
        return np.array([self._sums.at(row) for row in counts], np.float64)

    def with_block(self, block: int) -> NDArray[np.bool_]:
        """(features,) bool: those of exact lengths, and of lengths rounded up to a block."""
        chosen: NDArray[np.bool_] = (self._blocks == 1) | (self._blocks == block)
        return chosen

    def weighted(self, coefficients: Floats) -> tuple[tuple[Product, ...], float]:
        """Features times coefficients (features,) in ms as one sum, and its unit in ms."""
        unit = float(self.at(self._dense)[0] @ coefficients) / _DENSE
        # Python's own integers: a coefficient times a scale may be beyond what a float counts in
        # ones.
        rounded = [round(float(c) / unit) for c in coefficients]
        return tuple(
            Product(p.lengths, (p.weights[0] * rounded[place],), p.block)
            for p, place in zip(self._products, self._place, strict=True)
            if rounded[place]
        ), unit


def _products(architecture: Architecture) -> Iterator[tuple[tuple[str, int], Product]]:
    """Products, each with the name and block of the feature that it is added up in."""
    column = {g: i for i, g in enumerate(architecture.groups)}
    yield ("operators", 1), Product((), (1,))
    for activation in architecture.activations:
        row = [0] * len(column) + [activation.fixed]
        for group, per_unit in activation.per_unit.items():
            row[column[group]] += per_unit
        yield ("bytes of tensors", 1), Product((tuple(row),), (1,))
    for spec in architecture.tensors:
        if not spec.positions or len(spec.axes) < 2:
            continue
        kind = _kind(spec)
        out, into, *rest = (axis_row(axis, column) for axis in spec.axes)
        for b in BLOCKS:
            yield (f"MACs of {kind}", b), _product((out, into, *rest), spec.positions, b)
            yield (f"written by {kind}", b), _product((out,), spec.positions, b)
            if kind != "depthwise":
                yield (f"read by {kind}", b), _product((into,), spec.positions, b)


def _product(rows: Sequence[tuple[int, ...]], scale: int, block: int) -> Product:
    """A product in which lengths that are never cut are part of the weight."""
    cut = []
    for row in rows:
        if any(row[:-1]):
            cut.append(row)
        else:
            scale *= row[-1]
    return Product(tuple(cut), (scale,), block)


def _left_out(features: Floats, times: Floats) -> Floats:
    """(points,) relative errors of each point, predicted from all others."""
    rest = ~np.eye(len(times), dtype=np.bool_)
    predicted = [
        features[i] @ fit_relative(features[others], times[others]) for i, others in enumerate(rest)
    ]
    return np.abs(np.array(predicted) / times - 1.0)


def fit_relative(features: Floats, times: Floats) -> Floats:
    """Coefficients, not negative, with the least squared relative error.

    Args:
        features: (points, features), not negative.
        times: (points,) above 0.

    Returns:
        (features,); 0 for a feature that is always 0.
    """
    scale = features.max(axis=0)
    scale[scale == 0] = 1.0
    found: Floats = non_negative(features / scale / times[:, None], np.ones(len(times))) / scale
    return found


def non_negative(a: Floats, b: Floats) -> Floats:
    """Non-negative least squares: the x >= 0 with the least |a x - b|.

    The active set method of Lawson and Hanson, "Solving Least Squares Problems", 1974, chapter 23.

    Args:
        a: (m, n).
        b: (m,).

    Returns:
        (n,).
    """
    x = np.zeros(a.shape[1])
    free = np.zeros(a.shape[1], np.bool_)
    tolerance = 1e-10 * max(1.0, float(np.abs(a).max(initial=0.0)))
    for _ in range(3 * a.shape[1] + 10):  # more than ever needed; ends where rounding would cycle
        gradient = a.T @ (b - a @ x)
        gradient[free] = -np.inf
        best = int(gradient.argmax()) if gradient.size else 0
        if not gradient.size or gradient[best] <= tolerance:
            break
        free[best] = True
        x = _inside(a, b, x, free)
    return x


def _inside(a: Floats, b: Floats, x: Floats, free: NDArray[np.bool_]) -> Floats:
    """Least squares over the free variables; those that would turn negative are bound again."""
    while free.any():
        solved = np.zeros(len(x))
        solved[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
        negative = free & (solved <= 0)
        if not negative.any():
            return solved
        share = float((x[negative] / (x[negative] - solved[negative])).min())
        x = x + share * (solved - x)
        free &= x > 1e-15
        x[~free] = 0.0
    return x
