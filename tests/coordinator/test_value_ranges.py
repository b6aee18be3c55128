"""Histograms of a fleet's values become ranges that one odd device does not decide."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetprune.errors import WireError
from fleetprune_coordinator.value_ranges import (
    BINS,
    LOWEST,
    PER_OCTAVE,
    PER_TENSOR,
    RangeSums,
    best_range,
)

ONE = -LOWEST * PER_OCTAVE  # the bin of 1 up to 2**0.25


def counts(up=(), down=()):
    """(PER_TENSOR,) float32 of one tensor: pairs of bin and count, from 0 up and below 0."""
    table = np.zeros((2, BINS), np.float32)
    for side, pairs in enumerate((up, down)):
        for place, count in pairs:
            table[side, place] = count
    return table.ravel()


def shares(up=(), down=()):
    return counts(up, down).reshape(2, BINS).astype(np.float64)


def pooled(*devices, weights=None):
    sums = RangeSums(PER_TENSOR)
    for device, weight in zip(devices, weights or [1.0] * len(devices), strict=True):
        sums.add(device, weight)
    return sums.result()[0].tolist()


def test_a_range_ends_where_the_values_end():
    assert best_range(shares(up=[(ONE, 1)])) == (0.0, 2**0.25)
    assert best_range(shares(up=[(ONE, 1)], down=[(ONE - PER_OCTAVE, 1)])) == pytest.approx(
        (-(2**-0.75), 2**0.25)
    )
    assert best_range(shares(down=[(ONE, 1)])) == (-(2**0.25), 0.0)


def test_zeros_need_no_range():
    assert best_range(shares(up=[(0, 1)])) == (0.0, 1.0)
    assert best_range(shares(up=[(0, 9), (ONE, 1)])) == (0.0, 2**0.25)


def test_few_large_values_are_cut_off_and_many_are_not():
    """At twice the range every value costs 4 times as much; a value beyond it costs its distance.

    One of 10**7 beyond: kept inside it costs 3 * (2**0.25 / 255)**2 / 12 = 5e-6 to all others.
    """
    beyond = ONE + PER_OCTAVE
    assert best_range(shares(up=[(ONE, 1), (beyond, 1e-7)])) == (0.0, 2**0.25)
    assert best_range(shares(up=[(ONE, 1), (beyond, 1e-3)])) == (0.0, 2**1.25)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, BINS - 1), st.floats(1e-6, 1)), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(1, BINS - 1), st.floats(1e-6, 1)), max_size=8),
)
def test_no_range_is_wider_than_the_values(up, down):
    low, high = best_range(shares(up, down))
    most = 2.0 ** (LOWEST + (1 + max(place for place, _ in up)) / PER_OCTAVE)
    least = 2.0 ** (LOWEST + (1 + max((p for p, _ in down), default=-1)) / PER_OCTAVE)
    assert 0 < high <= most
    assert -least * bool(down) <= low <= 0


def test_the_weight_of_a_device_is_not_its_own_word():
    """A device that says it saw a thousand times as many values counts no more."""
    small, large = counts(up=[(ONE, 1)]), counts(up=[(ONE + 2, 1)])
    assert pooled(small, large) == pooled(1000 * small, large) == pooled(small, 1000 * large)


def test_a_device_with_more_weight_counts_more():
    small, large = counts(up=[(ONE, 1)]), counts(up=[(ONE + 2, 1)])
    assert pooled(small, large, weights=[1, 1]) == pytest.approx([0, 2**0.75])
    assert pooled(small, large, weights=[1e6, 1e-3]) == pytest.approx([0, 2**0.25])


def test_no_device_widens_a_range_beyond_twice_the_median():
    honest = counts(up=[(ONE, 100)], down=[(ONE, 100)])
    hostile = counts(up=[(BINS - 1, 100)], down=[(BINS - 1, 100)])
    assert pooled(*[honest] * 4, hostile) == pytest.approx([-(2**1.25), 2**1.25])
    assert pooled(*[honest] * 3, *[hostile] * 2) == pytest.approx([-(2**1.25), 2**1.25])


def test_nothing_added_is_no_range():
    assert RangeSums(PER_TENSOR).result() is None


def refused(vector, message, size=PER_TENSOR):
    sums = RangeSums(size)
    with pytest.raises(WireError) as caught:
        sums.add(vector, 1.0)
    assert str(caught.value) == message
    assert sums.result() is None


def test_errors():
    refused(
        counts(up=[(1, 1)])[1:],
        f"ranges of shape ({PER_TENSOR - 1},), expected ({PER_TENSOR},)",
    )
    refused(counts(up=[(1, 1), (2, -3)]), "ranges: -3.0, expected counts of at least 0")
    two = np.concatenate([counts(up=[(1, 1)]), counts()])
    refused(two, "ranges: tensor 1 has no values, expected some", size=2 * PER_TENSOR)
