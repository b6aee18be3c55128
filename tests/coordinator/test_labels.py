"""What operators do to labels, on tensors of a few elements; [1, 2] are units, 0 always stays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetprune_coordinator.labels import Algebra, Labels, axes_of, grown, permuted, taken, tiled
from fleetprune_coordinator.units import Units


@pytest.fixture
def algebra():
    return Algebra(Units())


def lists(labels):
    return [factor.tolist() for factor in labels.factors]


def test_a_weight_has_units_along_every_axis(algebra):
    weight = algebra.fresh((2, 1, 3), weight=True)
    assert lists(weight) == [[[[1]], [[2]]], [[[3, 4, 5]]]]
    assert [axes_of(f) for f in weight.factors] == [(0,), (2,)]


def test_aligned_elements_are_cut_alike(algebra):
    x, y = algebra.fresh((3,)), algebra.fresh((2, 3))
    both = algebra.combine([x, y])
    assert both.shape == (2, 3)
    assert lists(both) == [[[1, 2, 3]], [[4], [5]]]


def test_a_factor_that_is_broadcast_asks_for_nothing(algebra):
    x, gate = algebra.fresh((3, 1)), Labels((1, 4))
    assert lists(algebra.combine([x, gate])) == [[[1], [2], [3]]]


def test_what_meets_an_uncut_axis_stays(algebra):
    x = algebra.fresh((3,))
    algebra.why = "it meets the input"
    assert lists(algebra.combine([x, Labels((3,))])) == []
    assert algebra.units.reason(1) == "it meets the input"


def test_a_part_that_meets_an_uncut_part_stays(algebra):
    x = algebra.fresh((3,))
    y = algebra.joined([Labels((1,)), algebra.fresh((2,))], 0)
    assert lists(y) == [[0, 4, 5]]
    assert lists(algebra.combine([x, y])) == [[0, 2, 3]]


def test_heads_are_cut_whole_once_something_runs_over_their_width(algebra):
    flat = algebra.fresh((6,))
    heads = algebra.reshaped(flat, (3, 2))
    assert lists(heads) == [[[1, 2], [3, 4], [5, 6]]]
    assert lists(algebra.whole(heads, [1])) == [[[1], [3], [5]]]
    assert lists(algebra.settled(flat)) == [[1, 1, 3, 3, 5, 5]]


def test_a_flattened_channel_has_all_its_positions(algebra):
    x = Labels((2, 3), (algebra.units.new(2).reshape(2, 1),))
    assert lists(algebra.reshaped(x, (6,))) == [[1, 1, 1, 2, 2, 2]]
    assert lists(algebra.reshaped(x, (1, 2, 1, 3))) == [[[[[1]], [[2]]]]]


def test_weights_of_heads_follow_the_heads_of_what_they_weight(algebra):
    """(head, query, key) times (head, key, width): the widths of one head go together."""
    scores = Labels((2, 5, 5, 1), (algebra.units.new(2).reshape(2, 1, 1, 1),))
    values = algebra.reshaped(algebra.fresh((6,)), (2, 1, 1, 3))
    assert lists(algebra.combine([scores, values])) == [[[[[1]]], [[[2]]]]]
    assert lists(algebra.settled(values)) == [[[[[1]]], [[[2]]]]]


def test_a_gain_per_place_in_a_head_is_not_cut(algebra):
    heads = algebra.reshaped(algebra.fresh((6,)), (2, 3))
    gain = algebra.fresh((3,))
    assert lists(algebra.combine([heads, gain])) == [[[1], [4]]]
    assert lists(algebra.settled(gain)) == []


def test_a_weight_may_be_summed_over_what_is_cut_and_activations_may_not(algebra):
    x = Labels((1, 3), (algebra.units.new(3).reshape(1, 3),))
    weight = algebra.fresh((2, 3), weight=True)
    assert lists(algebra.product(x, weight, 1)) == [[4, 5]]
    assert lists(algebra.settled(x)) == [[[1, 2, 3]]]
    algebra.product(x, Labels((1, 3), x.factors), 1)
    assert lists(algebra.settled(x)) == []


def test_a_tensor_cannot_go_altogether(algebra):
    algebra.why = "it is all there is"
    unit = algebra.units.new(1)
    assert algebra.settled(Labels((4,), (np.repeat(unit, 4),))).factors == ()
    assert algebra.units.reason(1) == "it is all there is"


def test_moving_elements():
    x = Labels((2, 3), (np.array([[1], [2]]), np.array([[3, 4, 5]])))
    assert lists(permuted(x, [1, 0])) == [[[1, 2]], [[3], [4], [5]]]
    assert lists(taken(x, 1, slice(1, None))) == [[[1], [2]], [[4, 5]]]
    assert lists(grown(x, 1, 1, -1)) == [[[1], [2]], [[0, 3, 4]]]
    assert lists(tiled(x, [1, 2])) == [[[1], [2]], [[3, 4, 5, 3, 4, 5]]]
    assert grown(x, 1, 1, -1).shape == (2, 3)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_a_reshape_moves_labels_as_it_moves_elements(inner, data):
    """Against numpy's own reshape of all elements' labels."""
    size = int(np.prod(inner))
    pairs = [(a, size // a) for a in range(1, size + 1) if size % a == 0]
    new = data.draw(st.sampled_from([tuple(inner), (size,), *pairs]))
    axis = data.draw(st.integers(0, len(inner) - 1))
    algebra = Algebra(Units())
    n = inner[axis]
    factor = (algebra.units.new(n) if n > 1 else np.zeros(1, np.intp)).reshape(
        [n if i == axis else 1 for i in range(len(inner))]
    )
    want = np.broadcast_to(factor, inner).reshape(new)
    got = algebra.reshaped(Labels(tuple(inner), (factor,)), new)
    full = np.broadcast_to(got.factors[0], new) if got.factors else np.zeros(new, np.intp)
    assert (full == want).all()
