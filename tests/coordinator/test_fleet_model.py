import numpy as np
import pytest

from fleetprune.layout import Architecture, Role, Segment, TensorSpec
from fleetprune_coordinator.fleet_model import initial_model, remask


def one(units, group=None):
    return (Segment(group=group, units=units),)


NORMED = Architecture(
    groups={"h": 4},
    tensors=(
        TensorSpec(name="in.weight", role=Role.PARAMETER, axes=(one(4, "h"), one(1))),
        TensorSpec(name="out.weight", role=Role.PARAMETER, axes=(one(1), one(4, "h"))),
        TensorSpec(name="bn.running_mean", role=Role.STATISTIC, axes=(one(4, "h"),)),
        TensorSpec(name="bn.running_var", role=Role.STATISTIC, axes=(one(4, "h"),)),
    ),
)
SHAPES = {"wide": {"h": 4}, "narrow": {"h": 2}}


@pytest.fixture
def model():
    params = {
        "in.weight": np.float32([[0], [1], [2], [3]]),
        "out.weight": np.float32([[10, 11, 12, 13]]),
    }
    stats = {
        "bn.running_mean": np.float32([0, 1, 2, 3]),
        "bn.running_var": np.float32([1, 2, 3, 4]),
    }
    return initial_model(NORMED, params, stats, SHAPES)


def scores(*values):
    return {"h": np.float32(values)}


def test_a_class_gets_the_leading_units_end_to_end(model):
    params, stats = model.vectors(NORMED, "narrow")
    assert params.tolist() == [0, 1, 10, 11]
    assert stats.tolist() == [0, 1, 1, 2]


def test_the_important_units_come_first_in_every_tensor(model):
    after, order = remask(NORMED, model, scores(0, 1, 2, 3), SHAPES)
    assert set(order["h"][:2].tolist()) == {2, 3}
    assert after.mask_version == 1
    assert after.origin["h"].tolist() == order["h"].tolist()
    first = after.params["in.weight"].ravel().tolist()
    assert after.params["out.weight"].ravel().tolist() == [10 + u for u in first]
    assert sorted(first[:2]) == [2, 3]


def test_a_second_permutation_keeps_track_of_the_users_units(model):
    once, _ = remask(NORMED, model, scores(0, 1, 2, 3), SHAPES)
    twice, _ = remask(NORMED, once, scores(0, 0, 1, 1), SHAPES)
    assert twice.params["in.weight"].ravel().tolist() == twice.origin["h"].tolist()
    assert twice.mask_version == 2


def test_the_whole_network_computes_the_same_after_a_permutation(model):
    def network(params):
        return (params["out.weight"] @ np.maximum(params["in.weight"], 0)).item()

    after, _ = remask(NORMED, model, scores(0, 5, 2, 9), SHAPES)
    assert network(after.params) == network(model.params)


def test_nothing_changes_where_no_unit_crosses_a_cut(model):
    same, _ = remask(NORMED, model, scores(8, 9, 1, 2), SHAPES)
    assert same is model


def test_new_keep_counts_alone_make_a_new_mask(model):
    after, _ = remask(NORMED, model, scores(4, 3, 2, 1), {"wide": {"h": 4}, "narrow": {"h": 3}})
    assert after.mask_version == 1
    assert after.vectors(NORMED, "narrow")[0].size == 6


def test_a_unit_new_to_a_class_brings_the_wider_class_statistics(model):
    stats = {
        "wide": {
            "bn.running_mean": np.float32([0, 1, 2, 3]),
            "bn.running_var": np.float32([1, 1, 1, 1]),
        },
        "narrow": {
            "bn.running_mean": np.float32([50, 51]),
            "bn.running_var": np.float32([5, 5]),
        },
    }
    model = type(model)(**{**model.__dict__, "stats": stats})
    after, order = remask(NORMED, model, scores(9, 0, 0, 8), SHAPES)
    assert order["h"].tolist()[:2] == [0, 3]
    # unit 0 was in the narrow class, unit 3 was not
    assert after.stats["narrow"]["bn.running_mean"].tolist() == [50, 3]
    assert after.stats["narrow"]["bn.running_var"].tolist() == [5, 1]
    # the wide class keeps its own figures for all units
    assert after.stats["wide"]["bn.running_mean"].tolist() == [0, 3, 2, 1]
