from bisect import bisect_left

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fleetprune.budgets import Allocation
from fleetprune.errors import BudgetError
from fleetprune.patterns import SINGLE, Pattern
from fleetprune.weight_masks import (
    BLOCK_BYTES,
    DECODER_BYTES,
    Layer,
    decoder_bytes,
    lamp,
    packed_bytes,
    pattern_masks,
    solve_masks,
)


def f32(*values):
    return np.array(values, np.float32)


# ---- what a weight is worth beside those of other layers


def test_lamp_by_hand():
    """Squares 1, 4, 9: each as a share of itself and all larger ones."""
    assert lamp(np.array([1.0, 3.0, 2.0])) == pytest.approx([1 / 14, 1, 4 / 13])


def test_lamp_of_equal_ones_is_higher_for_the_lower_index():
    assert lamp(np.array([2.0, 2.0, 2.0, 2.0])).tolist() == [1, 1 / 2, 1 / 3, 1 / 4]


def test_lamp_of_zeros_is_zero():
    assert lamp(np.zeros(3)).tolist() == [0, 0, 0]
    assert lamp(np.array([0.0, 1e-300, 0.0])).tolist() == [0, 1, 0]
    assert lamp(np.zeros(0)).tolist() == []


@given(arrays.arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 2.0**100, width=32)))
def test_lamp_rises_with_worth_and_ends_at_one(worth):
    scores = lamp(worth)
    order = np.argsort(worth, kind="stable")
    assert (np.diff(scores[order]) >= 0).all() or len(set(worth)) < worth.size
    assert scores.max() == (1 if worth.any() else 0)
    np.testing.assert_allclose(lamp(worth * 8), scores)  # a layer's scale does not count


# ---- bytes


def test_the_bytes_of_a_packed_weight_by_hand():
    marks = np.zeros((100, 80), np.bool_)  # 8000 weights, 32000 bytes
    marks[0, :2] = True
    # Two steps and two values; one bit each would be 1000 bytes and three values.
    assert packed_bytes(SINGLE, marks, 4) == DECODER_BYTES + 2 * (1 + 4)
    marks[:50] = True
    # 1000 bytes of marks, 4001 values: the first row is zeros.
    assert packed_bytes(SINGLE, marks, 4) == DECODER_BYTES + 1000 + 4001 * 4
    marks[:] = True
    assert packed_bytes(SINGLE, marks, 4) == 32000  # never more than as it is


def test_long_gaps_need_stored_zeros():
    marks = np.zeros((1, 8000), np.bool_)
    marks[0, 255] = True
    assert packed_bytes(SINGLE, marks, 1) == DECODER_BYTES + 1 * 2
    marks[0, 255], marks[0, 256] = False, True
    assert packed_bytes(SINGLE, marks, 1) == DECODER_BYTES + 2 * 2
    marks[0, 256], marks[0, 511] = False, True  # 255 + 255 + 1
    assert packed_bytes(SINGLE, marks, 1) == DECODER_BYTES + 3 * 2


def test_the_longer_of_both_sides_counts():
    """A file may hold a matrix transposed: one column of 600 is a row of 600 there."""
    marks = np.zeros((600, 300), np.bool_)
    marks[:, 0] = True  # 299 between neighbours one way, 0 the other
    assert packed_bytes(SINGLE, marks, 1) == DECODER_BYTES + 2 * (600 + 599)


def test_blocks_are_marked_once():
    marks = np.zeros((30, 80), np.bool_)
    marks[0, 0] = True
    four = Pattern.parse("4x1")
    assert packed_bytes(four, marks, 1) == DECODER_BYTES + BLOCK_BYTES + 1 + 4
    assert decoder_bytes(4) - decoder_bytes(1) == BLOCK_BYTES


@settings(deadline=None)
@given(
    arrays.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=40),
    st.sampled_from([1, 4]),
    st.randoms(use_true_random=False),
)
def test_another_block_never_costs_less(shape, item, random):
    """What the search for the largest count rests on."""
    places = list(range(int(np.prod(shape))))
    random.shuffle(places)
    marks = np.zeros(shape, np.bool_)
    before = packed_bytes(SINGLE, marks, item)
    for place in places[:60]:
        marks.flat[place] = True
        now = packed_bytes(SINGLE, marks, item)
        assert now >= before
        before = now


