import numpy as np
import pytest

from fleetprune import criteria
from fleetprune.criteria.units import finished, locate, makers, summed
from fleetprune.errors import BudgetError, WireError

from .nets import BOTH, RESIDUAL, TURNED, TWO, WORDS, f32, parameter, segment


def test_what_makes_a_unit_are_weights_whose_first_axis_runs_over_it():
    assert [g.tensor for g in makers(TWO)["h"]] == ["in.weight"]
    assert [g.tensor for g in makers(RESIDUAL)["r"]] == ["a.weight", "b.weight"]
    assert [(g.tensor, g.start) for g in makers(BOTH)["b"]] == [("cat.weight", 1)]


def made_by(architecture, group):
    return [(g.tensor, g.axis, g.start) for g in makers(architecture)[group]]


def test_a_transposed_convolution_makes_what_lies_on_its_second_axis():
    assert made_by(TURNED, "up") == [("up.weight", 1, 0)]
    assert made_by(TURNED, "in") == [("in.weight", 0, 0)]


def test_a_bias_tells_where_a_layers_outputs_lie():
    # As the second layer of a sum, whose group has another one's name.
    other = [
        parameter("to.weight", segment(3, "in"), segment(2, "up"), segment(1)),
        parameter("to.bias", segment(2, "up")),
        parameter("from.weight", segment(2, "up"), segment(3, "in"), segment(1)),
        parameter("from.bias", segment(2, "up")),
    ]
    net = TURNED.model_copy(update={"tensors": (*TURNED.tensors, *other)})
    assert made_by(net, "up")[1:] == [("to.weight", 1, 0), ("from.weight", 0, 0)]
    assert made_by(net, "in") == [("in.weight", 0, 0)]


def test_tables_make_the_features_of_their_rows():
    assert made_by(WORDS, "word") == [("word.weight", 1, 0), ("place.weight", 1, 0)]


def test_a_segment_is_found_where_it_lies_in_the_narrower_model():
    axis = BOTH.tensor("cat.weight").axes[0]
    assert locate(axis, 1, {"a": 1, "b": 1}) == (1, axis[1])
    assert locate(axis, 2, {"a": 1, "b": 2}) is None


def test_elements_are_summed_into_the_units_of_a_narrower_model():
    keep = {"r": 2}
    tensors = {"a.weight": f32([1], [2]), "b.weight": f32([10, 20], [30, 40])}
    sums = summed(RESIDUAL, makers(RESIDUAL), lambda name: tensors[name].astype(float), keep)
    assert sums["r"].tolist() == [31, 72]


def test_concatenated_groups_are_told_apart():
    params = {"fc.weight": f32([5, 1, 2])}
    scores = criteria.taylor(BOTH, params, {"fc.weight": f32([1, 1, 1])})
    assert scores["a"].tolist() == [0.0]
    assert scores["b"].tolist() == [1.0, 4.0]
    sizes = criteria.magnitude(BOTH, {"cat.weight": f32([-5], [1], [2])})
    assert {g: s.tolist() for g, s in sizes.items()} == {"a": [5], "b": [1, 2]}


@pytest.mark.parametrize(("wrong", "right"), [("params", "gradients"), ("gradients", "params")])
def test_no_wrong_shape_is_broadcast(wrong, right):
    tensors = {
        wrong: {"norm.weight": f32(1), "norm.bias": f32(1, 1)},
        right: {"norm.weight": f32(1, 1), "norm.bias": f32(1, 1)},
    }
    with pytest.raises(WireError, match=r"^norm\.weight: shape \(1,\), expected \(2,\)$"):
        criteria.taylor(TWO, **tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_what_is_no_finite_number_is_refused_by_name(value):
    with pytest.raises(BudgetError) as caught:
        finished("taylor", {"a": np.zeros(2), "b": np.array([1.0, value, 2.0])})
    shown = "nan" if np.isnan(value) else "inf"
    assert str(caught.value) == (
        f"taylor: unit 1 of group b scores {shown}, expected a finite number: "
        f"the weights or what was measured are not sound"
    )


def test_a_weight_that_is_not_a_number_is_noticed():
    with pytest.raises(BudgetError, match=r"^magnitude: unit 1 of group h scores nan, "):
        criteria.magnitude(TWO, {"in.weight": f32([3, 4], [0, np.nan])})
