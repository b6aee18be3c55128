"""Which excluded layers have to be spared already when a model is traced."""

import torch
from torch import nn

from fleetprune_coordinator.supported import untraceable
from fleetprune_coordinator.tracing import trace


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 6), nn.ReLU())
    net.append(nn.Linear(6, 2))
    net[2].weight = net[0].weight
    return net


def test_only_layers_that_are_refused():
    net = nn.ModuleDict({"body": nn.ModuleDict({"rnn": nn.LSTM(2, 3)}), "fc": nn.Linear(3, 2)})
    assert untraceable(net, ["body.rnn"]) == ("body.rnn",)
    assert untraceable(net, ["body", "fc"]) == ("body.rnn",)  # what Linear makes is spared later
    assert untraceable(net, ["*"]) == ("body.rnn",)
    assert untraceable(net, ["fc", "body.r", "rnn", "nowhere"]) == ()
    assert untraceable(net, []) == ()


def test_layers_that_share_a_weight():
    assert untraceable(tied(), ["2", "0", "3"]) == ("0", "2")
    assert untraceable(tied(), ["2"]) == ("2",)
    architecture = trace(tied(), torch.zeros(1, 4), untraceable(tied(), ["[02]"]))
    assert architecture.groups == {"3": 6}
