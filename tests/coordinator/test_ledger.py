import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetprune.criteria import Criterion, magnitude, wanda
from fleetprune.errors import BudgetError, UsageError, WireError
from fleetprune.layout import Architecture, Role, Segment, TensorSpec
from fleetprune_coordinator.ledger import MOST, Ledger
from fleetprune_coordinator.score_merge import ScoreMerge


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def net() -> Architecture:
    """in -> a (3 units) -> b (2 units), b seen by a linear layer through 2 positions each."""
    a, b = Segment(group="a", units=3), Segment(group="b", units=2)
    flat = Segment(group="b", units=2, block=2)
    return Architecture(
        groups={"a": 3, "b": 2},
        tensors=(
            TensorSpec(name="one", role=Role.PARAMETER, axes=((a,), (Segment(units=1),))),
            TensorSpec(name="two", role=Role.PARAMETER, axes=((b,), (a,))),
            TensorSpec(name="out", role=Role.PARAMETER, axes=((Segment(units=2),), (flat,))),
        ),
        observed=("two", "out"),
    )


PARAMS = {
    "one": np.ones((3, 1), np.float32),
    "two": np.array([[1, 2, 3], [4, 5, 6]], np.float32),
    "out": np.array([[1, 1, 1, 1], [0, 0, 1, 1]], np.float32),
}
WIDE, MIDDLE, SMALL = {"a": 3, "b": 2}, {"a": 2, "b": 1}, {"a": 1, "b": 1}


def taylor(ledger: Ledger) -> dict[str, list[float]]:
    return {g: s.tolist() for g, s in ledger.scores(Criterion.TAYLOR, PARAMS).items()}


def test_reports_are_made_comparable_by_the_smallest_class() -> None:
    ledger = Ledger(net(), SMALL)
    # Per step 2 6 4 | 2 4; the smallest class has the first of each group, whose mean is 2.
    ledger.add_scores(Criterion.TAYLOR, WIDE, f32(20, 60, 40, 20, 40), steps=10, weight=1)
    ledger.close_round()
    assert taylor(ledger) == {"a": [1, 3, 2], "b": [1, 2]}


def test_a_louder_class_says_the_same() -> None:
    ledger = Ledger(net(), SMALL)
    ledger.add_scores(Criterion.TAYLOR, WIDE, f32(2, 6, 4, 2, 4), steps=1, weight=1)
    ledger.add_scores(
        Criterion.TAYLOR, MIDDLE, f32(200, 600, 200), steps=1, weight=3
    )  # a hundred times the loss
    ledger.close_round()
    assert taylor(ledger) == {"a": [1, 3, 2], "b": [1, 2]}


def test_weights_count_among_those_who_cover() -> None:
    ledger = Ledger(net(), SMALL)
    ledger.add_scores(Criterion.TAYLOR, WIDE, f32(1, 1, 8, 1, 9), steps=1, weight=1)
    ledger.add_scores(Criterion.TAYLOR, MIDDLE, f32(1, 5, 1), steps=1, weight=3)
    ledger.close_round()
    assert taylor(ledger) == {"a": [1, 4, 8], "b": [1, 9]}  # (1*1 + 3*5) / 4; then alone


def test_the_average_moves_only_where_the_round_has_seen() -> None:
    ledger = Ledger(net(), SMALL, decay=0.75)
    ledger.add_scores(Criterion.TAYLOR, WIDE, f32(1, 4, 8, 1, 9), steps=1, weight=1)
    ledger.close_round()
    ledger.add_scores(Criterion.TAYLOR, MIDDLE, f32(1, 8, 1), steps=1, weight=1)
    ledger.close_round()
    assert taylor(ledger) == {"a": [1, 5, 8], "b": [1, 9]}  # 0.75 * 4 + 0.25 * 8
    ledger.close_round()  # nobody reported
    assert taylor(ledger) == {"a": [1, 5, 8], "b": [1, 9]}


