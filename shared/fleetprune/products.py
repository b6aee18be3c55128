"""Figures that are sums of products of lengths, as integer matrices; asked thousands of times.

Every length of a model is linear in the keep counts, and what it costs is a sum of products of
such lengths. A solver wants to know what one more step of *each* group would cost: a `Walk`
keeps the answers at one point, and after a step mends those that it changes, which are those of
the groups that share a product with the group that moved.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Places = NDArray[np.intp]
Row = tuple[int, ...]
"""A length: coefficients (groups,), then the constant."""


@dataclass(frozen=True, slots=True)
class Product:
    """One product of lengths, times a weight in each figure."""

    lengths: tuple[Row, ...]
    """Where there are none, the product is 1."""
    weights: tuple[int, ...]
    """(figures,)"""
    block: int = 1
    """Each length is rounded up to whole multiples of this first."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Pairs of a group and a product that it has a part in, group by group."""

    groups: Places
    """(pairs,)"""
    products: Places
    """(pairs,)"""
    slopes: Ints
    """(depth, pairs) of each length of the product, in units of the group."""
    blocks: Ints | None
    """(depth, pairs); None: all are 1."""
    weights: Ints
    """(figures, pairs)"""
    present: Places
    """The groups, each once."""
    starts: Places
    """Where the pairs of each of `present` begin."""

    def of(self, which: Places) -> "Parts":
        """Some pairs alone, by their places, which rise."""
        return Parts.sorted(
            self.groups[which],
            self.products[which],
            np.ascontiguousarray(self.slopes[:, which]),
            None if self.blocks is None else np.ascontiguousarray(self.blocks[:, which]),
            np.ascontiguousarray(self.weights[:, which]),
        )

    @classmethod
    def sorted(
        cls, groups: Places, products: Places, slopes: Ints, blocks: Ints | None, weights: Ints
    ) -> "Parts":
        """Of pairs that stand group by group."""
        starts = np.flatnonzero(np.append(True, groups[1:] != groups[:-1])[: groups.size])
        return cls(groups, products, slopes, blocks, weights, groups[starts], starts)


@dataclass(frozen=True, slots=True)
class Near:
    """What one group's step changes."""

    products: Places
    """Those that it has a part in."""
    slopes: Ints
    """(depth, products) of their lengths in units of the group."""
    blocks: Ints | None
    """(depth, products); None: all are 1."""
    which: Places
    """All pairs with one of `products`, as places in `Sums.parts`."""
    parts: Parts
    """These pairs."""


