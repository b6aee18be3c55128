import numpy as np
import pytest

from fleetprune import criteria
from fleetprune.errors import BudgetError
from fleetprune.layout import Architecture

from .nets import RESIDUAL, TURNED, TWO, WORDS, f32, parameter, segment


def test_magnitude_is_the_norm_of_a_units_incoming_weights():
    params = {"in.weight": f32([3, -4], [0, 2])}
    assert criteria.magnitude(TWO, params)["h"].tolist() == [5.0, 2.0]
    assert criteria.magnitude_l1(TWO, params)["h"].tolist() == [7.0, 2.0]


def test_the_layers_of_a_residual_group_count_together():
    params = {"a.weight": f32([2], [0], [1]), "b.weight": f32([2, 1], [1, 1], [0, 0])}
    assert criteria.magnitude(RESIDUAL, params)["r"].tolist() == [3.0, np.float32(2**0.5), 1.0]
    assert criteria.magnitude_l1(RESIDUAL, params)["r"].tolist() == [5.0, 2.0, 1.0]


def test_units_on_the_second_axis_of_a_transposed_convolution():
    # Of three inputs, columns 0 and 1 lead to the first unit, 2 and 3 to the second.
    weight = f32([[3], [0], [1], [1]], [[0], [4], [1], [1]], [[0], [0], [0], [0]])
    params = {"in.weight": f32([1], [-2], [3]), "up.weight": weight}
    assert criteria.magnitude(TURNED, params)["up"].tolist() == [5, 2]
    assert criteria.magnitude_l1(TURNED, params)["up"].tolist() == [7, 4]
    assert criteria.magnitude(TURNED, params)["in"].tolist() == [1, 2, 3]
    # Six weights each. The layer's twelve have a sum of 11 and squares of 29.
    deviation = (29 / 12 - (11 / 12) ** 2) ** 0.5
    np.testing.assert_allclose(
        criteria.threshold(TURNED, params)["up"], [7 / 6 / deviation, 4 / 6 / deviation], rtol=1e-6
    )


def test_units_on_the_second_axis_are_points_for_fpgm():
    # Three units of one channel: points (0, 0), (0, 0) and (3, 4); the median is where two are.
    net = Architecture(
        groups={"up": 3},
        tensors=(parameter("up.weight", segment(2), segment(3, "up"), segment(1)),),
    )
    weight = f32([[0], [0], [3]], [[0], [0], [4]])
    assert criteria.fpgm(net, {"up.weight": weight})["up"].tolist() == [0, 0, 5]


def test_the_tables_of_an_embedding_count_together():
    params = {
        "word.weight": f32([1, 0], [2, 0], [2, 0]),
        "place.weight": f32([4, 1], [0, -1]),
    }
    assert criteria.magnitude(WORDS, params)["word"].tolist() == [5, np.float32(2**0.5)]
    assert criteria.magnitude_l1(WORDS, params)["word"].tolist() == [9, 2]


def test_gamma_is_the_size_of_a_norms_scale_and_not_of_its_shift():
    params = {"norm.weight": f32(-3, 2), "norm.bias": f32(0, 100)}
    assert criteria.gamma(TWO, params)["h"].tolist() == [3.0, 2.0]


def test_a_group_without_a_norm_has_a_scale_of_1():
    mixed = TWO.model_copy(
        update={
            "groups": {"h": 2, "k": 3},
            "tensors": (*TWO.tensors, parameter("last.weight", segment(3, "k"), segment(1))),
        }
    )
    scores = criteria.gamma(mixed, {"norm.weight": f32(-3, 2), "norm.bias": f32(0, 0)})
    assert {g: s.tolist() for g, s in scores.items()} == {"h": [3, 2], "k": [1, 1, 1]}


def test_gamma_says_that_there_is_no_norm():
    with pytest.raises(BudgetError) as caught:
        criteria.gamma(RESIDUAL, {})
    assert str(caught.value) == "gamma: no norm layer scales any unit; choose magnitude"


def test_threshold_counts_weights_in_deviations_of_their_layer():
    # -1, 1, 3, -3 have mean 0 and deviation sqrt(5). A layer a hundred times larger says the same.
    params = {"in.weight": f32([-1, 1], [3, -3])}
    expected = (np.array([1, 3]) / 5**0.5).astype(np.float32)
    np.testing.assert_allclose(criteria.threshold(TWO, params)["h"], expected, rtol=1e-6)
    louder = {"in.weight": 100 * params["in.weight"]}
    np.testing.assert_allclose(criteria.threshold(TWO, louder)["h"], expected, rtol=1e-6)


def test_threshold_is_the_share_that_a_mask_keeps_over_all_thresholds():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(2, 2)).astype(np.float32)
    steps = np.linspace(0, 10, 20001)
    kept = [criteria.weights.threshold_mask(weight, t).mean(axis=1) for t in steps]
    share = np.trapezoid(np.array(kept), steps, axis=0)
    np.testing.assert_allclose(
        criteria.threshold(TWO, {"in.weight": weight})["h"], share, atol=1e-3
    )


def test_a_layer_of_equal_weights_has_no_deviation():
    assert criteria.threshold(TWO, {"in.weight": f32([2, 2], [2, 2])})["h"].tolist() == [0, 0]


def line(*weights):
    """As many units of one weight each."""
    n = len(weights)
    architecture = Architecture(
        groups={"g": n}, tensors=(parameter("w.weight", segment(n, "g"), segment(1)),)
    )
    return architecture, {"w.weight": f32(*[[w] for w in weights])}


def test_fpgm_is_the_distance_to_the_median_of_the_units():
    assert criteria.fpgm(*line(0, 1, 5))["g"].tolist() == [1, 0, 4]


def test_fpgm_drops_what_others_stand_in_for_however_large():
    # 9 and 10 are large, but alike; by size the 0 would go.
    scores = criteria.fpgm(*line(9, 10, 11, 0))["g"]
    assert int(np.argmax(scores)) == 3
    assert int(np.argmin(scores)) in {0, 1}
    assert int(np.argmin(criteria.magnitude(*line(9, 10, 11, 0))["g"])) == 3


def test_fpgm_takes_all_weights_that_make_a_unit_as_one_point():
    # Points (0, 0, 0), (0, 3, 4), (0, 0, 0): the median is where two of three are.
    params = {"a.weight": f32([0], [0], [0]), "b.weight": f32([0, 0], [3, 4], [0, 0])}
    assert criteria.fpgm(RESIDUAL, params)["r"].tolist() == [0, 5, 0]


def test_synflow_is_the_size_of_weight_times_gradient():
    # R = |v_0|(|a| + |b|) + |v_1|(|c| + |d|) with weights a..d = 3, -4, 0, 2 and v = (-1, 5).
    params = {"in.weight": f32([3, -4], [0, 2]), "out.weight": f32([-1, 5])}
    gradients = {"in.weight": f32([1, 1], [5, 5])}
    assert criteria.synflow(TWO, params, gradients)["h"].tolist() == [7, 10]


DATA_FREE = [criteria.magnitude, criteria.magnitude_l1, criteria.threshold, criteria.fpgm]


@pytest.mark.parametrize("criterion", DATA_FREE)
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_equal_units_get_equal_scores(criterion, value):
    architecture, params = line(*[value] * 6)
    scores = criterion(architecture, params)["g"]
    assert np.unique(scores).size == 1
    assert np.isfinite(scores).all()