def test_unseen_units_score_zero_and_an_empty_ledger_says_so() -> None:
    ledger = Ledger(net(), SMALL)
    assert not ledger.ready(Criterion.TAYLOR)
    assert not ledger.ready(Criterion.WANDA)
    assert ledger.ready(Criterion.MAGNITUDE)
    for criterion in (Criterion.TAYLOR, Criterion.WANDA):
        with pytest.raises(BudgetError) as caught:
            ledger.scores(criterion, PARAMS)
        assert str(caught.value) == (
            f"criterion {criterion.value}: no device has reported yet; "
            f"close a round first, or start with magnitude"
        )
    expected = magnitude(net(), PARAMS)
    for group, scores in ledger.scores(Criterion.MAGNITUDE, PARAMS).items():
        assert scores.tolist() == expected[group].tolist()
    ledger.add_scores(Criterion.TAYLOR, SMALL, f32(3, 3), steps=1, weight=1)
    assert not ledger.ready(Criterion.TAYLOR)  # the round is still open
    ledger.close_round()
    assert taylor(ledger) == {"a": [1, 0, 0], "b": [1, 0]}


def test_a_report_without_any_gradient_is_passed_over() -> None:
    ledger = Ledger(net(), SMALL)
    ledger.add_scores(Criterion.TAYLOR, WIDE, f32(0, 5, 5, 0, 5), steps=1, weight=1)
    ledger.close_round()
    assert not ledger.ready(Criterion.TAYLOR)


def test_wanda_of_equal_shapes_is_that_of_the_pooled_samples() -> None:
    # Sums over 4 and 12 samples; the score of the mean is that of the pool but for sqrt(16).
    first, second = f32(1, 4, 9, 1, 1, 1, 1), f32(15, 12, 7, 3, 3, 3, 3)
    ledger = Ledger(net(), SMALL)
    ledger.add_sumsq(WIDE, first, 4)
    ledger.add_sumsq(WIDE, second, 12)
    ledger.close_round()
    pooled = first + second
    expected = wanda(net(), PARAMS, {"two": pooled[:3], "out": pooled[3:]})
    for group, scores in ledger.scores(Criterion.WANDA, PARAMS).items():
        np.testing.assert_allclose(scores * 4, expected[group], rtol=1e-6)
    # By hand: |W| columns of `two` 5 7 9, mean squares 1 1 1.
    assert ledger.scores(Criterion.WANDA, PARAMS)["a"].tolist() == [5, 7, 9]


def test_activation_sums_of_narrow_shapes_go_to_the_right_inputs() -> None:
    ledger = Ledger(net(), SMALL)
    ledger.add_sumsq(WIDE, f32(1, 1, 1, 1, 1, 1, 1), 1)
    ledger.add_sumsq(SMALL, f32(7, 7, 7), 1)  # one input of `two`, the two positions of one unit
    ledger.close_round()
    arrays = ledger.arrays()
    assert arrays["sumsq/two"].tolist() == [4, 1, 1]
    assert arrays["sumsq/out"].tolist() == [4, 4, 1, 1]


def test_reorder_follows_the_units() -> None:
    ledger = Ledger(net(), SMALL)
    ledger.add_scores(Criterion.TAYLOR, WIDE, f32(1, 3, 2, 1, 9), steps=1, weight=1)
    ledger.add_sumsq(WIDE, f32(1, 2, 3, 10, 11, 20, 21), 1)
    ledger.close_round()
    ledger.reorder({"a": np.array([1, 2, 0]), "b": np.array([1, 0])}, {"a": 2, "b": 1})
    assert taylor(ledger) == {"a": [3, 2, 1], "b": [9, 1]}
    assert ledger.arrays()["sumsq/two"].tolist() == [2, 3, 1]
    assert ledger.arrays()["sumsq/out"].tolist() == [20, 21, 10, 11]
    with pytest.raises(
        UsageError, match=r"^group a: keep 1, expected at least the smallest class's 2$"
    ):
        ledger.add_scores(Criterion.TAYLOR, SMALL, f32(1, 1), steps=1, weight=1)


