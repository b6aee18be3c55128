"""Probabilities that can be checked by hand, and by simulation what the gates are worth."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.rollout_gates import STAGES, Case, abort_rate
from fleetprune_coordinator.rollout_config import RolloutConfig
from fleetprune_coordinator.rollout_gates import Loss, Paired, accuracy_loss, share_above


def test_shares_by_hand():
    # Without a sample the prior stays, Beta(1/2, 1/2), which is the arcsine distribution.
    assert share_above(0, 0, 0.25) == pytest.approx(2 / 3)
    assert share_above(1, 2, 0.5) == pytest.approx(0.5)
    # Beta(3/2, 1/2): the distribution function is (2 asin(sqrt(x)) - sin(2 asin(sqrt(x)))) / pi.
    angle = 2 * math.asin(math.sqrt(0.02))
    assert share_above(1, 1, 0.02) == pytest.approx(1 - (angle - math.sin(angle)) / math.pi)


def test_one_of_three_canaries_is_enough_and_one_of_a_hundred_is_not():
    assert share_above(1, 3, 0.02) > 0.95
    assert share_above(1, 100, 0.02) < 0.3
    assert share_above(6, 100, 0.02) > 0.95


@given(st.integers(0, 50), st.integers(0, 50), st.floats(0, 0.99))
def test_more_failures_are_never_less_suspicious(failed, good, most):
    less = share_above(failed, failed + good, most)
    more = share_above(failed + 1, failed + 1 + good, most)
    assert -1e-12 <= less <= more + 1e-12 <= 1 + 2e-12


def test_a_loss_by_hand():
    # 48 of 50 right before, 40 of 50 now: 8 lost, which are at least 8 discordant samples, and
    # with agreement on 80 % at most 10. With two more samples, one of them discordant:
    found = accuracy_loss([Paired(0.96, 0.80, 50, agreement=0.8)], most=0.02)
    mean, discordant = 8 / 52, 11 / 52
    error = math.sqrt((discordant - mean**2) / 52)
    assert found == Loss(
        1, 50, pytest.approx(0.16), pytest.approx(error), pytest.approx(0.98702, abs=1e-5)
    )


def test_nothing_to_compare():
    assert accuracy_loss([], 0.02) is None
    assert accuracy_loss([Paired(0.9, 0.1, 0)], 0.02) is None


def test_a_gain_is_no_loss():
    found = accuracy_loss([Paired(0.8, 0.9, 50)], most=0.0)
    assert found.loss == pytest.approx(-0.1)
    assert found.doubt < 0.1


def test_samples_are_what_is_pooled():
    found = accuracy_loss([Paired(1.0, 0.9, 10), Paired(1.0, 0.5, 90)], most=0.02)
    assert (found.devices, found.samples, found.loss) == (2, 100, pytest.approx(0.46))


def test_one_odd_device_of_several_is_outvoted():
    odd, fine = Paired(0.9, 0.4, 50, 0.5), Paired(0.9, 0.9, 50, 0.95)
    assert accuracy_loss([odd], 0.02).doubt > 0.99
    assert accuracy_loss([odd, fine, fine], 0.02).doubt < 0.5
    assert accuracy_loss([odd, *[fine] * 30], 0.02).doubt < 0.8
    assert accuracy_loss([odd, odd, fine], 0.02).doubt > 0.95


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=15))
def test_any_devices_give_a_probability(counts):
    devices = [Paired(before / 40, after / 40, 40) for before, after in counts]
    found = accuracy_loss(devices, 0.02)
    assert 0 <= found.doubt <= 1 and found.error > 0
    mirrored = accuracy_loss([Paired(d.after, d.before, 40) for d in devices], 0.02)
    assert mirrored.loss == pytest.approx(-found.loss)


@pytest.mark.parametrize(
    ("case", "stages", "least", "most"),
    [
        (Case(), (3,), 0.0, 0.05),
        (Case(), (100,), 0.0, 0.01),
        (Case(uneven=3), STAGES, 0.0, 0.10),
        (Case(odd=1), (100,), 0.0, 0.01),
        (Case(points=2), (3,), 0.0, 0.12),  # at the limit: about 1 - confidence
        (Case(points=2), (100,), 0.0, 0.12),
        (Case(points=10), (3,), 0.75, 1.0),
        (Case(points=10), (100,), 1.0, 1.0),
        (Case(failures=0.5), (3,), 0.75, 1.0),
        (Case(failures=0.1), (100,), 0.9, 1.0),
    ],
)
def test_what_the_gates_are_worth(case, stages, least, most):
    assert least <= abort_rate(case, stages, 150, RolloutConfig()) <= most


def test_a_stricter_limit_finds_smaller_losses():
    rules = RolloutConfig(max_accuracy_loss=0.0)
    assert abort_rate(Case(points=2), (100,), 150, rules) > 0.8
