"""Convolution and its gradients on blocked tensors: the operators of `com.microsoft.nchwc`.

onnxruntime has fast convolutions on blocked tensors, but chooses them only for constant weights.
Here they are written into the graph directly, and the weights are brought into the filter layouts
that they expect:

* dense, blocked input: (O/B, C/B, taps, B of C, B of O);
* dense, plain input (fewer channels than a block): (O/B, C, taps, B of O) with taps before B;
* depthwise: (C/B, taps, B).

Both gradients are convolutions too, see `input_gradient` and `weight_gradient`.
"""
# ruff: noqa: PLR0917  (a rule takes the operator's arguments in the order of its schema)

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from fleetprune_coordinator.graphs.geometry import Geometry, plain4, read_part
from fleetprune_coordinator.graphs.lowering import Call, Lowering
from fleetprune_coordinator.graphs.values import Value, four_axes
from fleetprune_coordinator.graphs.writer import NCHWC


def suits(geometry: Geometry) -> bool:
    """Whether the blocked operators cover this convolution: dense or depthwise."""
    return geometry.groups == 1 or geometry.depthwise


def conv(
    low: Lowering,
    x: str,
    weight: str,
    kernel: Sequence[int],
    *,
    pads: Sequence[int] = (0, 0, 0, 0),
    strides: Sequence[int] = (1, 1),
    dilations: Sequence[int] = (1, 1),
    group: int = 1,
    bias: str = "",
    add: str = "",
    **activation: Any,
) -> str:
    """activation(conv(x, weight) + bias + add), one blocked convolution.

    Args:
        low: The graph.
        x: Blocked input.
        weight: In one of the filter layouts.
        kernel: Rows and columns.
        pads: Top, left, bottom, right.
        strides: Rows and columns.
        dilations: Rows and columns.
        group: Number of groups; all padded channels for a depthwise one.
        bias: (padded O,), or "".
        add: A blocked tensor of the output's shape, or "".
        **activation: `activation` and `activation_params` of the operator.
    """
    inputs = [x, weight, bias, add]
    while not inputs[-1]:
        inputs.pop()
    return low.op(
        "Conv",
        *inputs,
        domain=NCHWC,
        kernel_shape=list(kernel),
        pads=list(pads),
        strides=list(strides),
        dilations=list(dilations),
        group=group,
        **activation,
    )


def _chosen_taps(low: Lowering, geometry: Geometry, w: str, taps: Sequence[int]) -> str:
    """(O, C/groups, taps): the weight's kernel elements in the wanted order."""
    outputs, channels, *kernel = geometry.weight_shape
    name = low.op("Reshape", w, low.ints(outputs, channels, prod(kernel)))
    if list(taps) == list(range(prod(kernel))):
        return name
    return low.op("Gather", name, low.ints(*taps), axis=2)


def _pad_channels(low: Lowering, name: str, outputs: int, channels: int) -> str:
    """Add zeros behind the first two of three axes."""
    if outputs == channels == 0:
        return name
    return low.op("Pad", name, low.ints(0, 0, 0, outputs, channels, 0))