def test_a_ledger_comes_back_from_its_arrays() -> None:
    ledger = Ledger(net(), SMALL, decay=0.5)
    ledger.add_scores(Criterion.TAYLOR, MIDDLE, f32(1, 3, 1), steps=1, weight=1)
    ledger.add_sumsq(WIDE, f32(1, 2, 3, 10, 11, 20, 21), 1)
    ledger.close_round()
    again = Ledger.from_arrays(net(), SMALL, ledger.arrays(), decay=0.5)
    for one in (ledger, again):
        one.add_scores(Criterion.TAYLOR, WIDE, f32(1, 5, 7, 1, 9), steps=1, weight=1)
        one.close_round()
    # Seen before: the mean of 3 and 5. Never seen before: the value itself.
    assert taylor(again) == taylor(ledger) == {"a": [1, 4, 7], "b": [1, 9]}
    wrong = dict(ledger.arrays())
    wrong["scores/taylor/a"] = np.zeros(2)
    with pytest.raises(UsageError) as caught:
        Ledger.from_arrays(net(), SMALL, wrong)
    assert str(caught.value) == "ledger array scores/taylor/a of shape (2,), expected (3,)"
    for name in ("scores/taylor/c", "scores/magnitude/a", "sumsq/one", "taylor/a"):
        with pytest.raises(UsageError) as caught:
            Ledger.from_arrays(net(), SMALL, {name: np.zeros(3)})
        assert str(caught.value) == (
            f"ledger array {name}, expected those of this model's groups and weights"
        )


def test_wrong_reports_are_refused_and_leave_no_trace() -> None:
    ledger = Ledger(net(), SMALL)
    for report, message in [
        (f32(1), "scores of shape (1,), expected (5,)"),
        (f32(1, 1, -1, 1, 1), "scores: -1.0, expected at least 0"),
        (f32(1, 1, 1, np.nan, 1), "scores: element 3 is not finite"),
    ]:
        with pytest.raises(WireError) as caught:
            ledger.add_scores(Criterion.TAYLOR, WIDE, report, steps=1, weight=1)
        assert str(caught.value) == message
    for report, message in [
        (f32(1), "sumsq of shape (1,), expected (7,)"),
        (f32(1, 1, 1, 1, 1, 1, -2), "sumsq: -2.0, expected at least 0"),
    ]:
        with pytest.raises(WireError) as caught:
            ledger.add_sumsq(WIDE, report, 1)
        assert str(caught.value) == message
    with pytest.raises(UsageError, match=r"^0 steps, expected at least 1$"):
        ledger.add_scores(Criterion.TAYLOR, WIDE, f32(1, 1, 1, 1, 1), steps=0, weight=1)
    with pytest.raises(UsageError, match=r"^0 samples, expected at least 1$"):
        ledger.add_sumsq(WIDE, f32(1, 1, 1, 1, 1, 1, 1), 0)
    with pytest.raises(UsageError, match=r"^decay 1, expected 0 <= decay < 1$"):
        Ledger(net(), SMALL, decay=1)
    ledger.close_round()
    assert not ledger.ready(Criterion.TAYLOR)
    assert not ledger.ready(Criterion.WANDA)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([WIDE, MIDDLE, SMALL]), st.integers(0, 999), st.floats(0.1, 99)),
        min_size=1,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_the_order_of_reports_does_not_matter(reports, random) -> None:
    shuffled = list(reports)
    random.shuffle(shuffled)
    ledgers = []
    for sequence in (reports, shuffled):
        ledger = Ledger(net(), SMALL)
        for keep, seed, weight in sequence:
            scores = np.random.default_rng(seed).uniform(0.1, 9, sum(keep.values()))
            ledger.add_scores(
                Criterion.TAYLOR, keep, scores.astype(np.float32), steps=3, weight=weight
            )
        ledger.close_round()
        ledgers.append(ledger)
    for name, values in ledgers[0].arrays().items():
        np.testing.assert_allclose(ledgers[1].arrays()[name], values, rtol=1e-9)


