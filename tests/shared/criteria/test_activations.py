import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fleetprune import criteria
from fleetprune.errors import UsageError, WireError
from fleetprune.layout import Architecture

from .nets import BOTH, FLAT, TWO, f32, parameter, segment


def test_wanda_is_weight_times_activation_norm():
    scores = criteria.wanda(TWO, {"out.weight": f32([-2, 1])}, {"out.weight": f32(9, 100)})
    assert scores["h"].tolist() == [6.0, 10.0]  # 2 * 3 and 1 * 10: the small weight wins


@given(arrays(np.int64, (9, 2), elements=st.integers(-9, 9)), st.integers(0, 9))
def test_wanda_of_summed_squares_is_wanda_of_the_pooled_samples(x, split):
    params = {"out.weight": f32([0.3, -1.7])}
    here, there = np.square(x[:split]).sum(0), np.square(x[split:]).sum(0)
    scores = criteria.wanda(TWO, params, {"out.weight": (here + there).astype(np.float32)})
    pooled = criteria.wanda(TWO, params, {"out.weight": np.square(x).sum(0).astype(np.float32)})
    assert scores["h"].tolist() == pooled["h"].tolist()


def test_wanda_refuses_a_vector_that_would_broadcast():
    with pytest.raises(
        WireError,
        match=r"^out\.weight: activation sums of shape \(1,\), expected \(2,\)$",
    ):
        criteria.wanda(TWO, {"out.weight": f32([1, 1])}, {"out.weight": f32(1)})


def test_flattened_features_count_for_the_unit_they_came_from():
    scores = criteria.wanda(
        FLAT, {"fc.weight": f32([1, 1, 1, 2, 2, 2])}, {"fc.weight": f32(1, 1, 1, 4, 4, 4)}
    )
    assert scores["c"].tolist() == [3.0, 12.0]


def test_apoz_is_the_share_of_zeros_and_they_go_first():
    # 8 samples: h_0 is zero in 2 of them, h_1 in 6.
    assert criteria.apoz(TWO, {"out.weight": f32(2, 6)}, 8)["h"].tolist() == [-0.25, -0.75]


def test_apoz_is_the_mean_over_a_units_activations():
    # One sample: of the first channel 1 of 3 features is zero, of the second none.
    scores = criteria.apoz(FLAT, {"fc.weight": f32(0, 1, 0, 0, 0, 0)}, 1)
    assert scores["c"].tolist() == [np.float32(-1 / 3), 0.0]
    two = criteria.apoz(BOTH, {"fc.weight": f32(1, 2, 4)}, 4)
    assert {g: s.tolist() for g, s in two.items()} == {"a": [-0.25], "b": [-0.5, -1.0]}


def test_apoz_of_added_counts_is_apoz_of_the_pooled_samples():
    here, there = f32(1, 3), f32(1, 5)
    pooled = criteria.apoz(TWO, {"out.weight": here + there}, 4 + 12)
    assert pooled["h"].tolist() == [-2 / 16, -8 / 16]


def test_a_unit_that_nothing_is_behind_is_as_good_as_always_zero():
    last = Architecture(
        groups={"h": 2}, tensors=(parameter("w.weight", segment(2, "h"), segment(1)),)
    )
    assert criteria.apoz(last, {}, 1)["h"].tolist() == [-1, -1]
    assert criteria.wanda(last, {}, {})["h"].tolist() == [0, 0]


def test_apoz_refuses_what_it_cannot_use():
    with pytest.raises(UsageError, match=r"^0 samples, expected more than 0$"):
        criteria.apoz(TWO, {"out.weight": f32(2, 6)}, 0)
    with pytest.raises(
        WireError, match=r"^out\.weight: counts of zeros of shape \(3,\), expected \(2,\)$"
    ):
        criteria.apoz(TWO, {"out.weight": f32(1, 2, 3)}, 8)
