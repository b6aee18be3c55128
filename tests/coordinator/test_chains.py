import numpy as np

from fleetprune_coordinator.chains import Group, chains


def axes(**units):
    return {(name, 0): np.array(numbers) for name, numbers in units.items()}


def found(**units):
    return [group.units for group in chains(axes(**units))]


def test_units_in_the_same_order_everywhere_are_a_group():
    given = axes(rows=[1, 2, 3], columns=[1, 1, 2, 2, 3, 3], other=[0, 0])
    assert chains(given) == [Group((1, 2, 3), (("rows", 0), ("columns", 0)))]


def test_a_concatenation_has_two_groups():
    assert found(left=[1, 2], right=[3, 4, 5], both=[1, 2, 3, 4, 5]) == [(1, 2), (3, 4, 5)]


def test_a_group_may_lie_on_an_axis_several_times():
    assert found(rows=[1, 2, 1, 2, 1, 2]) == [(1, 2)]
    assert found(rows=[1, 2, 0, 1, 2]) == [(1, 2)]


def test_what_stays_divides_groups():
    assert found(rows=[1, 2, 0, 3, 4]) == [(1, 2), (3, 4)]


def test_another_order_or_width_is_no_group():
    assert found(rows=[1, 2, 3], columns=[3, 2, 1]) == [(1,), (2,), (3,)]
    assert found(rows=[1, 2, 3], columns=[1, 2, 2, 3]) == [(1,), (2,), (3,)]
    assert found(rows=[1, 2, 3, 4], columns=[1, 3, 2, 4]) == [(1,), (2,), (3,), (4,)]


def test_an_axis_that_only_some_units_are_on_divides_them():
    assert found(rows=[1, 2, 3, 4], columns=[2, 3]) == [(1,), (2, 3), (4,)]
