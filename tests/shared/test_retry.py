import random

from fleetprune.retry import Backoff, RoundTrip


def test_backoff_doubles_up_to_its_limit():
    backoff = Backoff(first_s=0.5, most_s=60.0)
    assert [backoff.limit(i) for i in range(9)] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert backoff.limit(10**9) == 60.0


def test_jitter_spreads_over_all_or_half_of_the_limit():
    backoff, rng = Backoff(1.0, 8.0), random.Random(0)
    full = [backoff.full_jitter(3, rng) for _ in range(1000)]
    half = [backoff.half_jitter(3, rng) for _ in range(1000)]
    assert 0 <= min(full) < 0.1 and 7.9 < max(full) <= 8
    assert 4 <= min(half) < 4.1 and 7.9 < max(half) <= 8


def test_round_trip_as_in_rfc_6298():
    trip = RoundTrip()
    assert trip.timeout_s == 2.0
    trip.measured(1.0)
    assert trip.timeout_s == 1.0 + 4 * 0.5
    trip.measured(2.0)  # deviation 0.5 + (1 - 0.5) / 4, mean 1 + 1 / 8
    assert trip.timeout_s == 1.125 + 4 * 0.625
    trip.expired()
    assert trip.timeout_s == 2 * 3.625
    trip.expired()
    trip.answered()
    assert trip.timeout_s == 2 * 3.625
    trip.measured(1.125)
    assert trip.timeout_s == 1.125 + 4 * 0.46875


def test_round_trip_is_bounded():
    trip = RoundTrip()
    trip.measured(0.0001)
    assert trip.timeout_s == RoundTrip.LEAST_S
    for _ in range(100):
        trip.expired()
    assert trip.timeout_s == RoundTrip.MOST_S
    trip.forget_losses()
    assert trip.timeout_s == RoundTrip.LEAST_S