# ---- masks


LAYERS = {"a": Layer((40, 40), 1), "b": Layer((20, 40), 1)}


def kept(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


def test_uniform_leaves_every_layer_the_same_share():
    layers = {"a": Layer((40, 40), 1), "b": Layer((80, 40), 1)}
    scores = {
        "a": np.arange(1600, dtype=np.float32).reshape(40, 40),
        "b": 1000 * np.arange(3200, dtype=np.float32).reshape(80, 40),
    }
    # 1600 weights: 200 bytes of marks and 800 + 1 values; 3200: 400 and 1600 + 1.
    limit = 2 * DECODER_BYTES + 200 + 801 + 400 + 1601
    masks = solve_masks(layers, scores, limit, allocation=Allocation.UNIFORM)
    assert kept(masks) == {"a": 800, "b": 1600}
    assert masks["a"].ravel()[800:].all()  # the high ones
    fewer = solve_masks(layers, scores, limit - 1, allocation=Allocation.UNIFORM)
    assert sum(kept(fewer).values()) == 2399


def test_a_layer_that_would_save_nothing_keeps_all_of_its_weights():
    """Its file takes it as it is, since what unpacks it is longer than what it saves."""
    layers = {"small": Layer((18, 20), 1), "large": Layer((80, 40), 1)}
    scores = {name: np.ones(layer.shape, np.float32) for name, layer in layers.items()}
    limit = 360 + DECODER_BYTES + 400 + 1001
    masks = solve_masks(layers, scores, limit, allocation=Allocation.UNIFORM)
    assert kept(masks) == {"small": 360, "large": 1000}


def test_global_keeps_most_where_few_make_up_a_layer_least():
    """One weight is nearly all of `b`; in `a` all are alike."""
    scores = {"a": np.ones((40, 40), np.float32), "b": np.full((20, 40), 1e-6, np.float32)}
    scores["b"][3, 4] = 1.0
    masks = solve_masks(LAYERS, scores, 2 * DECODER_BYTES + 1000)
    assert kept(masks)["b"] == 1
    assert masks["b"][3, 4]
    assert kept(masks)["a"] > 600


def test_the_large_ones_stay():
    """Whatever the allocation: within a layer, nothing that stays is worth less than what goes."""
    rng = np.random.default_rng(0)
    scores = {n: rng.random(layer.shape).astype(np.float32) for n, layer in LAYERS.items()}
    for allocation in Allocation:
        masks = solve_masks(LAYERS, scores, 2 * DECODER_BYTES + 900, allocation=allocation)
        for name, mask in masks.items():
            assert 0 < mask.sum() < mask.size
            assert scores[name][mask].min() >= scores[name][~mask].max()


def test_of_equal_ones_the_first_stay():
    scores = {name: np.ones(layer.shape, np.float32) for name, layer in LAYERS.items()}
    for allocation in Allocation:
        masks = solve_masks(LAYERS, scores, 2 * DECODER_BYTES + 900, allocation=allocation)
        for mask in masks.values():
            flat = mask.ravel()
            assert flat[: flat.sum()].all()


def test_one_block_of_each_layer_stays_even_where_all_are_worth_nothing():
    scores = {name: np.zeros(layer.shape, np.float32) for name, layer in LAYERS.items()}
    scores["a"][5, 6] = 1.0
    masks = solve_masks(LAYERS, scores, 2 * DECODER_BYTES + 5)
    assert kept(masks) == {"a": 1, "b": 1}
    assert masks["a"][5, 6]
    assert masks["b"][0, 0]


def test_what_does_not_fit_is_refused_with_what_it_takes():
    scores = {name: np.ones(layer.shape, np.float32) for name, layer in LAYERS.items()}
    least = 2 * (DECODER_BYTES + 2)
    assert kept(solve_masks(LAYERS, scores, least)) == {"a": 1, "b": 1}
    with pytest.raises(BudgetError) as e:
        solve_masks(LAYERS, scores, least - 1)
    assert str(e.value) == (
        f"{least - 1} bytes for the weights of 2 layers, which take at least {least}: "
        "raise flash_bytes"
    )


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.full((2, 2), np.nan, np.float32), "scores of w: expected finite numbers of at least 0"),
        (np.full((2, 2), np.inf, np.float32), "scores of w: expected finite numbers of at least 0"),
        (f32([1, 1], [1, -1]), "scores of w: expected finite numbers of at least 0"),
        (f32(1, 1, 1, 1), "scores of w: shape (4,), expected (2, 2)"),
    ],
)
def test_scores_that_say_nothing_are_refused(scores, message):
    layers = {"w": Layer((2, 2), 4)}
    with pytest.raises(BudgetError) as e:
        solve_masks(layers, {"w": scores}, 100)
    assert str(e.value) == message
    with pytest.raises(BudgetError) as e:
        pattern_masks(layers, {"w": scores}, Pattern.parse("1:2"), 0.0)
    assert str(e.value) == message


