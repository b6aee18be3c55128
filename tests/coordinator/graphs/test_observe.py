"""The observing graph against forward hooks, and exact BatchNorm recalibration."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fleetprune.errors import GraphError
from fleetprune_coordinator.graphs import export_observe
from fleetprune_sim import models

from .graph_cases import flat, randomise, relative_error, run_graph, running


def feeds(model, x, sw):
    values = {
        "x": x.numpy(),
        "sw": np.asarray(sw, np.float32),
        "params": flat(model.parameters()),
    }
    if running(model):
        values["stats"] = flat(running(model))
    return values


def layer_inputs(model, x):
    """Each layer's input in evaluation mode, float64."""
    exact, seen = copy.deepcopy(model).double().eval(), {}
    for name, module in exact.named_modules():
        module.register_forward_pre_hook(lambda _, a, name=name: seen.setdefault(name, a[0]))
    with torch.no_grad():
        logits = exact(x.double())
    return seen, logits


@pytest.mark.parametrize(
    "make",
    [lambda: models.ds_cnn(5), lambda: models.efficientnet_lite0(0.25, 5)],
    ids=["ds_cnn", "efficientnet_lite0"],
)
def test_sums_equal_those_of_hooks(make):
    torch.manual_seed(0)
    model = randomise(make())
    x, sw = torch.randn(4, 3, 12, 12), np.array([1, 2, 0, 0.5])
    weights = [n for n, p in model.named_parameters() if p.dim() > 1]
    graph = export_observe(model, x, batch=4, observed=weights)
    out = run_graph(graph, feeds(model, x, sw))

    seen, logits = layer_inputs(model, x)
    assert relative_error(out["logits"], logits.numpy()) < 1e-5
    wanted, weight = [], torch.from_numpy(sw)
    for name in weights:
        squares = seen[name.removesuffix(".weight")] ** 2
        squares = squares.flatten(2).sum(2) if squares.dim() > 2 else squares
        width = model.get_parameter(name).shape[1]  # 1 for depthwise: all its channels together
        wanted.append((weight @ squares).reshape(-1, width).sum(0))
    assert graph.meta.observed == len(flat(wanted))
    assert relative_error(out["sumsq"], flat(wanted)) < 1e-5

    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    sums = [weight @ seen[n].flatten(2).sum(2) for n in norms]
    squares = [weight @ (seen[n] ** 2).flatten(2).sum(2) for n in norms]
    assert relative_error(out["bn_sum"], flat(sums)) < 1e-5
    assert relative_error(out["bn_sumsq"], flat(squares)) < 1e-5
    assert out["bn_count"].tolist() == [3.5 * seen[n][0, 0].numel() for n in norms]


def test_two_unequal_devices_recalibrate_exactly_as_the_pooled_data():
    # A first BatchNorm's input does not depend on statistics, so one pass recalibrates it.
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.Flatten()))
    x = torch.randn(11, 2, 9) * torch.linspace(1, 5, 11)[:, None, None]
    graph = export_observe(model, x, batch=8, observed=[])

    def observe(samples):
        padded = torch.cat([samples, torch.full((8 - len(samples), 2, 9), 7.0)])
        return run_graph(graph, feeds(model, padded, np.arange(8) < len(samples)))

    devices = [observe(x[:8]), observe(x[8:])]
    total, squares, count = (
        sum(d[name].astype(np.float64) for d in devices)
        for name in ("bn_sum", "bn_sumsq", "bn_count")
    )
    assert count.tolist() == [11 * 7]
    mean = total / count
    pooled = model[0].double()(x.double()).detach()
    np.testing.assert_allclose(mean, pooled.mean((0, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        squares / count - mean**2, pooled.var((0, 2), correction=0), rtol=1e-5
    )


def test_a_linear_layer_on_sequences_sums_over_positions():
    model = nn.Linear(3, 2)
    x = torch.arange(12.0).reshape(2, 2, 3)
    graph = export_observe(model, x, batch=2, observed=["weight"])
    out = run_graph(graph, feeds(model, x, [1, 0.5]))
    # Column 0 holds 0, 3 in the first sample and 6, 9 in the second: 0 + 9 + (36 + 81) / 2.
    assert out["sumsq"].tolist() == [67.5, 91.5, 121.5]


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.ds_cnn(5),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 2)),
    ],
    ids=["ds_cnn", "flattened"],
)
def test_zeros_equal_those_of_hooks(make):
    torch.manual_seed(0)
    model = randomise(make())
    x, sw = torch.randn(4, 3, 12, 12), np.array([1, 2, 0, 0.5])
    weights = [n for n, p in model.named_parameters() if p.dim() > 1 and p.shape[1] > 1]
    graph = export_observe(model, x, batch=4, observed=[], counted=weights)
    out = run_graph(graph, feeds(model, x, sw))
    assert "sumsq" not in out
    assert graph.meta.observed == out["zeros"].size

    seen, _ = layer_inputs(model, x)
    wanted = []
    for name in weights:
        inactive = (seen[name.removesuffix(".weight")] <= 0).double()
        share = inactive.flatten(2).mean(2) if inactive.dim() > 2 else inactive
        wanted.append(torch.from_numpy(sw) @ share)
    assert relative_error(out["zeros"], flat(wanted)) < 1e-5
    assert (out["zeros"] <= 3.5).all()


