import numpy as np
import pytest

from fleetprune.criteria import CATALOGUE, Criterion
from fleetprune.layout import Architecture, Role, Segment, TensorSpec
from fleetprune_coordinator.weight_scores import FOLLOWED, Changes, weight_scores, within_rows

NAMES = ("a.weight", "b.weight")
A, B = NAMES


def f32(*values):
    return np.array(values, np.float32)


PARAMS = {A: f32([1, -2], [3, 4]), B: f32([5], [-6]), "a.bias": f32(9, 9)}
EVERYONE = {name: np.ones_like(value) for name, value in PARAMS.items()}
NOBODY = {name: np.zeros_like(value) for name, value in PARAMS.items()}


def scores(criterion, changes=None, norms=None, flow=None, params=PARAMS):
    changes = changes or Changes(criterion, NAMES)
    return weight_scores(criterion, params, changes, norms=norms or {}, flow=flow)


def changed(criterion, *moves, coverage=EVERYONE):
    """Changes that have seen a round for each move of `a`'s first weight."""
    found, params = Changes(criterion, NAMES), dict(PARAMS)
    for move in moves:
        after = {**params, A: params[A].copy()}
        after[A][0, 0] += move
        found.add(params, after, coverage)
        params = after
    return found


def as_lists(found):
    return {name: values.tolist() for name, values in found.items()}


def test_what_needs_the_weights_alone():
    size = {A: [[1, 2], [3, 4]], B: [[5], [6]]}
    assert as_lists(scores(Criterion.MAGNITUDE)) == size
    assert as_lists(scores(Criterion.L1)) == size
    deviations = scores(Criterion.THRESHOLD)
    assert deviations[B] == pytest.approx(f32([5], [6]) / 5.5)
    assert scores(Criterion.THRESHOLD, params={**PARAMS, B: f32([7], [7])})[B].tolist() == [
        [0],
        [0],
    ]


@pytest.mark.parametrize("criterion", [c for c in Criterion if not CATALOGUE[c].weights])
def test_where_there_is_no_form_for_weights_they_go_by_magnitude(criterion):
    assert as_lists(scores(criterion)) == as_lists(scores(Criterion.MAGNITUDE))


@pytest.mark.parametrize("criterion", sorted(FOLLOWED | {Criterion.WANDA}))
def test_before_anything_is_reported_weights_go_by_magnitude(criterion):
    assert as_lists(scores(criterion)) == as_lists(scores(Criterion.MAGNITUDE))


def test_chance_is_the_same_every_time():
    one, two = scores(Criterion.NONE), scores(Criterion.NONE)
    assert as_lists(one) == as_lists(two)
    assert all(0 <= v < 1 for values in one.values() for v in values.ravel())
    assert len(set(one[A].ravel())) == 4


def test_synflow_takes_the_gradient_of_all_parameters():
    def flow(params):
        assert params.keys() == PARAMS.keys()
        return {name: np.full_like(value, 2) for name, value in params.items()}

    assert as_lists(scores(Criterion.SYNFLOW, flow=flow)) == {A: [[2, 4], [6, 8]], B: [[10], [12]]}


@pytest.mark.parametrize(
    ("criterion", "score"),
    [
        # The weight was 1 and is scored as it stood: its change of 0.5 stands for a gradient.
        (Criterion.TAYLOR, 0.25),
        (Criterion.TAYLOR_ABS, 0.5),
        (Criterion.SENSITIVITY, 0.5),
        (Criterion.FISHER, 0.125),
        (Criterion.SNIP, 1.0),  # all of the network's
        (Criterion.MOVEMENT, 0.625),  # (1.5**2 - 1) / 2
    ],
)
def test_what_a_rounds_change_says_by_hand(criterion, score):
    found = scores(criterion, changed(criterion, 0.5))
    assert found[A].ravel().tolist() == [score, 0, 0, 0]
    assert found[B].ravel().tolist() == [0, 0]


def test_older_rounds_fade():
    # 0.8 * 1 + 0.2 * 0.5, times the weight as it was, 1
    found = scores(Criterion.TAYLOR_ABS, changed(Criterion.TAYLOR_ABS, 1.0, 0.5))
    assert found[A][0, 0] == pytest.approx(0.9)
    # squares: 0.8 * 1 + 0.2 * 0.25, and half of it
    found = scores(Criterion.FISHER, changed(Criterion.FISHER, 1.0, 0.5))
    assert found[A][0, 0] == pytest.approx(0.425)


def test_movement_adds_up_and_what_shrank_most_goes_first():
    once = scores(Criterion.MOVEMENT, changed(Criterion.MOVEMENT, 1.0, 0.5))
    assert once[A].ravel().tolist() == [2.625, 0, 0, 0]  # (2.5**2 - 1) / 2
    shrank = scores(Criterion.MOVEMENT, changed(Criterion.MOVEMENT, -1.0))
    assert shrank[A].ravel().tolist() == [0, 0.5, 0.5, 0.5]  # nothing below 0, the order as it is
    assert shrank[B].ravel().tolist() == [0, 0]


