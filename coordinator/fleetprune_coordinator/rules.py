"""How each ATen operator carries units from its inputs to its outputs.

A rule may join units and keep units whole (see `labels`), and returns the labels of the outputs.
Operators without one keep all units that they meet.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from fleetprune_coordinator.labels import (
    Algebra,
    Labels,
    broadcast,
    grown,
    permuted,
    taken,
    tiled,
    without,
)

Result = Labels | Sequence[Labels]


@dataclass(frozen=True)
class Step:
    """An operator with its inputs' labels."""

    algebra: Algebra
    arguments: Mapping[str, Any]
    """By the schema's names, tensors as `Labels`."""
    shapes: tuple[tuple[int, ...], ...]
    """Of the outputs."""

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def tensors(self) -> list[Labels]:
        """All tensors that it reads, in order."""
        found: list[Labels] = []
        for value in self.arguments.values():
            items = value if isinstance(value, (list, tuple)) else [value]
            found += [item for item in items if isinstance(item, Labels)]
        return found

    @property
    def first(self) -> Labels:
        """The first tensor that it reads."""
        return self.tensors[0]

    def axes(self, name: str = "dim") -> list[int]:
        """Axes of the first tensor that an argument names; none or an empty list: all."""
        rank, value = len(self.first.shape), self.arguments.get(name)
        if isinstance(value, int):
            value = [value]
        return [axis % rank for axis in value] if value else list(range(rank))


