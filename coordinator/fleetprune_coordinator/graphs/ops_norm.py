"""Batch normalisation and its gradient.

Statistics are weighted: a sample of weight 0 (`Lowering.live`) is padding of a short batch and
must not count. With n = (live samples) * (positions):

    mean = sum(x) / n        var = sum((x - mean)**2) / n        rstd = 1 / sqrt(var + eps)
    y = (x - mean) * rstd * w + b
    gw = sum(g * (x - mean)) * rstd        gb = sum(g)
    gx = w * rstd * (g - gb / n - (x - mean) * rstd**2 * sum(g * (x - mean)) / n)   (live samples)

The loss does not depend on padding samples, so g is zero there and plain sums over g are right.
"""
# ruff: noqa: PLR0917  (a rule takes the operator's arguments in the order of its schema)

from collections.abc import Sequence

import numpy as np

from fleetprune_coordinator.graphs import ops_norm_blocked as fast
from fleetprune_coordinator.graphs.batch_statistics import (
    Trained,
    Weights,
    correction,
    inverse_root,
    mask_padding,
    sample_weights,
)
from fleetprune_coordinator.graphs.lowering import Call, Lowering, lowers
from fleetprune_coordinator.graphs.values import Value


def scale_and_shift(low: Lowering, x: str, gain: str, offset: str, channels: int) -> str:
    """X * gain + offset per channel, as one BatchNormalization with mean 0 and variance 1."""
    zero, one = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    constant = low.writer.constant
    return low.op("BatchNormalization", x, gain, offset, constant(zero), constant(one), epsilon=0.0)


@lowers("aten.native_batch_norm", "aten._native_batch_norm_legit")
def native_batch_norm(
    low: Lowering,
    call: Call,
    x: Value,
    w: Value | None,
    b: Value | None,
    running_mean: Value | None,
    running_var: Value | None,
    training: bool | float,
    momentum: float,
    eps: float | None = None,
) -> list[Value | None]:
    """BatchNorm1d, 2d, 3d and InstanceNorm.

    Also updates the running statistics, the variance by n / (n - 1): see `Lowering.updated`. One
    single value has no unbiased variance: the biased one, 0, counts, as in `aggregate.moments`.
    """
    if eps is None:  # the overload without running statistics
        training, momentum, eps = running_mean, running_var, training  # type: ignore[assignment]
        running_mean = running_var = None
    c = x.shape[1]
    gain = low.plain(w) if w else low.writer.constant(np.ones(c, np.float32))
    offset = low.plain(b) if b else low.writer.constant(np.zeros(c, np.float32))
    if not training:
        if running_mean is None or running_var is None:
            raise call.unsupported("is not supported in evaluation without running statistics")
        name = low.op(
            "BatchNormalization",
            low.plain(x),
            gain,
            offset,
            low.plain(running_mean),
            low.plain(running_var),
            epsilon=float(eps),
        )
        low.memo["frozen", call.node] = (running_mean, running_var, gain)
        return [low.result(call, name), None, None]

    if low.batch_size is not None:
        name = _by_itself(low, x, (w, b), float(eps))
        return [low.result(call, name), None, None]
    weights = sample_weights(low, x.shape)
    normalise = fast.normalise if fast.suits(low, x) else _normalise
    y, mean, variance, trained = normalise(low, call, x, gain, offset, float(eps), weights)
    low.memo["batch_norm", call.node] = trained
    if running_mean is not None and running_var is not None:
        one = low.scalar(1.0)
        others = low.op("Max", low.op("Sub", weights.count, one), one)
        unbiased = low.op("Div", weights.count, others)
        low.updated[running_mean] = _moved(low, running_mean, mean, momentum)
        low.updated[running_var] = _moved(
            low, running_var, low.op("Mul", variance, unbiased), momentum
        )
    return [y, None, None]


def _by_itself(low: Lowering, x: Value, affine: Sequence[Value | None], eps: float) -> str:
    """InstanceNorm in an inference graph, which shows an open number of samples as channels."""
    axes = low.ints(0, *range(2, len(x.shape)))
    name = low.plain(x)
    centred = low.op("Sub", name, low.op("ReduceMean", name, axes, keepdims=1))
    variance = low.op("ReduceMean", low.op("Mul", centred, centred), axes, keepdims=1)
    name = low.op("Mul", centred, inverse_root(low, variance, eps))
    for op_type, vector in zip(("Mul", "Add"), affine, strict=True):
        if vector is not None:
            column = low.reshape(low.plain(vector), (1, x.shape[1], *[1] * (len(x.shape) - 2)))
            name = low.op(op_type, name, column)
    return name


def _moved(low: Lowering, running: Value, now: str, momentum: float) -> str:
    """(1 - momentum) * running + momentum * now."""
    kept = low.op("Mul", low.plain(running), low.scalar(1 - momentum))
    return low.op("Add", kept, low.op("Mul", now, low.scalar(momentum)))


