"""Sessions and the check of a graph on the machine that is to run it."""

import base64

import numpy as np
import pytest
import torch

from fleetprune.errors import GraphError
from fleetprune_agent import runtime
from fleetprune_coordinator.graphs import export_infer, export_observe, export_train_step
from fleetprune_coordinator.graphs.verification import native_block, probe_model
from fleetprune_sim import models

torch.set_num_threads(1)
needs_blocks = pytest.mark.skipif(
    runtime.probe_block() == 0, reason="onnxruntime has no blocked operators on this processor"
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return models.digits_cnn()


def train_graph(model, block):
    return export_train_step(model, torch.zeros(1, 1, 8, 8), batch=4, block=block)


def test_the_probe_is_the_graph_that_the_coordinator_writes():
    assert base64.b64decode(runtime._PROBE_GRAPH) == probe_model()


def test_both_sides_see_the_same_block():
    assert runtime.probe_block() == native_block()


def test_good_graphs_pass(model):
    example = torch.zeros(1, 1, 8, 8)
    train = [train_graph(model, b) for b in {0, runtime.probe_block()}]
    observe = export_observe(model, example, batch=4, observed=["fc.weight"])
    for graph in (*train, observe):
        session = runtime.training_session(graph.onnx)
        assert runtime.session_meta(session) == graph.meta
        runtime.verify(session, graph.meta)
    graph = export_infer(model, example)
    session = runtime.inference_session(graph.onnx)
    runtime.verify(session, runtime.session_meta(session))


@needs_blocks
def test_a_graph_for_another_block_is_refused(model):
    graph = train_graph(model, 24 - runtime.probe_block())
    session = runtime.training_session(graph.onnx)
    with pytest.raises(
        GraphError, match=r"train_step graph (computes wrong|does not run|: output)"
    ):
        runtime.verify(session, graph.meta)


def test_wrong_weights_in_an_inference_graph_are_noticed(model):
    graph = export_infer(model, torch.zeros(1, 1, 8, 8))
    other = export_infer(models.digits_cnn(), torch.zeros(1, 1, 8, 8))
    with pytest.raises(GraphError, match=r"infer graph computes wrong numbers on this machine: y"):
        runtime.verify(runtime.inference_session(other.onnx), graph.meta)


def test_bytes_that_are_no_graph_are_refused():
    with pytest.raises(GraphError, match=r"^onnxruntime cannot load the graph: "):
        runtime.training_session(b"no graph")


def test_a_graph_without_metadata_is_refused():
    if not native_block():
        pytest.skip("the probe graph needs blocked operators")
    session = runtime.training_session(probe_model())
    with pytest.raises(GraphError) as error:
        runtime.session_meta(session)
    assert str(error.value) == "graph without the metadata entry 'fleetprune'"


def test_training_through_the_runtime_lowers_the_loss(model):
    graph = train_graph(model, runtime.probe_block())
    session = runtime.training_session(graph.onnx)
    state = {
        "params": torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy(),
        "momentum": np.zeros(graph.meta.parameters, np.float32),
        "stats": torch.cat(
            [b.reshape(-1) for n, b in model.named_buffers() if "running" in n]
        ).numpy(),
    }
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(4, 1, 8, 8)).astype(np.float32),
        "y": np.array([0, 1, 2, 3]),
        "sw": np.ones(4, np.float32),
        "lr": np.array(0.05, np.float32),
    }
    losses = []
    for _ in range(10):
        names = ["loss", "params_out", "momentum_out", "stats_out"]
        loss, *new = session.run(names, batch | state)
        state = dict(zip(state, new, strict=True))
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