def test_zeros_by_hand():
    """Two positions, two channels; what is below zero counts as well."""
    model = nn.Conv1d(2, 1, 1)
    x = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]], [[2.0, 3.0], [0.0, 4.0]]])
    graph = export_observe(model, x, batch=2, observed=[], counted=["weight"])
    out = run_graph(graph, feeds(model, x, [1, 0.5]))
    # Channel 0: half of the first sample. Channel 1: all of it, and half of the second's half.
    assert out["zeros"].tolist() == [0.5, 1.25]


def test_a_layer_that_runs_twice_has_the_zeros_of_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2, bias=False)

        def forward(self, x):
            return self.layer(self.layer(x))

    model = Twice()
    with torch.no_grad():
        model.layer.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    x = torch.tensor([[1.0, 0.0]])
    graph = export_observe(model, x, batch=1, observed=[], counted=["layer.weight"])
    # First (1, 0), then (0, 1): each input is zero half of the time.
    assert run_graph(graph, feeds(model, x, [1]))["zeros"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.ds_cnn(5),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 2)),
    ],
    ids=["ds_cnn", "flattened"],
)
def test_products_equal_those_of_hooks(make):
    torch.manual_seed(0)
    model = randomise(make())
    x, sw = torch.randn(4, 3, 12, 12), np.array([1, 2, 0, 0.5])
    weights = [n for n, p in model.named_parameters() if p.dim() > 1 and p.shape[1] > 1]
    graph = export_observe(model, x, batch=4, observed=[], crossed=weights)
    out = run_graph(graph, feeds(model, x, sw))

    seen, _ = layer_inputs(model, x)
    wanted = []
    for name in weights:
        rows = seen[name.removesuffix(".weight")].movedim(1, -1)
        weight = torch.from_numpy(sw).reshape(-1, *[1] * (rows.dim() - 1)) * rows
        width = rows.shape[-1]
        products = weight.reshape(-1, width).T @ rows.reshape(-1, width)
        wanted.append(products[tuple(torch.triu_indices(width, width))])
    assert relative_error(out["gram"], flat(wanted)) < 1e-5


def test_products_of_a_linear_layer_by_hand():
    model = nn.Linear(2, 1)
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    graph = export_observe(model, x, batch=2, observed=[], crossed=["weight"])
    out = run_graph(graph, feeds(model, x, [1, 0.5]))
    # 1 + 9 + (25 + 49) / 2, 2 + 12 + (30 + 56) / 2, 4 + 16 + (36 + 64) / 2
    assert out["gram"].tolist() == [47, 57, 70]


def test_without_batch_norm_there_are_no_statistics():
    model = models.mlp(4, 8, 3)
    graph = export_observe(model, torch.zeros(1, 4), batch=2, observed=["0.weight", "2.weight"])
    assert set(run_graph(graph, feeds(model, torch.ones(2, 4), [1, 1]))) == {"logits", "sumsq"}
    assert (graph.meta.observed, graph.meta.statistics) == (12, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("9.weight", "observed weight 9.weight: the model has no such layer"),
        (
            "0.bias",
            "observed weight 0.bias: expected the weight of a Conv1d, Conv2d or Linear, "
            "got 'bias' of a Linear",
        ),
    ],
)
def test_a_wrong_name_is_refused(name, message):
    with pytest.raises(GraphError) as error:
        export_observe(models.mlp(4, 8, 3), torch.zeros(1, 4), batch=2, observed=[name])
    assert str(error.value) == message
