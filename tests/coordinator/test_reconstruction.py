"""Units that rebuild the others, and the weights for it: by hand, by its optimum, on real data."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from fleetprune.layout import Architecture, Role, Segment, TensorSpec
from fleetprune_coordinator.fleet_model import initial_model, remask
from fleetprune_coordinator.gram import Gram, reordered
from fleetprune_coordinator.reconstruction import reconstruction, refit
from fleetprune_coordinator.resize import extract, read
from fleetprune_coordinator.tracing import trace


def net(units: int, block: int = 1, outputs: int = 1) -> Architecture:
    """in -> a, seen by `out` through `block` inputs each."""
    a, flat = Segment(group="a", units=units), Segment(group="a", units=units, block=block)
    one, out = Segment(units=1), Segment(units=outputs)
    return Architecture(
        groups={"a": units},
        tensors=(
            TensorSpec(name="one", role=Role.PARAMETER, axes=((a,), (one,))),
            TensorSpec(name="out", role=Role.PARAMETER, axes=((out,), (flat,))),
        ),
        observed=("out",),
    )


def params(*rows: list[float]) -> dict[str, np.ndarray]:
    weight = np.array(rows, np.float32)
    return {"one": np.ones((weight.shape[1], 1), np.float32), "out": weight}


def whole(matrix) -> dict[str, Gram]:
    matrix = np.array(matrix, np.float64)
    return {"out": Gram(np.arange(len(matrix)), matrix)}


REDUNDANT = [[1, 2, 0], [2, 4, 0], [0, 0, 1]]
"""The second input is always twice the first, the third has to do with neither."""


def test_the_order_by_hand() -> None:
    # The output is x0 + x1 + x2 = 1.5 x1 + x2, of energy 1.5**2 * 4 + 1 = 10: x1 explains 9 of
    # it, then x2 the rest. x0 would explain as much as x1 but for the ridge, and nothing after it.
    scores = reconstruction(net(3), params([1, 1, 1]), whole(REDUNDANT))["a"]
    assert scores == pytest.approx([0, 0.9, 0.1], abs=1e-3)
    assert scores[0] > 0


def test_the_weights_by_hand() -> None:
    order = {"a": np.array([1, 2, 0])}
    grams = reordered(whole(REDUNDANT), net(3), order)
    shapes = {"small": {"a": 1}, "middle": {"a": 2}, "large": {"a": 3}}
    fitted = refit(net(3), params([1, 1, 1]), grams, shapes)
    assert fitted["out"][0] == pytest.approx([1.5, 1, 0], abs=3e-3)
    assert (fitted["one"] == 1).all()


def test_units_of_several_inputs_count_as_a_whole() -> None:
    # Two units of two inputs: the first has 2 and 2, the second 3 and 0.
    grams = whole(np.diag([2.0, 2.0, 3.0, 0.0]))
    scores = reconstruction(net(2, block=2), params([1, 1, 1, 1]), grams)["a"]
    assert scores == pytest.approx([4 / 7, 3 / 7], abs=1e-3)


def test_layers_have_the_same_say_whatever_their_scale() -> None:
    two = net(2)
    a = two.tensors[1].axes
    both = two.model_copy(
        update={
            "tensors": (*two.tensors, TensorSpec(name="loud", role=Role.PARAMETER, axes=a)),
            "observed": ("out", "loud"),
        }
    )
    values = params([1, 3]) | {"loud": np.array([[2000, 1000]], np.float32)}
    grams = {n: Gram(np.arange(2), np.eye(2)) for n in ("out", "loud")}
    # 1 and 9 of 10, and 4 and 1 of 5.
    assert reconstruction(both, values, grams)["a"] == pytest.approx([0.9, 1.1], abs=2e-3)


def test_what_was_not_measured_comes_last_and_stays() -> None:
    grams = {"out": Gram(np.arange(2), np.eye(2))}
    values = params([1, 2, 5])
    assert reconstruction(net(3), values, grams)["a"] == pytest.approx([0.2, 0.8, 0], abs=1e-3)
    fitted = refit(net(3), values, grams, {"small": {"a": 1}, "large": {"a": 3}})
    assert fitted["out"][0] == pytest.approx([1, 2, 5], abs=1e-5)


@pytest.mark.parametrize(
    ("weight", "matrix"), [([0, 0], np.eye(2)), ([1, 1], np.zeros((2, 2)))], ids=["weights", "data"]
)
def test_dead_layers_say_nothing_and_stay(weight, matrix) -> None:
    assert reconstruction(net(2), params(weight), whole(matrix))["a"].tolist() == [0, 0]
    fitted = refit(net(2), params(weight), whole(matrix), {"small": {"a": 1}, "large": {"a": 2}})
    assert fitted["out"].tolist() == [weight]


def test_a_layer_that_all_classes_have_whole_stays() -> None:
    values = params([1, 1, 1])
    assert refit(net(3), values, whole(REDUNDANT), {"all": {"a": 3}})["out"] is values["out"]


@given(st.integers(0, 10_000))
def test_every_width_is_at_its_optimum_given_the_narrower_ones(seed) -> None:
    rng = np.random.default_rng(seed)
    n = 6
    x = rng.normal(size=(30, n)) @ rng.normal(size=(n, n))
    gram = x.T @ x / 30
    weight = rng.normal(size=(2, n)).astype(np.float32)
    architecture = net(n, outputs=2)
    shapes = {"small": {"a": 2}, "middle": {"a": 4}, "large": {"a": n}}
    fitted = refit(architecture, params(*weight.tolist()), whole(gram), shapes)["out"]

    def error(columns: np.ndarray, width: int) -> float:
        off = weight - np.pad(columns[:, :width], ((0, 0), (0, n - width)))
        return float(np.trace(off @ gram @ off.T))

    for width, free in ((2, slice(0, 2)), (4, slice(2, 4))):
        best = error(fitted, width)
        slack = 1e-2 * error(np.zeros_like(weight), width)  # of the ridge
        assert best <= error(weight, width) + slack or width == 4
        for _ in range(5):
            moved = fitted.copy()
            moved[:, free] += 0.3 * rng.normal(size=moved[:, free].shape).astype(np.float32)
            assert best <= error(moved, width) + slack


def test_a_trained_network_keeps_more_than_by_size_or_chance() -> None:
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model.append(nn.Linear(64, 10))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(300):
        i = torch.randint(0, 1200, (64,), generator=torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[i]), y[i]).backward()
        optimiser.step()
    architecture = trace(model, x[:1])
    values, _ = read(model)
    grams = {}
    with torch.no_grad():
        for name, depth in (("2.weight", 2), ("4.weight", 4)):
            seen = model[:depth](x[:1200]).double().numpy()
            grams[name] = Gram(np.arange(64), seen.T @ seen / 1200)
    shapes = {"whole": architecture.dense, "small": dict.fromkeys(architecture.groups, 16)}

    def accuracy(scores, *, fit: bool) -> float:
        state = initial_model(architecture, values, {}, shapes)
        state, order = remask(architecture, state, scores, shapes)
        weights = state.params
        if fit:
            weights = refit(architecture, weights, reordered(grams, architecture, order), shapes)
        small = extract(model, architecture, weights, {}, shapes["small"])
        with torch.no_grad():
            return float((small(x[1200:]).argmax(1) == y[1200:]).float().mean())

    best = reconstruction(architecture, values, grams)
    rng = np.random.default_rng(0)
    chance = {g: rng.random(n).astype(np.float32) for g, n in architecture.groups.items()}
    found = accuracy(best, fit=True)
    assert found > 0.85  # a quarter of the units; the whole network has 0.93
    assert found > accuracy(best, fit=False) + 0.05
    assert found > accuracy(chance, fit=True) + 0.01
    assert found > accuracy(chance, fit=False) + 0.3
