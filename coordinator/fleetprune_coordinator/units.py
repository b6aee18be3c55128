"""Sets of units that must be kept or dropped together, and why some of them must stay.

Every index of every weight's axis begins as a unit of its own. What the model computes joins units
(both operands of a sum, the rows of one layer and the columns of the next) and keeps others whole
(the model's output).
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.intp]


class Units:
    """Disjoint sets of numbered units; number 0 stands for what is always there."""

    def __init__(self) -> None:
        self._parent = [0]
        self._reasons: dict[int, tuple[int, str]] = {}
        self.changes = 0
        """How often units were joined or kept; the same as before if nothing has changed since."""

    def new(self, count: int) -> Array:
        """So many new units."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count, dtype=np.intp)

    def _root(self, unit: int) -> int:
        parent = self._parent
        while parent[unit] != unit:
            parent[unit] = parent[parent[unit]]
            unit = parent[unit]
        return unit

    def join(self, a: Array, b: Array, why: str) -> None:
        """Join units pairwise (arrays broadcast); a unit that meets 0 stays whole, for `why`."""
        pairs = np.stack([x.ravel() for x in np.broadcast_arrays(a, b)])
        for first, second in np.unique(pairs, axis=1).T.tolist():
            if not first or not second:
                self._keep(first or second, why)
                continue
            one, other = sorted((self._root(first), self._root(second)))
            if one != other:
                self._parent[other] = one
                self.changes += 1
                if (reason := self._reasons.pop(other, None)) is not None:
                    self._reasons[one] = min(reason, self._reasons.get(one, reason))

    def keep(self, units: Array, why: str) -> None:
        """Keep units whole; of several reasons the first is remembered."""
        for unit in np.unique(units).tolist():
            self._keep(unit, why)

    def _keep(self, unit: int, why: str) -> None:
        if unit and self._root(unit) not in self._reasons:
            self.changes += 1
            self._reasons[self._root(unit)] = (self.changes, why)

    def live(self, units: Array) -> Array:
        """One number per set in place of each unit; 0 where it is always there."""
        known, places = np.unique(units, return_inverse=True)
        roots = [self._root(unit) for unit in known.tolist()]
        alive = np.array([0 if r in self._reasons else r for r in roots], np.intp)
        return alive[places].reshape(units.shape)

    def reason(self, unit: int) -> str:
        """Why a unit must stay; "" if it need not."""
        return self._reasons.get(self._root(unit), (0, ""))[1]