def test_criteria_are_kept_apart() -> None:
    ledger = Ledger(net(), SMALL)
    ledger.add_scores(Criterion.FISHER, WIDE, f32(1, 3, 2, 1, 9), steps=1, weight=1)
    ledger.close_round()
    assert ledger.ready(Criterion.FISHER)
    assert not ledger.ready(Criterion.TAYLOR)
    assert set(ledger.arrays()) == {"scores/fisher/a", "scores/fisher/b"}
    assert ledger.scores(Criterion.FISHER, PARAMS)["a"].tolist() == [1, 3, 2]


def test_movement_is_signed_and_its_scale_is_that_of_its_size() -> None:
    ledger = Ledger(net(), SMALL)
    # The common units move by -2 and 4: their mean size is 3.
    ledger.add_scores(Criterion.MOVEMENT, WIDE, f32(-2, 6, -9, 4, 3), steps=1, weight=1)
    ledger.close_round()
    scores = ledger.scores(Criterion.MOVEMENT, PARAMS)
    expected = {"a": np.array([-2, 6, -9]) / 3, "b": np.array([4, 3]) / 3}
    for group, values in scores.items():
        np.testing.assert_allclose(values, expected[group], rtol=1e-6)


def test_a_unit_that_nobody_covered_is_no_better_than_the_worst() -> None:
    ledger = Ledger(net(), SMALL)
    ledger.add_scores(Criterion.MOVEMENT, MIDDLE, f32(-2, 2, 2), steps=1, weight=1)
    ledger.close_round()
    scores = ledger.scores(Criterion.MOVEMENT, PARAMS)
    assert scores["a"].tolist() == [-1, 1, -1]
    assert scores["b"].tolist() == [1, 0]
    zeros = Ledger(net(), SMALL)
    zeros.add_zeros(SMALL, f32(1, 2, 0), 4)
    zeros.close_round()
    assert zeros.scores(Criterion.APOZ, PARAMS)["a"].tolist() == [-0.25, -1, -1]
    assert zeros.scores(Criterion.APOZ, PARAMS)["b"].tolist() == [-0.25, -1]


def test_one_report_has_a_largest_size_either_way() -> None:
    ledger = Ledger(net(), SMALL)
    report = f32(1, -3e38, 3e38, 1, 1)
    ledger.add_scores(Criterion.MOVEMENT, WIDE, report, steps=1, weight=1)
    ledger.close_round()
    assert ledger.scores(Criterion.MOVEMENT, PARAMS)["a"].tolist() == [1, -MOST, MOST]


def test_zeros_are_a_share_of_the_pooled_samples() -> None:
    ledger = Ledger(net(), SMALL)
    ledger.add_zeros(WIDE, f32(1, 0, 4, 2, 0, 4, 4), 4)
    ledger.add_zeros(WIDE, f32(1, 12, 6, 4, 0, 12, 12), 12)
    ledger.close_round()
    scores = ledger.scores(Criterion.APOZ, PARAMS)
    assert scores["a"].tolist() == [-2 / 16, -12 / 16, -10 / 16]
    assert scores["b"].tolist() == [-3 / 16, -1]  # two features each


def test_zeros_that_no_samples_have_are_refused() -> None:
    ledger = Ledger(net(), SMALL)
    for report, message in [
        (f32(1), "zeros of shape (1,), expected (7,)"),
        (f32(1, 1, 1, 1, 1, 1, -2), "zeros: -2.0, expected at least 0"),
        (f32(1, 1, 1, 1, 1, 1, 5), "zeros: 5.0 of 4 samples, expected at most all"),
        (f32(1, 1, 1, 1, 1, 1, np.nan), "zeros: element 6 is not finite"),
    ]:
        with pytest.raises(WireError) as caught:
            ledger.add_zeros(WIDE, report, 4)
        assert str(caught.value) == message
    with pytest.raises(UsageError, match=r"^0 samples, expected at least 1$"):
        ledger.add_zeros(WIDE, f32(0, 0, 0, 0, 0, 0, 0), 0)
    ledger.close_round()
    assert not ledger.ready(Criterion.APOZ)


