"""What the plain description says of who makes units, against the operators of the model."""

import prunable_nets as nets
import pytest

from fleetprune.criteria import magnitude, makers
from fleetprune_coordinator.attention import with_cuttable_heads
from fleetprune_coordinator.couplings import Couplings
from fleetprune_coordinator.program import run_program
from fleetprune_coordinator.resize import read, statistics_of
from fleetprune_coordinator.tracing import trace

INNER = ("2.right", 0)
"""Of a weight that is a product of two: what lies between them, one makes and the other reads."""


@pytest.mark.parametrize(
    "net", [n for n in nets.ALL if n is not nets.efficientnet_lite0], ids=lambda f: f.__name__
)
def test_makers_are_those_of_the_operators(net):
    model, example = nets.make(net)
    architecture = trace(model, example)
    plain = with_cuttable_heads(model)
    tensors = {n: tuple(t.shape) for n, t in [*plain.named_parameters(), *statistics_of(plain)]}
    couplings = Couplings(plain, run_program(plain, example), tensors)
    found = {(g.tensor, g.axis) for gates in makers(architecture).values() for g in gates}
    made = {
        (name, axis)
        for name, axis in couplings.makes
        if len(tensors[name]) > 1
        and any(s.group is not None for s in architecture.tensor(name).axes[axis])
    }
    assert made <= found
    assert not (found - made - {INNER}) & couplings.reads  # scales and maps of bias are no layers'


@pytest.mark.parametrize("net", [nets.transposed, nets.embedded], ids=lambda f: f.__name__)
def test_every_unit_of_turned_layers_has_a_size(net):
    model, example = nets.make(net)
    scores = magnitude(trace(model, example), read(model)[0])
    assert all((score > 0).all() for score in scores.values())
