import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetprune_coordinator.score_merge import Average, ScoreMerge, merged

NAN = np.nan


def column(*values):
    return np.array([[v] for v in values], float)


def test_the_median_is_the_middle_one_or_the_mean_of_the_middle_two():
    assert merged(column(9, 1, 2), ScoreMerge.MEDIAN).tolist() == [2]
    assert merged(column(9, 1, 2, 4), ScoreMerge.MEDIAN).tolist() == [3]
    assert merged(column(7), ScoreMerge.MEDIAN).tolist() == [7]


def test_a_fifth_is_left_out_at_each_end():
    assert merged(column(1, 2, 3, 4, 1000), ScoreMerge.TRIMMED).tolist() == [3]
    # Of ten devices the two lowest and the two highest: (3 + 4 + 5 + 6 + 7 + 8) / 6.
    assert merged(column(*range(1, 11)), ScoreMerge.TRIMMED).tolist() == [5.5]
    # Of four a fifth is no whole device.
    assert merged(column(1, 2, 3, 1000), ScoreMerge.TRIMMED).tolist() == [251.5]


@pytest.mark.parametrize("merge", [ScoreMerge.MEDIAN, ScoreMerge.TRIMMED])
def test_only_devices_that_cover_an_element_count(merge):
    reports = np.array([[1.0, NAN, NAN], [3.0, 5.0, NAN], [2.0, NAN, NAN]])
    assert merged(reports, merge).tolist() == [2, 5, 0]


@given(
    st.lists(st.floats(-9, 9), min_size=1, max_size=12),
    st.sampled_from([ScoreMerge.MEDIAN, ScoreMerge.TRIMMED]),
    st.randoms(use_true_random=False),
)
def test_the_order_of_devices_does_not_matter_and_bounds_hold(values, merge, random):
    shuffled = list(values)
    random.shuffle(shuffled)
    one, other = (merged(column(*v), merge)[0] for v in (values, shuffled))
    assert one == pytest.approx(other)
    assert min(values) - 1e-9 <= one <= max(values) + 1e-9


@given(st.lists(st.floats(0, 9), min_size=3, max_size=12))
def test_less_than_half_of_the_devices_cannot_leave_the_range_of_the_others(honest):
    liars = [1e9] * ((len(honest) - 1) // 2)
    median = merged(column(*honest, *liars), ScoreMerge.MEDIAN)[0]
    assert min(honest) <= median <= max(honest)


@pytest.mark.parametrize("merge", list(ScoreMerge))
def test_an_average_moves_by_rounds(merge):
    average = Average(3, merge)
    average.add(slice(0, 2), np.array([2.0, 8.0]), 2.0)  # 1 and 4
    average.close(0.5)
    assert average.value.tolist() == [1, 4, 0]
    assert average.seen.tolist() == [True, True, False]
    average.add(slice(0, 3), np.array([3.0, 4.0, 5.0]), 1.0)
    average.reorder(np.array([2, 1, 0]))
    average.close(0.5)
    assert average.value.tolist() == [5, 4, 2]  # seen first: as it is; else half way
    average.close(0.5)
    assert average.value.tolist() == [5, 4, 2]


def test_a_mean_weighs_by_samples_and_the_others_do_not():
    values = {}
    for merge in ScoreMerge:
        average = Average(1, merge)
        for value, weight in ((1.0, 8.0), (3.0, 1.0), (8.0, 1.0)):
            average.add(slice(0, 1), np.array([value * weight]), weight)
        average.close(0.0)
        values[merge] = average.value[0]
    assert values == {ScoreMerge.MEAN: 1.9, ScoreMerge.MEDIAN: 3.0, ScoreMerge.TRIMMED: 4.0}
