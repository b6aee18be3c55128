import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetprune.schedule import PolynomialDecay


def test_cuts_at_once_by_default():
    assert PolynomialDecay().limit(0, dense=1000, budget=250) == 250


def test_linear_decay_in_the_head():
    linear = PolynomialDecay(begin=0, end=4, power=1)
    assert [linear.limit(r, 1000, 200) for r in range(6)] == [1000, 800, 600, 400, 200, 200]


def test_cubic_decay_cuts_most_early():
    cubic = PolynomialDecay(begin=2, end=4, power=3)
    assert cubic.slack(1) == 1.0
    assert cubic.slack(3) == pytest.approx(1 / 8)  # half way: (1 - 1/2)**3
    assert cubic.limit(3, 1000, 200) == 300


def test_a_budget_above_the_dense_model_stays():
    assert PolynomialDecay(end=4).limit(0, dense=100, budget=500) == 500


@given(st.integers(0, 50), st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_limit_falls_and_ends_at_the_budget(end, dense, budget):
    decay = PolynomialDecay(end=end)
    limits = [decay.limit(r, dense, budget) for r in range(end + 2)]
    assert limits == sorted(limits, reverse=True)
    assert limits[-1] == budget
