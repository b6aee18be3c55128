"""The graph that counts values, against the tensors of the inference file."""

import numpy as np
import onnx
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
from fleetprune_coordinator.graphs.export_ranges import export_ranges
from fleetprune_coordinator.integer_kernels import choose
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
    proto = onnx.load_from_string(export_infer(model, torch.zeros(1, *x.shape[1:])).onnx)
    last = proto.graph.node[-1]
    names = choose(proto.graph.node[:-1], "x", [last.input[0]]).tensors
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
    "net", [n for n in nets.GROUPS if n is not nets.efficientnet_lite0], ids=lambda f: f.__name__
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


def fails(model, example, message):
    with pytest.raises(GraphError) as caught:
        export_ranges(model, example, batch=4)
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
