"""Operators that move elements without computing: views, slices, concatenation, constants."""
# ruff: noqa: PLR0917  (a rule takes the operator's arguments in the order of its schema)

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from fleetprune_coordinator.graphs.lowering import Call, Lowering, lowers
from fleetprune_coordinator.graphs.values import Value

SMALL = 64
"""Elements up to which a filled tensor is stored rather than expanded."""


@lowers("aten.clone", "aten.detach", "aten.alias", "aten.lift_fresh_copy", "aten.contiguous")
def identity(low: Lowering, call: Call, x: Value, *_: Any) -> Value:
    """The tensor itself: nothing in the graph is ever overwritten."""
    return x


@lowers("aten._to_copy")
def to_copy(low: Lowering, call: Call, x: Value, *_: Any) -> Value:
    """Another dtype."""
    if x.dtype == call.dtype:
        return x
    return low.pointwise(call, lambda a: low.cast(a, call.dtype), x, compute=x.dtype)


@lowers("aten.view", "aten._unsafe_view", "aten.reshape", "aten.squeeze", "aten.unsqueeze")
def view(low: Lowering, call: Call, x: Value, *_: Any) -> Value:
    """The same elements in the same order under another shape."""
    if x.shape == call.shape:
        return x
    if x.constant is not None:
        return Value(call.shape, call.dtype, constant=x.constant.reshape(call.shape))
    return low.result(call, low.reshape(low.plain(x), call.shape))


@lowers("aten.as_strided")
def as_strided(
    low: Lowering, call: Call, x: Value, size: list[int], stride: list[int], offset: int | None
) -> Value:
    """Only where it is a plain reshape."""
    contiguous = [prod(size[i + 1 :]) for i in range(len(size))]
    same_order = all(s == c for s, c, n in zip(stride, contiguous, size, strict=True) if n != 1)
    if not same_order or prod(size) != prod(x.shape) or offset not in (None, 0):
        raise call.unsupported("is supported only where it is a plain reshape")
    return view(low, call, x)


def _transpose(low: Lowering, call: Call, x: Value, order: list[int]) -> Value:
    return low.result(call, low.op("Transpose", low.plain(x), perm=order))


@lowers("aten.permute")
def permute(low: Lowering, call: Call, x: Value, order: Sequence[int]) -> Value:
    """The axes in another order."""
    return _transpose(low, call, x, [i % len(order) for i in order])


@lowers("aten.transpose")
def transpose(low: Lowering, call: Call, x: Value, first: int, second: int) -> Value:
    """Two axes swapped."""
    order = list(range(len(call.shape)))
    order[first], order[second] = order[second], order[first]
    return _transpose(low, call, x, order)


@lowers("aten.t")
def t(low: Lowering, call: Call, x: Value) -> Value:
    """A matrix transposed."""
    return _transpose(low, call, x, list(range(len(call.shape)))[::-1])


