"""Which units of an older weight those of a newer one are.

A new mask puts units in another order, and no file tells which. But a unit's weights are near what
they were, and far from every other unit's; so the files themselves tell, whatever came between.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.delta import default_map

Map = NDArray[np.int64]

MOST: Final = 4096
"""Units of an axis that are compared with one another; longer ones stay where they were."""
NEAR: Final = 0.5
"""Share of the squares of its weights by which a unit may differ from what it was elsewhere."""
_ROUNDS: Final = 3


def match_units(before: NDArray[Any], after: NDArray[Any]) -> tuple[Map, Map]:
    """Find a weight's units in an older weight.

    Outputs are told by their weights to the inputs that are known by then, then inputs likewise,
    in turn; at first inputs are taken to be where they were, as most are after a new mask.

    Args:
        before: (o, i, k) the older weight.
        after: (o', i', k) the newer one.

    Returns:
        (o',) and (i',) places in `before`, -1 where a unit is new.
    """
    old, new = before.astype(np.float32), after.astype(np.float32)
    outputs, inputs = (default_map(new.shape[a], old.shape[a]) for a in (0, 1))
    for _ in range(_ROUNDS):
        last = outputs, inputs
        outputs = _match(old, new, outputs, inputs)
        inputs = _match(old.swapaxes(0, 1), new.swapaxes(0, 1), inputs, outputs)
        if np.array_equal(last[0], outputs) and np.array_equal(last[1], inputs):
            break
    return outputs, inputs


def _match(old: NDArray[np.float32], new: NDArray[np.float32], units: Map, others: Map) -> Map:
    """The first axis's units, given those of the second."""
    known = others >= 0
    if max(len(old), len(new)) > MOST or not known.any():
        return units
    x = new[:, known].reshape(len(new), -1).astype(np.float64)
    y = old[:, others[known]].reshape(len(old), -1).astype(np.float64)
    own = (x * x).sum(axis=1)
    apart = own[:, None] + (y * y).sum(axis=1)[None] - 2 * x @ y.T
    best = apart.argmin(axis=1)
    least = apart[np.arange(len(x)), best]
    stayed = default_map(len(new), len(old))
    here = np.where(stayed >= 0, apart[np.arange(len(x)), np.maximum(stayed, 0)], np.inf)
    # A unit that only seems nearer to another one costs a few bits; a map costs more.
    found = np.where(here <= own * NEAR, stayed, np.where(least < own * NEAR, best, -1))
    return np.where((found < 0) & (here < own), stayed, found)
