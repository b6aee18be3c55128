import copy
import re

import numpy as np
import onnxruntime as ort
import pytest
import torch
from step_graphs import step

from fleetprune.errors import GraphError
from fleetprune.model_payload import ModelPayload
from fleetprune_agent.data import Batches
from fleetprune_agent.runtime import training_session
from fleetprune_agent.trainer import StoppedError, log_frequencies, train
from fleetprune_coordinator.graphs import export_train_step

START = ModelPayload(1, 0, np.array([1, 2], np.float32), np.array([4, 8], np.float32))


def session(onnx: bytes):
    return ort.InferenceSession(onnx, providers=["CPUExecutionProvider"])


def batches(values=(1, 2, 3, 4)) -> Batches:
    x = np.array(values, np.float32)[:, None]
    return Batches(x, np.zeros(len(x), np.int64), 3)


def run(sessions, **changes):
    settings = {"epochs": 1, "max_steps": 0, "learning_rate": 0.5, "rng": np.random.default_rng(0)}
    return train(sessions, START, changes.pop("batches", batches()), **{**settings, **changes})


def test_two_steps_in_the_head():
    got = run([session(step())])
    assert got.steps == 2
    assert got.params.tolist() == [0, 0]  # (1, 2) - 2 * 0.5 * (1, 2)
    assert got.stats.tolist() == [1, 2]
    assert got.scores.tolist() == [3, 3]  # momentum 1, then 2
    assert got.loss == 2.5  # mean of 1, 2, 3 and of 4, weighted by samples
    assert START.params.tolist() == [1, 2]


def test_the_proximal_pull_in_the_head():
    # (1, 2) - 0.5 * (1, 2) = (0.5, 1); pulled back by 0.5 * 1 of the way: (0.75, 1.5)
    got = run([session(step())], max_steps=1, proximal=1.0)
    assert got.params.tolist() == [0.75, 1.5]
    assert START.params.tolist() == [1, 2]


def test_log_frequencies_of_labels():
    frequencies = log_frequencies(np.array([0, 0, 0, 2]), 3)
    np.testing.assert_allclose(np.exp(frequencies), [0.751, 0.001, 0.251], rtol=1e-6)


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"), [(3, 0, 6), (3, 5, 5), (1, 9, 2), (0, 0, 0), (0, 7, 0)]
)
def test_number_of_steps(epochs, max_steps, steps):
    got = run([session(step())], epochs=epochs, max_steps=max_steps)
    assert got.steps == steps
    assert got.params.tolist() == [1 - 0.5 * steps, 2 - steps]
    assert (got.loss is None, got.scores is None) == (steps == 0, steps == 0)


def test_graphs_are_drawn_evenly_and_by_the_seed():
    sessions = [session(step((1, 0))), session(step((0, 1)))]
    first = run(sessions, epochs=100, learning_rate=1, rng=np.random.default_rng(5))
    again = run(sessions, epochs=100, learning_rate=1, rng=np.random.default_rng(5))
    other = run(sessions, epochs=100, learning_rate=1, rng=np.random.default_rng(6))
    taken = [1 - first.params[0], 2 - first.params[1]]
    assert sum(taken) == 200
    assert all(70 < n < 130 for n in taken)  # 4 standard deviations are 28
    assert again.params.tolist() == first.params.tolist()
    assert other.params.tolist() != first.params.tolist()


def test_divergence_stops():
    with pytest.raises(
        GraphError,
        match=re.escape(
            "step 2 of 2: loss is nan, expected a finite number: learning rate 0.5 may be too high"
        ),
    ):
        run([session(step())], batches=batches((1, 2, 3, np.inf)))
    with pytest.raises(
        GraphError, match=re.escape("params after 2 steps[1] is -inf, expected finite numbers")
    ):
        run([session(step((1, 1e38)))], learning_rate=3.0)


def test_a_graph_that_refuses_its_inputs():
    with pytest.raises(GraphError, match=r"^onnxruntime: .*Got invalid dimensions for input: x"):
        run([session(step(batch=4))])


def test_stops_between_steps():
    answers = iter([False, True])
    with pytest.raises(StoppedError, match=r"^stopped after 1 of 2 steps$"):
        run([session(step())], stopped=lambda: next(answers))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net()


def flat(tensors) -> np.ndarray:
    return np.concatenate([t.detach().numpy().ravel() for t in tensors]).astype(np.float32)


def statistics(net: Net) -> np.ndarray:
    return flat([net.norm.running_mean, net.norm.running_var])


def test_the_coordinator_s_graph_trains_as_torch_does(net):
    """Three epochs of 10 samples in batches of 4, the last of each a short one."""
    graph = export_train_step(
        net, torch.zeros(1, 1, 6, 6), batch=4, momentum=0.9, weight_decay=0.01
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10, 1, 6, 6)).astype(np.float32)
    y = rng.integers(0, 3, 10)
    got = train(
        [training_session(graph.onnx)],
        ModelPayload(1, 0, flat(net.parameters()), statistics(net)),
        Batches(x, y, 4),
        epochs=3,
        max_steps=0,
        learning_rate=0.1,
        rng=rng,
    )
    expected = copy.deepcopy(net).train()
    decayed = [p for p in expected.parameters() if p.dim() > 1]
    others = [p for p in expected.parameters() if p.dim() <= 1]
    optimiser = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=0.1,
        momentum=0.9,
    )
    losses = []
    for _ in range(3):
        for start in (0, 4, 8):
            part = slice(start, min(start + 4, 10))
            loss = torch.nn.functional.cross_entropy(
                expected(torch.from_numpy(x[part])), torch.from_numpy(y[part])
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses += [loss.item()] * (part.stop - part.start)
    assert got.steps == 9
    assert got.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert np.abs(got.params - flat(expected.parameters())).max() < 1e-4
    assert np.abs(got.stats - statistics(expected)).max() < 1e-4
    assert np.abs(got.params - flat(net.parameters())).max() > 0.01
