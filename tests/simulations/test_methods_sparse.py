"""What defines each method that prunes single weights, on numbers worked by hand."""

import numpy as np
import pytest

from fleetprune.errors import BudgetError
from fleetprune.messages import ResultHeader, TaskKind
from fleetprune_sim.methods.feddst import readjust
from fleetprune_sim.methods.fedrts import Posterior, kept_outcome, pruned_outcome
from fleetprune_sim.methods.fedtiny import block_of, grow_and_prune
from fleetprune_sim.methods.sparse.frames import SparseResult, encode_mask
from fleetprune_sim.methods.sparse.grow import named_weights
from fleetprune_sim.methods.sparse.importance import EXCHANGE, reconfigure, shrinking_limits
from fleetprune_sim.methods.sparse.intake import checked_mask
from fleetprune_sim.methods.sparse.prunable import (
    Prunable,
    SparseLayout,
    best_of,
    best_per_tensor,
)
from fleetprune_sim.methods.sparse.schedule import Schedule

ONE = Prunable(4, ((0, 4),))
"""One tensor of four weights."""
TWO = Prunable(7, ((0, 4), (5, 2)))
"""Tensors of four and two weights, with a bias between them."""


def floats(*values):
    return np.array(values, np.float32)


def bools(text):
    return np.array([c == "1" for c in text])


def text(mask):
    return "".join("01"[int(m)] for m in mask)


# ---- choosing


def test_of_equal_scores_the_first_are_taken_and_never_one_more():
    assert text(best_of(floats(1, 1, 1, 1), bools("1111"), 2)) == "1100"
    assert text(best_of(floats(1, 3, 2, 9), bools("1110"), 2)) == "0110"
    with pytest.raises(BudgetError, match=r"^3 of 2 weights, expected 0\.\.2$"):
        best_of(floats(1, 2, 3), bools("110"), 3)


def test_each_tensor_is_chosen_from_by_itself():
    chosen = best_per_tensor(TWO, floats(1, 2, 3, 4, 0.1, 0.2), bools("111111"), (1, 1))
    assert text(chosen) == "000101"
    assert TWO.kept(chosen) == (1, 1)


def test_a_mask_leaves_everything_else_where_it_is():
    # Parameters 0..3 and 5..6 are prunable, 4 is a bias.
    assert text(TWO.support(bools("100001"))) == "1000101"


# ---- when


def test_masks_change_until_a_share_of_the_rounds_and_less_and_less():
    assert Schedule(40, 5, 0.5).turns() == [5, 10, 15]
    assert Schedule(40, 5, 1 / 3).turns() == [5, 10]
    assert Schedule(40, 5, 1.0).turns() == [5, 10, 15, 20, 25, 30, 35]
    assert Schedule(10, 5, 1 / 3).turns() == [5]  # once in any case, but never at the end
    assert Schedule(5, 5, 1.0).turns() == []
    assert Schedule(40, 0, 0.5).turns() == []
    shares = [Schedule(40, 5, 0.5).share(n, 0.2) for n in (0, 10, 20, 30)]
    assert shares == pytest.approx([0.2, 0.1, 0, 0])


# ---- FedDST


def test_feddst_drops_the_smallest_weights_and_grows_the_largest_gradients():
    mask, weights = bools("110110"), floats(0.5, -0.1, 0, 2, -3, 0)
    gradient = floats(9, 4, -5, 9, 9, 1)
    stay, grown = readjust(TWO, mask, weights, gradient, (1, 0))
    # Of the first tensor -0.1 goes and the weight that was pruned comes; the second one rests.
    # Signs do not matter, and what stays has no claim by its gradient.
    assert (text(stay), text(grown)) == ("100110", "001000")


def test_feddst_may_grow_what_it_has_just_dropped():
    weights = floats(0.5, -0.1, 0, 2, -3, 0)
    stay, grown = readjust(TWO, bools("110110"), weights, floats(9, -6, 5, 9, 7, 1), (1, 1))
    assert (text(stay), text(grown)) == ("100100", "010010")


# ---- FedTiny


def test_fedtiny_grows_by_gradient_and_prunes_what_was_there_before():
    mask, weights = bools("1100"), floats(0.3, -0.2, 0, 0)
    after = grow_and_prune(ONE, mask, weights, np.array([0.0, 0.0, 1.0, -4.0]), (1,))
    # The new weight begins at 0 and would be the smallest: it is not judged yet.
    assert text(after) == "1001"


def test_fedtiny_goes_through_the_blocks_from_the_output_backwards():
    assert [list(block_of(turn, 5, 3)) for turn in range(4)] == [[3, 4], [1, 2], [0], [3, 4]]
    assert [list(block_of(turn, 3, 3)) for turn in range(3)] == [[2], [1], [0]]
    assert list(block_of(7, 4, 1)) == [0, 1, 2, 3]


# ---- FedRTS


