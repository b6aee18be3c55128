"""The graph that counts values, against the tensors of the inference file."""

from functools import partial

import numpy as np
import onnxruntime as ort
import prunable_nets as nets
import pytest
import torch
from onnx import helper
from torch import nn

from fleetprune.errors import GraphError
from fleetprune.model_payload import ModelPayload
from fleetprune_agent.data import Batches
from fleetprune_agent.observer import observe
from fleetprune_agent.runtime import session_meta, training_session, verify
from fleetprune_coordinator.graphs import export_infer
from fleetprune_coordinator.graphs.export_ranges import check_countable, export_ranges
from fleetprune_coordinator.graphs.sample_axes import blocks_before
from fleetprune_coordinator.quantise import prepared
from fleetprune_coordinator.resize import read
from fleetprune_coordinator.value_ranges import BINS, HIGHEST, LOWEST, PER_OCTAVE, PER_TENSOR


def payload(model):
    params, stats = (
        np.concatenate([np.zeros(0, np.float32), *(v.ravel() for v in tensors.values())])
        for tensors in read(model)
    )
    return ModelPayload(0, 0, params, stats)


def file_tensors(model, x):
    """What the inference file's chosen tensors hold, in order."""
    proto, choice = prepared(export_infer(model, torch.zeros(1, *x.shape[1:])).onnx)
    names = choice.tensors
    del proto.graph.output[:]
    for name in names[1:]:
        proto.graph.output.append(helper.make_tensor_value_info(name, 1, None))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    data = proto.SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [x, *session.run(list(names[1:]), {"x": x})]


def histogram(values):
    size = np.clip(np.abs(values.ravel()), 2.0**LOWEST, 2.0**HIGHEST * (1 - 2.0**-20))
    place = np.floor((np.log2(size) - LOWEST) * PER_OCTAVE).astype(int)
    place += BINS * (values.ravel() < 0)
    return np.bincount(place, minlength=PER_TENSOR)


def counted(model, x, batch=4):
    graph = export_ranges(model, torch.zeros(1, *x.shape[1:]), batch=batch)
    session = training_session(graph.onnx)
    verify(session, session_meta(session))
    seen = observe(session, payload(model), Batches(x, None, batch))
    assert graph.meta.ranges == seen.sums["ranges"].size
    return seen.sums["ranges"].reshape(-1, PER_TENSOR)


@pytest.mark.parametrize(
    "net", [n for n in nets.ALL if n is not nets.efficientnet_lite0], ids=lambda f: f.__name__
)
def test_a_device_counts_the_values_of_the_shipped_files_tensors(net):
    model, example = nets.make(net)
    # Five samples in batches of four: the last one is padded.
    x = np.random.default_rng(0).normal(size=(5, *example.shape[1:])).astype(np.float32)
    got, wanted = counted(model, x), file_tensors(model, x)
    assert len(got) == len(wanted)
    for ours, values in zip(got, wanted, strict=True):
        theirs = histogram(values)
        assert ours.sum() == theirs.sum() == values.size
        assert np.abs(ours - theirs).sum() <= 2  # a value at the edge of a bin


def test_equal_weights_are_counted_layer_by_layer():
    """A fresh model's zero biases are one constant in a file, and two branches may be alike."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    for p in model.parameters():
        nn.init.zeros_(p)
    got = counted(model, np.ones((4, 4), np.float32))
    assert got.sum(axis=1).tolist() == [16, 12, 8]
    assert got[0, BINS // 2] == 16  # of ones
    assert got[1, 0] == 12  # of zeros


def tokens_first():
    """Tokens first, samples second: so torch's attention has it by default."""
    attention = nn.MultiheadAttention(8, 2)

    def wiring(m, x):
        x = m.embed(x.transpose(0, 1))
        return m.fc((x + m.attention(x, x, x)[0]).mean(0))

    return nets.Wired(wiring, embed=nn.Linear(5, 8), attention=attention, fc=nn.Linear(8, 3))


def samples_last():
    """One row per feature, one column per sample, before the last layer."""

    def wiring(m, x):
        return m.fc(torch.relu(m.mix(x)).permute(1, 2, 0).reshape(24, -1).T)

    return nets.Wired(wiring, mix=nn.Linear(5, 4), fc=nn.Linear(24, 3))


@pytest.mark.parametrize("make", [tokens_first, samples_last])
def test_padding_is_not_counted_whichever_axis_has_the_samples(make):
    torch.manual_seed(0)
    model = make().eval()
    x = np.random.default_rng(0).normal(size=(5, 6, 5)).astype(np.float32)  # of which 3 are padding
    got, wanted = counted(model, x), file_tensors(model, x)
    for ours, values in zip(got, wanted, strict=True):
        theirs = histogram(values)
        assert ours.sum() == theirs.sum() == values.size
        assert np.abs(ours - theirs).sum() <= 2


def test_where_samples_lie():
    """x (n, 2, 3) as it is, with samples in the middle, and last within their axis."""
    n = {"x": helper.make_tensor_value_info("x", 1, ["n", 2, 3])}
    nodes = [
        helper.make_node("Transpose", ["x"], ["middle"], perm=[1, 0, 2]),
        helper.make_node("Flatten", ["middle"], ["rows"], axis=2),  # (2 n, 3)
        helper.make_node("Transpose", ["x"], ["last"], perm=[1, 2, 0]),
        helper.make_node("Transpose", ["rows"], ["turned"], perm=[1, 0]),  # (3, 2 n)
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["apart"]),
    ]
    graph = helper.make_graph(nodes, "g", [n["x"]], [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    x = np.random.default_rng(0).normal(size=(3, 2, 3)).astype(np.float32)
    names = ["x", "middle", "rows", "last", "turned"]
    assert blocks_before(model, names, x) == [1, 2, 2, 6, 6]
    for name, alone in (("mean", "(1, 2, 3) for one sample and (1, 2, 3)"),
                        ("apart", "(1, 2, 3) for one sample and (3, 2, 3)")):  # fmt: skip
        with pytest.raises(GraphError) as caught:
            blocks_before(model, [name], x)
        kind = {"mean": "ReduceMean", "apart": "Sub"}[name]
        assert str(caught.value) == (
            f"the output {name} of {kind} mixes the samples of a batch: of shape {alone} for 3, "
            "expected each sample's numbers in it as they are for that sample alone"
        )


def fails(model, example, message):
    for refused in (partial(export_ranges, batch=4), check_countable):
        with pytest.raises(GraphError) as caught:
            refused(model, example)
        assert str(caught.value) == message


def test_errors():
    fails(
        nn.Embedding(5, 3),
        torch.zeros(1, 2, dtype=torch.int64),
        "ranges of a model whose input is torch.int64, expected float32",
    )
    fails(
        nn.Sequential(nn.LayerNorm(4), nn.Softplus()),
        torch.zeros(1, 4),
        "the model has no operator that can run on integers",
    )
    apart = nets.Wired(lambda m, x: m.fc(x - x.mean(0, keepdim=True)), fc=nn.Linear(4, 2))
    with pytest.raises(GraphError, match=r"^the output \w+ of Sub mixes the samples of a batch: "):
        check_countable(apart, torch.zeros(1, 4))
