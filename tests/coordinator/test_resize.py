import copy

import numpy as np
import prunable_nets as nets
import pytest
import torch
from torch import nn

from fleetprune.errors import BudgetError, UsageError
from fleetprune.layout import Role, cut, reorder
from fleetprune_coordinator.resize import extract, load, read, resize
from fleetprune_coordinator.tracing import trace


def traced(net):
    model, example = nets.make(net)
    return model, example, trace(model, example)


@pytest.mark.parametrize("net", nets.ALL, ids=lambda f: f.__name__)
def test_extracting_everything_changes_nothing(net):
    model, example, architecture = traced(net)
    parameters, statistics = read(model)
    whole = extract(model, architecture, parameters, statistics, architecture.dense)
    torch.testing.assert_close(whole(example), model(example), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("net", nets.ALL, ids=lambda f: f.__name__)
def test_reordered_units_compute_the_same(net):
    model, example, architecture = traced(net)
    rng = np.random.default_rng(1)
    order = {g: rng.permutation(n) for g, n in architecture.groups.items()}
    dense = architecture.groups
    parameters, statistics = read(model)
    moved = [
        {s.name: reorder(s, tensors[s.name], dense, order) for s in architecture.role(role)}
        for role, tensors in ((Role.PARAMETER, parameters), (Role.STATISTIC, statistics))
    ]
    permuted = extract(model, architecture, *moved, architecture.dense)
    torch.testing.assert_close(permuted(example), model(example), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("net", nets.ALL, ids=lambda f: f.__name__)
def test_a_cut_model_is_the_dense_one_with_the_units_zeroed(net):
    """All groups at once and each alone, in float32."""
    model, example, architecture = traced(net)
    half = {g: max(1, n // 2) for g, n in architecture.groups.items()}
    alone = [architecture.dense | {group: kept} for group, kept in half.items()]
    with torch.no_grad():
        for keep in [half, *alone]:
            small = resize(model, architecture, keep)
            zeroed = nets.zeroed(model, architecture, keep)
            want = zeroed(example)
            bound = 1e-5 * max(1.0, float(want.abs().max()))
            torch.testing.assert_close(small(example), want, rtol=0, atol=bound)


def test_a_cut_model_keeps_the_leading_units():
    """Two units of a sum: without the second, its summand is missing."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    architecture = trace(model, torch.ones(1, 1))
    parameters = {
        "0.weight": np.array([[2.0], [3.0]], np.float32),
        "1.weight": np.array([[10.0, 100.0]], np.float32),
    }
    one = torch.ones(1, 1)
    assert extract(model, architecture, parameters, {}, {"0": 2})(one).item() == 2 * 10 + 3 * 100
    assert extract(model, architecture, parameters, {}, {"0": 1})(one).item() == 2 * 10


def test_statistics_are_given_in_the_shape_of_the_class():
    model, example, architecture = traced(nets.plain_cnn)
    keep = {"0.0": 3, "2.0": 2}
    parameters, statistics = read(model)
    mine = {k: v + 1 for k, v in cut(architecture, statistics, keep, Role.STATISTIC).items()}
    small = extract(model, architecture, parameters, mine, keep)
    np.testing.assert_array_equal(read(small)[1]["0.1.running_mean"], mine["0.1.running_mean"])
    assert small(example).shape == (1, 5)
    assert not small.training


def test_attributes_follow_the_tensors():
    model, _, architecture = traced(nets.separable)
    small = resize(model, architecture, {"0.0": 3, "2.0": 2})
    first, depthwise, norm = small[0][0], small[1][0], small[1][1]
    assert (first.in_channels, first.out_channels, first.groups) == (3, 3, 1)
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (3, 3, 3)
    assert norm.num_features == 3
    assert (small[4][2].in_features, small[4][2].out_features) == (2, 5)
    assert (model[1][0].groups, model[1][1].num_features) == (4, 4)


def test_attributes_of_other_layers():
    model, _, architecture = traced(nets.grouped)
    small = resize(model, architecture, {"0.0": 3, "2.0": 5})
    assert (small[1][0].in_channels, small[1][0].out_channels, small[1][0].groups) == (6, 9, 3)
    model, _, architecture = traced(nets.transposed)
    small = resize(model, architecture, {"0": 3, "1": 2})
    assert (small[1].in_channels, small[1].out_channels, small[1].groups) == (3, 4, 1)
    assert (small[4].in_channels, small[4].out_channels, small[4].groups) == (4, 8, 2)
    model, _, architecture = traced(nets.group_norm)
    small = resize(model, architecture, {"0": 3})
    assert (small[1].num_channels, small[1].num_groups) == (6, 3)
    model, _, architecture = traced(nets.instance_norm)
    assert resize(model, architecture, {"0": 5, "3": 2})[1].num_features == 5
    model, _, architecture = traced(nets.embedded)
    small = resize(model, architecture, {"table": 3})
    assert (small.table.num_embeddings, small.table.embedding_dim) == (5, 3)
    model, _, architecture = traced(nets.attention_of_torch)
    small = resize(model, architecture, {"0": 8, "2.attention": 3})[2].attention
    assert (small.num_heads, small.head_dim, small.embed_dim) == (3, 2, 8)
    model, _, architecture = traced(nets.attention_chunks)
    small = resize(model, architecture, {"0": 8, "2.qkv": 1, "2.out": 8})[2]
    assert (small.heads, small.head_width, small.inner) == (1, 3, 3)
    model, _, architecture = traced(nets.scaled)
    small = resize(model, architecture, {"0": 3, "4": 2})
    assert (small[2].num_parameters, small[5].num_parameters) == (3, 1)
    model, _, architecture = traced(nets.norm_mlp)
    assert resize(model, architecture, {"0": 5, "3": 2})[1].num_features == 5


def test_one_channel_of_a_depthwise_layer_runs():
    model, example, architecture = traced(nets.separable)
    assert resize(model, architecture, {"0.0": 1, "2.0": 1})(example).shape == (1, 5)


def test_resize_copies_values_and_trainability():
    model, _, architecture = traced(nets.mlp)
    model[0].bias.requires_grad_(False)
    small = resize(model, architecture, {"0": 3})
    assert torch.equal(small[0].weight, model[0].weight[:3])
    assert torch.equal(small[2].weight, model[2].weight[:, :3])
    assert [p.requires_grad for p in small.parameters()] == [True, False, True, True]
    with torch.no_grad():
        small[0].weight.zero_()
    assert model[0].weight.abs().sum() > 0


def test_read_then_load_is_the_identity():
    model, example, _ = traced(nets.norm_mlp)
    parameters, statistics = read(model)
    assert list(parameters) == [name for name, _ in model.named_parameters()]
    assert list(statistics) == [
        "1.running_mean",
        "1.running_var",
        "4.running_mean",
        "4.running_var",
    ]
    assert {a.dtype for a in parameters.values()} == {np.dtype(np.float32)}
    blank = copy.deepcopy(model)
    for tensor in blank.parameters():
        nn.init.zeros_(tensor)
    load(blank, parameters, statistics)
    assert torch.equal(blank(example), model(example))


def test_read_returns_copies():
    model, _, _ = traced(nets.mlp)
    before = model[0].bias.clone()
    read(model)[0]["0.bias"][:] = 7
    assert torch.equal(model[0].bias, before)


def test_errors():
    model, _, architecture = traced(nets.mlp)
    parameters, statistics = read(model)

    def fails(kind, call, message):
        with pytest.raises(kind) as caught:
            call()
        assert str(caught.value) == message

    fails(
        BudgetError, lambda: resize(model, architecture, {"0": 9}), "group 0: keep 9, expected 1..8"
    )
    fails(
        UsageError,
        lambda: resize(resize(model, architecture, {"0": 3}), architecture, {"0": 3}),
        "0.weight: shape (3, 10), expected (8, 10)",
    )
    fails(
        UsageError,
        lambda: load(model, {**parameters, "0.bias": np.zeros(1, np.float32)}, statistics),
        "0.bias: shape (1,), expected (8,)",
    )
    fails(
        UsageError,
        lambda: load(model, parameters, {"x": np.zeros(1, np.float32)}),
        "statistics: x is only in the model or only in the arrays",
    )
    fails(
        UsageError,
        lambda: extract(model, architecture, {}, {}, {"0": 3}),
        "parameters: 0.weight is missing",
    )
    fails(
        UsageError,
        lambda: extract(
            model, architecture, {**parameters, "0.bias": np.zeros(9, np.float32)}, {}, {"0": 3}
        ),
        "0.bias: shape (9,), expected (8,)",
    )
