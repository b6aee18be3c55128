import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fleetprune.schedule import Curve, Schedule, regrowth


def limits(schedule, rounds=6):
    return [schedule.limit(r, 1000, 200) for r in range(rounds)]


def test_cuts_at_once_by_default():
    assert Schedule().limit(0, dense=1000, budget=250) == 250


def test_linear_decay_in_the_head():
    assert limits(Schedule(curve="linear", end=4)) == [1000, 800, 600, 400, 200, 200]
    assert limits(Schedule(end=4, power=1)) == [1000, 800, 600, 400, 200, 200]


def test_cubic_decay_cuts_most_early():
    cubic = Schedule(begin=2, end=4, power=3)
    assert cubic.slack(1) == 1.0
    assert cubic.slack(3) == pytest.approx(1 / 8)  # half way: (1 - 1/2)**3
    assert cubic.limit(3, 1000, 200) == 300


def test_cosine_decay_is_slow_at_both_ends():
    cosine = Schedule(curve="cosine", end=6)
    assert [cosine.slack(r) for r in (0, 2, 3, 4, 6)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("curve", ["one_shot", "constant"])
def test_all_at_once_in_the_round_that_is_named(curve):
    assert limits(Schedule(curve=curve, begin=2)) == [1000, 1000, 200, 200, 200, 200]


def test_steps_are_as_far_apart_as_the_frequency_says():
    every_other = Schedule(curve="linear", end=4, frequency=2)
    assert limits(every_other) == [1000, 1000, 600, 600, 200, 200]


def test_a_smaller_start():
    half = Schedule(curve="linear", end=3, initial=0.5)
    assert limits(half, 4) == [500, 400, 300, 200]


def test_a_dynamic_schedule_leaves_what_it_has_left_and_nothing_after_its_end():
    dynamic = Schedule(curve="dynamic", end=4)
    assert [dynamic.limit(r, 1000, 200, slack=0.5) for r in (0, 3, 4)] == [600, 600, 200]
    assert dynamic.limit(0, 1000, 200) == 1000


def test_a_budget_above_the_dense_model_stays():
    assert Schedule(end=4).limit(0, dense=100, budget=500) == 500


@given(
    st.sampled_from(list(Curve)),
    st.integers(0, 50),
    st.integers(1, 7),
    st.integers(1, 10**6),
    st.integers(1, 10**6),
)
def test_the_limit_falls_and_ends_at_the_budget(curve, end, frequency, dense, budget):
    schedule = Schedule(curve=curve, end=end, frequency=frequency)
    found = [schedule.limit(r, dense, budget) for r in range(end + 2)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == budget


@pytest.mark.parametrize("curve", ["linear", "polynomial", "cosine", "dynamic"])
def test_a_schedule_that_ends_before_it_begins_is_refused(curve):
    with pytest.raises(ValidationError) as e:
        Schedule(curve=curve, begin=5, end=3)
    assert "begins in round 5, after its end 3; raise end, or lower begin" in str(e.value)


def test_regrowth_falls_along_a_cosine():
    found = [regrowth(r, 4, 0.4) for r in range(6)]
    assert found == pytest.approx([0.4, 0.2 + 0.2 * 2**-0.5, 0.2, 0.2 - 0.2 * 2**-0.5, 0, 0])
    assert regrowth(0, 0, 0.4) == 0
