"""Quantised files: really small, really on integers, and within what the solver counted."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import prunable_nets as nets
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from fleetprune.costs import costs
from fleetprune.errors import GraphError
from fleetprune_coordinator.artifacts import Artifact, golden, predict
from fleetprune_coordinator.graphs import export_infer
from fleetprune_coordinator.int8 import choose_file, planned
from fleetprune_coordinator.onnx_costs import SLACK_BYTES, file_costs
from fleetprune_coordinator.quantise import (
    all_integer,
    float_layers,
    no_ranges,
    prepared,
    quantise,
)
from fleetprune_coordinator.resize import resize
from fleetprune_coordinator.selfcheck import randomised
from fleetprune_coordinator.tracing import trace
from fleetprune_sim import models

torch.set_num_threads(1)

ZOO = {
    "mlp": (models.mlp, (64,)),
    "digits_cnn": (models.digits_cnn, (1, 8, 8)),
    "cnn1d": (models.cnn1d, (6, 64)),
    "ds_cnn": (models.ds_cnn, (3, 32, 32)),
    "resnet8": (models.resnet8, (3, 32, 32)),
    "mobilenet_v2": (models.mobilenet_v2, (3, 32, 32)),
    "efficientnet_lite0": (lambda: models.efficientnet_lite0(0.35), (3, 32, 32)),
}
IN_FLOAT = {nets.concat, nets.layer_norm_mlp, nets.scaled, nets.gated_activations}
"""Nets with operators that have no integer kernel."""


def exported(model, shape):
    return export_infer(model, torch.zeros(1, *shape)).onnx


def fake(model):
    return quantise(model, no_ranges(model))


def what_onnxruntime_runs(model):
    """How many nodes of each type are left when onnxruntime has loaded a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loaded.onnx"
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(path)
        options.log_severity_level = 3
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(path).graph.node)


def check_bounds(model, shape):
    """The solver's figures against real files, cut at random, to one unit and not; the last one."""
    example = torch.zeros(1, *shape)
    architecture = trace(model, example)
    counted = planned(model, architecture)
    groups, rng = architecture.groups, np.random.default_rng(0)
    for keep in (
        {g: int(rng.integers(1, n + 1)) for g, n in groups.items()},
        dict.fromkeys(groups, 1),
        groups,
    ):
        file = fake(exported(resize(model, architecture, keep), shape))
        measured, computed = file_costs(file), costs(counted, keep)
        assert measured.macs == computed.macs
        # A smaller tensor's sizes take up to two bytes less to write down.
        loose = 2 * SLACK_BYTES + 8 * len(architecture.tensors)
        assert 0 <= computed.artifact_bytes - measured.artifact_bytes < loose
        assert measured.peak_activation_bytes <= computed.peak_activation_bytes
        if all_integer(file):
            assert measured.peak_activation_bytes == computed.peak_activation_bytes
    return file


@pytest.mark.parametrize("net", [n for n in nets.GROUPS if n is not nets.efficientnet_lite0])
def test_solvers_figures_bound_the_files_of_small_nets(net):
    model, example = nets.make(net)
    check_bounds(model, tuple(example.shape[1:]))


PARTLY = {
    nets.transposed: "2 of 4 layers stay in float32: 2 ConvTranspose (onnxruntime has no integer "
    "kernel)",
    nets.low_rank: "1 of 3 layers stay in float32: 1 Gemm (its weight is computed)",
    nets.attention_across: "",
    nets.mixer: "",
}
"""Nets whose weights are turned, cut out of others, computed, or of layers without a kernel, and
what is said of those that stay in float32."""


@pytest.mark.parametrize("net", PARTLY)
def test_what_can_be_quantised_is_and_the_rest_counts_as_float(net):
    model, example = nets.make(net)
    shape = tuple(example.shape[1:])
    file = check_bounds(model, shape)
    assert not all_integer(file)
    assert float_layers(exported(model, shape)) == PARTLY[net]
    assert what_onnxruntime_runs(file)["QGemm"] > 0


@pytest.mark.parametrize("net", [n for n in nets.ALL if n is not nets.efficientnet_lite0])
def test_every_nets_quantised_file_computes_about_the_same(net):
    model, example = nets.make(net)
    file = exported(model, tuple(example.shape[1:]))
    x = np.random.default_rng(0).normal(size=(8, *example.shape[1:])).astype(np.float32)
    y = predict(file, x)
    apart = np.abs(predict(quantise(file, ranges(file, x)), x) - y).max()
    assert apart < 0.1 * max(np.ptp(y), 1.0)


def ranges(file, x):
    """The lowest and the highest values of a file's tensors."""
    proto, choice = prepared(file)
    del proto.graph.output[:]
    for name in choice.tensors[1:]:
        proto.graph.output.append(helper.make_tensor_value_info(name, 1, None))
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    values = [x, *session.run(list(choice.tensors[1:]), {"x": x})]
    return np.array([(v.min(), v.max()) for v in values], np.float32)


def test_a_file_that_is_partly_float_says_so_when_it_ships():
    model, _ = nets.make(nets.low_rank)
    file = exported(model, (5,))
    x = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    made = Artifact(file, golden(x[:2], predict(file, x[:2])), file_costs(file), 1e-4, 0)
    truth = predict(file, x).argmax(axis=1)
    options = {"wanted": True, "fits": lambda made: True}
    small, verdict = choose_file(made, ranges(file, x), x, truth, most_lost=1.0, **options)
    assert (small.int8, verdict.int8, verdict.reason) == (True, True, PARTLY[nets.low_rank])
    _, verdict = choose_file(made, ranges(file, x), x, None, most_lost=1.0, **options)
    assert verdict.reason == PARTLY[nets.low_rank]