def test_a_block_is_worth_the_sum_of_its_weights():
    layers = {"w": Layer((40, 40), 1)}
    scores = np.ones((40, 40), np.float32)
    scores[1, 7] = 3.0  # its block of 2 x 1 is worth 4, all others 2
    scores[4, 0] = 1.5
    pattern = Pattern.parse("2x1")
    limit = decoder_bytes(2) + 2 * 3
    mask = solve_masks(layers, {"w": scores}, limit, pattern=pattern)["w"]
    assert np.argwhere(mask).tolist() == [[0, 7], [1, 7], [4, 0], [5, 0]]


RANDOM = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@settings(deadline=None, max_examples=60)
@given(
    RANDOM,
    st.sampled_from(["1x1", "2x1", "1x2", "2x2"]),
    st.sampled_from(list(Allocation)),
    st.sampled_from([1, 4]),
    st.integers(0, 100),
)
def test_within_the_limit_and_one_block_more_would_not_be(rng, text, allocation, item, percent):
    pattern = Pattern.parse(text)
    layers = {
        f"l{i}": Layer(tuple(2 * int(n) for n in rng.integers(1, 25, 2)), item) for i in range(3)
    }
    # Few values, so that there are ties.
    scores = {n: rng.integers(0, 5, layer.shape).astype(np.float32) for n, layer in layers.items()}

    def blocks(masks):
        return sum(int(pattern.marks(mask).sum()) for mask in masks.values())

    def cost(masks):
        return sum(packed_bytes(pattern, pattern.marks(masks[n]), item) for n in layers)

    dense = sum(item * int(np.prod(layer.shape)) for layer in layers.values())
    limit = percent * dense // 100
    try:
        masks = solve_masks(layers, scores, limit, pattern=pattern, allocation=allocation)
    except BudgetError:
        return
    again = solve_masks(layers, scores, limit, pattern=pattern, allocation=allocation)
    for name, mask in masks.items():
        assert np.array_equal(mask, again[name])
        assert mask.shape == layers[name].shape
        assert mask.any()
        assert np.array_equal(pattern.spread(pattern.marks(mask)), mask)
    assert cost(masks) <= limit
    if all(mask.all() for mask in masks.values()):
        return
    more = solve_masks(layers, scores, dense, pattern=pattern, allocation=allocation)
    assert all(mask.all() for mask in more.values())
    count = blocks(masks)
    least = bisect_left(
        range(dense + 1),
        count + 1,
        lo=limit,
        key=lambda n: blocks(
            solve_masks(layers, scores, n, pattern=pattern, allocation=allocation)
        ),
    )
    wider = solve_masks(layers, scores, least, pattern=pattern, allocation=allocation)
    # The next larger choice holds this one, and no smaller limit has it.
    assert all((wider[n] | mask == wider[n]).all() for n, mask in masks.items())
    assert cost(wider) == least > limit


# ---- N of M


def test_a_pattern_is_reached_along_its_schedule():
    layers = {"w": Layer((3, 8), 4)}
    scores = {"w": np.tile(np.arange(8, dtype=np.float32), (3, 1))}
    pattern = Pattern.parse("1:4")
    for slack, n in ((1.0, 4), (0.99, 3), (0.67, 3), (0.5, 2), (0.1, 1), (0.0, 1)):
        mask = pattern_masks(layers, scores, pattern, slack)["w"]
        assert (mask.reshape(3, 2, 4).sum(axis=2) == n).all()
        assert mask.reshape(3, 2, 4)[:, :, 4 - n :].all()
