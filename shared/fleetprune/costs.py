"""What a model costs at given keep counts: file bytes, multiply-accumulates, peak activation bytes.

Exact integers, the same on the coordinator and on a device. The budget solver asks thousands of
times, so a `CostModel` turns the description into a few integer matrices once: every axis length
is linear in the keep counts, a tensor's size is a product of such lengths, and the peak is a
maximum of linear functions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetprune.layout import Architecture, Axis, KeepCounts, Role

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Costs:
    """What one inference of one model needs."""

    artifact_bytes: int
    """Bytes of the shipped file."""
    macs: int
    """Multiply-accumulates of the convolutions and linear layers, for one sample."""
    peak_activation_bytes: int
    """Most bytes of intermediate tensors in memory at once, for one sample."""


class CostModel:
    """The costs of one architecture as integer matrices; make it once, ask it often."""

    def __init__(self, architecture: Architecture) -> None:
        """Prepare the matrices; the architecture is not read again apart from range checks."""
        self._architecture = architecture
        self._column = {g: i for i, g in enumerate(architecture.groups)}
        self._overhead = architecture.overhead_bytes
        self._sum_sizes(architecture)
        self._sum_live(architecture)

    def _axis_row(self, axis: Axis) -> tuple[int, ...]:
        """Coefficients (groups + 1,) of an axis's length; the last is the constant."""
        row = [0] * (len(self._column) + 1)
        for s in axis:
            row[-1 if s.group is None else self._column[s.group]] += s.block * (
                s.units if s.group is None else 1
            )
        return tuple(row)

    def _sum_sizes(self, architecture: Architecture) -> None:
        """Merge the tensors whose sizes are the same function, up to a factor, of the counts."""
        merged: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for spec in architecture.tensors:
            scale, cut_rows = 1, []
            for row in map(self._axis_row, spec.axes):
                if any(row[:-1]):
                    cut_rows.append(row)
                else:
                    scale *= row[-1]
            totals = merged.setdefault(tuple(sorted(cut_rows)), [0, 0, 0])
            totals[0] += scale * spec.artifact_bytes
            totals[1] += scale * spec.positions
            totals[2] += scale * (spec.role is Role.PARAMETER)
        depth = max((len(rows) for rows in merged), default=0)
        one = (0,) * len(self._column) + (1,)
        padded = [rows + (one,) * (depth - len(rows)) for rows in merged]
        rows = np.array(padded, np.int64).reshape(len(merged), depth, len(one))
        self._lengths: Ints = np.ascontiguousarray(rows[..., :-1].transpose(1, 0, 2))
        self._constants: Ints = np.ascontiguousarray(rows[..., -1].T)
        self._weights: Ints = np.array(list(merged.values()), np.int64).reshape(-1, 3).T.copy()

    def _sum_live(self, architecture: Architecture) -> None:
        """One row per operator: the bytes in memory; rows that never decide are left out."""
        buffers = np.zeros((len(architecture.activations), len(self._column) + 1), np.int64)
        for i, activation in enumerate(architecture.activations):
            buffers[i, -1] = activation.fixed
            for group, per_unit in activation.per_unit.items():
                buffers[i, self._column[group]] = per_unit
        sums = {tuple(int(v) for v in buffers[list(ids)].sum(axis=0)) for ids in architecture.live}
        rows = np.array(sorted(sums), np.int64).reshape(len(sums), len(self._column) + 1)
        covered = [
            any((rows[i] <= rows[j]).all() for j in range(len(rows)) if j != i)
            for i in range(len(rows))
        ]
        kept = rows[~np.array(covered, np.bool_)] if len(rows) else rows
        self._live: Ints = np.ascontiguousarray(kept[:, :-1])
        self._live_constants: Ints = kept[:, -1].copy()

    def _counts(self, keep: KeepCounts) -> Ints:
        self._architecture.check_keep(keep)
        return np.array([keep[g] for g in self._column], np.int64)

    def _totals(self, counts: Ints) -> list[int]:
        """Artifact bytes without overhead, MACs, and parameters."""
        sizes = np.prod(self._lengths @ counts + self._constants, axis=0, dtype=np.int64)
        return [int(v) for v in self._weights @ sizes]

    def _peak(self, counts: Ints) -> int:
        return int((self._live @ counts + self._live_constants).max(initial=0))

    def costs(self, keep: KeepCounts) -> Costs:
        """All costs at once; BudgetError if `keep` is out of range."""
        counts = self._counts(keep)
        weights, macs, _ = self._totals(counts)
        return Costs(self._overhead + weights, macs, self._peak(counts))

    def parameters(self, keep: KeepCounts) -> int:
        """Number of trained weights; BudgetError if `keep` is out of range."""
        return self._totals(self._counts(keep))[2]


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