def test_fedrts_mixes_the_mean_model_with_the_votes_of_devices():
    # In the mean and on three quarters of the devices; in the mean alone; on devices alone.
    outcome = kept_outcome(bools("110"), np.array([0.75, 0.0, 1.0]))
    assert outcome.tolist() == [0.875, 0.5, 0.5]
    # Nobody's gradient: worse than even; everybody's: better, but less than a sure weight.
    assert pruned_outcome(np.array([0.0, 0.5, 1.0])).tolist() == [0.25, 0.5, 0.75]


def test_fedrts_counts_an_outcome_as_ten_observations_and_never_forgets():
    posterior = Posterior(np.ones(3), np.ones(3))
    once = posterior.seen(np.array([0.75, 0.0, 1.0]), bools("110"))
    assert (once.alpha.tolist(), once.beta.tolist()) == ([8.5, 1, 1], [3.5, 11, 1])
    twice = once.seen(np.array([1.0, 0.5, 0.5]), bools("111"))
    assert (twice.alpha.tolist(), twice.beta.tolist()) == ([18.5, 6, 6], [3.5, 16, 6])


def test_fedrts_draws_what_is_likely_often_and_what_is_not_seldom():
    # Means of 10/11, 1/2, 1/2 and 1/11 for two places.
    posterior = Posterior(np.array([10.0, 5, 5, 1]), np.array([1.0, 5, 5, 10]))
    rng = np.random.default_rng(0)
    drawn = np.array([posterior.draw(ONE, (2,), rng) for _ in range(400)])
    assert (drawn.sum(axis=1) == 2).all()
    first, second, third, last = drawn.mean(axis=0)
    assert first > 0.95
    assert second == pytest.approx(third, abs=0.1)
    assert 0 < last < 0.05


# ---- PruneFL


def test_prunefl_keeps_the_largest_weights_and_buys_the_rest_by_importance_per_cost():
    # Ten weights in the mask at cost 1: a tensor may lose three of them at most.
    prunable = Prunable(14, ((0, 12), (12, 2)))
    mask = bools("11111111110010")
    weights = floats(10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 5, 0)
    importance = np.array([0.0] * 7 + [31, 155, 62, 124, 93, 0, 225.0])
    assert EXCHANGE == 30
    after = reconfigure(prunable, (1, 20), mask, weights, importance, limit=29)
    # The seven largest and the one of the second tensor stay: 7 + 20 of 29. Per time, 1 + 30 and
    # 20 + 30, the others are worth 1, 5, 2, 4, 3, 0 and 4.5: weight 8 comes first, then that one
    # does not fit and ends it.
    assert text(after) == "11111110100010"
    more = reconfigure(prunable, (1, 20), mask, weights, importance, limit=50)
    # Room for 23 more: 1, 20 for that one, and two that are worth 4 and 3.
    assert text(more) == "11111110101111"


def test_prunefl_thins_out_what_must_stay_where_it_alone_is_too_much():
    prunable = Prunable(12, ((0, 10), (10, 2)))
    weights, nothing = floats(*range(1, 13)), np.zeros(12)
    after = reconfigure(prunable, (1, 4), np.ones(12, np.bool_), weights, nothing, limit=8)
    # 7 + 2 * 4 = 15 would stay. Beyond one of each (5) there are 10, of which 3 fit: so 1 + 6 * 3
    # // 10 = 2 and 1 + 1 * 3 // 10 = 1 stay, the largest; the last 2 go to the first of equals.
    assert text(after) == "110000001101"


def test_prunefl_shrinks_in_equal_ratios_and_ends_at_the_budget():
    assert shrinking_limits(1600, 100, 4) == (800, 400, 200, 100)


# ---- what devices may not say


def answer(**sections):
    header = ResultHeader(
        task="t", device="d", kind=TaskKind.TRAIN, round=1, mask_version=0, samples=1
    )
    return SparseResult(header, None, {}, sections)


def test_a_device_cannot_move_weights_between_tensors():
    layout = SparseLayout(TWO, ((4,), (2,)), (1, 1), 0)
    good = answer(mask=encode_mask(bools("011010")))
    assert text(checked_mask(good, layout, (2, 1))) == "011010"
    with pytest.raises(Exception, match=r"^answer to t marks \(3, 0\) weights .* expected \(2, 1"):
        checked_mask(answer(mask=encode_mask(bools("011100"))), layout, (2, 1))
    with pytest.raises(Exception, match=r"^answer to t without section mask$"):
        checked_mask(answer(), layout, (2, 1))


def test_a_device_cannot_name_weights_that_are_not_pruned():
    named = answer(grown=encode_mask(bools("001001")))
    assert named_weights(named, TWO, bools("110010"), (1, 1)).tolist() == [2, 5]
    with pytest.raises(Exception, match=r"marks \(0, 1\) weights of the tensors, expected \(1, 1"):
        named_weights(named, TWO, bools("111010"), (1, 1))
