import numpy as np

from fleetprune_coordinator.units import Units


def test_joined_units_have_one_number():
    units = Units()
    a, b = units.new(3), units.new(3)
    assert units.live(np.concatenate([a, b])).tolist() == [1, 2, 3, 4, 5, 6]
    units.join(a, b, "why")
    assert units.live(np.concatenate([a, b])).tolist() == [1, 2, 3, 1, 2, 3]
    units.join(a[:1], b, "broadcast")
    assert units.live(a).tolist() == [1, 1, 1]


def test_what_meets_0_stays_and_says_why():
    units = Units()
    a = units.new(2)
    units.join(a, np.array([0, a[1]]), "an input")
    assert units.live(a).tolist() == [0, 2]
    assert [units.reason(int(u)) for u in a] == ["an input", ""]


def test_a_reason_holds_for_all_that_is_joined_and_the_first_one_stays():
    units = Units()
    a = units.new(3)
    units.keep(a[2:], "first")
    units.keep(a[:1], "second")
    units.join(a[:2], a[1:], "together")
    assert units.live(a).tolist() == [0, 0, 0]
    assert {units.reason(int(u)) for u in a} == {"first"}


def test_changes_are_counted():
    units = Units()
    a = units.new(2)
    units.join(a[:1], a[1:], "")
    units.keep(a, "")
    assert units.changes == 2
    units.join(a[:1], a[1:], "")
    units.keep(a, "")
    assert units.changes == 2