def test_a_weight_that_nobody_trained_keeps_what_is_known_of_it():
    found = changed(Criterion.SENSITIVITY, 0.5)
    found.add(PARAMS, PARAMS, NOBODY)
    assert scores(Criterion.SENSITIVITY, found)[A].ravel().tolist() == [0.5, 0, 0, 0]
    found.add(PARAMS, PARAMS, EVERYONE)
    assert scores(Criterion.SENSITIVITY, found)[A][0, 0] == pytest.approx(0.4)
    unknown = changed(Criterion.SENSITIVITY, 0.5, coverage=NOBODY)
    assert not scores(Criterion.SENSITIVITY, unknown)[A].any()


@pytest.mark.parametrize("criterion", sorted(FOLLOWED))
def test_a_snapshot_brings_changes_back(criterion):
    found = changed(criterion, 0.5, -0.25)
    again = Changes(criterion, NAMES)
    again.restore({"calibrated": np.array([False]), **found.arrays()})
    assert again.known
    assert as_lists(scores(criterion, again)) == as_lists(scores(criterion, found))
    again.restore(Changes(criterion, NAMES).arrays())  # nothing in it changes nothing
    assert as_lists(scores(criterion, again)) == as_lists(scores(criterion, found))


@pytest.mark.parametrize("criterion", sorted(set(Criterion) - FOLLOWED))
def test_what_needs_no_changes_keeps_none(criterion):
    found = changed(criterion, 0.5)
    assert not found.known
    assert found.arrays() == {}


def test_changes_follow_a_new_order_of_units():
    def axis(units, group=None):
        return (Segment(group=group, units=units),)

    architecture = Architecture(
        groups={"h": 2},
        tensors=(
            TensorSpec(name=A, role=Role.PARAMETER, axes=(axis(2, "h"), axis(2)), positions=1),
            TensorSpec(name=B, role=Role.PARAMETER, axes=(axis(2), axis(1)), positions=1),
        ),
    )
    found = changed(Criterion.SENSITIVITY, 0.5)
    found.reorder(architecture, {"h": np.array([1, 0])})
    assert scores(Criterion.SENSITIVITY, found)[A].tolist() == [[0, 0], [0.5, 0]]


# ---- Wanda


def test_rows_are_compared_with_themselves_alone():
    found = within_rows(f32([1, 2, 3, 4], [400, 300, 200, 100]))
    assert found.tolist() == [[0.25, 0.5, 0.75, 1], [1, 0.75, 0.5, 0.25]]
    assert within_rows(f32([5, 5, 5, 5])).tolist() == [[1, 0.75, 0.5, 0.25]]  # ties in order
    assert within_rows(f32([[1, 4]], [[3, 2]])).tolist() == [[[0.5, 1]], [[1, 0.5]]]


def test_wanda_weighs_by_the_inputs():
    """Inputs of norm 3 and 1: in the first row 1 * 3 beats 2 * 1, and so it does in the second."""
    found = scores(Criterion.WANDA, norms={A: f32(9, 1)})
    assert found[A].tolist() == [[1, 0.5], [1, 0.5]]
    assert found[B].tolist() == [[5], [6]]  # nobody has reported of it: by magnitude


def test_sums_of_devices_score_as_the_pooled_samples():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 8))
    weight = rng.normal(size=(5, 8)).astype(np.float32)
    pooled = np.square(x).sum(0)
    parts = sum(np.square(part).sum(0) for part in np.split(x, [7, 20, 50]))
    params = {A: weight, B: PARAMS[B]}
    one, two = (
        scores(Criterion.WANDA, norms={A: (s / 60).astype(np.float32)}, params=params)[A]
        for s in (pooled, parts)
    )
    assert one.tolist() == two.tolist()
    by_hand = np.argsort(np.argsort(np.abs(weight) * np.sqrt(pooled), axis=1), axis=1)
    assert one.tolist() == ((by_hand + 1) / 8).astype(np.float32).tolist()


def test_scores_are_what_masks_take():
    """Of every criterion, whatever training did: finite and not negative."""
    rng = np.random.default_rng(1)
    before = {A: rng.normal(size=(6, 9)).astype(np.float32), B: np.zeros((2, 3), np.float32)}
    after = {A: -3 * before[A], B: before[B] + 1}
    everyone = {name: np.ones_like(value) for name, value in before.items()}

    def flow(params):
        return {name: np.ones_like(value) for name, value in params.items()}

    for criterion in Criterion:
        changes = Changes(criterion, NAMES)
        changes.add(before, after, everyone)
        found = scores(criterion, changes, {A: np.ones(9, np.float32)}, flow, after)
        assert found.keys() == set(NAMES)
        for name, values in found.items():
            assert values.shape == after[name].shape
            assert values.dtype == np.float32
            assert np.isfinite(values).all()
            assert values.min() >= 0