@pytest.mark.parametrize("name", ZOO)
def test_the_zoos_files_run_on_integers_and_cost_what_was_counted(name):
    make, shape = ZOO[name]
    torch.manual_seed(0)
    file = check_bounds(make(), shape)
    assert all_integer(file)
    floats = {"Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "DequantizeLinear"}
    assert not floats & set(what_onnxruntime_runs(file))


@pytest.mark.parametrize("net", [n for n in nets.GROUPS if n is not nets.efficientnet_lite0])
def test_it_is_known_which_nets_leave_the_integers(net):
    model, example = nets.make(net)
    file = fake(exported(model, tuple(example.shape[1:])))
    assert all_integer(file) == (net not in IN_FLOAT)
    # A file ends in one DequantizeLinear where its last operator is no linear layer.
    left = what_onnxruntime_runs(file)["DequantizeLinear"]
    assert left <= (net is nets.conv_head) or net in IN_FLOAT


def test_a_quantised_file_is_about_a_quarter():
    make, shape = ZOO["digits_cnn"]
    file = exported(randomised(make(), torch.float32), shape)
    assert len(fake(file)) < 0.28 * len(file)


def one_layer(weight, bias, ranges):
    """A quantised linear layer; returns the file and its outputs for x = (1, 1)."""
    model = nn.Linear(2, len(weight))
    with torch.no_grad():
        model.weight.copy_(torch.tensor(weight))
        model.bias.copy_(torch.tensor(bias))
    file = quantise(exported(model, (2,)), np.array(ranges, np.float32))
    return file, predict(file, np.ones((1, 2), np.float32))[0]


def test_numbers_of_one_layer():
    """Steps of 1/85 for x; weights in 64ths of each row's largest: 3/64 and 96/64."""
    file, y = one_layer([[3.0, 1.5], [-96.0, 48.0]], [1.0, 0.0], [[0, 3], [0, 0]])
    weights = {
        tuple(t.dims): numpy_helper.to_array(t)
        for t in onnx.load_from_string(file).graph.initializer
        if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2
    }
    assert weights[2, 2].tolist() == [[64, 32], [-64, 32]]
    assert y == pytest.approx([5.5, -48.0], abs=0.01)


def test_weights_use_seven_bits():
    make, shape = ZOO["mlp"]
    file = fake(exported(randomised(make(), torch.float32), shape))
    bytes_ = [
        numpy_helper.to_array(t)
        for t in onnx.load_from_string(file).graph.initializer
        if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2
    ]
    assert len(bytes_) == 2
    for weights in bytes_:
        assert np.abs(weights.astype(int)).max(axis=1).tolist() == [64] * len(weights)


def test_a_clamp_keeps_its_limit_though_it_is_left_out():
    """ReLU6 of 100 is 6 also where the fleet's values seem to go up to 8."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU6(), nn.Linear(1, 1))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.fill_(1.0)
            layer.bias.zero_()
    ranges = np.array([[0, 100], [0, 8], [0, 8]], np.float32)
    file = quantise(exported(model, (1,)), ranges)
    assert not any(n.op_type == "Clip" for n in onnx.load_from_string(file).graph.node)
    assert predict(file, np.array([[100.0], [2.0]], np.float32)).ravel() == pytest.approx(
        [6.0, 2.0], abs=0.25
    )


def test_a_clamp_before_a_float_operator_is_not_lost():
    """A linear layer can write float32 for it, but ReLU of -1 stays 0, and e to that is 1."""
    net = nets.Wired(
        lambda m, x: m.b(torch.exp(torch.relu(m.a(x)))), a=nn.Linear(1, 1), b=nn.Linear(1, 1)
    )
    with torch.no_grad():
        for layer in (net.a, net.b):
            layer.weight.fill_(1.0)
            layer.bias.zero_()
    file = exported(net, (1,))
    assert len(no_ranges(file)) == 4  # x, what ReLU makes, what exp makes, and the output
    file = quantise(file, np.array([[-1, 1], [0, 1], [0, 3], [0, 3]], np.float32))
    y = predict(file, np.array([[-1.0], [1.0]], np.float32)).ravel()
    assert y == pytest.approx([1.0, np.e], abs=0.05)


def test_biases_that_are_alike_get_each_its_own_scale():
    """An exporter writes equal constants once; with inputs of unlike scale they are not equal."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight.copy_(torch.eye(2) * 10**i)
            layer.bias.fill_(1.0)
    ranges = np.array([[0, 1], [0, 2], [0, 21], [0, 2101]], np.float32)
    file = quantise(exported(model, (2,)), ranges)
    y = predict(file, np.array([[1.0, 0.5]], np.float32))[0]
    assert y == pytest.approx([2101, 1601], rel=0.02)


def test_quantising_twice_gives_the_same_bytes():
    make, shape = ZOO["cnn1d"]
    torch.manual_seed(0)
    file = exported(make(), shape)
    assert fake(file) == fake(file)


def test_any_number_of_samples_runs():
    make, shape = ZOO["resnet8"]
    torch.manual_seed(0)
    file = fake(exported(make(), shape))
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    np.testing.assert_array_equal(predict(file, x)[:1], predict(file, x[:1]))


def test_errors():
    file = exported(nn.Linear(2, 2), (2,))
    with pytest.raises(GraphError) as caught:
        quantise(file, np.zeros((3, 2), np.float32))
    assert str(caught.value) == (
        "int8: ranges of shape (3, 2), expected (2, 2): one per tensor of the file"
    )
    words = export_infer(
        nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)),
        torch.full((1, 2), 4, dtype=torch.int64),
    ).onnx
    with pytest.raises(GraphError) as caught:
        quantise(words, np.zeros((2, 2), np.float32))
    assert str(caught.value) == "int8: the model's input is not float32"