@lowers("aten.expand")
def expand(low: Lowering, call: Call, x: Value, *_: Any) -> Value:
    """Repeat along axes of length 1; (N, C, 1, 1) to (N, C, H, W) stays blocked."""
    if x.shape == call.shape:
        return x
    if low.block and len(call.shape) == 4 and x.shape == (*call.shape[:2], 1, 1):
        n, c, h, w = call.shape
        b, padded = low.block, low.layouts.padded(c)
        narrow = low.op("Reshape", low.blocked(x), low.ints(n, padded // b, 1, b))
        wide = low.op("Expand", narrow, low.ints(n, padded // b, h * w, b))
        name = low.op("Reshape", wide, low.ints(n, padded, h, w))
        return Value(call.shape, call.dtype, blocked=name)
    return low.result(call, low.op("Expand", low.plain(x), low.dims(call.shape)))


@lowers("aten.repeat")
def repeat(low: Lowering, call: Call, x: Value, repeats: Sequence[int]) -> Value:
    """Tile; the shape may gain leading axes."""
    if low.batch_size is not None and len(x.shape) == 1 and len(repeats) == 1:
        # InstanceNorm repeats its vectors per sample, and no shape is inferred for that Tile.
        rows = low.op("Expand", low.plain(x), low.dims((repeats[0], *x.shape)))
        return low.result(call, low.reshape(rows, call.shape))
    shape = (1,) * (len(repeats) - len(x.shape)) + x.shape
    name = low.reshape(low.plain(x), shape) if shape != x.shape else low.plain(x)
    return low.result(call, low.op("Tile", name, low.dims(repeats)))


def _slice(low: Lowering, name: str, axis: int, start: int, end: int, step: int = 1) -> str:
    return low.op("Slice", name, low.ints(start), low.ints(end), low.ints(axis), low.ints(step))


@lowers("aten.flip")
def flip(low: Lowering, call: Call, x: Value, axes: Sequence[int]) -> Value:
    """The elements along some axes in reverse order."""
    chosen = sorted(axis % len(x.shape) for axis in axes)
    ends = [-size - 1 for size in (x.shape[axis] for axis in chosen)]
    back = low.ints(*(-1 for _ in chosen))
    name = low.op("Slice", low.plain(x), back, low.ints(*ends), low.ints(*chosen), back)
    return low.result(call, name)


@lowers("aten.roll")
def roll(low: Lowering, call: Call, x: Value, shifts: Sequence[int], axes: Sequence[int]) -> Value:
    """The elements moved along some axes; what leaves at one end comes in at the other."""
    if not axes:
        raise call.unsupported("is supported only with axes")
    name = low.plain(x)
    for shift, axis in zip(shifts, (axis % len(x.shape) for axis in axes), strict=True):
        size = x.shape[axis]
        if cut := -shift % size:
            parts = (_slice(low, name, axis, *bounds) for bounds in ((cut, size), (0, cut)))
            name = low.op("Concat", *parts, axis=axis)
    return low.result(call, name)


def _bounds(size: int, start: int | None, end: int | None) -> tuple[int, int]:
    """Python's slice bounds for an axis of `size`, both within 0..size."""
    low, high, _ = slice(start, end).indices(size)
    return low, max(low, high)


@lowers("aten.slice")
def slice_(
    low: Lowering,
    call: Call,
    x: Value,
    axis: int,
    start: int | None,
    end: int | None,
    step: int,
) -> Value:
    """x[start:end:step] along one axis."""
    axis %= len(x.shape)
    first, last = _bounds(x.shape[axis], start, end)
    if (first, last, step) == (0, x.shape[axis], 1):
        return x
    return low.result(call, _slice(low, low.plain(x), axis, first, last, step))


@lowers("aten.select")
def select(low: Lowering, call: Call, x: Value, axis: int, index: int) -> Value:
    """x[index] along one axis, which goes away."""
    axis %= len(x.shape)
    position = low.scalar(index % x.shape[axis], "int64")
    return low.result(call, low.op("Gather", low.plain(x), position, axis=axis))


def _pad(low: Lowering, name: str, axes: int, axis: int, before: int, after: int) -> str:
    pads = [0] * (2 * axes)
    pads[axis], pads[axes + axis] = before, after
    return low.op("Pad", name, low.ints(*pads))


@lowers("aten.slice_backward")
def slice_backward(
    low: Lowering,
    call: Call,
    g: Value,
    shape: Sequence[int],
    axis: int,
    start: int,
    end: int,
    step: int,
) -> Value:
    """G put back where it was cut from, zeros elsewhere."""
    axis %= len(shape)
    first, last = _bounds(shape[axis], start, end)
    name = low.plain(g)
    if step != 1:
        name, last = _spread(low, name, g.shape, axis, step), first + g.shape[axis] * step
        if last > shape[axis]:
            name, last = _slice(low, name, axis, 0, shape[axis] - first), shape[axis]
    return low.result(call, _pad(low, name, len(shape), axis, first, shape[axis] - last))


def _spread(low: Lowering, name: str, shape: Sequence[int], axis: int, step: int) -> str:
    """Zeros behind each element along an axis, so that they stand `step` apart."""
    single = [*shape[: axis + 1], 1, *shape[axis + 1 :]]
    name = _pad(low, low.reshape(name, single), len(single), axis + 1, 0, step - 1)
    return low.reshape(name, [*shape[:axis], shape[axis] * step, *shape[axis + 1 :]])


@lowers("aten.select_backward")
def select_backward(
    low: Lowering, call: Call, g: Value, shape: Sequence[int], axis: int, index: int
) -> Value:
    """G put back at one index, zeros elsewhere."""
    axis %= len(shape)
    index %= shape[axis]
    narrow = [*shape[:axis], 1, *shape[axis + 1 :]]
    name = low.reshape(low.plain(g), narrow)
    return low.result(call, _pad(low, name, len(shape), axis, index, shape[axis] - index - 1))


@lowers("aten.cat")
def cat(low: Lowering, call: Call, parts: Sequence[Value], axis: int) -> Value:
    """Join along one axis; channels of whole blocks are joined in blocked layout."""
    axis %= len(call.shape)
    parts = [p for p in parts if p.shape != (0,)]
    whole = low.block and axis == 1 and len(call.shape) == 4
    if (
        whole
        and any(p.only_blocked for p in parts)
        and all(p.shape[1] % low.block == 0 for p in parts)
    ):
        name = low.op("Concat", *(low.blocked(p) for p in parts), axis=1)
        return Value(call.shape, call.dtype, blocked=name)
    return low.result(call, low.op("Concat", *(low.plain(p) for p in parts), axis=axis))


@lowers("aten.stack")
def stack(low: Lowering, call: Call, parts: Sequence[Value], axis: int) -> Value:
    """Join along a new axis."""
    axis %= len(call.shape)
    at = low.ints(axis)
    names = (low.op("Unsqueeze", low.plain(p), at) for p in parts)
    return low.result(call, low.op("Concat", *names, axis=axis))


@lowers("aten.split", "aten.split_with_sizes", "aten.unsafe_split")
def split(low: Lowering, call: Call, x: Value, _sizes: Any, axis: int) -> list[Value]:
    """Cut along one axis."""
    axis %= len(x.shape)
    if len(call.outputs) == 1:
        return [x]
    sizes = low.ints(*(shape[axis] for shape, _ in call.outputs))
    names = low.writer.multi("Split", low.plain(x), sizes, outputs=len(call.outputs), axis=axis)
    return [
        Value(shape, dtype, plain=name)
        for (shape, dtype), name in zip(call.outputs, names, strict=True)
    ]


@lowers("aten.unbind")
def unbind(low: Lowering, call: Call, x: Value, axis: int) -> list[Value]:
    """All slices along one axis."""
    axis %= len(x.shape)
    return [
        Value(shape, dtype, plain=low.op("Gather", low.plain(x), low.scalar(i, "int64"), axis=axis))
        for i, (shape, dtype) in enumerate(call.outputs)
    ]


@lowers("aten.constant_pad_nd")
def constant_pad_nd(
    low: Lowering, call: Call, x: Value, pads: Sequence[int], value: float
) -> Value:
    """Pad; torch lists (before, after) from the last axis on. Negative pads cut."""
    axes = len(x.shape)
    before, after = [0] * axes, [0] * axes
    for i in range(len(pads) // 2):
        before[axes - 1 - i], after[axes - 1 - i] = pads[2 * i], pads[2 * i + 1]
    name = low.op("Pad", low.plain(x), low.ints(*before, *after), low.scalar(value, call.dtype))
    return low.result(call, name)


def _filled(low: Lowering, call: Call, value: float) -> Value:
    varies = low.batch_size is not None and bool(call.shape)
    if prod(call.shape) <= SMALL and not varies:
        return Value(call.shape, call.dtype, constant=np.full(call.shape, value, call.dtype))
    name = low.op("Expand", low.scalar(value, call.dtype), low.dims(call.shape))
    return low.result(call, name)


@lowers("aten.scalar_tensor")
def scalar_tensor(low: Lowering, call: Call, value: float, *_: Any) -> Value:
    """A number as a tensor without axes."""
    return _filled(low, call, value)


@lowers("aten.full", "aten.full_like", "aten.fill")
def full(low: Lowering, call: Call, _shape: Any, value: float | Value, *_: Any) -> Value:
    """One number everywhere."""
    if isinstance(value, Value):
        if value.constant is None:
            raise call.unsupported("is supported only with a constant")
        return _filled(low, call, value.constant.item())
    return _filled(low, call, value)


@lowers("aten.new_full")
def new_full(low: Lowering, call: Call, _x: Value, _shape: Any, value: float, *_: Any) -> Value:
    """One number everywhere."""
    return _filled(low, call, value)


@lowers(
    "aten.zeros",
    "aten.zeros_like",
    "aten.new_zeros",
    "aten.zero",
    "aten.new_empty",
    "aten.empty",
    "aten.empty_like",
    "aten.new_empty_strided",
    "aten.empty_strided",
)
def zeros(low: Lowering, call: Call, *_: Any) -> Value:
    """Zeros; also for memory that torch leaves uninitialised, and then fills."""
    return _filled(low, call, 0)


@lowers("aten.ones", "aten.ones_like", "aten.new_ones")
def ones(low: Lowering, call: Call, *_: Any) -> Value:
    """Ones."""
    return _filled(low, call, 1)


@lowers("aten.arange")
def arange(low: Lowering, call: Call, *bounds: Any) -> Value:
    """Numbers at equal distances, as a constant."""
    overload = str(call.node.target).rsplit(".", 1)[-1]
    used = {"default": 1, "start": 2, "start_step": 3}[overload]
    return Value(call.shape, call.dtype, constant=np.arange(*bounds[:used]).astype(call.dtype))
