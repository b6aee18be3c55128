"""Small made-up networks for the solver's tests: chains of layers, with shortcuts."""

import numpy as np
from hypothesis import strategies as st

from fleetprune.layout import Activation, Architecture, Role, Segment, TensorSpec


def axis(units, group=None):
    return (Segment(group=group, units=units),)


def weight(name, *axes, positions=1):
    return TensorSpec(name=f"{name}.weight", role=Role.PARAMETER, axes=axes, positions=positions)


def pair(a=32, b=64):
    """10 MACs per pair of units, 4 bytes per weight, the wider of two buffers in memory."""
    return Architecture(
        groups={"a": a, "b": b},
        tensors=(weight("b", axis(b, "b"), axis(a, "a"), positions=10),),
        activations=(Activation(per_unit={"a": 1}), Activation(per_unit={"b": 1})),
        live=((0,), (1,)),
    )


@st.composite
def chains(draw):
    """A chain of one to five layers of 1 to 24 units."""
    widths = draw(st.lists(st.integers(1, 24), min_size=1, max_size=5))
    groups = {f"g{i}": n for i, n in enumerate(widths)}
    tensors, activations, before = [], [], axis(3)
    for i, (name, units) in enumerate(groups.items()):
        positions = draw(st.integers(1, 9))
        tensors.append(weight(name, axis(units, name), before, positions=positions))
        if i >= 2 and draw(st.booleans()):
            other = f"g{i - 2}"
            skip = (axis(units, name), axis(groups[other], other))
            tensors.append(weight(f"{name}.skip", *skip, positions=positions))
        per_unit = {name: draw(st.integers(1, 9))}
        activations.append(Activation(fixed=draw(st.integers(0, 9)), per_unit=per_unit))
        before = axis(units, name)
    tensors.append(weight("fc", axis(10), before))
    live = [(i, i + 1) for i in range(len(groups) - 1)] or [(0,)]
    return Architecture(
        groups=groups,
        tensors=tuple(tensors),
        activations=tuple(activations),
        live=tuple(live),
        overhead_bytes=draw(st.integers(0, 50)),
    )


def falling(groups, seed=0):
    """Scores by falling importance; every fourth seed has ties alone."""
    rng = np.random.default_rng(seed)
    return {
        g: np.sort(rng.random(n, np.float32) if seed % 4 else np.ones(n, np.float32))[::-1]
        for g, n in groups.items()
    }
