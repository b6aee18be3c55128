import numpy as np

from fleetprune_coordinator.unit_match import match_units


def weight(o, i, k, seed=0):
    return np.random.default_rng(seed).normal(size=(o, i, k)).astype(np.float32)


def test_units_that_changed_places_are_found_on_both_axes():
    before = weight(12, 10, 9)
    outputs, inputs = np.arange(12), np.arange(10)
    outputs[[2, 7]], inputs[[0, 9]] = (7, 2), (9, 0)
    after = before[outputs][:, inputs] + 0.1 * weight(12, 10, 9, seed=1)
    found = match_units(before, after)
    assert found[0].tolist() == outputs.tolist()
    assert found[1].tolist() == inputs.tolist()


def test_a_unit_from_outside_is_new_and_a_lost_one_is_missed_by_nobody():
    before, other = weight(6, 8, 9), weight(1, 8, 9, seed=1)
    after = np.concatenate([before[:2], 3 * other, before[4:]])
    outputs, inputs = match_units(before, after)
    assert outputs.tolist() == [0, 1, -1, 4, 5]
    assert inputs.tolist() == list(range(8))


def test_a_narrower_weight_is_a_part_of_a_wider_one():
    before = weight(6, 8, 9)
    for a, b in ((before, before[:4, :5]), (before[:4, :5], before)):
        outputs, inputs = match_units(a, b)
        assert outputs.tolist() == [n if n < 4 else -1 for n in range(b.shape[0])]
        assert inputs.tolist() == [n if n < 5 else -1 for n in range(b.shape[1])]


def test_units_that_are_all_alike_stay():
    outputs, inputs = match_units(np.ones((4, 3, 1)), np.ones((4, 3, 1)))
    assert outputs.tolist() == [0, 1, 2, 3]
    assert inputs.tolist() == [0, 1, 2]
