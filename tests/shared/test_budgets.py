import pytest

from fleetprune.budgets import Budget, Grid
from fleetprune.costs import Costs
from fleetprune.errors import BudgetError
from fleetprune.protection import Protection

GROUPS = {"a": 32, "b": 64}
COSTS = Costs(artifact_bytes=100, macs=1000, peak_activation_bytes=30)


def test_limits_are_kept_if_they_are_reached():
    assert Budget(flash_bytes=100, macs=1000, ram_bytes=30).meets(COSTS)
    assert Budget().meets(COSTS)


def test_each_violation_is_a_phrase():
    budget = Budget(flash_bytes=99, macs=1000, ram_bytes=1)
    assert budget.violations(COSTS) == ["artifact_bytes 100 > 99", "peak_activation_bytes 30 > 1"]


def test_memory_is_that_of_a_batch():
    budget = Budget(ram_bytes=119, batch=4, macs=1000)
    assert budget.limits() == {"peak_activation_bytes": 29, "macs": 1000}
    assert budget.violations(COSTS) == ["peak_activation_bytes 120 at batch 4 > 119"]
    assert Budget(ram_bytes=120, batch=4).meets(COSTS)


def test_a_budget_covers_what_is_tighter_in_every_limit():
    phone = Budget(macs=500, flash_bytes=80)
    assert Budget().covers(phone)
    assert Budget(macs=500).covers(phone)
    assert not phone.covers(Budget(macs=400))  # which may be as large as it likes
    assert Budget(ram_bytes=10).covers(Budget(ram_bytes=20, batch=2))


def test_levels_are_multiples_and_the_full_width():
    grid = Grid.of({"a": 20, "b": 4}, 8)
    assert grid.levels == {"a": (8, 16, 20), "b": (4,)}
    assert grid.smallest() == {"a": 8, "b": 4}


def test_a_multiple_counts_channels_not_units_that_have_several():
    groups, channels = {"heads": 4, "odd": 6, "plain": 32}, {"heads": 16, "odd": 12, "plain": 1}
    grid = Grid.of(groups, 8, channels=channels)
    # A head of 16 channels is a multiple by itself; of units of 12 channels it takes two.
    assert grid.levels == {"heads": (1, 2, 3, 4), "odd": (2, 4, 6), "plain": (8, 16, 24, 32)}
    # What is said of units holds for units.
    assert Grid.of(groups, 8, Protection(multiple={"heads": 2}), channels).levels["heads"] == (2, 4)


def test_protected_groups_have_fewer_levels():
    protection = Protection(frozenset({"a"}), {"b": 20}, {"c": 4})
    grid = Grid.of({**GROUPS, "c": 10}, 16, protection)
    assert grid.levels == {"a": (32,), "b": (32, 48, 64), "c": (4, 8, 10)}


def test_levels_under_a_ceiling_or_the_ceiling_itself():
    grid = Grid.of({"a": 32, "b": 64}, 8)
    assert grid.under({"a": 17, "b": 5}).levels == {"a": (8, 16), "b": (5,)}


def test_refuses_a_multiple_below_one():
    with pytest.raises(BudgetError, match=r"^channel multiple 0, expected at least 1$"):
        Grid.of(GROUPS, 0)
