"""One inference as operators: names, weights, multiplications."""

import torch
from torch import nn
from torch.nn import functional

from fleetprune_coordinator.program import on_shapes, run_program


def program(model, *shape):
    return run_program(model.eval(), torch.zeros(1, *shape))


def test_operators_know_their_layer_and_their_weight():
    calls = program(nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)), 4).calls
    assert [(c.name, c.layer) for c in calls] == [
        ("t", "0"),
        ("addmm", "0"),
        ("relu", "1"),
        ("t", "2"),
        ("addmm", "2"),
    ]
    assert [c.weight for c in calls] == ["", "0.weight", "", "", "2.weight"]
    assert [c.macs for c in calls] == [0, 12, 0, 0, 6]
    assert [c.outputs[0].depends for c in calls] == [False, True, True, False, True]


def test_multiplications_of_convolutions():
    """A kernel of 2 x 2: at 9 positions of the output, or of the input where it is transposed."""
    layers = [nn.Conv2d(2, 4, 2, groups=2), nn.ConvTranspose2d(4, 3, 2), nn.Flatten()]
    calls = program(nn.Sequential(*layers), 2, 4, 4).calls
    assert [c.macs for c in calls if c.macs] == [4 * 1 * 4 * 9, 4 * 3 * 4 * 9]


def test_parts_of_a_weight_are_known_and_what_is_computed_of_it_is_none():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = nn.Parameter(torch.ones(6, 4))

        def forward(self, x):
            first, second = self.both.chunk(2)
            return functional.linear(x, first) + functional.linear(x, second.sigmoid())

    products = [c for c in program(Net(), 4).calls if c.factors]
    assert [c.weight for c in products] == ["both", ""]
    assert not any(c.factors[1].whole for c in products)


def test_only_what_the_output_depends_on_is_kept():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x):
            self.idle(x)
            return self.used(x)

    found = program(Net(), 4)
    assert set(found.tensors) == {"used.weight", "used.bias"}
    assert {c.layer for c in found.calls} == {"used"}


def test_shapes_alone_will_do_and_tensors_made_on_the_way_are_shapes_too():
    class Net(nn.Module):
        def forward(self, x):
            return x + torch.arange(x.shape[1])

    found = run_program(on_shapes(Net()), torch.zeros(1, 3, device="meta"))
    assert [(c.name, c.outputs[0].shape) for c in found.calls if c.pointwise] == [("add", (1, 3))]


def test_no_hook_stays():
    model = nn.Sequential(nn.Linear(4, 2))
    program(model, 4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
