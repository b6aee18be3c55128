import io

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fleetprune.costs import Costs
from fleetprune_coordinator.artifacts import Artifact, golden, predict
from fleetprune_coordinator.graphs import export_infer
from fleetprune_coordinator.grid_values import on_grid, rounded, rounded_artifact
from fleetprune_sim.models import mlp

X = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)


def artifact(scale=1.0):
    torch.manual_seed(0)
    model = mlp(6, 16, 3).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    onnx = export_infer(model, torch.zeros(1, 6)).onnx
    costs = Costs(artifact_bytes=len(onnx), macs=1, peak_activation_bytes=1)
    return Artifact(onnx, golden(X[:8], predict(onnx, X[:8])), costs, 10)


def test_the_largest_of_an_output_decides_its_steps():
    array = np.array([[1.0, 0.5 + 1 / 3000], [1000.0, 0.3], [0.0, 0.0]], np.float32)
    step = 2.0**-10
    assert rounded(array).tolist() == [[1.0, 0.5], [1000.0, 0.5], [0.0, 0.0]]
    assert rounded(np.array([[1.0, 0.4]], np.float32))[0, 1] % step == 0


def test_a_vector_has_one_step_and_more_bits():
    array = np.array([1.0, 0.5 + 2.0**-13, 0.5 + 2.0**-15], np.float32)
    assert rounded(array).tolist() == [1.0, 0.5 + 2.0**-13, 0.5]


def test_zeros_stay_and_none_is_negative():
    near = rounded(np.array([[-0.0, -1e-9, 1.0]], np.float32))
    assert near.tolist() == [[0.0, 0.0, 1.0]]
    assert not np.signbit(near).any()


@given(arrays(np.float32, (3, 5), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_a_number_moves_by_half_a_step_at_most_and_then_never_again(array):
    near = rounded(array)
    top = np.abs(array).max(axis=1, keepdims=True)
    assert (np.abs(near.astype(np.float64) - array) <= top * 2.0**-11).all()
    assert rounded(near).tobytes() == near.tobytes()


def test_a_rounded_file_is_as_long_and_says_nearly_the_same():
    made = artifact()
    shipped = rounded_artifact(made, X)
    assert shipped.onnx == on_grid(made.onnx) != made.onnx
    assert len(shipped.onnx) == len(made.onnx)
    apart = np.abs(predict(shipped.onnx, X) - predict(made.onnx, X)).max()
    assert 0 < apart < np.ptp(predict(made.onnx, X)) / 256
    with np.load(io.BytesIO(shipped.golden)) as samples:
        assert samples["x"].tobytes() == X[:8].tobytes()
        assert samples["y"].tobytes() == predict(shipped.onnx, X[:8]).tobytes()


def test_weights_stay_where_rounding_them_would_show(monkeypatch):
    monkeypatch.setattr("fleetprune_coordinator.grid_values.BITS", 2)
    made = artifact()
    assert rounded_artifact(made, X) is made


def test_a_model_that_always_says_the_same_is_rounded():
    made = artifact(0.0)
    assert not np.signbit(predict(rounded_artifact(made, X).onnx, X)).any()
