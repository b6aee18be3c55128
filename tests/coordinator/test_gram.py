"""Gram matrices: additive over devices, and refused where no samples can have them."""

import numpy as np
import pytest

from fleetprune.errors import UsageError, WireError
from fleetprune.layout import Architecture, Role, Segment, TensorSpec
from fleetprune_coordinator.gram import MOST_INPUTS, Gram, GramSums, measured, reordered


def net(units: int = 3) -> Architecture:
    """in -> a -> out."""
    a = Segment(group="a", units=units)
    one = Segment(units=1)
    return Architecture(
        groups={"a": units},
        tensors=(
            TensorSpec(name="one", role=Role.PARAMETER, axes=((a,), (one,))),
            TensorSpec(name="out", role=Role.PARAMETER, axes=((one,), (a,))),
        ),
        observed=("out",),
    )


def triangle(x: np.ndarray) -> np.ndarray:
    products = x.T @ x
    return products[np.triu_indices(len(products))].astype(np.float32)


def test_two_unequal_devices_are_their_pooled_samples() -> None:
    x = np.random.default_rng(0).normal(size=(11, 3))
    sums = GramSums(net(), {"a": 3})
    assert (sums.size, sums.result()) == (6, {})
    sums.add(triangle(x[:8]), 8)
    sums.add(triangle(x[8:]), 3)
    gram = sums.result()["out"]
    np.testing.assert_allclose(gram.matrix, x.T @ x / 11, rtol=1e-5)
    assert gram.inputs.tolist() == [0, 1, 2]


def test_classes_of_one_shape_are_pooled() -> None:
    x = np.random.default_rng(0).normal(size=(5, 2))
    first, second = GramSums(net(), {"a": 2}), GramSums(net(), {"a": 2})
    first.add(triangle(x[:2]), 2)
    second.add(triangle(x[2:]), 3)
    first.include(second)
    np.testing.assert_allclose(first.result()["out"].matrix, x.T @ x / 5, rtol=1e-5)


def test_matrices_follow_their_units() -> None:
    matrix = np.array([[1.0, 12.0, 13.0], [12.0, 2.0, 23.0], [13.0, 23.0, 3.0]])
    before = {"out": Gram(np.arange(3), matrix)}
    after = reordered(before, net(), {"a": np.array([2, 0, 1])})["out"]
    assert after.matrix.tolist() == [[3, 13, 23], [13, 1, 12], [23, 12, 2]]
    assert after.inputs.tolist() == [0, 1, 2]


def test_of_a_narrower_model_only_what_it_has_is_moved() -> None:
    before = {"out": Gram(np.arange(2), np.array([[1.0, 12.0], [12.0, 2.0]]))}
    after = reordered(before, net(), {"a": np.array([1, 2, 0])})["out"]
    assert (after.inputs.tolist(), after.matrix.tolist()) == ([0, 2], [[2, 12], [12, 1]])


def test_very_wide_layers_are_left_out() -> None:
    assert measured(net(MOST_INPUTS)) == ("out",)
    assert measured(net(MOST_INPUTS + 1)) == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 0, 1], "gram of shape (3,), expected (6,)"),
        ([1, 0, 0, np.nan, 0, 1], "gram: element 3 is not finite"),
        ([1, 0, 0, -1, 0, 1], "gram: out has a sum of squares -1.0, expected at least 0"),
        ([1, 2, 0, 1, 0, 1], "gram: out has a product above what its squares allow"),
    ],
)
def test_what_no_samples_can_have_is_refused(values, message) -> None:
    sums = GramSums(net(), {"a": 3})
    with pytest.raises(WireError) as e:
        sums.add(np.array(values, np.float32), 1)
    assert str(e.value) == message
    assert sums.result() == {}


def test_no_samples_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(UsageError, match="0 samples, expected at least 1"):
        GramSums(net(), {"a": 3}).add(np.zeros(6, np.float32), 0)