def dense_filter(
    low: Lowering,
    geometry: Geometry,
    w: str,
    taps: Sequence[int],
    kernel: Sequence[int],
    *,
    plain_input: bool = False,
    swap: bool = False,
) -> str:
    """A filter of chosen kernel elements for a dense convolution.

    Args:
        low: The graph.
        geometry: The convolution that w belongs to.
        w: Plain weight.
        taps: Which kernel elements, in order.
        kernel: Rows and columns that they form.
        plain_input: The convolution will read a plain tensor.
        swap: Exchange input and output channels (for the input's gradient).
    """
    outputs, channels = geometry.weight_shape[:2]
    b, padded = low.block, low.layouts.padded
    wide_outputs = padded(outputs)
    wide_channels = channels if plain_input else padded(channels)
    name = _chosen_taps(low, geometry, w, taps)
    name = _pad_channels(low, name, wide_outputs - outputs, wide_channels - channels)
    if plain_input:
        name = low.op("Reshape", name, low.ints(wide_outputs // b, b, channels, len(taps)))
        name = low.op("Transpose", name, perm=[0, 2, 3, 1])
        return low.op("Reshape", name, low.ints(wide_outputs, channels, *kernel))
    name = low.op("Reshape", name, low.ints(wide_outputs // b, b, wide_channels // b, b, len(taps)))
    if swap:
        name = low.op("Transpose", name, perm=[2, 0, 4, 1, 3])
        return low.op("Reshape", name, low.ints(wide_channels, wide_outputs, *kernel))
    name = low.op("Transpose", name, perm=[0, 2, 4, 3, 1])
    return low.op("Reshape", name, low.ints(wide_outputs, wide_channels, *kernel))


def depthwise_filter(
    low: Lowering, geometry: Geometry, w: str, taps: Sequence[int], kernel: Sequence[int]
) -> str:
    """A filter of chosen kernel elements for a depthwise convolution; see `dense_filter`."""
    channels, b = geometry.channels, low.block
    padded = low.layouts.padded(channels)
    name = _pad_channels(low, _chosen_taps(low, geometry, w, taps), padded - channels, 0)
    name = low.op("Reshape", name, low.ints(padded // b, b, len(taps)))
    name = low.op("Transpose", name, perm=[0, 2, 1])
    return low.op("Reshape", name, low.ints(padded, 1, *kernel))


def forward(
    low: Lowering, call: Call, geometry: Geometry, x: Value, w: Value, bias: Value | None
) -> Value:
    """The convolution itself."""
    taps = range(prod(geometry.kernel))
    weight = low.plain(w)
    offset = "" if bias is None else low.layouts.pad_vector(low.plain(bias), geometry.outputs)
    group = 1
    if geometry.depthwise:
        source = low.blocked(x)
        weight = depthwise_filter(low, geometry, weight, taps, geometry.kernel)
        group = low.layouts.padded(geometry.channels)
    else:
        plain_input = geometry.channels < low.block and x.blocked is None
        source = low.reshape(low.plain(x), four_axes(x.shape)) if plain_input else low.blocked(x)
        weight = dense_filter(low, geometry, weight, taps, geometry.kernel, plain_input=plain_input)
    name = conv(
        low,
        source,
        weight,
        geometry.kernel,
        pads=(*geometry.pad, *geometry.pad),
        strides=geometry.stride,
        dilations=geometry.dilation,
        group=group,
        bias=offset,
    )
    return Value(call.shape, blocked=name)


def channel_sum(low: Lowering, value: Value) -> str:
    """The sum over samples and positions, (C,)."""
    n, c, h, w = four_axes(value.shape)
    pooled = low.op("GlobalAveragePool", low.blocked(value), domain=NCHWC)
    pooled = low.op("Reshape", pooled, low.ints(n, low.layouts.padded(c)))
    total = low.op("ReduceSum", pooled, low.ints(0), keepdims=0)
    total = low.op("Mul", total, low.scalar(float(h * w)))
    return low.layouts.cut_vector(total, c)


@dataclass(frozen=True)
class Phase:
    """Along one axis: the input positions that read the same kernel elements.

    Input position h gets g[(h + pad - k) / stride] * w[k] for those k that make the quotient
    whole: k = a, a + stride, ... with a = (h + pad) mod stride. The positions of one `a` are
    stride apart, so their gradients are a convolution of stride 1 with every stride-th element of
    the kernel, last first.
    """

    taps: tuple[int, ...]
    first: int
    """The first such position, 0 <= first < stride."""
    count: int
    """How many there are."""
    pads: tuple[int, int]
    """Padding of g before and behind; negative: elements to leave out."""


def phases(kernel: int, stride: int, pad: int, size: int, out_size: int) -> list[Phase]:
    """All phases of one axis that have kernel elements and positions."""
    found = []
    for a in range(min(stride, kernel)):
        taps = tuple(range(a, kernel, stride))[::-1]
        lowest = -((a - pad) // stride)  # ceil((pad - a) / stride)
        count = (size - 1 + pad - a) // stride - lowest + 1
        before = len(taps) - 1 - lowest
        behind = count - 1 + len(taps) - out_size - before
        if count > 0:
            found.append(Phase(taps, (a - pad) % stride, count, (before, behind)))
    return found


def input_gradient(
    low: Lowering, geometry: Geometry, g: Value, w: Value, shape: tuple[int, ...]
) -> Value:
    """One convolution of g per phase, interleaved; with stride 1 there is only one phase."""
    rows, columns = (
        phases(*axis)
        for axis in zip(
            geometry.kernel,
            geometry.stride,
            geometry.pad,
            geometry.size,
            geometry.out_size,
            strict=True,
        )
    )
    weight = low.plain(w)
    if geometry.stride == (1, 1):
        name = _phase_gradient(low, geometry, g, weight, rows[0], columns[0])
        return Value(shape, blocked=name)
    parts = {
        (r.first, c.first): _spread(
            low, geometry, _phase_gradient(low, geometry, g, weight, r, c), r.count, c.count
        )
        for r in rows
        for c in columns
    }
    return Value(shape, blocked=_interleave(low, geometry, parts))


def _phase_gradient(
    low: Lowering, geometry: Geometry, g: Value, weight: str, row: Phase, column: Phase
) -> str:
    """Blocked (N, C, row.count, column.count)."""
    taps = [i * geometry.kernel[1] + j for i in row.taps for j in column.taps]
    kernel = (len(row.taps), len(column.taps))
    if geometry.depthwise:
        filter_ = depthwise_filter(low, geometry, weight, taps, kernel)
        group = low.layouts.padded(geometry.channels)
    else:
        filter_ = dense_filter(low, geometry, weight, taps, kernel, swap=True)
        group = 1
    (top, bottom), (left, right) = row.pads, column.pads
    source = low.blocked(g)
    if min(top, bottom, left, right) < 0:
        height, width = geometry.out_size
        starts = max(0, -top), max(0, -left)
        ends = height - max(0, -bottom), width - max(0, -right)
        source = low.op(
            "Slice",
            low.layouts.memory(source, g.shape),
            low.ints(*starts),
            low.ints(*ends),
            low.ints(2, 3),
        )
        channels = low.layouts.padded(geometry.outputs)
        part = (ends[0] - starts[0], ends[1] - starts[1])
        source = low.op("Reshape", source, low.ints(geometry.batch, channels, *part))
    pads = [max(0, p) for p in (top, left, bottom, right)]
    return conv(low, source, filter_, kernel, pads=pads, group=group)


def _grid(geometry: Geometry) -> tuple[int, int]:
    """Positions per phase, at most."""
    rows, columns = (-(-n // s) for n, s in zip(geometry.size, geometry.stride, strict=True))
    return rows, columns


def _spread(low: Lowering, geometry: Geometry, name: str, rows: int, columns: int) -> str:
    """One phase as (N*C/B, rows, 1, columns, 1, B), padded to the largest phase's size."""
    b, n = low.block, geometry.batch
    planes = low.layouts.padded(geometry.channels) // b
    height, width = _grid(geometry)
    if (rows, columns) != (height, width):
        name = low.op("Reshape", name, low.ints(n, planes, rows, columns, b))
        pads = (0, 0, 0, 0, 0, 0, 0, height - rows, width - columns, 0)
        name = low.op("Pad", name, low.ints(*pads))
    return low.op("Reshape", name, low.ints(n * planes, height, 1, width, 1, b))


def _interleave(low: Lowering, geometry: Geometry, parts: dict[tuple[int, int], str]) -> str:
    """Put the phases' rows and columns in turn; a phase without kernel elements is zero."""
    b, n = low.block, geometry.batch
    planes = low.layouts.padded(geometry.channels) // b
    (height, width), (tall, wide) = _grid(geometry), geometry.stride
    zero = low.writer.zeros(n * planes, height, 1, width, 1, b)
    rows = [[parts.get((row, column), zero) for column in range(wide)] for row in range(tall)]
    joined = [low.op("Concat", *row, axis=4) if wide > 1 else row[0] for row in rows]
    name = low.op("Concat", *joined, axis=2) if tall > 1 else joined[0]
    if (height * tall, width * wide) != geometry.size:
        name = low.op("Reshape", name, low.ints(n, planes, height * tall, width * wide, b))
        name = low.op("Slice", name, low.ints(0, 0), low.ints(*geometry.size), low.ints(2, 3))
    return low.op("Reshape", name, low.ints(n, planes * b, *geometry.size))


def weight_gradient(low: Lowering, geometry: Geometry, x: Value, g: Value) -> str:
    """The convolution of the input with the output's gradient as its filter.

    gw[k] = sum over h of x[h*stride + k - pad] * g[h]: output position k, kernel position h,
    dilation = the old stride.
    """
    if geometry.depthwise:
        return _depthwise_weight_gradient(low, geometry, x, g)
    return _dense_weight_gradient(low, geometry, x, g)


def _depthwise_weight_gradient(low: Lowering, geometry: Geometry, x: Value, g: Value) -> str:
    """All samples' channels as channels of one sample: (1, N*C, H, W).

    The blocked g already lies in memory as a depthwise filter of N*C channels. The sum over
    samples follows.
    """
    n, c, b = geometry.batch, geometry.channels, low.block
    padded = low.layouts.padded(c)
    source, size, pads = low.blocked(x), geometry.size, (*geometry.pad, *geometry.pad_end)
    if min(pads) < 0:
        part = Value((n, c, *geometry.extent), plain=read_part(low, geometry, plain4(low, x)))
        source, size, pads = low.blocked(part), geometry.extent, (0, 0, 0, 0)
    name = conv(
        low,
        low.op("Reshape", source, low.ints(1, n * padded, *size)),
        low.op("Reshape", low.blocked(g), low.ints(n * padded, 1, *geometry.out_size)),
        geometry.out_size,
        pads=pads,
        dilations=geometry.stride,
        group=n * padded,
    )
    taps = prod(geometry.kernel)
    name = low.op("Reshape", name, low.ints(n, padded // b, taps, b))
    name = low.op("ReduceSum", name, low.ints(0), keepdims=0)
    name = low.op("Transpose", name, perm=[0, 2, 1])
    name = low.op("Reshape", name, low.ints(padded, taps))
    return low.layouts.cut_vector(name, c)


def _dense_weight_gradient(low: Lowering, geometry: Geometry, x: Value, g: Value) -> str:
    """Samples become channels: (C, N, H, W) convolved with (O, N, Ho, Wo) is (C, O, kh, kw)."""
    n, b = geometry.batch, low.block
    samples, outputs = low.layouts.padded(n), low.layouts.padded(geometry.outputs)
    height, width = geometry.out_size

    filter_ = low.blocked(g)
    if samples != n:
        filter_ = low.op("Pad", filter_, low.ints(0, 0, 0, 0, samples - n, 0, 0, 0))
    filter_ = low.op("Reshape", filter_, low.ints(samples // b, b, outputs // b, height * width, b))
    filter_ = low.op("Transpose", filter_, perm=[2, 0, 3, 1, 4])
    filter_ = low.op("Reshape", filter_, low.ints(outputs, samples, height, width))

    source = low.op("Transpose", read_part(low, geometry, plain4(low, x)), perm=[1, 0, 2, 3])
    if samples != n:
        source = low.op("Pad", source, low.ints(0, 0, 0, 0, 0, samples - n, 0, 0))
    source = low.op("ReorderInput", source, domain=NCHWC)

    name = conv(low, source, filter_, geometry.out_size, dilations=geometry.stride)
    name = low.op("ReorderOutput", name, domain=NCHWC, channels=geometry.outputs)
    return low.op("Transpose", name, perm=[1, 0, 2, 3])
