"""Architectures whose scores can be worked out in the head."""

import numpy as np

from fleetprune.layout import Architecture, Gate, Role, Segment, TensorSpec


def f32(*values):
    return np.array(values, np.float32)


def segment(units, group=None, block=1):
    return (Segment(group=group, units=units, block=block),)


def parameter(name, *axes):
    return TensorSpec(name=name, role=Role.PARAMETER, axes=axes)


TWO = Architecture(
    groups={"h": 2},
    tensors=(
        parameter("in.weight", segment(2, "h"), segment(2)),
        parameter("norm.weight", segment(2, "h")),
        parameter("norm.bias", segment(2, "h")),
        parameter("out.weight", segment(1), segment(2, "h")),
    ),
    gates={"h": (Gate(tensor="norm.weight", axis=0), Gate(tensor="norm.bias", axis=0))},
    observed=("out.weight",),
)
"""Two neurons h, each with two inputs, feeding one output; a norm on h."""

RESIDUAL = Architecture(
    groups={"r": 3},
    tensors=(
        parameter("a.weight", segment(3, "r"), segment(1)),
        parameter("b.weight", segment(3, "r"), segment(2)),
        parameter("out.weight", segment(1), segment(3, "r")),
    ),
    gates={"r": (Gate(tensor="a.weight", axis=0), Gate(tensor="b.weight", axis=0))},
    observed=("out.weight",),
)
"""Two layers whose outputs are added: three units, each made by one weight and by two."""

FLAT = Architecture(
    groups={"c": 2},
    tensors=(parameter("fc.weight", segment(1), segment(2, "c", block=3)),),
    observed=("fc.weight",),
)
"""Two channels, flattened into 2 * 3 features."""

TURNED = Architecture(
    groups={"up": 2, "in": 3},
    tensors=(
        parameter("in.weight", segment(3, "in"), segment(1)),
        parameter("up.weight", segment(3, "in"), segment(2, "up", block=2), segment(1)),
        parameter("out.weight", segment(1), segment(2, "up", block=2)),
    ),
    observed=("out.weight",),
)
"""A transposed convolution from three channels to two units of two channels each."""

WORDS = Architecture(
    groups={"word": 2},
    tensors=(
        parameter("word.weight", segment(3), segment(2, "word")),
        parameter("place.weight", segment(2), segment(2, "word")),
        parameter("gain", segment(1), segment(2, "word")),
        parameter("fc.weight", segment(1), segment(2, "word")),
    ),
    observed=("fc.weight",),
)
"""Tables of three words and of two places, each two features wide, which are added."""

BOTH = Architecture(
    groups={"a": 1, "b": 2},
    tensors=(
        parameter(
            "cat.weight", (Segment(group="a", units=1), Segment(group="b", units=2)), segment(1)
        ),
        parameter(
            "fc.weight", segment(1), (Segment(group="a", units=1), Segment(group="b", units=2))
        ),
    ),
    gates={"b": (Gate(tensor="fc.weight", axis=1, start=1),)},
    observed=("fc.weight",),
)
"""Two groups side by side on one axis, as after a concatenation."""