def _normalise(
    low: Lowering, call: Call, x: Value, gain: str, offset: str, eps: float, weights: Weights
) -> tuple[Value, str, str, Trained]:
    c = x.shape[1]
    mean = _weighted_mean(low, low.plain(x), x.shape, weights)
    ones = low.writer.constant(np.ones(c, np.float32))
    centred = scale_and_shift(low, low.plain(x), ones, low.op("Neg", mean), c)
    variance = _weighted_mean(low, low.op("Mul", centred, centred), x.shape, weights)
    rstd = inverse_root(low, variance, eps)
    scale = low.op("Mul", rstd, gain)
    y = scale_and_shift(low, centred, scale, offset, c)
    trained = Trained(Value(x.shape, plain=centred), scale, rstd, weights)
    # Cheap: `_backward` keeps `centred`.
    return low.result(call, low.writer.cheap(y)), mean, variance, trained


def _weighted_mean(low: Lowering, name: str, shape: Sequence[int], weights: Weights) -> str:
    """(C,) mean over positions and live samples."""
    if weights.share is None:
        axes = low.ints(0, *range(2, len(shape)))
        return low.op("ReduceMean", name, axes, keepdims=0)
    if len(shape) > 2:
        name = low.op("ReduceMean", name, low.ints(*range(2, len(shape))), keepdims=0)
    return low.op("MatMul", weights.share, name)


@lowers("aten.native_batch_norm_backward")
def native_batch_norm_backward(
    low: Lowering,
    call: Call,
    g: Value,
    x: Value,
    _w: Value | None,
    _running_mean: Value | None,
    _running_var: Value | None,
    _mean: Value | None,
    _invstd: Value | None,
    training: bool,
    eps: float,
    wanted: Sequence[bool],
) -> list[Value | None]:
    """Gradients of input, weight and bias."""
    forward = _forward_node(call)
    if not training:
        return _frozen_backward(low, g, x, float(eps), low.memo["frozen", forward])
    trained: Trained = low.memo["batch_norm", forward]
    backward = fast.backward if trained.centred.blocked else _backward
    gx, gw, gb = backward(low, g, trained, wanted[0])
    c = (x.shape[1],)
    return [gx, Value(c, plain=gw), Value(c, plain=gb)]


def _forward_node(call: Call) -> object:
    """The forward BatchNorm, found by the saved mean that the backward one takes."""
    saved_mean = call.node.args[5]
    return saved_mean.args[0]  # type: ignore[union-attr]


def _backward(
    low: Lowering, g: Value, trained: Trained, input_wanted: bool
) -> tuple[Value | None, str, str]:
    shape, weights = g.shape, trained.weights
    axes = low.ints(0, *range(2, len(shape)))
    gradient, centred = low.plain(g), low.plain(trained.centred)
    gb = low.op("ReduceSum", gradient, axes, keepdims=0)
    dot = low.op("ReduceSum", low.op("Mul", gradient, centred), axes, keepdims=0)
    gx = None
    if input_wanted:
        offset, slope = correction(low, trained, gb, dot)
        zero = low.writer.constant(np.zeros(shape[1], np.float32))
        name = low.op(
            "Add",
            scale_and_shift(low, gradient, trained.gain, offset, shape[1]),
            scale_and_shift(low, centred, slope, zero, shape[1]),
        )
        gx = Value(shape, plain=mask_padding(low, name, weights.live, len(shape)))
    return gx, low.op("Mul", dot, trained.rstd), gb


def _frozen_backward(
    low: Lowering, g: Value, x: Value, eps: float, frozen: tuple[Value, Value, str]
) -> list[Value | None]:
    """BatchNorm that uses its running statistics: an affine map. gx = g * w * rstd."""
    running_mean, running_var, gain = frozen
    c, axes = x.shape[1], low.ints(0, *range(2, len(x.shape)))
    rstd = inverse_root(low, low.plain(running_var), eps)
    gradient = low.plain(g)
    zero = low.writer.constant(np.zeros(c, np.float32))
    ones = low.writer.constant(np.ones(c, np.float32))
    negative = low.op("Neg", low.plain(running_mean))
    centred = scale_and_shift(low, low.plain(x), ones, negative, c)
    dot = low.op("ReduceSum", low.op("Mul", gradient, centred), axes, keepdims=0)
    gx = scale_and_shift(low, gradient, low.op("Mul", gain, rstd), zero, c)
    gb = low.op("ReduceSum", gradient, axes, keepdims=0)
    return [
        Value(x.shape, plain=gx),
        Value((c,), plain=low.op("Mul", dot, rstd)),
        Value((c,), plain=gb),
    ]
