"""The inference graph: folding, size, any batch."""

import copy

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from fleetprune.errors import GraphError
from fleetprune_coordinator.graphs import export_infer
from fleetprune_sim import models

from .graph_cases import randomise, relative_error

OVERHEAD = 8000
"""Bytes of nodes, names and metadata of the largest graph here."""

MODELS = {
    "mlp": (models.mlp, (64,)),
    "cnn1d": (models.cnn1d, (6, 128)),
    "digits_cnn": (models.digits_cnn, (1, 8, 8)),
    "ds_cnn": (models.ds_cnn, (3, 32, 32)),
    "resnet8": (models.resnet8, (3, 32, 32)),
    "efficientnet_lite0": (lambda: models.efficientnet_lite0(0.25), (3, 16, 16)),
    "linear, batch norm": (
        lambda: nn.Sequential(nn.Linear(8, 64, bias=False), nn.BatchNorm1d(64), nn.Tanh()),
        (8,),
    ),
}


def infer(graph, x):
    session = ort.InferenceSession(graph.onnx, providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x.numpy()})[0]


@pytest.mark.parametrize("name", MODELS)
def test_folded_graph_equals_torch_and_holds_nothing_but_weights(name):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = randomise(make())
    graph = export_infer(model, torch.zeros(1, *shape))
    exact = copy.deepcopy(model).double().eval()
    for batch in (1, 2, 5):
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            assert relative_error(infer(graph, x), exact(x.double()).numpy()) < 1e-5
    nodes = [n.op_type for n in onnx.load_from_string(graph.onnx).graph.node]
    assert "BatchNormalization" not in nodes
    assert len(graph.onnx) < 4 * sum(p.numel() for p in model.parameters()) + OVERHEAD


def test_batch_norm_is_kept_where_it_cannot_be_folded():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return y + self.norm(y)

    torch.manual_seed(0)
    graph = export_infer(randomise(Branch()), torch.zeros(1, 3, 2, 2))
    nodes = [n.op_type for n in onnx.load_from_string(graph.onnx).graph.node]
    assert nodes.count("BatchNormalization") == 1


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (6, 16)),
        (nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.AvgPool2d(2)), (1, 8, 8)),
        (nn.Sequential(nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8, affine=True)), (1, 8, 8)),
        (nn.Sequential(nn.Conv1d(2, 8, 3), nn.InstanceNorm1d(8)), (2, 9)),
        (nn.Sequential(nn.ConvTranspose2d(2, 6, 3, 2, 1, 1), nn.BatchNorm2d(6)), (2, 5, 5)),
    ],
    ids=["transformer", "group norm", "instance norm", "without weights", "transposed"],
)
def test_the_batch_stays_open_through_reshapes(model, shape):
    torch.manual_seed(0)
    graph = export_infer(model, torch.zeros(1, *shape))
    x = torch.randn(4, *shape)
    with torch.no_grad():
        want = model.eval()(x).numpy()
    assert relative_error(infer(graph, x), want) < 1e-5


def test_lstm_states_follow_the_batch():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 8, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0][:, -1]

    torch.manual_seed(0)
    model = Last()
    graph = export_infer(model, torch.zeros(1, 3, 4))
    x = torch.randn(5, 3, 4)
    assert relative_error(infer(graph, x), model(x).detach().numpy()) < 1e-5


def test_integer_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2))
    x = torch.tensor([[0, 3, 6], [1, 1, 2]])
    graph = export_infer(model, x)
    np.testing.assert_allclose(infer(graph, x), model(x).detach(), rtol=1e-5)


def test_an_unsupported_layer_is_named():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Upsample(scale_factor=2))
    with pytest.raises(GraphError) as error:
        export_infer(model, torch.zeros(1, 1, 4, 4))
    assert str(error.value) == (
        "layer '1' (Upsample): aten.upsample_nearest2d has no lowering; "
        "remove or replace that layer"
    )


def test_a_model_that_mixes_samples_is_refused():
    class Centre(nn.Module):
        def forward(self, x):
            return x - x.roll(1, 0) if len(x) < 100 else x

    with pytest.raises(GraphError, match="inference graph differs from torch"):
        export_infer(Centre(), torch.zeros(1, 3))
