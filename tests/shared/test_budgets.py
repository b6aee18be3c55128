import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetprune.budgets import Allocation, Budget, BudgetSolver, Grid
from fleetprune.costs import Costs
from fleetprune.errors import BudgetError

GROUPS = {"a": 32, "b": 64}


def two_layers(keep):
    """10 MACs per pair of units, 4 bytes per weight, the wider of two buffers in memory."""
    pairs = keep["a"] * keep["b"]
    return Costs(
        artifact_bytes=4 * pairs, macs=10 * pairs, peak_activation_bytes=max(*keep.values())
    )


def falling(groups=GROUPS):
    return {g: np.linspace(1, 0.1, n).astype(np.float32) for g, n in groups.items()}


def solve(budgets, *, multiple=8, allocation=Allocation.UNIFORM, scores=None):
    solver = BudgetSolver(two_layers, GROUPS, multiple=multiple, allocation=allocation)
    return solver.solve(budgets, scores or falling())


def test_levels_are_multiples_and_the_full_width():
    grid = Grid.of({"a": 20, "b": 4}, 8)
    assert grid.levels == {"a": (8, 16, 20), "b": (4,)}


def test_no_limit_keeps_everything():
    assert solve({"gateway": Budget()})["gateway"] == GROUPS


def test_half_of_each_group_for_a_quarter_of_the_macs():
    assert solve({"phone": Budget(macs=10 * 16 * 32)})["phone"] == {"a": 16, "b": 32}


def test_one_less_than_a_quarter_no_longer_fits():
    keep = solve({"phone": Budget(macs=10 * 16 * 32 - 1)})["phone"]
    assert two_layers(keep).macs <= 10 * 16 * 32 - 1


def test_what_is_left_of_a_budget_is_given_back():
    # both groups are at one half; 8 more of b cost 8 * 16 pairs, 8 more of a would cost 8 * 32
    keep = solve({"phone": Budget(macs=10 * 16 * 40)})["phone"]
    assert keep == {"a": 16, "b": 40}


def test_uniform_shapes_do_not_depend_on_scores():
    budgets = {"phone": Budget(macs=10 * 16 * 44)}
    one = {"a": np.zeros(32, np.float32), "b": np.ones(64, np.float32)}
    other = {"a": np.ones(32, np.float32), "b": np.zeros(64, np.float32)}
    assert solve(budgets, scores=one) == solve(budgets, scores=other)


def test_every_limit_holds_at_once():
    budget = Budget(macs=10 * 24 * 40, flash_bytes=4 * 16 * 40, ram_bytes=36)
    keep = solve({"phone": budget})["phone"]
    assert budget.meets(two_layers(keep))
    assert keep["b"] == 32  # 40 would need 40 bytes at the peak


def test_an_infeasible_budget_names_the_class_and_the_smallest_figure():
    with pytest.raises(
        BudgetError,
        match=r"^class sensor: macs 639 cannot be met, the smallest achievable is 640; "
        r"raise the budget or lower channel_multiple$",
    ):
        solve({"sensor": Budget(macs=639)})
    with pytest.raises(BudgetError, match=r"^class sensor: flash_bytes 9 cannot be met, the "):
        solve({"sensor": Budget(flash_bytes=9)})


def test_the_smallest_achievable_budget_is_met():
    assert solve({"sensor": Budget(macs=640)})["sensor"] == {"a": 8, "b": 8}


def test_global_takes_from_the_group_that_matters_less():
    scores = {"a": np.full(32, 10, np.float32), "b": np.full(64, 0.01, np.float32)}
    keep = solve({"phone": Budget(macs=10 * 32 * 32)}, allocation=Allocation.GLOBAL, scores=scores)
    assert keep["phone"] == {"a": 32, "b": 32}


def test_global_never_empties_a_layer():
    scores = {"a": np.full(32, 10, np.float32), "b": np.zeros(64, np.float32)}
    keep = solve({"phone": Budget(macs=10 * 16 * 32)}, allocation=Allocation.GLOBAL, scores=scores)
    assert keep["phone"]["b"] >= 16  # half of the uniform count


def test_a_class_without_the_covering_relation_still_meets_its_own_budget():
    budgets = {"ram": Budget(ram_bytes=16), "macs": Budget(macs=10 * 8 * 64)}
    keep = solve(budgets)
    assert all(budgets[n].meets(two_layers(keep[n])) for n in budgets)


limits = st.one_of(st.none(), st.integers(64, 4 * 32 * 64))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(limits, limits), min_size=1, max_size=4),
    st.sampled_from(Allocation),
    st.sampled_from([1, 4, 8]),
    st.integers(0, 9),
)
def test_any_feasible_budgets_are_met_and_covered_classes_are_nested(pairs, how, multiple, seed):
    budgets = {
        f"c{i}": Budget(macs=None if m is None else 10 * m, flash_bytes=f and 4 * f)
        for i, (m, f) in enumerate(pairs)
    }
    rng = np.random.default_rng(seed)
    scores = {g: np.sort(rng.random(n, np.float32))[::-1] for g, n in GROUPS.items()}
    keep = solve(budgets, multiple=multiple, allocation=how, scores=scores)
    for name, budget in budgets.items():
        assert budget.meets(two_layers(keep[name]))
        for other, wider in budgets.items():
            if wider.covers(budget):
                assert all(keep[name][g] <= keep[other][g] for g in GROUPS)


def test_refuses_a_multiple_below_one():
    with pytest.raises(BudgetError, match=r"^channel multiple 0, expected at least 1$"):
        Grid.of(GROUPS, 0)