Rule = Callable[[Step], Result]
RULES: dict[str, Rule] = {}
POINTWISE = frozenset({
    "hardswish", "_prelu_kernel", "copy", "fill", "zero", "log_sigmoid_forward", "rsub",
    "floor_divide", "lift_fresh", "where", "masked_fill", "threshold",
})  # fmt: skip
"""Operators that treat every element alike beside those that torch marks so."""
SAME = frozenset({
    "alias", "detach", "clone", "contiguous", "lift_fresh_copy", "_to_copy", "zeros_like",
    "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "native_dropout",
})  # fmt: skip
"""Operators that give a tensor of their input's shape, cut wherever that is."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of some operators."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def pointwise(step: Step) -> Result:
    """All operands are cut alike."""
    return step.algebra.combine(step.tensors)


def unknown(step: Step) -> Result:
    """Nothing that it reads is cut."""
    for labels in step.tensors:
        step.algebra.keep(labels)
    return [Labels(shape) for shape in step.shapes]


def made_up(step: Step) -> Result:
    """A tensor made from numbers is cut as what it meets; whether its code does so is tried."""
    return [step.algebra.fresh(shape) for shape in step.shapes]


for _name in SAME:
    RULES[_name] = lambda step: step.first
for _name in POINTWISE:
    RULES[_name] = pointwise
for _name in ("new_zeros", "new_ones", "new_full", "new_empty"):
    RULES[_name] = made_up


# Moving elements.


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "squeeze", "unsqueeze")
def _view(step: Step) -> Result:
    return step.algebra.reshaped(step.first, step.shapes[0])


@rule("permute")
def _permute(step: Step) -> Result:
    return permuted(step.first, step["dims"])


@rule("transpose")
def _transpose(step: Step) -> Result:
    order = list(range(len(step.first.shape)))
    i, j = step["dim0"], step["dim1"]
    order[i], order[j] = order[j], order[i]
    return permuted(step.first, order)


@rule("t")
def _t(step: Step) -> Result:
    return permuted(step.first, range(len(step.first.shape))[::-1])


@rule("expand")
def _expand(step: Step) -> Result:
    return broadcast(step.first, step.shapes[0])


@rule("repeat")
def _repeat(step: Step) -> Result:
    return step.algebra.settled(tiled(step.first, step["repeats"]))


@rule("slice")
def _slice(step: Step) -> Result:
    places = slice(step["start"], step["end"], step["step"])
    return step.algebra.settled(taken(step.first, step["dim"], places))


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def _split(step: Step) -> Result:
    """Equal parts of a cut axis are cut alike: code that halves an axis halves what is left."""
    axis, start, parts = step["dim"] % len(step.first.shape), 0, []
    for shape in step.shapes:
        parts.append(taken(step.first, axis, slice(start, start + shape[axis])))
        start += shape[axis]
    if len(set(step.shapes)) == 1:
        for part in parts[1:]:
            for f, g in zip(parts[0].factors, part.factors, strict=True):
                if f.shape[axis] > 1:
                    step.algebra.units.join(f, g, step.algebra.why)
    return [step.algebra.settled(part) for part in parts]


@rule("select", "unbind")
def _select(step: Step) -> Result:
    left = step.algebra.reduced(step.first, [step["dim"]])
    return [left for _ in step.shapes]


@rule("index_select")
def _index_select(step: Step) -> Result:
    left = step.algebra.whole(step["self"], [step["dim"]])
    return Labels(step.shapes[0], left.factors)


@rule("index")
def _index(step: Step) -> Result:
    """Rows that one tensor of indices names; nothing is cut along the rows."""
    indices = step["indices"]
    if not indices or indices[0] is None or any(i is not None for i in indices[1:]):
        return unknown(step)
    step.algebra.keep(indices[0])
    left = step.algebra.reduced(step["self"], [0])
    return broadcast(left, step.shapes[0])


@rule("embedding")
def _embedding(step: Step) -> Result:
    step.algebra.keep(step["indices"])
    left = step.algebra.reduced(step["weight"], [0])
    return broadcast(left, step.shapes[0])


@rule("cat")
def _cat(step: Step) -> Result:
    parts = [p for p in step["tensors"] if p.shape != (0,)]
    return step.algebra.joined(parts, step["dim"])


@rule("stack")
def _stack(step: Step) -> Result:
    axis = step["dim"] % len(step.shapes[0])
    lines = [
        step.algebra.reshaped(p, (*p.shape[:axis], 1, *p.shape[axis:])) for p in step["tensors"]
    ]
    return step.algebra.joined(lines, axis)


@rule("constant_pad_nd")
def _pad(step: Step) -> Result:
    labels, pads = step.first, step["pad"]
    for i in range(len(pads) // 2):
        labels = grown(labels, len(labels.shape) - 1 - i, pads[2 * i], pads[2 * i + 1])
    return step.algebra.settled(labels)


@rule("channel_shuffle")
def _channel_shuffle(step: Step) -> Result:
    """The number of groups stays: every group is cut alike."""
    n, c, *rest = step.first.shape
    groups = step["groups"]
    split = step.algebra.reshaped(step.first, (n, groups, c // groups, *rest))
    split = step.algebra.whole(split, [1])
    turned = permuted(split, [0, 2, 1, *range(3, len(rest) + 3)])
    return step.algebra.reshaped(turned, step.shapes[0])


# Looking along axes.


@rule(
    "sum", "mean", "prod", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean",
    "norm", "linalg_vector_norm", "logsumexp", "any", "all", "argmax", "argmin", "median",
)  # fmt: skip
def _reduce(step: Step) -> Result:
    if len(step.tensors) > 1:  # the elementwise maximum of two tensors
        return pointwise(step)
    keep = len(step.shapes[0]) == len(step.first.shape)
    left = step.algebra.reduced(step.first, step.axes(), keep=keep)
    return [Labels(left.shape, left.factors) for _ in step.shapes]


@rule(
    "_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp", "sort",
    "topk", "renorm",
)  # fmt: skip
def _along(step: Step) -> Result:
    left = step.algebra.whole(step.first, [step["dim"]])
    return [Labels(shape, left.factors) for shape in step.shapes]


@rule("flip", "roll")
def _turn(step: Step) -> Result:
    left = step.algebra.whole(step.first, step.axes("dims"))
    return Labels(step.shapes[0], left.factors)


@rule("glu")
def _glu(step: Step) -> Result:
    axis = step["dim"] % len(step.first.shape)
    half = step.first.shape[axis] // 2
    parts = [taken(step.first, axis, slice(i * half, (i + 1) * half)) for i in range(2)]
    return step.algebra.combine(parts)


def _over_positions(step: Step, spatial: int) -> Result:
    axes = range(len(step.first.shape) - spatial, len(step.first.shape))
    left = step.algebra.whole(step.first, axes)
    return [Labels(shape, left.factors) for shape in step.shapes]


def _register_positions() -> None:
    pools = ("avg_pool", "_adaptive_avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
    others = ("upsample_nearest", "_upsample_nearest_exact")
    padded = ("reflection_pad", "replication_pad")
    for d in (1, 2, 3):
        names = [f"{name}{d}d" for name in (*pools, *others, *padded)]
        for name in [*names, f"max_pool{d}d_with_indices"]:
            RULES[name] = lambda step, d=d: _over_positions(step, d)  # type: ignore[misc]
    for name, d in (("linear1d", 1), ("bilinear2d", 2), ("bicubic2d", 2), ("trilinear3d", 3)):
        RULES[f"upsample_{name}"] = lambda step, d=d: _over_positions(step, d)  # type: ignore[misc]


_register_positions()


# Norms.


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm", "_native_batch_norm_legit_no_stats",
)  # fmt: skip
def _batch_norm(step: Step) -> Result:
    x, *vectors = step.tensors
    if step.arguments.get("training"):  # InstanceNorm: over the positions
        if not vectors:
            return unknown(step)
        x = step.algebra.whole(x, range(2, len(x.shape)))
    columns = [step.algebra.reshaped(v, _column(v.shape[0], x)) for v in vectors]
    return [step.algebra.combine([x, *columns]), *(Labels(shape) for shape in step.shapes[1:])]


def _column(channels: int, x: Labels) -> tuple[int, ...]:
    """Shape of a vector along the channels of `x`."""
    return (1, channels, *(1 for _ in x.shape[2:]))


@rule("native_layer_norm")
def _layer_norm(step: Step) -> Result:
    x, *affine = step.tensors
    count = len(step["normalized_shape"])
    left = step.algebra.whole(x, range(len(x.shape) - count, len(x.shape)))
    normed = step.algebra.combine([left, *affine])
    return [normed, *(Labels(shape) for shape in step.shapes[1:])]


@rule("native_group_norm")
def _group_norm(step: Step) -> Result:
    """Whole groups of channels that are normalised together are cut."""
    x, *affine = step.tensors
    if not affine:  # the layer could not tell from its tensors how many groups are left
        return unknown(step)
    algebra, groups, channels = step.algebra, step["group"], step["C"]
    split = algebra.reshaped(x, (x.shape[0], groups, channels // groups, *x.shape[2:]))
    rank = len(split.shape)
    split = algebra.whole(split, range(2, rank))
    for vector in affine:
        pairs = algebra.reshaped(vector, (groups, channels // groups))
        pairs = algebra.whole(pairs, [1])
        shape = (1, groups, channels // groups, *(1 for _ in range(3, rank)))
        split = algebra.combine([split, algebra.reshaped(pairs, shape)])
    normed = algebra.reshaped(split, x.shape)
    return [normed, *(Labels(shape) for shape in step.shapes[1:])]


@rule("_weight_norm_interface")
def _weight_norm(step: Step) -> Result:
    v, g = step["v"], step["g"]
    left = step.algebra.whole(v, [a for a in range(len(v.shape)) if a != step["dim"]])
    return [step.algebra.combine([left, g]), *(Labels(shape) for shape in step.shapes[1:])]


# Products.


def _matrices(step: Step, a: Labels, b: Labels) -> Labels:
    """(..., m, k) times (..., k, n)."""
    left = step.algebra.reshaped(a, (*a.shape, 1))
    right = step.algebra.reshaped(b, (*b.shape[:-2], 1, *b.shape[-2:]))
    return step.algebra.product(left, right, len(a.shape) - 1)


@rule("mm", "bmm")
def _mm(step: Step) -> Result:
    return _matrices(step, *step.tensors)


@rule("addmm", "baddbmm")
def _addmm(step: Step) -> Result:
    bias, a, b = step.tensors
    return step.algebra.combine([bias, _matrices(step, a, b)])


@rule("mv", "addmv")
def _mv(step: Step) -> Result:
    *bias, matrix, vector = step.tensors
    product = step.algebra.product(matrix, step.algebra.reshaped(vector, (1, *vector.shape)), 1)
    return step.algebra.combine([*bias, product])


@rule("convolution")
def _convolution(step: Step) -> Result:
    """Of a grouped one, whole groups are cut: all their outputs go with all their inputs."""
    x, w, bias = step["input"], step["weight"], step["bias"]
    algebra, groups, turned = step.algebra, step["groups"], step["transposed"]
    kernel = range(2, len(w.shape))
    x, w = algebra.whole(x, range(2, len(x.shape))), algebra.whole(w, kernel)
    pixel = without(_flattened(x), [2])
    taps = without(_flattened(w), [2])
    taps = permuted(taps, [1, 0]) if turned else taps  # (outputs, inputs), one of them per group
    n, c = pixel.shape
    outputs = step.shapes[0][1]
    left = algebra.reshaped(pixel, (n, groups, 1, c // groups))
    if turned and groups > 1:
        rows = algebra.reshaped(taps, (1, outputs // groups, groups, c // groups))
        right = permuted(rows, [0, 2, 1, 3])
    else:
        right = algebra.reshaped(taps, (1, groups, outputs // groups, c // groups))
    if groups > 1:
        left, right = algebra.whole(left, [3]), algebra.whole(right, [2, 3])
    product = algebra.product(left, right, 3)
    shape = (n, outputs, *(1 for _ in step.shapes[0][2:]))
    result = algebra.reshaped(product, shape)
    if bias is not None:
        result = algebra.combine([result, algebra.reshaped(bias, _column(outputs, result))])
    return broadcast(result, step.shapes[0])


def _flattened(labels: Labels) -> Labels:
    """(a, b, ...) with all axes behind the second as one; no factor runs along them."""
    a, b, *rest = labels.shape
    factors = tuple(f.reshape(*f.shape[:2], 1) for f in labels.factors)
    return Labels((a, b, prod(rest)), factors, labels.weight)
