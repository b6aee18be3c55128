"""The three graphs of cut networks of every kind; each is held against torch as it is made."""

import prunable_nets as nets
import pytest
import torch

from fleetprune.costs import costs, parameters
from fleetprune_coordinator.graph_library import gate_members
from fleetprune_coordinator.graphs import export_infer, export_observe, export_train_step
from fleetprune_coordinator.graphs.verification import native_block
from fleetprune_coordinator.onnx_costs import file_costs
from fleetprune_coordinator.resize import resize
from fleetprune_coordinator.tracing import trace

NETS = (
    nets.grouped, nets.multiplied, nets.transposed, nets.group_norm, nets.instance_norm,
    nets.gated_linear, nets.halves, nets.padded_shortcut, nets.low_rank, nets.squeeze_excite,
    nets.cnn1d, nets.attention_one_layer, nets.attention_three_layers, nets.attention_rotated,
    nets.attention_of_torch, nets.attention_across, nets.encoder, nets.class_token, nets.mixer,
    nets.dead_ends,
)  # fmt: skip


def cut(net):
    model, example = nets.make(net)
    architecture = trace(model, example)
    keep = {g: max(1, n // 2) for g, n in architecture.groups.items()}
    return architecture, keep, resize(model, architecture, keep).eval(), example


@pytest.mark.parametrize("net", NETS, ids=lambda f: f.__name__)
def test_a_cut_network_trains_observes_and_is_shipped(net):
    architecture, keep, small, example = cut(net)
    x = torch.randn(4, *example.shape[1:])
    count = parameters(architecture, keep)
    gates = gate_members(architecture, keep)
    train = export_train_step(small, x, batch=4, gates=gates, block=native_block())
    assert (train.meta.parameters, train.meta.units) == (count, sum(keep.values()))
    observe = export_observe(small, x, batch=4, observed=architecture.observed)
    assert observe.meta.parameters == count
    measured, planned = file_costs(export_infer(small, x[:1]).onnx), costs(architecture, keep)
    assert measured.macs == planned.macs
    assert measured.peak_activation_bytes <= planned.peak_activation_bytes


def test_an_embedding_takes_integers():
    model = torch.nn.Sequential(
        torch.nn.Embedding(7, 6), torch.nn.Flatten(), torch.nn.Linear(18, 2)
    )
    x = torch.tensor([[0, 3, 6], [1, 1, 2], [4, 5, 6], [0, 0, 0]])
    architecture = trace(model, x[:1])
    assert architecture.groups == {"0": 6}
    small = resize(model, architecture, {"0": 2}).eval()
    export_train_step(small, x, batch=4, gates=gate_members(architecture, {"0": 2}))
    assert file_costs(export_infer(small, x[:1]).onnx).macs == 6 * 2
