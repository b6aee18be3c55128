import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetprune.criteria import magnitude, wanda
from fleetprune.errors import BudgetError, UsageError, WireError
from fleetprune.layout import Architecture, Role, Segment, TensorSpec
from fleetprune_coordinator.ledger import Criterion, Ledger


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
    ledger.add_taylor(WIDE, f32(20, 60, 40, 20, 40), steps=10, weight=1)
    ledger.close_round()
    assert taylor(ledger) == {"a": [1, 3, 2], "b": [1, 2]}


def test_a_louder_class_says_the_same() -> None:
    ledger = Ledger(net(), SMALL)
    ledger.add_taylor(WIDE, f32(2, 6, 4, 2, 4), steps=1, weight=1)
    ledger.add_taylor(MIDDLE, f32(200, 600, 200), steps=1, weight=3)  # a hundred times the loss
    ledger.close_round()
    assert taylor(ledger) == {"a": [1, 3, 2], "b": [1, 2]}


def test_weights_count_among_those_who_cover() -> None:
    ledger = Ledger(net(), SMALL)
    ledger.add_taylor(WIDE, f32(1, 1, 8, 1, 9), steps=1, weight=1)
    ledger.add_taylor(MIDDLE, f32(1, 5, 1), steps=1, weight=3)
    ledger.close_round()
    assert taylor(ledger) == {"a": [1, 4, 8], "b": [1, 9]}  # (1*1 + 3*5) / 4; then alone


def test_the_average_moves_only_where_the_round_has_seen() -> None:
    ledger = Ledger(net(), SMALL, decay=0.75)
    ledger.add_taylor(WIDE, f32(1, 4, 8, 1, 9), steps=1, weight=1)
    ledger.close_round()
    ledger.add_taylor(MIDDLE, f32(1, 8, 1), steps=1, weight=1)
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
    ledger.add_taylor(SMALL, f32(3, 3), steps=1, weight=1)
    assert not ledger.ready(Criterion.TAYLOR)  # the round is still open
    ledger.close_round()
    assert taylor(ledger) == {"a": [1, 0, 0], "b": [1, 0]}


def test_a_report_without_any_gradient_is_passed_over() -> None:
    ledger = Ledger(net(), SMALL)
    ledger.add_taylor(WIDE, f32(0, 5, 5, 0, 5), steps=1, weight=1)
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
    ledger.add_taylor(WIDE, f32(1, 3, 2, 1, 9), steps=1, weight=1)
    ledger.add_sumsq(WIDE, f32(1, 2, 3, 10, 11, 20, 21), 1)
    ledger.close_round()
    ledger.reorder({"a": np.array([1, 2, 0]), "b": np.array([1, 0])}, {"a": 2, "b": 1})
    assert taylor(ledger) == {"a": [3, 2, 1], "b": [9, 1]}
    assert ledger.arrays()["sumsq/two"].tolist() == [2, 3, 1]
    assert ledger.arrays()["sumsq/out"].tolist() == [20, 21, 10, 11]
    with pytest.raises(
        UsageError, match=r"^group a: keep 1, expected at least the smallest class's 2$"
    ):
        ledger.add_taylor(SMALL, f32(1, 1), steps=1, weight=1)


def test_a_ledger_comes_back_from_its_arrays() -> None:
    ledger = Ledger(net(), SMALL, decay=0.5)
    ledger.add_taylor(MIDDLE, f32(1, 3, 1), steps=1, weight=1)
    ledger.add_sumsq(WIDE, f32(1, 2, 3, 10, 11, 20, 21), 1)
    ledger.close_round()
    again = Ledger.from_arrays(net(), SMALL, ledger.arrays(), decay=0.5)
    for one in (ledger, again):
        one.add_taylor(WIDE, f32(1, 5, 7, 1, 9), steps=1, weight=1)
        one.close_round()
    # Seen before: the mean of 3 and 5. Never seen before: the value itself.
    assert taylor(again) == taylor(ledger) == {"a": [1, 4, 7], "b": [1, 9]}
    wrong = dict(ledger.arrays())
    wrong["taylor/a"] = np.zeros(2)
    with pytest.raises(UsageError) as caught:
        Ledger.from_arrays(net(), SMALL, wrong)
    assert str(caught.value) == "ledger array taylor/a of shape (2,), expected (3,)"
    del wrong["taylor/a"]
    with pytest.raises(UsageError, match=r"^ledger arrays .* expected .*taylor/a"):
        Ledger.from_arrays(net(), SMALL, wrong)


def test_wrong_reports_are_refused_and_leave_no_trace() -> None:
    ledger = Ledger(net(), SMALL)
    for report, message in [
        (f32(1), "taylor of shape (1,), expected (5,)"),
        (f32(1, 1, -1, 1, 1), "taylor: -1.0, expected at least 0"),
        (f32(1, 1, 1, np.nan, 1), "taylor: element 3 is not finite"),
    ]:
        with pytest.raises(WireError) as caught:
            ledger.add_taylor(WIDE, report, steps=1, weight=1)
        assert str(caught.value) == message
    for report, message in [
        (f32(1), "sumsq of shape (1,), expected (7,)"),
        (f32(1, 1, 1, 1, 1, 1, -2), "sumsq: -2.0, expected at least 0"),
    ]:
        with pytest.raises(WireError) as caught:
            ledger.add_sumsq(WIDE, report, 1)
        assert str(caught.value) == message
    with pytest.raises(UsageError, match=r"^0 steps, expected at least 1$"):
        ledger.add_taylor(WIDE, f32(1, 1, 1, 1, 1), steps=0, weight=1)
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
            ledger.add_taylor(keep, scores.astype(np.float32), steps=3, weight=weight)
        ledger.close_round()
        ledgers.append(ledger)
    for name, values in ledgers[0].arrays().items():
        np.testing.assert_allclose(ledgers[1].arrays()[name], values, rtol=1e-9)