class Sums:
    """Several figures, each a weighted sum of the same products; exact, in 64 bits."""

    def __init__(self, groups: int, figures: int, products: Iterable[Product]) -> None:
        """Merge equal products and lay them out.

        Args:
            groups: Number of groups.
            figures: Number of figures.
            products: Of any number of lengths.
        """
        merged: dict[tuple[int, tuple[Row, ...]], list[int]] = {}
        for product in products:
            key = (product.block, tuple(sorted(product.lengths)))
            total = merged.setdefault(key, [0] * figures)
            for i, weight in enumerate(product.weights):
                total[i] += weight
        depth = max((len(rows) for _, rows in merged), default=0)
        one = (0,) * groups + (1,)
        padded = [rows + (one,) * (depth - len(rows)) for _, rows in merged]
        table = np.array(padded, np.int64).reshape(len(merged), depth, groups + 1)
        self.groups, self.figures = groups, figures
        self.slopes: Ints = np.ascontiguousarray(table[..., :-1].transpose(1, 0, 2))
        self._constants: Ints = np.ascontiguousarray(table[..., -1].T)
        self.weights: Ints = np.array(list(merged.values()), np.int64).reshape(-1, figures).T.copy()
        blocks = [[b] * len(rows) + [1] * (depth - len(rows)) for b, rows in merged]
        block = np.array(blocks, np.int64).reshape(len(merged), depth).T.copy()
        self.blocks: Ints | None = block if (block > 1).any() else None
        group_of, product_of = np.nonzero((self.slopes != 0).any(axis=0).T)
        self.parts = Parts.sorted(
            group_of,
            product_of,
            self.slopes[:, product_of, group_of],
            None if self.blocks is None else self.blocks[:, product_of],
            self.weights[:, product_of],
        )
        self._pairs = np.argsort(product_of, kind="stable")
        """Places of pairs, product by product."""
        self._ends: Places = np.searchsorted(product_of[self._pairs], np.arange(len(merged) + 1))
        """Where those of each product begin."""
        self._near: dict[int, Near] = {}

    def at(self, counts: Ints) -> Ints:
        """(figures,) the figures at keep counts (groups,)."""
        return self.weights @ multiplied(self.lengths(counts), self.blocks)

    def lengths(self, counts: Ints) -> Ints:
        """(depth, products) all lengths at keep counts (groups,)."""
        return self.slopes @ counts + self._constants

    def near(self, group: int) -> Near:
        """What a group's step changes."""
        if group not in self._near:
            products = self.parts.products[self.parts.groups == group]
            pairs = [self._pairs[self._ends[p] : self._ends[p + 1]] for p in products]
            which = np.sort(np.concatenate([np.zeros(0, np.intp), *pairs]))
            self._near[group] = Near(
                products,
                self.slopes[:, products, group],
                None if self.blocks is None else self.blocks[:, products],
                which,
                self.parts.of(which),
            )
        return self._near[group]


class Walk:
    """The figures at one point, and what each group's next step would add to them."""

    def __init__(self, sums: Sums, counts: Ints, steps: Ints) -> None:
        """Begin at keep counts.

        Args:
            sums: The figures.
            counts: (groups,) keep counts.
            steps: (groups,) units that each group's next step adds; negative: takes away.
        """
        self._sums, self._steps = sums, steps.copy()
        self._lengths = sums.lengths(counts)
        self._sizes = multiplied(self._lengths, sums.blocks)
        self.figures: Ints = sums.weights @ self._sizes
        """(figures,)"""
        self.added: Ints = np.zeros((sums.figures, sums.groups), np.int64)
        """(figures, groups) what each group's step alone adds to each figure."""
        self._changes = self._changed(sums.parts)
        if sums.parts.starts.size:
            weighted = sums.parts.weights * self._changes
            self.added[:, sums.parts.present] = np.add.reduceat(weighted, sums.parts.starts, axis=1)

    def move(self, group: int, then: int) -> None:
        """Take a group's step.

        Args:
            group: Which.
            then: Units that its next step adds.
        """
        self.figures = self.figures + self.added[:, group]
        near, step = self._sums.near(group), self._steps[group]
        self._steps[group] = then
        if not near.products.size:
            return
        lengths = self._lengths[:, near.products] + near.slopes * step
        self._lengths[:, near.products] = lengths
        self._sizes[near.products] = multiplied(lengths, near.blocks)
        changes = self._changed(near.parts)
        more = near.parts.weights * (changes - self._changes[near.which])
        self._changes[near.which] = changes
        self.added[:, near.parts.present] += np.add.reduceat(more, near.parts.starts, axis=1)

    def _changed(self, parts: Parts) -> Ints:
        """(pairs,) what each part's product changes by when its group steps."""
        moved = self._lengths[:, parts.products] + parts.slopes * self._steps[parts.groups]
        return multiplied(moved, parts.blocks) - self._sizes[parts.products]


def multiplied(lengths: Ints, blocks: Ints | None) -> Ints:
    """(n,) products of (depth, n) lengths, each rounded up to its block (depth, n)."""
    if blocks is not None:
        lengths = -(-lengths // blocks) * blocks
    if not len(lengths):
        return np.ones(lengths.shape[1], np.int64)
    product: Ints = lengths[0].copy()
    for length in lengths[1:]:  # one or two: faster than a reduction
        product *= length
    return product
