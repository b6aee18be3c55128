import re

import numpy as np
import onnxruntime as ort
import pytest
import torch
from step_graphs import observation

from fleetprune.errors import GraphError
from fleetprune.model_payload import ModelPayload
from fleetprune_agent.data import Batches
from fleetprune_agent.observer import observe
from fleetprune_agent.runtime import training_session
from fleetprune_agent.trainer import StoppedError
from fleetprune_coordinator.graphs import export_observe

PAYLOAD = ModelPayload(1, 0, np.zeros(2, np.float32), np.zeros(2, np.float32))


@pytest.fixture(scope="module")
def session():
    return ort.InferenceSession(observation(), providers=["CPUExecutionProvider"])


def batches(values, labels=None) -> Batches:
    x = np.array(values, np.float32)[:, None]
    return Batches(x, None if labels is None else np.array(labels), 3)


def test_padding_counts_for_nothing(session):
    got = observe(session, PAYLOAD, batches([1, 2, 3, 4]))
    assert {k: v.tolist() for k, v in got.sums.items()} == {
        "sumsq": [30],
        "bn_sum": [10],
        "bn_sumsq": [60],
        "bn_count": [4],
    }
    assert {v.dtype for v in got.sums.values()} == {np.dtype(np.float32)}
    assert (got.samples, got.correct) == (4, None)


def test_sums_of_two_devices_are_those_of_their_pooled_data(session):
    a = observe(session, PAYLOAD, batches([1, 2, 3, 4]))
    b = observe(session, PAYLOAD, batches([5]))
    both = observe(session, PAYLOAD, batches([1, 2, 3, 4, 5]))
    for name in both.sums:
        assert (a.sums[name] + b.sums[name]).tolist() == both.sums[name].tolist()


def test_correct_where_there_are_labels(session):
    got = observe(session, PAYLOAD, batches([1, 0, 1, 0], [0, 1, 1, 1]))
    assert (got.samples, got.correct) == (4, 3)


def test_many_small_samples_are_not_lost(session):
    """2**24 + 1 is the first integer that float32 cannot count to."""
    got = observe(session, PAYLOAD, batches([4096.0, 0, 0, 1, 1, 0]))
    assert got.sums["sumsq"].tolist() == [2**24 + 2]


def test_sums_that_overflow_are_refused(session):
    with pytest.raises(
        GraphError, match=re.escape("sumsq[0] is inf, expected finite numbers") + "$"
    ):
        observe(session, PAYLOAD, batches([1.5e19, 0, 0, 1.5e19]))


def test_stops_between_batches(session):
    answers = iter([False, True])
    with pytest.raises(StoppedError, match=r"^stopped after 3 of 4 samples$"):
        observe(session, PAYLOAD, batches([1, 2, 3, 4]), lambda: next(answers))


def test_the_coordinator_s_graph_measures_what_torch_measures():
    """Seven samples in batches of 4; sums of the head's inputs and of the norm's."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv1d(2, 3, 3),
        torch.nn.BatchNorm1d(3),
        torch.nn.Flatten(),
        torch.nn.Linear(12, 2),
    ).eval()
    graph = export_observe(net, torch.zeros(1, 2, 6), batch=4, observed=["0.weight", "3.weight"])
    x = np.random.default_rng(0).normal(size=(7, 2, 6)).astype(np.float32)
    params = np.concatenate([p.detach().numpy().ravel() for p in net.parameters()])
    stats = np.array([0, 0, 0, 1, 1, 1], np.float32)
    with torch.no_grad():
        conv = net[0](torch.from_numpy(x))
        head = net[2](net[1](conv))
        best = net[3](head).argmax(1).numpy()
    labels = best.copy()
    labels[:2] = 1 - labels[:2]
    got = observe(
        training_session(graph.onnx), ModelPayload(1, 0, params, stats), Batches(x, labels, 4)
    )
    assert (got.samples, got.correct) == (7, 5)
    squares = [(x**2).sum((0, 2)), (head**2).sum(0).numpy()]
    assert got.sums["sumsq"] == pytest.approx(np.concatenate(squares), rel=1e-5)
    assert got.sums["bn_sum"] == pytest.approx(conv.sum((0, 2)).numpy(), rel=1e-4, abs=1e-5)
    assert got.sums["bn_sumsq"] == pytest.approx((conv**2).sum((0, 2)).numpy(), rel=1e-5)
    assert got.sums["bn_count"].tolist() == [7 * 4]
