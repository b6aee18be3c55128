import numpy as np
import pytest

from fleetprune import criteria
from fleetprune.errors import WireError
from fleetprune.layout import Architecture, Gate, Role, Segment, TensorSpec


def segment(units, group=None, block=1):
    return (Segment(group=group, units=units, block=block),)


def parameter(name, *axes):
    return TensorSpec(name=name, role=Role.PARAMETER, axes=axes)


# Two neurons h, each with two inputs, feeding one output; a norm on h.
TWO = Architecture(
    groups={"h": 2},
    tensors=(
        parameter("in.weight", segment(2, "h"), segment(2)),
        parameter("norm.weight", segment(2, "h")),
        parameter("norm.bias", segment(2, "h")),
        parameter("out.weight", segment(1), segment(2, "h")),
    ),
    gates={"h": (Gate(tensor="norm.weight", axis=0), Gate(tensor="norm.bias", axis=0))},
    observed=("out.weight",),
)


def test_magnitude_is_the_norm_of_a_units_incoming_weights():
    scores = criteria.magnitude(TWO, {"in.weight": np.float32([[3, -4], [0, 2]])})
    assert scores["h"].tolist() == [5.0, 2.0]


def test_taylor_sums_scale_and_shift_before_the_square():
    params = {"norm.weight": np.float32([1, 2]), "norm.bias": np.float32([3, 1])}
    grads = {"norm.weight": np.float32([2, 1]), "norm.bias": np.float32([-1, 1])}
    # unit 0: 1*2 + 3*-1 = -1; unit 1: 2*1 + 1*1 = 3
    assert criteria.taylor(TWO, params, grads)["h"].tolist() == [1.0, 9.0]


def test_taylor_of_a_filter_before_a_norm_is_nothing_so_gates_leave_it_out():
    assert all(not gate.tensor.startswith("in") for gate in TWO.gates["h"])


def test_wanda_is_weight_times_activation_norm():
    scores = criteria.wanda(
        TWO, {"out.weight": np.float32([[-2, 1]])}, {"out.weight": np.float32([9, 100])}
    )
    assert scores["h"].tolist() == [6.0, 10.0]  # 2 * 3 and 1 * 10: the small weight wins


def test_wanda_of_summed_squares_is_wanda_of_the_pooled_samples():
    rng = np.random.default_rng(0)
    params = {"out.weight": rng.normal(size=(1, 2)).astype(np.float32)}
    here, there = rng.normal(size=(5, 2)), rng.normal(size=(9, 2))
    summed = np.square(here).sum(0) + np.square(there).sum(0)
    pooled = np.square(np.concatenate([here, there])).sum(0)
    scores = criteria.wanda(TWO, params, {"out.weight": summed.astype(np.float32)})
    np.testing.assert_allclose(
        scores["h"], np.abs(params["out.weight"][0]) * np.sqrt(pooled), rtol=1e-6
    )


def test_wanda_refuses_a_vector_that_would_broadcast():
    with pytest.raises(
        WireError,
        match=r"^out\.weight: activation sums of shape \(1,\), expected \(2,\)$",
    ):
        criteria.wanda(TWO, {"out.weight": np.float32([[1, 1]])}, {"out.weight": np.float32([1])})


def test_flattened_features_count_for_the_unit_they_came_from():
    # one group of 2 channels, flattened into 2 * 3 features
    flat = Architecture(
        groups={"c": 2},
        tensors=(parameter("fc.weight", segment(1), segment(2, "c", block=3)),),
        observed=("fc.weight",),
    )
    scores = criteria.wanda(
        flat,
        {"fc.weight": np.float32([[1, 1, 1, 2, 2, 2]])},
        {"fc.weight": np.float32([1, 1, 1, 4, 4, 4])},
    )
    assert scores["c"].tolist() == [3.0, 12.0]


def test_concatenated_groups_are_told_apart():
    both = Architecture(
        groups={"a": 1, "b": 2},
        tensors=(
            parameter(
                "fc.weight",
                segment(1),
                (Segment(group="a", units=1), Segment(group="b", units=2)),
            ),
        ),
        gates={"b": (Gate(tensor="fc.weight", axis=1, start=1),)},
    )
    params = {"fc.weight": np.float32([[5, 1, 2]])}
    scores = criteria.taylor(both, params, {"fc.weight": np.float32([[1, 1, 1]])})
    assert scores["a"].tolist() == [0.0]
    assert scores["b"].tolist() == [1.0, 4.0]
