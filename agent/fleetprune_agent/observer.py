"""Looking without learning: activation sums that any device can measure, without labels.

All sums are additive: added up over devices they are exactly those of the pooled data, so
devices too small to train still decide which units matter (`criteria.wanda`, `criteria.apoz`) and
what the BatchNorm statistics of a pruned model should be.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.model_payload import ModelPayload
from fleetprune_agent.data import Batches
from fleetprune_agent.sessions import Session, require_finite, run_graph
from fleetprune_agent.trainer import StoppedError, never

IMPORTANCE: Final = ("sumsq", "zeros")
"""What tells units apart, beside what the model's statistics come from."""
SUMS: Final = (*IMPORTANCE, "bn_sum", "bn_sumsq", "bn_count", "gram", "ranges")


@dataclass(frozen=True, eq=False)
class Observed:
    """What one pass over a device's data showed.

    Attributes:
        sums: By name out of `SUMS`, (n,) float32; those that the graph has.
        samples: Samples seen.
        correct: Samples classified correctly; None without labels.
    """

    sums: dict[str, NDArray[np.float32]]
    samples: int
    correct: int | None


def observe(
    session: Session,
    payload: ModelPayload,
    batches: Batches,
    stopped: Callable[[], bool] = never,
) -> Observed:
    """Run the `observe` graph once over all samples.

    Sums are kept in float64: a device may have more samples than float32 can count in squares.

    Raises:
        GraphError: A sum is not finite, or the runtime fails.
        StoppedError: `stopped`, asked before each batch, said so.
    """
    totals: dict[str, NDArray[np.float64]] = {}
    samples = correct = 0
    for batch in batches:
        if stopped():
            raise StoppedError(f"stopped after {samples} of {len(batches.x)} samples")
        feeds = {"x": batch.x, "sw": batch.sw, "params": payload.params, "stats": payload.stats}
        out = run_graph(session, feeds)
        samples += batch.samples
        best = np.argmax(out["logits"][: batch.samples], axis=1)
        correct += int(np.count_nonzero(best == batch.y[: batch.samples]))
        for name in SUMS:
            if name in out:
                totals[name] = totals.get(name, np.float64(0)) + out[name].astype(np.float64)
    sums: dict[str, NDArray[np.float32]] = {}
    for name, total in totals.items():
        with np.errstate(over="ignore"):  # too large for float32 becomes inf, refused here
            sums[name] = total.astype(np.float32)
        require_finite(name, sums[name])
    return Observed(sums, samples, None if batches.y is None else correct)
