import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fleetprune.criteria import weights
from fleetprune.errors import BudgetError, UsageError, WireError

from .nets import f32

W = f32([3, -4], [0, 2])
G = f32([1, 0.5], [9, -3])


def test_each_criterion_by_hand():
    assert weights.magnitude(W).tolist() == [[3, 4], [0, 2]]
    assert weights.synflow(W, G).tolist() == [[3, 2], [0, 6]]
    assert weights.taylor(W, G).tolist() == [[9, 4], [0, 36]]
    assert weights.taylor_abs(W, G).tolist() == [[3, 2], [0, 6]]
    assert weights.sensitivity(G).tolist() == [[1, 0.5], [9, 3]]
    assert weights.fisher(W, np.square(G)).tolist() == [[4.5, 2], [0, 18]]
    assert weights.movement(W, G).tolist() == [[-3, 2], [0, 6]]
    assert weights.moved(W, f32([4, -4], [1, -1])).tolist() == [[3.5, 0], [0.5, -1.5]]


def test_threshold_keeps_large_weights_of_either_sign():
    # Deviation of 1, -1, 5, -5: sqrt(13) = 3.6.
    layer = f32([1, -1], [5, -5])
    assert weights.threshold_mask(layer, 1.0).tolist() == [[False, False], [True, True]]
    assert weights.threshold_mask(layer, 0.0).all()
    assert not weights.threshold_mask(layer, 9.0).any()


@given(
    arrays(np.float32, (3, 4), elements=st.integers(-6, 6).map(float)),
    st.floats(0.01, 3),
)
def test_threshold_as_a_score_is_the_largest_threshold_that_keeps(layer, t):
    if np.std(layer) == 0:
        assert weights.threshold_mask(layer, t).all() == (np.abs(layer) >= 0).all()
        assert not weights.threshold(layer).any()
        return
    scores = weights.threshold(layer)
    clear = np.abs(scores - t) > 1e-5
    assert ((scores >= t) == weights.threshold_mask(layer, t))[clear].all()


@pytest.mark.parametrize("t", [-1.0, np.nan, np.inf])
def test_a_threshold_is_a_finite_number(t):
    with pytest.raises(UsageError) as caught:
        weights.threshold_mask(W, t)
    assert str(caught.value) == f"threshold {t}, expected a finite number of at least 0"


def test_wanda_compares_within_each_row():
    # Norms 3 and 1: 3*3, 4*1 and 0*3, 2*1.
    scores = weights.wanda(W, f32(9, 1))
    assert scores.tolist() == [[9, 4], [0, 2]]
    # Over the whole layer the first row would keep both; by rows each keeps its best.
    assert weights.keep_per_row(scores, 1).tolist() == [[True, False], [False, True]]


def test_wanda_of_a_convolution_takes_one_norm_per_channel():
    kernel = np.ones((1, 2, 3), np.float32)
    assert weights.wanda(kernel, f32(4, 9)).tolist() == [[[2, 2, 2], [3, 3, 3]]]
    with pytest.raises(WireError, match=r"^activation sums of shape \(1,\), expected \(2,\)$"):
        weights.wanda(kernel, f32(4))


@given(arrays(np.float32, (4, 3, 2), elements=st.integers(0, 3).map(float)), st.integers(0, 6))
def test_rows_keep_exact_counts_and_their_highest(scores, keep):
    mask = weights.keep_per_row(scores, keep)
    assert mask.shape == scores.shape
    rows, kept = scores.reshape(4, 6), mask.reshape(4, 6)
    assert (kept.sum(axis=1) == keep).all()
    for row, stays in zip(rows, kept, strict=True):
        assert min(row[stays], default=np.inf) >= max(row[~stays], default=-np.inf)


def test_equal_scores_keep_the_lower_index():
    assert weights.keep_per_row(np.zeros((2, 4)), 2).tolist() == [[True, True, False, False]] * 2


def test_rows_refuse_what_they_cannot_keep():
    with pytest.raises(BudgetError, match=r"^keep 3 of 2 weights per row, expected 0\.\.2$"):
        weights.keep_per_row(W, 3)
    with pytest.raises(BudgetError, match=r"^scores: row 1 is not finite$"):
        weights.keep_per_row(f32([1, 2], [np.nan, 0]), 1)


def test_snip_is_a_share_of_the_whole_network():
    # 3 + 2 + 0 + 6 = 11 in one layer, 9 in the other.
    shares = weights.snip({"a": W, "b": f32([9])}, {"a": G, "b": f32([-1])})
    assert shares["a"].tolist() == (f32([3, 2], [0, 6]) / 20).tolist()
    assert shares["b"].tolist() == [[np.float32(0.45)]]
    silent = weights.snip({"a": W}, {"a": np.zeros_like(W)})
    assert not silent["a"].any()


def test_growth_looks_at_pruned_weights_alone():
    mask = np.array([[True, False], [True, False]])
    scores = weights.growth(G, mask)
    assert scores.tolist() == [[-1, 0.5], [-1, 3]]


def test_nothing_is_broadcast():
    for call in (
        lambda: weights.taylor(W, f32(1, 2)),
        lambda: weights.moved(W, f32(1, 2)),
        lambda: weights.growth(W, np.zeros(2, np.bool_)),
    ):
        with pytest.raises(
            WireError, match=r"^arrays of shapes \(2, 2\) and \(2,\), expected the same$"
        ):
            call()


def test_what_is_no_number_is_refused_by_its_place():
    with pytest.raises(BudgetError) as caught:
        weights.magnitude(f32([1, 2], [np.nan, 4]))
    assert str(caught.value) == (
        "magnitude: the weight at (1, 0) scores nan, expected a finite number"
    )
    with pytest.raises(BudgetError, match=r"^taylor: the weight at \(0,\) scores inf, "):
        weights.taylor(f32(1e30), f32(1e30))
