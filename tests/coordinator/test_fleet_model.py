from dataclasses import replace

import numpy as np
import pytest

from fleetprune.layout import Architecture, Role, Segment, TensorSpec
from fleetprune_coordinator.fleet_model import initial_model, remask, restored, support_arrays
from fleetprune_coordinator.records import MaskRecord
from fleetprune_coordinator.snapshot import Snapshot


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


# ---- single weights


@pytest.fixture
def pruned(model):
    """The narrow class has pruned the first of its two outer weights."""
    return replace(model, supports={"narrow": {"out.weight": np.array([[False, True]])}})


def test_pruned_weights_are_zero_for_their_class_alone(pruned):
    assert pruned.vectors(NORMED, "narrow")[0].tolist() == [0, 1, 0, 11]
    assert pruned.vectors(NORMED, "wide")[0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert pruned.params["out.weight"].tolist() == [[10, 11, 12, 13]]  # nothing is forgotten


def test_what_is_left_of_a_class_end_to_end(pruned):
    support = pruned.support(NORMED, "narrow")
    assert support.tolist() == [True, True, False, True]
    assert pruned.support(NORMED, "wide") is None
    assert pruned.parameters(NORMED, "narrow") == 3
    assert pruned.parameters(NORMED, "wide") == 8


def test_dense_has_zeros_where_a_class_has_none(pruned):
    dense = pruned.dense(NORMED, "narrow")
    assert dense["out.weight"].tolist() == [[0, 11, 12, 13]]  # beyond its units, as they are
    assert dense["in.weight"] is pruned.params["in.weight"]
    assert pruned.dense(NORMED, "wide")["out.weight"] is pruned.params["out.weight"]


def test_a_new_order_of_units_prunes_no_weights_of_the_old_one(pruned):
    after, _ = remask(NORMED, pruned, scores(0, 1, 2, 3), SHAPES)
    assert after.supports == {}
    same, _ = remask(NORMED, pruned, scores(8, 9, 1, 2), SHAPES)
    assert same is pruned


def test_a_snapshot_brings_back_what_is_left(pruned):
    held = Snapshot(
        round=3,
        mask_version=pruned.mask_version,
        params=pruned.params,
        stats=pruned.stats,
        extra={"calibrated": np.array([False]), **support_arrays(pruned)},
    )
    mask = MaskRecord(pruned.mask_version, 3, pruned.origin, pruned.shapes)
    again = restored(Snapshot.from_bytes(held.to_bytes()), mask)
    assert again.supports.keys() == {"narrow"}
    assert again.supports["narrow"].keys() == {"out.weight"}
    assert again.supports["narrow"]["out.weight"].dtype == np.bool_
    for name in SHAPES:
        for one, other in zip(
            again.vectors(NORMED, name), pruned.vectors(NORMED, name), strict=True
        ):
            assert one.tobytes() == other.tobytes()
    whole = restored(Snapshot.from_bytes(replace(held, extra={}).to_bytes()), mask)
    assert whole.supports == {}
