"""What of a layer's weights goes together when single weights are pruned: one, a block, N of M.

A weight has outputs on its first axis and inputs on its second; every position of a kernel is
treated alike. Blocks and groups lie within one position.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import UsageError

Shape = tuple[int, ...]
_BLOCK = re.compile(r"([1-9]\d{0,2})x([1-9]\d{0,2})")
_N_OF_M = re.compile(r"([1-9]\d?):([1-9]\d?)")


class Granularity(StrEnum):
    """What is cut away."""

    CHANNEL = "channel"
    """Whole units: the model becomes physically smaller, and faster everywhere."""
    WEIGHT = "weight"
    """Single weights, down to the class's bytes: the file becomes smaller, the model no faster."""
    HYBRID = "hybrid"
    """Units down to the limits of time and memory, then weights inside what is left down to the
    bytes."""

    @property
    def weights(self) -> bool:
        """Whether single weights are pruned."""
        return self is not Granularity.CHANNEL


@dataclass(frozen=True, slots=True)
class Pattern:
    """Blocks of `rows` outputs by `columns` inputs; or `n` of every `m` inputs in a row."""

    rows: int = 1
    columns: int = 1
    n: int = 0
    """0: any number of blocks stays."""
    m: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "1x1" (single weights), "4x1" (a block) or "2:4" (N of M).

        Raises:
            UsageError: It is none of these, or as many stay as there are.
        """
        if match := _BLOCK.fullmatch(text):
            return cls(int(match[1]), int(match[2]))
        if (match := _N_OF_M.fullmatch(text)) and int(match[1]) < int(match[2]):
            return cls(n=int(match[1]), m=int(match[2]))
        raise UsageError(
            f'pattern "{text}", expected outputs x inputs of a block, as "1x1" or "4x1", '
            'or N:M with N < M, as "2:4"'
        )

    def __str__(self) -> str:
        """As `parse` reads it."""
        return f"{self.n}:{self.m}" if self.m else f"{self.rows}x{self.columns}"

    @property
    def block(self) -> int:
        """Weights that go together."""
        return self.rows * self.columns

    def concerns(self, shape: Shape) -> bool:
        """Whether a dense weight of this shape is pruned.

        One that is smaller than the pattern, as of a depthwise convolution, stays whole.
        """
        if len(shape) < 2:
            return False
        return shape[0] >= self.rows and shape[1] >= max(self.columns, self.m)

    def misfit(self, shape: Shape) -> str | None:
        """Why a weight of this shape cannot be divided; None if it can."""
        for what, size, step in (
            ("outputs", shape[0], self.rows),
            ("inputs", shape[1], self.m or self.columns),
        ):
            if size % step:
                return f"{size} {what}, which {step} does not divide"
        return None

    def grid(self, shape: Shape) -> Shape:
        """How many blocks a weight has, axis by axis."""
        return (shape[0] // self.rows, shape[1] // self.columns, *shape[2:])

    def blocks(self, shape: Shape) -> int:
        """How many blocks a weight has."""
        return prod(self.grid(shape))

    def pooled(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Sum per block of a weight's values, of the shape of `grid`."""
        o, i, *rest = self.grid(values.shape)
        parts = values.astype(np.float64).reshape(o, self.rows, i, self.columns, *rest)
        pooled: NDArray[np.float64] = parts.sum(axis=(1, 3))
        return pooled

    def marks(self, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Marks of weights as marks of the blocks that hold them."""
        return kept[:: self.rows, :: self.columns]

    def spread(self, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Marks of blocks as marks of weights."""
        return kept.repeat(self.rows, axis=0).repeat(self.columns, axis=1)

    def best_of_each(self, values: NDArray[Any], n: int) -> NDArray[np.bool_]:
        """Mark the `n` highest of every `m` inputs in a row; ties go to the lower index.

        Args:
            values: (outputs, inputs, ...) with inputs divided by `m`.
            n: 1..m.
        """
        o, i, *rest = values.shape
        groups = values.astype(np.float64).reshape(o, i // self.m, self.m, *rest)
        best = np.argsort(-groups, axis=2, kind="stable").take(range(n), axis=2)
        mask = np.zeros(groups.shape, np.bool_)
        np.put_along_axis(mask, best, values=True, axis=2)
        return mask.reshape(values.shape)


SINGLE = Pattern()
