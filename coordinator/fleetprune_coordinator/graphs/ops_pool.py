"""Pooling and its gradients."""
# ruff: noqa: PLR0917  (a rule takes the operator's arguments in the order of its schema)

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from fleetprune_coordinator.graphs.lowering import Call, Lowering, lowers
from fleetprune_coordinator.graphs.values import Value


@lowers("aten.max_pool2d_with_indices")
def max_pool2d(
    low: Lowering,
    call: Call,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    pad: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> list[Value]:
    """Largest element per window, and where it stood.

    ONNX counts that position in the whole tensor, torch in its plane; only the backward rule
    reads it.
    """
    stride = stride or kernel
    value, index = low.writer.multi(
        "MaxPool",
        low.plain(x),
        outputs=2,
        kernel_shape=list(kernel),
        strides=list(stride),
        pads=[*pad, *pad],
        dilations=list(dilation),
        ceil_mode=int(ceil_mode),
    )
    return [low.result(call, value), Value(call.shape, "int64", plain=index)]


@lowers("aten.adaptive_max_pool2d")
def adaptive_max_pool2d(low: Lowering, call: Call, x: Value, _size: Sequence[int]) -> list[Value]:
    """Largest element of each of the output's equal windows."""
    kernel = _even_windows(call, x.shape, call.shape)
    value, index = low.writer.multi(
        "MaxPool", low.plain(x), outputs=2, kernel_shape=kernel, strides=kernel
    )
    return [low.result(call, value), Value(call.shape, "int64", plain=index)]


def _scatter(low: Lowering, call: Call, g: Value, index: Value) -> Value:
    """Add each gradient to the element that the maximum came from."""
    name = low.op(
        "ScatterElements",
        low.writer.zeros(prod(call.shape)),
        low.reshape(low.plain(index), (-1,)),
        low.reshape(low.plain(g), (-1,)),
        reduction="add",
    )
    return low.result(call, low.reshape(name, call.shape))


@lowers("aten.max_pool2d_with_indices_backward")
def max_pool2d_backward(
    low: Lowering,
    call: Call,
    g: Value,
    _x: Value,
    _kernel: Sequence[int],
    _stride: Sequence[int],
    _pad: Sequence[int],
    _dilation: Sequence[int],
    _ceil_mode: bool,
    index: Value,
) -> Value:
    """See `_scatter`."""
    return _scatter(low, call, g, index)


@lowers("aten.adaptive_max_pool2d_backward")
def adaptive_max_pool2d_backward(
    low: Lowering, call: Call, g: Value, _x: Value, index: Value
) -> Value:
    """See `_scatter`."""
    return _scatter(low, call, g, index)


def _even_windows(call: Call, big: Sequence[int], small: Sequence[int]) -> list[int]:
    """Window of an adaptive pool whose windows are all alike."""
    if any(b % s for b, s in zip(big[-2:], small[-2:], strict=True)):
        raise call.unsupported(
            f"is supported only where {tuple(small[-2:])} divides {tuple(big[-2:])}"
        )
    return [b // s for b, s in zip(big[-2:], small[-2:], strict=True)]


@lowers("aten._adaptive_avg_pool2d")
def adaptive_avg_pool2d(low: Lowering, call: Call, x: Value, _size: Sequence[int]) -> Value:
    """Mean of each of the output's equal windows."""
    kernel = _even_windows(call, x.shape, call.shape)
    name = low.op("AveragePool", low.plain(x), kernel_shape=kernel, strides=kernel)
    return low.result(call, name)


@lowers("aten._adaptive_avg_pool2d_backward")
def adaptive_avg_pool2d_backward(low: Lowering, call: Call, g: Value, x: Value) -> Value:
    """Each gradient spread over its window."""
    kernel = _even_windows(call, x.shape, g.shape)
    scaled = low.op("Mul", low.plain(g), low.scalar(1 / prod(kernel)))
    return low.result(call, _spread(low, scaled, g.shape, kernel))


def _spread(low: Lowering, name: str, shape: Sequence[int], kernel: Sequence[int]) -> str:
    """Repeat each element over a window of `kernel`."""
    *front, height, width = shape
    rows, columns = kernel
    name = low.op("Reshape", name, low.ints(*front, height, 1, width, 1))
    name = low.op("Expand", name, low.ints(*front, height, rows, width, columns))
    return low.op("Reshape", name, low.ints(*front, height * rows, width * columns))


@lowers("aten.avg_pool2d")
def avg_pool2d(
    low: Lowering,
    call: Call,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    pad: Sequence[int],
    ceil_mode: bool,
    count_pad: bool,
    divisor: int | None,
) -> Value:
    """Mean per window."""
    _check_average(call, ceil_mode, divisor)
    name = low.op(
        "AveragePool",
        low.plain(x),
        kernel_shape=list(kernel),
        strides=list(stride or kernel),
        pads=[*pad, *pad],
        count_include_pad=int(count_pad),
    )
    return low.result(call, name)


def _check_average(call: Call, ceil_mode: bool, divisor: int | None) -> None:
    if ceil_mode or divisor is not None:
        raise call.unsupported("is not supported with ceil_mode or divisor_override")


def _window_counts(
    size: Sequence[int],
    out: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    pad: Sequence[int],
) -> NDArray[np.float32]:
    """(Ho, Wo) elements per window that are not padding."""

    def along(axis: int) -> NDArray[np.int64]:
        start = np.arange(out[axis]) * stride[axis] - pad[axis]
        return np.minimum(start + kernel[axis], size[axis]) - np.maximum(start, 0)

    return np.outer(along(0), along(1)).astype(np.float32)


@lowers("aten.avg_pool2d_backward")
def avg_pool2d_backward(
    low: Lowering,
    call: Call,
    g: Value,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    pad: Sequence[int],
    ceil_mode: bool,
    count_pad: bool,
    divisor: int | None,
) -> Value:
    """Each gradient, divided by its window's count, spread over its window.

    Overlapping windows: a transposed convolution with a kernel of ones.
    """
    _check_average(call, ceil_mode, divisor)
    stride = stride or kernel
    *front, height, width = x.shape
    out = g.shape[-2:]
    if count_pad:
        share = low.scalar(1 / prod(kernel))
    else:
        counts = _window_counts((height, width), out, kernel, stride, pad)
        share = low.writer.constant(1 / counts)
    scaled = low.op("Mul", low.plain(g), share)
    rest = [
        n + 2 * p - (o - 1) * s - k
        for n, p, o, s, k in zip((height, width), pad, out, stride, kernel, strict=True)
    ]
    if list(kernel) == list(stride) and not any(pad):
        name = _spread(low, scaled, g.shape, kernel)
        if any(rest):
            axes = [0] * len(front)
            name = low.op("Pad", name, low.ints(*axes, 0, 0, *axes, *rest))
        return low.result(call, name)
    planes = low.op("Reshape", scaled, low.ints(prod(front), 1, *out))
    ones = low.writer.constant(np.ones((1, 1, *kernel), np.float32))
    name = low.op(
        "ConvTranspose",
        planes,
        ones,
        strides=list(stride),
        pads=[*pad, *pad],
        output_padding=rest,
    )
    return low.result(call, low.reshape(name, call.shape))
