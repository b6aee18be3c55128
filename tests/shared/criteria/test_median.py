import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fleetprune.criteria import geometric_median


def total(points, place):
    return float(np.linalg.norm(points - place, axis=1).sum())


@pytest.mark.parametrize(
    ("points", "median"),
    [
        ([[7, 8]], [7, 8]),
        ([[2], [2], [2]], [2]),
        ([[0], [1], [5]], [1]),  # on a line: the median, not the mean 2
        ([[0], [4]], [0]),  # anything between is as good
        ([[0, 0], [2, 0], [0, 2], [2, 2]], [1, 1]),
        ([[0, 0], [0, 0], [9, 0], [0, 9]], [0, 0]),  # half of the points in one place
        ([[0, 0], [1, 0], [1, 0], [1, 0]], [1, 0]),
        # An angle of more than 120 degrees: its vertex.
        ([[0, 0], [4, 1], [-4, 1]], [0, 0]),
        # An equilateral triangle: its centre.
        ([[0, 0], [2, 0], [1, 3**0.5]], [1, 3**-0.5]),
    ],
)
def test_known_medians(points, median):
    assert geometric_median(np.array(points, float)) == pytest.approx(median, abs=1e-6)


@given(
    arrays(
        np.float64,
        st.tuples(st.integers(1, 8), st.integers(1, 3)),
        elements=st.integers(-5, 5).map(float),
    )
)
def test_no_place_near_or_far_has_a_smaller_sum_of_distances(points):
    median = geometric_median(points)
    best = total(points, median)
    for other in [*points, points.mean(axis=0), np.median(points, axis=0)]:
        assert best <= total(points, other) + 1e-7
    rng = np.random.default_rng(0)
    for step in rng.normal(size=(8, points.shape[1])):
        assert best <= total(points, median + 0.01 * step) + 1e-7


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_scale_does_not_matter(factor):
    points = np.random.default_rng(1).normal(size=(20, 5))
    expected = factor * geometric_median(points)
    np.testing.assert_allclose(geometric_median(factor * points), expected, rtol=1e-5)
