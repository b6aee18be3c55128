import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from fleetprune.graphmeta import METADATA_KEY, parse_graph_meta
from fleetprune_coordinator.graphs import export_infer
from fleetprune_coordinator.graphs.weightless import weightless
from fleetprune_coordinator.quantise import no_ranges, quantise
from fleetprune_sim import models

MODELS = {
    "resnet8": (models.resnet8, (3, 32, 32)),
    "ds_cnn": (models.ds_cnn, (3, 32, 32)),
    "mlp": (models.mlp, (64,)),
}


def operators(file: bytes, folder) -> list[str]:
    """What onnxruntime makes of a file."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_operators_run_and_the_file_is_small(name, tmp_path):
    make, shape = MODELS[name]
    real = export_infer(make(), torch.zeros(1, *shape)).onnx
    light = weightless(real)
    assert operators(light, tmp_path) == operators(real, tmp_path)
    assert len(light) < 8000 < len(real)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_integer_kernels_run_without_the_weights(name, tmp_path):
    make, shape = MODELS[name]
    whole = export_infer(make(), torch.zeros(1, *shape)).onnx
    real = quantise(whole, no_ranges(whole))
    light = weightless(real)
    ran = operators(light, tmp_path)
    assert ran == operators(real, tmp_path)
    assert "QGemm" in ran
    assert not {"Conv", "Gemm", "MatMul"}.intersection(ran)
    assert len(light) < 9000 < len(real)
    session = ort.InferenceSession(light, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones((1, *shape), np.float32)})
    assert y.shape == (1, 10)
    assert np.isfinite(y).all()


def test_activations_stay_of_the_size_of_the_inputs():
    light = weightless(export_infer(models.resnet8(), torch.zeros(1, 3, 32, 32)).onnx)
    session = ort.InferenceSession(light, providers=["CPUExecutionProvider"])
    x = np.ones((1, 3, 32, 32), np.float32)
    (y,) = session.run(None, {"x": x})
    assert y.shape == (1, 10)
    assert 0.01 < np.abs(y).max() < 100


def test_it_says_what_it_is_but_not_what_it_should_compute():
    real = export_infer(models.mlp(), torch.zeros(1, 64))
    light = onnx.load_from_string(weightless(real.onnx))
    (entry,) = (e for e in light.metadata_props if e.key == METADATA_KEY)
    meta = parse_graph_meta(entry.value)
    assert (meta.kind, meta.verification.x) == ("infer", real.meta.verification.x)
    assert real.meta.verification.expected
    assert meta.verification.expected == ()


def test_equal_graphs_give_equal_bytes():
    real = export_infer(models.mlp(), torch.zeros(1, 64)).onnx
    assert weightless(real) == weightless(real)
