"""What a training step says of units, against the criteria's own formulas on torch's gradients."""

import numpy as np
import pytest
import torch
from torch import nn

from fleetprune import criteria
from fleetprune.criteria import Criterion
from fleetprune.errors import GraphError
from fleetprune_coordinator.graph_library import gate_members
from fleetprune_coordinator.graphs import GateMember, export_train_step
from fleetprune_coordinator.graphs.unit_scores import STEPWISE
from fleetprune_coordinator.resize import read, resize
from fleetprune_coordinator.tracing import trace

from ..prunable_nets import concat, flatten_cnn, make, resnet
from .graph_cases import BLOCKS, randomise, relative_error, run_graph, step_feeds, torch_step


def cross_entropy(output, y):
    return nn.functional.cross_entropy(output, y, reduction="none")


def wanted(criterion, architecture, params, gradients):
    """By the pure functions, one after another group."""
    match criterion:
        case Criterion.TAYLOR:
            scores = criteria.taylor(architecture, params, gradients)
        case Criterion.TAYLOR_ABS:
            scores = criteria.taylor_abs(architecture, params, gradients)
        case Criterion.SENSITIVITY:
            scores = criteria.sensitivity(architecture, gradients)
        case Criterion.FISHER:
            squares = {n: np.square(g, dtype=np.float64) for n, g in gradients.items()}
            scores = criteria.fisher(architecture, params, squares)
        case Criterion.SNIP:
            scores = criteria.snip(architecture, params, gradients)
    return np.concatenate(list(scores.values()))


def step(model, architecture, criterion, block):
    """Scores of the graph and of the formulas."""
    x, y = torch.randn(5, *architecture.input_shape), torch.arange(5) % architecture.classes
    sw = np.array([1, 2, 0.5, 1, 0], np.float32)
    members = gate_members(architecture, architecture.groups, criterion)
    graph = export_train_step(
        model, x, batch=5, block=block, weight_decay=0.1, gates=members, criterion=criterion
    )
    got = run_graph(graph, step_feeds(model, x, y, sw))["scores"]
    assert (graph.meta.units, graph.meta.criterion) == (got.size, criterion.value)
    _, flat, _ = torch_step(model, x[:4], y[:4], sw[:4], cross_entropy)
    gradients, start = {}, 0
    for name, parameter in model.named_parameters():
        stop = start + parameter.numel()
        gradients[name] = flat[start:stop].reshape(parameter.shape)
        start = stop
    want = wanted(criterion, architecture, read(model)[0], gradients)
    return (got / got.sum() if criterion is Criterion.SNIP else got), want


@pytest.mark.parametrize("criterion", sorted(STEPWISE))
@pytest.mark.parametrize("net", [resnet, concat, flatten_cnn])
def test_the_graph_computes_the_formula(net, criterion):
    model, example = make(net)
    got, want = step(randomise(model), trace(model, example), criterion, 0)
    assert relative_error(got, want) < 2e-5


@pytest.mark.parametrize("criterion", sorted(STEPWISE))
def test_the_blocked_graph_computes_the_formula(criterion):
    model, example = make(resnet)
    got, want = step(randomise(model), trace(model, example), criterion, BLOCKS[-1])
    assert relative_error(got, want) < 2e-5


@pytest.mark.parametrize("criterion", [Criterion.TAYLOR, Criterion.FISHER])
def test_members_are_found_in_a_narrower_model(criterion):
    model, example = make(concat)
    dense = trace(model, example)
    keep = {g: max(1, n // 2) for g, n in dense.groups.items()}
    small = randomise(resize(model, dense, keep))
    architecture = trace(small, example)
    assert architecture.groups == keep
    assert gate_members(dense, keep, criterion) == gate_members(architecture, keep, criterion)
    got, want = step(small, architecture, criterion, 0)
    assert relative_error(got, want) < 2e-5


def test_one_weight_by_hand():
    # w = 2, x = 1, y = 0: loss (w*x)**2 = 4, gradient 4, w * g = 8.
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    x, y = torch.ones(1, 1), torch.zeros(1, 1)
    scores = {}
    for criterion in STEPWISE:
        graph = export_train_step(
            model,
            x,
            batch=1,
            loss="mse",
            gates=[[GateMember("weight", 0, 0, 1)]],
            criterion=criterion,
        )
        scores[criterion.value] = run_graph(graph, step_feeds(model, x, y, [1.0]))["scores"].item()
    assert scores == {"taylor": 64, "taylor_abs": 8, "sensitivity": 4, "fisher": 32, "snip": 8}


def test_what_needs_no_gradient_is_not_computed_by_a_step():
    with pytest.raises(GraphError) as caught:
        export_train_step(nn.Linear(2, 2), torch.zeros(1, 2), batch=1, criterion=Criterion.WANDA)
    assert str(caught.value) == (
        "criterion wanda of a training step, expected one of fisher, sensitivity, snip, taylor, "
        "taylor_abs"
    )
