"""Convolution and its gradients on plain tensors, which any processor can run.

Notation: x (N, C, H, W) input, w (O, C/groups, kh, kw) weight, y (N, O, Ho, Wo) output, g the
gradient of y. `ops_conv_blocked` does the same faster where the graph may use blocked tensors.
"""
# ruff: noqa: PLR0917  (a rule takes the operator's arguments in the order of its schema)

from collections.abc import Sequence
from typing import Any

import numpy as np

from fleetprune_coordinator.graphs import ops_conv_blocked as fast
from fleetprune_coordinator.graphs.geometry import Geometry, conv_geometry, plain4, read_part
from fleetprune_coordinator.graphs.lowering import Call, Lowering, lowers
from fleetprune_coordinator.graphs.values import Value
from fleetprune_coordinator.graphs.writer import MICROSOFT

NARROW = 16
"""Output columns up to which a depthwise weight gradient is one product per kernel row."""
LONG = 64
"""Positions from which a 1x1 weight gradient is one product per sample, not one for all."""


@lowers("aten.convolution")
def convolution(
    low: Lowering,
    call: Call,
    x: Value,
    w: Value,
    bias: Value | None,
    stride: Sequence[int],
    pad: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Value:
    """Conv1d and Conv2d, also transposed (and, without gradients, 3d)."""
    extra: dict[str, Any] = {"output_padding": list(output_padding)} if transposed else {}
    if low.block and len(x.shape) in (3, 4) and not transposed:
        geometry = conv_geometry(
            x.shape, w.shape, call.shape, stride=stride, pad=pad, dilation=dilation, groups=groups
        )
        if fast.suits(geometry):
            return fast.forward(low, call, geometry, x, w, bias)
    inputs = [low.plain(v) for v in (x, w, bias) if v is not None]
    name = low.op(
        "ConvTranspose" if transposed else "Conv",
        *inputs,
        kernel_shape=list(w.shape[2:]),
        strides=list(stride),
        pads=[*pad, *pad],
        dilations=list(dilation),
        group=groups,
        **extra,
    )
    return low.result(call, name)


@lowers("aten.convolution_backward")
def convolution_backward(
    low: Lowering,
    call: Call,
    g: Value,
    x: Value,
    w: Value,
    _bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    pad: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    _output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> list[Value | None]:
    """Gradients of input, weight and bias, each where it is wanted."""
    if len(x.shape) not in (3, 4):
        raise call.unsupported("is supported for one and two dimensions only")
    if transposed:
        x, g = g, x  # it is the input gradient of the convolution that leads the other way
    geometry = conv_geometry(
        x.shape, w.shape, g.shape, stride=stride, pad=pad, dilation=dilation, groups=groups
    )
    if transposed:
        return _transposed_backward(low, geometry, x, g, w, wanted)
    blocked = bool(low.block) and fast.suits(geometry) and geometry.dilation == (1, 1)
    gx = gw = gb = None
    if wanted[1]:  # before the input's, which would wait in memory beside what this one unfolds
        if blocked and not geometry.pointwise:
            name = fast.weight_gradient(low, geometry, x, g)
        else:
            name = weight_gradient(low, geometry, x, g)
        gw = Value(w.shape, plain=low.reshape(name, w.shape))
    if wanted[2]:
        gb = bias_gradient(low, g)
    if wanted[0]:
        make = fast.input_gradient if blocked else input_gradient
        gx = make(low, geometry, g, w, x.shape)
    return [gx, gw, gb]


def _transposed_backward(
    low: Lowering, geometry: Geometry, g: Value, x: Value, w: Value, wanted: Sequence[bool]
) -> list[Value | None]:
    """Gradients of a transposed convolution; `geometry` leads from its output to its input x."""
    gx = gw = gb = None
    if wanted[1]:
        name = weight_gradient(low, geometry, g, x)
        gw = Value(w.shape, plain=low.reshape(name, w.shape))
    if wanted[2]:
        gb = bias_gradient(low, g)
    if wanted[0]:
        name = low.op(
            "Conv",
            read_part(low, geometry, plain4(low, g)),
            low.reshape(low.plain(w), geometry.weight_shape),
            strides=list(geometry.stride),
            dilations=list(geometry.dilation),
            group=geometry.groups,
        )
        gx = Value(x.shape, plain=name if len(x.shape) == 4 else low.reshape(name, x.shape))
    return [gx, gw, gb]


def bias_gradient(low: Lowering, g: Value) -> Value:
    """sum(g) over samples and positions, (O,)."""
    if g.only_blocked:
        return Value((g.shape[1],), plain=fast.channel_sum(low, g))
    axes = low.ints(0, *range(2, len(g.shape)))
    return Value((g.shape[1],), plain=low.op("ReduceSum", low.plain(g), axes, keepdims=0))


def tap(low: Lowering, geometry: Geometry, padded: str, row: int, column: int) -> str:
    """What kernel element (row, column) meets: (.., .., Ho, Wo) of the padded input."""
    if geometry.kernel == (1, 1) and geometry.stride == (1, 1):
        return padded
    starts = [row * geometry.dilation[0], column * geometry.dilation[1]]
    ends = [
        a + (o - 1) * s + 1
        for a, o, s in zip(starts, geometry.out_size, geometry.stride, strict=True)
    ]
    return low.op(
        "Slice",
        padded,
        low.ints(*starts),
        low.ints(*ends),
        low.ints(2, 3),
        low.ints(*geometry.stride),
    )


def input_gradient(
    low: Lowering, geometry: Geometry, g: Value, w: Value, shape: tuple[int, ...]
) -> Value:
    """The transposed convolution of g with w.

    A depthwise one of stride 1 is written as a convolution with the flipped kernel and pads
    k - 1 - p, for which onnxruntime has the faster code.
    """
    weight = low.reshape(low.plain(w), geometry.weight_shape)
    pads = [k - 1 - p for k, p in zip(geometry.kernel, geometry.pad, strict=True)]
    unit = geometry.stride == geometry.dilation == (1, 1)
    if geometry.depthwise and unit and min(pads) >= 0:
        taps = geometry.kernel[0] * geometry.kernel[1]
        rows = low.op("Reshape", weight, low.ints(geometry.outputs, taps))
        flipped = low.op("Gather", rows, low.ints(*range(taps - 1, -1, -1)), axis=1)
        flipped = low.op("Reshape", flipped, low.ints(*geometry.weight_shape))
        name = low.op("Conv", plain4(low, g), flipped, pads=[*pads, *pads], group=geometry.groups)
    else:
        name = low.op(
            "ConvTranspose",
            plain4(low, g),
            weight,
            strides=list(geometry.stride),
            pads=[*geometry.pad, *geometry.pad],
            dilations=list(geometry.dilation),
            output_padding=list(geometry.output_padding),
            group=geometry.groups,
        )
    return Value(shape, plain=name if len(shape) == 4 else low.reshape(name, shape))


def weight_gradient(low: Lowering, geometry: Geometry, x: Value, g: Value) -> str:
    """gw[o, c, i, j] = sum over n, h, v of g[n, o, h, v] * x[n, c, h*s + i*d - p, v*s + j*d - p].

    Returns:
        The name of a tensor with the elements of w in order.
    """
    gradient = plain4(low, g)
    if geometry.pointwise:
        part = _read_by_pointwise(low, geometry, x)
        return _pointwise_weight_gradient(low, geometry, part, gradient)
    padded = read_part(low, geometry, plain4(low, x))
    if geometry.depthwise and geometry.out_size[1] <= NARROW and geometry.out_size[0] > 1:
        return _depthwise_weight_gradient(low, geometry, padded, gradient)
    parts = [
        low.op(
            "Reshape",
            _tap_gradient(low, geometry, tap(low, geometry, padded, i, j), gradient),
            low.ints(*geometry.weight_shape[:2], 1),
        )
        for i in range(geometry.kernel[0])
        for j in range(geometry.kernel[1])
    ]
    return low.op("Concat", *parts, axis=2) if len(parts) > 1 else parts[0]


def _tap_gradient(low: Lowering, geometry: Geometry, part: str, gradient: str) -> str:
    """The gradient of one kernel element, for all channels: a product per sample and group."""
    n, groups = geometry.batch, geometry.groups
    outputs, channels = geometry.outputs // groups, geometry.channels // groups
    if outputs == channels == 1:
        return low.op("ReduceSum", low.op("Mul", part, gradient), low.ints(0, 2, 3), keepdims=0)
    positions = geometry.out_size[0] * geometry.out_size[1]
    left = low.op("Reshape", gradient, low.ints(n, groups, outputs, positions))
    right = low.op("Reshape", part, low.ints(n, groups, channels, positions))
    product = low.op("FusedMatMul", left, right, domain=MICROSOFT, transB=1)
    return low.op("ReduceSum", product, low.ints(0), keepdims=0)


def _read_by_pointwise(low: Lowering, geometry: Geometry, x: Value) -> str:
    """The positions that a pointwise convolution reads, (N, C, Ho, Wo).

    Blocked values are cut before they change layout: the whole input in a second layout would be
    the largest tensor of all.
    """
    if geometry.pad != (0, 0):
        return tap(low, geometry, read_part(low, geometry, plain4(low, x)), 0, 0)
    if not x.only_blocked or geometry.stride == (1, 1) or len(x.shape) != 4:
        return tap(low, geometry, plain4(low, x), 0, 0)
    n, c = x.shape[:2]
    name = tap(low, geometry, low.layouts.memory(low.blocked(x), x.shape), 0, 0)
    name = low.op("Reshape", name, low.ints(n, low.layouts.padded(c), *geometry.out_size))
    return low.plain(Value((n, c, *geometry.out_size), blocked=name))


def _pointwise_weight_gradient(low: Lowering, geometry: Geometry, part: str, gradient: str) -> str:
    """Sum over n of g[n] @ x[n].T, with positions as columns."""
    n, positions = geometry.batch, geometry.out_size[0] * geometry.out_size[1]
    if positions >= LONG:
        left = low.op("Reshape", gradient, low.ints(n, geometry.outputs, positions))
        right = low.op("Reshape", part, low.ints(n, geometry.channels, positions))
        product = low.op("FusedMatMul", left, right, domain=MICROSOFT, transB=1)
        return low.op("ReduceSum", product, low.ints(0), keepdims=0)

    def rows(name: str, channels: int) -> str:
        name = low.op("Reshape", name, low.ints(n, channels, positions))
        name = low.op("Transpose", name, perm=[1, 0, 2])
        return low.op("Reshape", name, low.ints(channels, n * positions))

    return low.op("Gemm", rows(gradient, geometry.outputs), rows(part, geometry.channels), transB=1)


def _depthwise_weight_gradient(
    low: Lowering, geometry: Geometry, padded: str, gradient: str
) -> str:
    """Depthwise, few columns: per kernel row one product x.T @ g over all samples and rows.

    Its element (u, v) belongs to kernel column j where u = v*stride + j*dilation; a constant 0/1
    matrix adds those up.
    """
    n, c, (out_height, out_width) = geometry.batch, geometry.channels, geometry.out_size
    wide, taps = geometry.extent[1], geometry.kernel[1]
    diagonals = np.zeros((wide, out_width, taps), np.float32)
    for j in range(taps):
        for v in range(out_width):
            diagonals[v * geometry.stride[1] + j * geometry.dilation[1], v, j] = 1
    collect = low.writer.constant(diagonals.reshape(-1, taps))

    by_channel = low.op("Transpose", padded, perm=[1, 0, 2, 3])
    right = low.op("Transpose", gradient, perm=[1, 0, 2, 3])
    right = low.op("Reshape", right, low.ints(c, n * out_height, out_width))
    rows = []
    for i in range(geometry.kernel[0]):
        start = i * geometry.dilation[0]
        part = low.op(
            "Slice",
            by_channel,
            low.ints(start),
            low.ints(start + (out_height - 1) * geometry.stride[0] + 1),
            low.ints(2),
            low.ints(geometry.stride[0]),
        )
        left = low.op("Reshape", part, low.ints(c, n * out_height, wide))
        product = low.op("FusedMatMul", left, right, domain=MICROSOFT, transA=1)
        product = low.op("Reshape", product, low.ints(c, wide * out_width))
        row = low.op("MatMul", product, collect)
        rows.append(low.op("Reshape", row, low.ints(c, 1, taps)))
    return low.op("Concat", *rows, axis=1)
