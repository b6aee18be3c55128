"""What both forms of BatchNorm share; the formulas stand in `ops_norm`."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from fleetprune_coordinator.graphs.lowering import Lowering
from fleetprune_coordinator.graphs.values import Value


@dataclass(frozen=True)
class Weights:
    """How samples count in the statistics of one BatchNorm."""

    count: str
    """n, live samples times positions; a tensor without axes."""
    inverse: str
    """1 / n."""
    share: str | None
    """(N,) each sample's part in the mean over samples; None: all alike."""
    live: str | None
    """(N,) 1 or 0; None: all count."""


@dataclass(frozen=True)
class Trained:
    """What the backward rule needs of a BatchNorm in training."""

    centred: Value
    """x - mean."""
    gain: str
    """w * rstd, (C,)."""
    rstd: str
    """(C,)."""
    weights: Weights


def positions(shape: Sequence[int]) -> int:
    """Elements per sample and channel."""
    return prod(shape[2:])


def sample_weights(low: Lowering, shape: Sequence[int]) -> Weights:
    """The weights for an input of `shape`; live samples stand in its leading axis.

    Where the batch is folded with another axis, batch first, each sample's flag is repeated.
    """
    n, per_sample = shape[0], positions(shape)
    live = low.live
    if live is not None and n != low.batch:
        folds, rest = divmod(n, low.batch)
        if rest:  # InstanceNorm shows the batch as channels: its samples are apart anyway
            live = None
        else:
            rows = low.op("Expand", low.reshape(live, (low.batch, 1)), low.ints(low.batch, folds))
            live = low.reshape(rows, (n,))
    if live is None:
        total = float(n * per_sample)
        return Weights(low.scalar(total), low.scalar(1 / total), None, None)
    total_live = low.op("ReduceSum", live, keepdims=0)
    count = low.op("Mul", total_live, low.scalar(float(per_sample)))
    share = low.op("Mul", live, low.op("Reciprocal", total_live))
    return Weights(count, low.op("Reciprocal", count), share, live)


def inverse_root(low: Lowering, variance: str, eps: float) -> str:
    """1 / sqrt(variance + eps)."""
    return low.op("Reciprocal", low.op("Sqrt", low.op("Add", variance, low.scalar(eps))))


def correction(low: Lowering, trained: Trained, gb: str, dot: str) -> tuple[str, str]:
    """The two channel vectors in gx = gain*g + offset + slope*(x - mean)."""
    inverse = trained.weights.inverse
    offset = low.op("Neg", low.op("Mul", trained.gain, low.op("Mul", gb, inverse)))
    squared = low.op("Mul", trained.rstd, trained.rstd)
    slope = low.op("Mul", low.op("Mul", trained.gain, squared), low.op("Mul", dot, inverse))
    return offset, low.op("Neg", slope)


def mask_padding(low: Lowering, name: str, live: str | None, axes: int) -> str:
    """Zero for the samples that do not count."""
    if live is None:
        return name
    column = low.op("Reshape", live, low.ints(-1, *[1] * (axes - 1)))
    return low.op("Mul", name, column)