@pytest.mark.parametrize(
    ("merge", "expected"),
    [(ScoreMerge.MEAN, 5.0), (ScoreMerge.MEDIAN, 3.0), (ScoreMerge.TRIMMED, 4.0)],
)
def test_devices_are_merged_as_the_settings_say(merge, expected) -> None:
    ledger = Ledger(net(), SMALL, merge=merge)
    for worth in (1, 2, 3, 7, 12):  # each in its own loudness
        ledger.add_scores(Criterion.TAYLOR, MIDDLE, worth * f32(1, worth, 1), steps=1, weight=1)
    ledger.add_scores(Criterion.TAYLOR, SMALL, f32(5, 5), steps=1, weight=1)
    ledger.close_round()
    assert taylor(ledger)["a"] == [1, expected, 0]


def test_a_median_of_activations_gives_every_device_one_voice() -> None:
    ledger = Ledger(net(), SMALL, merge=ScoreMerge.MEDIAN)
    for scale, samples in ((1, 1), (2, 10), (1e30, 1)):
        sums = np.full(7, scale * samples, np.float32)
        ledger.add_sumsq(WIDE, sums, samples)
    ledger.close_round()
    assert ledger.arrays()["sumsq/two"].tolist() == [2, 2, 2]


def test_what_needs_no_device_is_always_ready() -> None:
    ledger = Ledger(net(), SMALL)
    for criterion in (Criterion.L1, Criterion.THRESHOLD, Criterion.FPGM, Criterion.NONE):
        assert ledger.ready(criterion)
        scores = ledger.scores(criterion, PARAMS)
        assert {g: s.size for g, s in scores.items()} == {"a": 3, "b": 2}
    assert ledger.scores(Criterion.NONE, PARAMS)["a"].tolist() == [0, -1, -2]
    assert ledger.scores(Criterion.L1, PARAMS)["b"].tolist() == [6, 15]


def test_what_the_ledger_cannot_know_is_said() -> None:
    ledger = Ledger(net(), SMALL)
    with pytest.raises(UsageError, match=r"^synflow needs the network, and this ledger was given"):
        ledger.scores(Criterion.SYNFLOW, PARAMS)
    with pytest.raises(UsageError, match=r"^reconstruction comes from Gram matrices, not from "):
        ledger.scores(Criterion.RECONSTRUCTION, PARAMS)
    with pytest.raises(UsageError, match=r"^scores of wanda, which no training device reports$"):
        ledger.add_scores(Criterion.WANDA, WIDE, f32(1, 1, 1, 1, 1), steps=1, weight=1)


def test_synflow_is_asked_of_the_network() -> None:
    ledger = Ledger(net(), SMALL, flow=lambda params: {n: 2 * p for n, p in params.items()})
    scores = ledger.scores(Criterion.SYNFLOW, PARAMS)
    assert scores["b"].tolist() == [2 * (1 + 4 + 9), 2 * (16 + 25 + 36)]


def test_all_averages_survive_a_snapshot() -> None:
    ledger = Ledger(net(), SMALL, merge=ScoreMerge.MEDIAN)
    ledger.add_scores(Criterion.MOVEMENT, MIDDLE, f32(-2, 2, 2), steps=1, weight=1)
    ledger.add_zeros(WIDE, f32(1, 0, 4, 2, 0, 4, 4), 4)
    ledger.close_round()
    again = Ledger.from_arrays(net(), SMALL, ledger.arrays(), merge=ScoreMerge.MEDIAN)
    assert again.arrays().keys() == ledger.arrays().keys()
    for name, values in ledger.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], values)
    for criterion in (Criterion.MOVEMENT, Criterion.APOZ):
        before, after = (one.scores(criterion, PARAMS) for one in (ledger, again))
        assert all((before[g] == after[g]).all() for g in before)
    order = {"a": np.array([2, 1, 0]), "b": np.array([1, 0])}
    again.reorder(order, SMALL)
    assert again.arrays()["zeros/two"].tolist() == [1, 0, 0.25]
    assert again.scores(Criterion.MOVEMENT, PARAMS)["a"].tolist() == [-1, 1, -1]
