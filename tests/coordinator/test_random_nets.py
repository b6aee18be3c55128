"""Networks made up at random: what the tracer claims of them holds, or it names a layer.

`make fuzz` tries many more of them, and others each time.
"""

import os
import re

import prunable_nets as nets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_nets import random_nets
from torch import nn

from fleetprune.costs import costs
from fleetprune.errors import TraceError
from fleetprune_coordinator.graph_library import gate_members
from fleetprune_coordinator.graphs import export_infer, export_observe, export_train_step
from fleetprune_coordinator.onnx_costs import file_costs
from fleetprune_coordinator.resize import resize
from fleetprune_coordinator.tracing import trace

EXAMPLES = int(os.environ.get("FUZZ", "0"))
COMMON = {
    "deadline": None,
    "derandomize": not EXAMPLES,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
}
NAMED = re.compile(r"\w+ \(\w+\)")
"""A layer as messages name it: `body.0.1 (Conv2d)`."""
DISPROVED = re.compile("is not the dense model|it takes .* multiplications|not together")
"""Reasons that would mean that a rule of the tracer is wrong, not that a model is unusual."""


def last_tokens(*blocks):
    """Blocks on (n, 5, 4) tokens, the mean token, a classifier."""
    mean = nets.Wired(lambda m, x: m.fc(torch.relu(x).mean(1)), fc=nn.Linear(4, 3))
    return nn.Sequential(*blocks, mean), (5, 4)


# What random networks, or the search for rules, has brought to light.
FOUND = {
    "queries, keys and values of three layers": lambda: last_tokens(
        nn.Linear(4, 4), nets.Attention(4, 2, 3, "three")
    ),
    "two heads, of which one alone needs no copy": lambda: last_tokens(
        nn.Linear(4, 4), nets.Attention(4, 2, 2, "one")
    ),
    "a pool that is asked for no indices": lambda: (
        nn.Sequential(nn.Conv1d(2, 4, 3), nn.MaxPool1d(2, 1), nn.Flatten(), nn.Linear(16, 3)),
        (2, 7),
    ),
    "a gate of one channel": lambda: (
        nn.Sequential(
            nn.Conv1d(2, 4, 1),
            nets.Wired(lambda m, x: x * torch.sigmoid(m.gate(x)), gate=nn.Conv1d(4, 1, 1)),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        (2, 5),
    ),
    "norms per sample, of an open number of them": lambda: (
        nn.Sequential(
            nn.Conv1d(2, 6, 3),
            nn.InstanceNorm1d(6, affine=True),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(30, 3),
        ),
        (2, 7),
    ),
    "a tensor made on the way": lambda: last_tokens(
        nn.Linear(4, 6),
        nets.Wired(lambda m, x: x * torch.cos(torch.arange(x.shape[1]) / 3.0)[:, None]),
        nn.Linear(6, 4),
    ),
    "weights of attention that nobody wants": lambda: last_tokens(
        nets.Wired(
            lambda m, x: m.attention(x, x, x)[0],
            attention=nn.MultiheadAttention(4, 2, batch_first=True),
        )
    ),
    "a mean over tokens of which one is cut off": lambda: last_tokens(
        nn.Linear(4, 6), nets.Wired(lambda m, x: x[:, 1:] - x[:, :1]), nn.ReLU(), nn.Linear(6, 4)
    ),
    "a part without elements": lambda: (
        nn.Sequential(
            nets.Wired(lambda m, x: torch.cat([x[:, 1:], x[:, :1]], 1)),
            nn.Flatten(),
            nn.Linear(5, 4),
            nn.ReLU(),
            nn.Linear(4, 3),
        ),
        (1, 5),
    ),
    "a shuffle of what is cut in groups": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 8, 1),
            nn.Conv2d(8, 8, 1, groups=2),
            nn.ChannelShuffle(2),
            nn.Conv2d(8, 8, 1, groups=4),
            nn.Conv2d(8, 6, 1),
            nn.Flatten(),
            nn.Linear(24, 3),
        ),
        (2, 2, 2),
    ),
}


def half(architecture):
    return {g: max(1, n // 2) for g, n in architecture.groups.items()}


def holds(model, shape):
    """Cut everywhere at once and in each group alone, a model equals the zeroed one."""
    torch.manual_seed(0)
    x = torch.randn(2, *shape)
    try:
        architecture = trace(model, x[:1])
    except TraceError as error:
        assert NAMED.search(str(error)), error
        return None
    assert not [why for why in architecture.uncut.values() if DISPROVED.search(why)]
    alone = [architecture.dense | {g: n} for g, n in half(architecture).items()]
    with torch.no_grad():
        for keep in [half(architecture), *alone]:
            want = nets.zeroed(model, architecture, keep)(x)
            bound = 1e-5 * max(1.0, float(want.abs().max()))
            torch.testing.assert_close(
                resize(model, architecture, keep).eval()(x), want, rtol=0, atol=bound
            )
    return architecture


@pytest.mark.parametrize("name", FOUND)
def test_found_once(name):
    model, shape = FOUND[name]()
    architecture = holds(model, shape)
    assert architecture is not None
    keep = half(architecture)
    small = resize(model, architecture, keep).eval()
    x = torch.randn(4, *shape)
    measured = file_costs(export_infer(small, x[:1]).onnx)
    assert measured.macs == costs(architecture, keep).macs
    export_train_step(small, x, batch=4, gates=gate_members(architecture, keep))
    export_observe(small, x, batch=4, observed=architecture.observed)


@settings(max_examples=EXAMPLES or 30, **COMMON)
@given(random_nets())
def test_a_cut_network_is_the_zeroed_one(made):
    holds(*made)


@settings(max_examples=EXAMPLES // 10 or 3, **COMMON)
@given(random_nets())
def test_all_graphs_of_a_cut_network_can_be_made(made):
    """They are held against torch as they are made, and the file's costs against the plan."""
    model, shape = made
    torch.manual_seed(0)
    x = torch.randn(4, *shape)
    try:
        architecture = trace(model, x[:1])
    except TraceError:
        return
    keep = half(architecture)
    small = resize(model, architecture, keep).eval()
    measured = file_costs(export_infer(small, x[:1]).onnx)
    planned = costs(architecture, keep)
    assert measured.macs == planned.macs
    assert measured.peak_activation_bytes <= planned.peak_activation_bytes
    export_train_step(small, x, batch=4, gates=gate_members(architecture, keep))
    export_observe(small, x, batch=4, observed=architecture.observed)
