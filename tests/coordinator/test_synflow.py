"""SynFlow's gradient against numbers worked by hand, and its law of conservation."""

import numpy as np
import pytest
import torch
from torch import nn

from fleetprune.criteria import synflow
from fleetprune.errors import BudgetError
from fleetprune_coordinator.resize import read
from fleetprune_coordinator.synflow import flow_gradients
from fleetprune_coordinator.tracing import trace
from fleetprune_sim import models

from .prunable_nets import concat, layer_norm_mlp, make, mobilenet, resnet, squeeze_excite


def flow(model, *shape):
    example, (params, _) = torch.zeros(1, *shape), read(model)
    gradients = flow_gradients(model, example, params)
    return gradients, params, trace(model, example)


def tiny():
    """y = 5 * relu(3 a - 4 b) - 1 * relu(2 b); with absolute weights R = 5 * 7 + 1 * 2 = 37."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -4.0], [0.0, 2.0]]))
        model[0].bias.fill_(-9.0)
        model[2].weight.copy_(torch.tensor([[5.0, -1.0]]))
    return model


def test_gradients_by_hand():
    gradients, params, architecture = flow(tiny(), 2)
    np.testing.assert_allclose(gradients["0.weight"] * 37, [[5, 5], [1, 1]], rtol=1e-6)
    np.testing.assert_allclose(gradients["2.weight"] * 37, [[7, 2]], rtol=1e-6)
    scores = synflow(architecture, params, gradients)
    np.testing.assert_allclose(scores["0"] * 37, [35, 2], rtol=1e-6)


def test_the_model_is_left_as_it_is():
    model = models.digits_cnn()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flow(model, 1, 8, 8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("net", [mobilenet, resnet, concat, layer_norm_mlp])
def test_what_flows_into_a_unit_flows_out_of_it(net):
    model, example = make(net)
    gradients, params, architecture = flow(model, *example.shape[1:])
    scores = synflow(architecture, params, gradients)
    inside = set()
    for name in architecture.observed:  # layers behind exactly one group, and a group behind once
        groups = [s.group for s in architecture.tensor(name).axes[1]]
        users = [
            n
            for n in architecture.observed
            if groups[0] in {s.group for s in architecture.tensor(n).axes[1]}
        ]
        makers = [
            t.name
            for t in architecture.tensors
            if len(t.axes) > 1 and groups[0] in {s.group for s in t.axes[0]}
        ]
        if groups == [groups[0]] and len(users) == len(makers) == 1 and groups[0]:
            inside.add(groups[0])
            weight = np.abs(params[name] * gradients[name])
            out = weight.sum(axis=tuple(a for a in range(weight.ndim) if a != 1))
            out = out.reshape(architecture.groups[groups[0]], -1).sum(axis=1)
            np.testing.assert_allclose(scores[groups[0]], out, rtol=1e-5)
    assert inside


def test_every_layer_of_a_chain_has_all_of_the_flow():
    gradients, params, _ = flow(models.cnn1d(3, 5), 3, 16)
    for name, gradient in gradients.items():
        if not name.endswith("bias"):
            assert np.abs(params[name] * gradient).sum() == pytest.approx(1, rel=1e-5)


def test_deep_networks_with_saturating_activations_keep_their_flow():
    model = models.efficientnet_lite0(0.25, 5)  # ReLU6 in 53 layers
    gradients, params, architecture = flow(model, 3, 32, 32)
    scores = synflow(architecture, params, gradients)
    assert all((values > 0).all() for values in scores.values())


def test_a_gate_passes_flow_but_has_none_of_its_own():
    model, example = make(squeeze_excite)
    gradients, params, architecture = flow(model, *example.shape[1:])
    scores = synflow(architecture, params, gradients)
    assert (scores["stem.0"] > 0).all()
    assert np.isfinite(scores["down"]).all()


def test_a_network_without_a_path_is_refused():
    model = tiny()
    nn.init.zeros_(model[2].weight)
    with pytest.raises(BudgetError) as caught:
        flow(model, 2)
    assert str(caught.value) == (
        "synflow: a flow of 0 reaches the output, expected a positive number; "
        "choose another criterion"
    )
