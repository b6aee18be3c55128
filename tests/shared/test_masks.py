import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fleetprune.errors import BudgetError
from fleetprune.masks import bounded_order, keep_top, order_units, settle_order

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


def masks(order, *cuts):
    return [sorted(order["g"][:c].tolist()) for c in cuts]


def test_at_most_the_share_of_a_mask_is_replaced():
    scores = {"g": np.array([1, 2, 3, 4, 9, 8, 7, 6], np.float32)}
    assert masks(bounded_order(scores, {"g": {4}}, 0.0), 4) == [[0, 1, 2, 3]]
    assert masks(bounded_order(scores, {"g": {4}}, 0.25), 4) == [[1, 2, 3, 4]]
    assert masks(bounded_order(scores, {"g": {4}}, 0.5), 4) == [[2, 3, 4, 5]]
    assert masks(bounded_order(scores, {"g": {4}}, 1.0), 4) == [[4, 5, 6, 7]]


def test_by_score_alone_only_the_better_come_in():
    scores = {"g": np.array([1, 5, 5, 2], np.float32)}
    assert masks(bounded_order(scores, {"g": {2}}, 1.0), 2) == [[1, 2]]


def test_by_growth_the_share_is_replaced_whatever_the_scale():
    scores = {"g": np.array([100, 200, 0, 0], np.float32)}
    growth = {"g": np.array([0, 0, 0.1, 0.2], np.float32)}
    assert masks(bounded_order(scores, {"g": {2}}, 0.5, growth), 2) == [[1, 3]]


def test_a_wider_mask_takes_in_what_a_narrower_one_does():
    scores = {"g": np.array([1, 4, 3, 2, 9, 0], np.float32)}
    order = bounded_order(scores, {"g": {2, 4}}, 0.5)
    assert masks(order, 2, 4) == [[1, 4], [1, 2, 3, 4]]


@given(
    st.integers(2, 12).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(-3, 3), min_size=n, max_size=n),
            st.sets(st.integers(1, n), max_size=3),
            st.floats(0, 1),
        )
    )
)
def test_bounded_masks_are_nested_permutations(drawn):
    values, cuts, share = drawn
    order = bounded_order({"g": np.array(values, np.float32)}, {"g": cuts}, share)["g"]
    assert sorted(order.tolist()) == list(range(len(values)))
    if len(cuts) == 1:
        (cut,) = cuts
        assert len(set(order[:cut].tolist()) - set(range(cut))) <= int(share * cut)
