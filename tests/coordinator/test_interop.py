"""Models that torch.nn.utils.prune or Torch-Pruning have been at."""

import copy

import numpy as np
import prunable_nets as nets
import pytest
import torch
import torch_pruning
from torch import nn
from torch.nn.utils import prune

from fleetprune.errors import UsageError
from fleetprune.layout import Role, cut
from fleetprune_coordinator.graphs import export_infer, export_train_step
from fleetprune_coordinator.interop import masked_state, plain_state, with_masks, without_masks
from fleetprune_coordinator.resize import extract, read
from fleetprune_coordinator.tracing import trace
from fleetprune_sim import models


def two_layers():
    """Weights (2, 2) and (1, 2) whose values can be told apart."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        net[0].bias.copy_(torch.tensor([0.5, 0.25]))
        net[2].weight.copy_(torch.tensor([[10.0, 20.0]]))
    return net


def test_a_masked_weight_becomes_one_with_zeros():
    net = two_layers()
    prune.l1_unstructured(net[0], "weight", amount=2)  # the two smallest: 1 and -2
    plain, masks = without_masks(net)
    assert {n: m.tolist() for n, m in masks.items()} == {"0.weight": [[False, False], [True, True]]}
    assert plain[0].weight.tolist() == [[0.0, 0.0], [3.0, 4.0]]
    assert isinstance(plain[0].weight, nn.Parameter)
    assert [n for n, _ in plain.named_parameters()] == [
        n for n, _ in two_layers().named_parameters()
    ]
    assert not list(plain.buffers())
    assert not plain[0]._forward_pre_hooks
    x = torch.tensor([[1.0, 2.0]])
    assert torch.equal(plain(x), net(x))


def test_the_masked_model_is_left_alone():
    net = two_layers()
    prune.random_unstructured(net[2], "weight", amount=1)
    before = list(net.state_dict())
    without_masks(net)
    assert list(net.state_dict()) == before
    assert prune.is_pruned(net)


def test_a_weight_masked_twice_has_both_masks():
    net = two_layers()
    for place in ((0, 0), (1, 1)):
        mask = torch.ones(2, 2)
        mask[place] = 0
        prune.custom_from_mask(net[0], "weight", mask)
    prune.l1_unstructured(net[0], "bias", amount=1)
    plain, masks = without_masks(net)
    assert masks["0.weight"].tolist() == [[False, True], [True, False]]
    assert masks["0.bias"].tolist() == [True, False]
    assert plain[0].weight.tolist() == [[0.0, -2.0], [3.0, 0.0]]


def test_masks_go_back_where_they_came_from():
    net = two_layers()
    prune.global_unstructured(
        [(net[0], "weight"), (net[2], "weight")], prune.L1Unstructured, amount=3
    )
    plain, masks = without_masks(net)
    again = with_masks(plain, masks)
    assert prune.is_pruned(again)
    assert not prune.is_pruned(plain)
    assert {n: m.tolist() for n, m in without_masks(again)[1].items()} == {
        n: m.tolist() for n, m in masks.items()
    }
    again(torch.ones(1, 2)).sum().backward()  # what is cut learns nothing there
    assert again[0].weight_orig.grad[torch.from_numpy(~masks["0.weight"])].tolist() == [0.0] * int(
        (~masks["0.weight"]).sum()
    )


def test_a_model_without_masks_has_none():
    plain, masks = without_masks(two_layers())
    assert masks == {}
    assert torch.equal(plain[0].weight, two_layers()[0].weight)


def test_state_dicts_go_both_ways():
    net = two_layers()
    prune.l1_unstructured(net[0], "weight", amount=2)
    state, masks = plain_state(net.state_dict())
    fresh = two_layers()
    fresh.load_state_dict(state)
    x = torch.tensor([[1.0, 2.0]])
    assert torch.equal(fresh(x), net(x))
    again = with_masks(two_layers(), {"0.weight": np.ones((2, 2), np.bool_)})
    again.load_state_dict(masked_state(state, masks))
    assert torch.equal(again(x), net(x))
    assert plain_state(two_layers().state_dict())[1] == {}


def test_masks_that_do_not_fit():
    net, mask = two_layers(), np.ones((3, 2), np.bool_)

    def fails(call, message):
        with pytest.raises(UsageError) as caught:
            call()
        assert str(caught.value) == message

    shape = "mask of 0.weight: shape (3, 2), expected (2, 2)"
    fails(lambda: with_masks(net, {"0.weight": mask}), shape)
    fails(lambda: masked_state(net.state_dict(), {"0.weight": mask}), shape)
    fails(
        lambda: with_masks(net, {"1.weight": mask}),
        "mask of 1.weight: the model has no such weight",
    )
    fails(
        lambda: masked_state(net.state_dict(), {"1.weight": mask}),
        "mask of 1.weight: the state_dict has no such weight",
    )
    state = {
        **net.state_dict(),
        "0.weight_orig": torch.ones(2, 2),
        "0.weight_mask": torch.ones(3, 2),
    }
    fails(lambda: plain_state(state), shape)
    assert not prune.is_pruned(net)


def pruned_by_torch_pruning(model, example, ratio):
    """As its documentation has it: magnitude, the classifier left whole."""
    torch.manual_seed(0)
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear)],
    )
    pruner.step()
    return model.eval()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: models.resnet8(channels=1), (1, 8, 8)),
        (lambda: models.ds_cnn(channels=1), (1, 8, 8)),
        (lambda: models.mobilenet_v2(0.1, channels=1), (1, 16, 16)),
        (lambda: nets.concat()[0], (3, 8, 8)),
    ],
    ids=["resnet8", "ds_cnn", "mobilenet_v2", "concat"],
)
def test_a_model_cut_by_torch_pruning_is_a_dense_start(make, shape):
    example = torch.randn(1, *shape)
    dense = make()
    before = trace(dense, example)
    model = pruned_by_torch_pruning(dense, example, 0.29)
    architecture = trace(model, example)
    assert list(architecture.groups) == list(before.groups)
    assert sum(architecture.groups.values()) < sum(before.groups.values())
    assert any(n % 2 for n in architecture.groups.values())  # no multiple of anything
    parameters, statistics = read(model)
    keep = {g: max(1, n // 2) for g, n in architecture.groups.items()}
    own = cut(architecture, statistics, keep, Role.STATISTIC)
    small = extract(model, architecture, parameters, own, keep)
    with torch.no_grad():
        zeroed = nets.zeroed(model, architecture, keep)
        torch.testing.assert_close(small(example), zeroed(example), rtol=1e-5, atol=1e-5)
        whole = extract(model, architecture, parameters, statistics, architecture.dense)
        assert torch.equal(whole(example), model(example))


def test_what_torch_pruning_left_can_be_exported():
    example = torch.randn(4, 1, 8, 8)
    model = pruned_by_torch_pruning(models.resnet8(channels=1), example[:1], 0.45)
    export_infer(copy.deepcopy(model), example[:1])
    export_train_step(model, example, batch=4)
