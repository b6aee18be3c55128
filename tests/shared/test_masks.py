import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fleetprune.errors import BudgetError
from fleetprune.masks import keep_top, order_units, settle_order

SCORES = arrays(np.float32, st.integers(1, 40), elements=st.integers(-3, 3).map(float))


def test_keeps_the_highest():
    assert keep_top(np.float32([3, 1, 2]), 2).tolist() == [True, False, True]


def test_equal_scores_keep_the_lower_index_and_the_exact_count():
    assert keep_top(np.full(10, 0.5, np.float32), 4).tolist() == [True] * 4 + [False] * 6


def test_keep_none_and_all():
    assert keep_top(np.float32([1, 2]), 0).sum() == 0
    assert keep_top(np.float32([1, 2]), 2).sum() == 2


@pytest.mark.parametrize("keep", [-1, 4])
def test_refuses_a_count_outside_the_units(keep):
    with pytest.raises(BudgetError, match=rf"^keep {keep} of 3 units, expected 0\.\.3$"):
        keep_top(np.float32([1, 2, 3]), keep)


def test_refuses_scores_that_are_not_finite():
    with pytest.raises(BudgetError, match=r"^scores: unit 1 is not finite$"):
        keep_top(np.float32([1, np.nan, 3]), 1)


@given(SCORES, st.data())
def test_masks_are_exact_and_nested(scores, data):
    narrow = data.draw(st.integers(0, scores.size))
    wide = data.draw(st.integers(narrow, scores.size))
    small, large = keep_top(scores, narrow), keep_top(scores, wide)
    assert small.sum() == narrow
    assert large.sum() == wide
    assert not (small & ~large).any()


def test_order_is_by_falling_score():
    assert order_units(np.float32([1, 5, 5, 9])).tolist() == [3, 1, 2, 0]


def test_units_that_cross_no_cut_stay_where_they_are():
    # 4 units, one class keeps 2: swapping within {0, 1} or {2, 3} changes no model
    order = settle_order({"g": np.float32([1, 2, 0.1, 0.5])}, {"g": {2}})
    assert order["g"].tolist() == [0, 1, 2, 3]


def test_only_the_units_that_cross_a_cut_move():
    order = settle_order({"g": np.float32([9, 1, 5, 0])}, {"g": {2}})
    assert order["g"].tolist() == [0, 2, 1, 3]


@given(SCORES, st.sets(st.integers(1, 40), max_size=4))
def test_settled_order_keeps_the_same_units_below_every_cut(scores, cuts):
    order = settle_order({"g": scores}, {"g": cuts})["g"]
    assert sorted(order.tolist()) == list(range(scores.size))
    best = order_units(scores)
    for cut in cuts:
        assert set(order[:cut].tolist()) == set(best[:cut].tolist())
