"""Batch normalisation on blocked tensors; the formulas are those of `ops_norm`.

Per-channel affine maps are 1x1 depthwise convolutions, into which a following ReLU or ReLU6 and an
addition are fused; means are global average pools; the sum of a product over all positions is a
depthwise convolution whose filter is one of the factors, which in blocked layout already lies in
memory as a filter.
"""
# ruff: noqa: PLR0917  (a rule takes the operator's arguments in the order of its schema)

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from fleetprune_coordinator.graphs.batch_statistics import (
    Trained,
    Weights,
    correction,
    inverse_root,
    mask_padding,
)
from fleetprune_coordinator.graphs.lowering import Call, Lowering
from fleetprune_coordinator.graphs.ops_conv_blocked import conv
from fleetprune_coordinator.graphs.values import Value, four_axes
from fleetprune_coordinator.graphs.writer import NCHWC

_aten = torch.ops.aten


def suits(low: Lowering, x: Value) -> bool:
    """Whether x has positions to normalise over, and one or two spatial axes."""
    return bool(low.block) and len(x.shape) in (3, 4) and four_axes(x.shape)[2:] != (1, 1)


def _affine(
    low: Lowering, x: str, gain: str, offset: str, padded: int, *, add: str = "", **activation: Any
) -> str:
    """activation(x * gain + offset + add); gain and offset (padded,)."""
    weight = low.op("Reshape", gain, low.ints(padded, 1, 1, 1))
    return conv(low, x, weight, (1, 1), group=padded, bias=offset, add=add, **activation)


def _pooled(low: Lowering, value: Value) -> str:
    """(N, padded) mean over positions."""
    name = low.op("GlobalAveragePool", low.blocked(value), domain=NCHWC)
    return low.op("Reshape", name, low.ints(value.shape[0], low.layouts.padded(value.shape[1])))


def _over_samples(low: Lowering, name: str, weights: str | None, op_type: str) -> str:
    """(N, padded) -> (padded,): the weighted sum, or the plain reduction without weights."""
    if weights is None:
        return low.op(op_type, name, low.ints(0), keepdims=0)
    return low.op("MatMul", weights, name)


def _dots(low: Lowering, a: str, b: str, shape: Sequence[int]) -> str:
    """(N, padded) sum over positions of a*b."""
    n, c, height, width = four_axes(shape)
    padded = low.layouts.padded(c)
    name = conv(
        low,
        low.op("Reshape", a, low.ints(1, n * padded, height, width)),
        low.op("Reshape", b, low.ints(n * padded, 1, height, width)),
        (height, width),
        group=n * padded,
    )
    return low.op("Reshape", name, low.ints(n, padded))


def normalise(
    low: Lowering, call: Call, x: Value, gain: str, offset: str, eps: float, weights: Weights
) -> tuple[Value, str, str, Trained]:
    """Output, mean (C,), variance (C,), and what the gradient needs."""
    c = x.shape[1]
    padded, cut = low.layouts.padded(c), low.layouts.cut_vector
    mean = _over_samples(low, _pooled(low, x), weights.share, "ReduceMean")
    ones = low.writer.constant(np.ones(padded, np.float32))
    centred = _affine(low, low.blocked(x), ones, low.op("Neg", mean), padded)
    total = _over_samples(low, _dots(low, centred, centred, x.shape), weights.live, "ReduceSum")
    variance = low.op("Mul", total, weights.inverse)
    rstd = inverse_root(low, variance, eps)
    scale = low.op("Mul", rstd, low.layouts.pad_vector(gain, c))
    activation = fuse_activation(low, call.node)
    name = _affine(
        low, centred, scale, low.layouts.pad_vector(offset, c), padded, **activation.attributes
    )
    y = Value(x.shape, blocked=low.writer.cheap(name))  # from `centred`, which `backward` keeps
    if activation.node is not None:
        low.memo["activated", activation.node] = y
    trained = Trained(Value(x.shape, blocked=centred), scale, rstd, weights)
    return y, cut(mean, c), cut(variance, c), trained


def backward(
    low: Lowering, g: Value, trained: Trained, input_wanted: bool
) -> tuple[Value | None, str, str]:
    """Gradients of input, weight (C,) and bias (C,)."""
    _, c, height, width = four_axes(g.shape)
    padded, cut = low.layouts.padded(c), low.layouts.cut_vector
    gradient, centred = low.blocked(g), low.blocked(trained.centred)
    gb = low.op("ReduceSum", _pooled(low, g), low.ints(0), keepdims=0)
    gb = low.op("Mul", gb, low.scalar(float(height * width)))
    dot = low.op("ReduceSum", _dots(low, gradient, centred, g.shape), low.ints(0), keepdims=0)
    gx = None
    if input_wanted:
        offset, slope = correction(low, trained, gb, dot)
        scaled = _affine(low, centred, slope, "", padded)
        name = _affine(low, gradient, trained.gain, offset, padded, add=scaled)
        gx = Value(g.shape, blocked=mask_padding(low, name, trained.weights.live, 4))
    return gx, cut(low.op("Mul", dot, trained.rstd), c), cut(gb, c)


class Fused:
    """An activation that a convolution applies itself."""

    def __init__(self, node: fx.Node | None = None, **attributes: Any) -> None:
        self.node = node
        self.attributes = attributes


def fuse_activation(low: Lowering, node: fx.Node) -> Fused:
    """The ReLU or ReLU6 that alone reads a BatchNorm's output.

    ReLU's gradient looks at ReLU's output. ReLU6's looks at its input, but asks only whether that
    lies strictly inside (0, 6), which the clipped value answers just as well.
    """
    outputs = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
    if len(outputs) != 1:
        return Fused()
    readers = [u for u in outputs[0].users if u.target is not _aten.hardtanh_backward.default]
    if len(readers) != 1:
        return Fused()
    reader = readers[0]
    if reader.target in (_aten.relu.default, _aten.relu_.default):
        if len(outputs[0].users) == 1:
            return Fused(reader, activation="Relu")
    elif reader.target in (_aten.hardtanh.default, _aten.hardtanh_.default):
        bounds = [float(b) for b in (*reader.args[1:], *(-1.0, 1.0)[len(reader.args) - 1 :])]  # type: ignore[arg-type]
        return Fused(reader, activation="Clip", activation_params=bounds)
    return Fused()
