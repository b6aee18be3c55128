from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetprune.budgets import Allocation, Budget, Grid
from fleetprune.costs import FIGURES, CostModel, axis_row
from fleetprune.errors import BudgetError
from fleetprune.latency import LatencyModel, LatencyPoint, LatencyTable, Precision
from fleetprune.products import Product
from fleetprune.protection import UNPROTECTED, Protection
from fleetprune.solver import BudgetSolver
from tests.shared import plain_solver
from tests.shared.chains import chains, falling, pair

NET = pair()
GROUPS = NET.groups
COSTS = CostModel(NET)


def solver(names, *, multiple=8, protection=UNPROTECTED, net=NET, **options):
    grid = Grid.of(net.groups, multiple, protection)
    return BudgetSolver(CostModel(net), dict.fromkeys(names, grid), **options)


def solve(budgets, *, scores=None, **options):
    return solver(budgets, **options).solve(budgets, scores or falling(GROUPS, seed=1))


def test_no_limit_keeps_everything():
    assert solve({"gateway": Budget()})["gateway"] == GROUPS


def test_half_of_each_group_for_a_quarter_of_the_macs():
    assert solve({"phone": Budget(macs=10 * 16 * 32)})["phone"] == {"a": 16, "b": 32}


def test_one_less_than_a_quarter_no_longer_fits():
    keep = solve({"phone": Budget(macs=10 * 16 * 32 - 1)})["phone"]
    assert COSTS.costs(keep).macs <= 10 * 16 * 32 - 1


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
    assert budget.meets(COSTS.costs(keep))
    assert keep["b"] == 32  # 40 would need 40 bytes at the peak


def test_memory_is_that_of_a_batch():
    budget = Budget(ram_bytes=200, batch=4)
    assert solve({"phone": budget})["phone"] == {"a": 32, "b": 48}  # 48 * 4 = 192


@pytest.mark.parametrize(
    ("budget", "refusal"),
    [
        (Budget(macs=639), "macs 639 cannot be met, the smallest achievable is 640"),
        (Budget(flash_bytes=9), "flash_bytes 9 cannot be met, the smallest achievable is 256"),
        (
            Budget(flash_bytes=255, macs=639, ram_bytes=31, batch=4),
            "flash_bytes 255 and ram_bytes 31 at batch 4 and macs 639 cannot be met, "
            "the smallest achievable are 256 and 32 and 640",
        ),
    ],
)
def test_an_infeasible_budget_names_the_class_and_the_smallest_figures(budget, refusal):
    with pytest.raises(BudgetError) as e:
        solve({"sensor": budget})
    assert str(e.value) == f"class sensor: {refusal}; raise the budget or lower channel_multiple"


def test_protected_layers_are_named_among_the_remedies():
    with pytest.raises(BudgetError) as e:
        solve({"sensor": Budget(macs=640)}, protection=Protection(whole=frozenset({"a"})))
    assert str(e.value) == (
        "class sensor: macs 640 cannot be met, the smallest achievable is 2560; raise the budget, "
        "lower channel_multiple or protect fewer layers"
    )


def test_the_smallest_achievable_budget_is_met():
    assert solve({"sensor": Budget(macs=640)})["sensor"] == {"a": 8, "b": 8}


def test_protected_groups_keep_what_they_must():
    protection = Protection(least={"a": 20}, multiple={"b": 5})
    keep = solve({"phone": Budget(macs=10 * 24 * 12)}, protection=protection)["phone"]
    assert keep == {"a": 24, "b": 10}


def test_global_takes_from_the_group_that_matters_less():
    scores = {"a": np.full(32, 10, np.float32), "b": np.full(64, 0.01, np.float32)}
    keep = solve({"phone": Budget(macs=10 * 32 * 32)}, allocation=Allocation.GLOBAL, scores=scores)
    assert keep["phone"] == {"a": 32, "b": 32}


@pytest.mark.parametrize(("floor", "least"), [(0.5, 16), (0.25, 8), (1.0, 32)])
def test_global_never_empties_a_layer(floor, least):
    scores = {"a": np.full(32, 10, np.float32), "b": np.zeros(64, np.float32)}
    budgets = {"phone": Budget(macs=10 * 16 * 32)}  # uniform: 16 and 32
    keep = solve(budgets, allocation=Allocation.GLOBAL, scores=scores, floor=floor)
    assert keep["phone"]["b"] >= least


def test_equal_scores_and_costs_cut_the_group_that_stands_first():
    net = pair(16, 16)
    scores = {"a": np.ones(16, np.float32), "b": np.ones(16, np.float32)}
    budgets = {"phone": Budget(macs=10 * 16 * 15)}
    keep = solve(budgets, net=net, multiple=1, allocation=Allocation.GLOBAL, scores=scores)
    assert keep["phone"] == {"a": 15, "b": 16}


def test_a_class_without_the_covering_relation_still_meets_its_own_budget():
    budgets = {"ram": Budget(ram_bytes=16), "macs": Budget(macs=10 * 8 * 64)}
    keep = solve(budgets)
    assert all(budgets[n].meets(COSTS.costs(keep[n])) for n in budgets)


def test_a_coarser_grid_inside_a_finer_one_is_nested_all_the_same():
    grids = {"wide": Grid.of(GROUPS, 1), "narrow": Grid.of(GROUPS, 8)}
    budgets = {"wide": Budget(ram_bytes=5), "narrow": Budget(ram_bytes=5, macs=10**6)}
    with pytest.raises(BudgetError, match=r"^class narrow: ram_bytes 5 cannot be met"):
        BudgetSolver(COSTS, grids).solve(budgets, falling(GROUPS))
    budgets = {"wide": Budget(ram_bytes=13), "narrow": Budget(ram_bytes=13, macs=10**6)}
    keep = BudgetSolver(COSTS, grids).solve(budgets, falling(GROUPS))
    assert keep == {"wide": {"a": 13, "b": 13}, "narrow": {"a": 8, "b": 8}}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([np.nan] + [0] * 31, "scores of group a: unit 0 is not finite"),
        ([0] * 31, "scores of group a: 31 of them, expected 32"),
    ],
)
def test_scores_that_are_none(scores, message):
    with pytest.raises(BudgetError) as e:
        solve({"phone": Budget()}, scores=falling(GROUPS) | {"a": np.array(scores, np.float32)})
    assert str(e.value) == message


def test_all_zero_scores_are_ties():
    zeros = {g: np.zeros(n, np.float32) for g, n in GROUPS.items()}
    budgets = {"phone": Budget(macs=10 * 16 * 32)}
    keep = solve(budgets, allocation=Allocation.GLOBAL, scores=zeros)["phone"]
    assert keep == {"a": 8, "b": 64}  # the first group, down to half of its uniform 16


# ---- which limit is in the way


def test_each_limit_counts_the_groups_that_it_holds_back():
    budget = Budget(macs=10 * 16 * 36, ram_bytes=40)
    s = solver(["phone"])
    found = s.nest({"phone": budget}, falling(GROUPS))["phone"]
    assert found.keep == {"a": 16, "b": 32}
    assert s.binding("phone", budget, found.keep, found.ceiling) == {
        "ram_bytes": 0,
        "macs": 2,
        "nesting": 0,
    }
    tight = Budget(macs=10 * 16 * 40, ram_bytes=32)  # now b may not grow, a still costs too much
    assert s.binding("phone", tight, found.keep, found.ceiling) == {
        "ram_bytes": 1,
        "macs": 1,
        "nesting": 0,
    }


def test_nesting_counts_the_groups_that_the_class_around_holds_back():
    budgets = {"phone": Budget(macs=10 * 16 * 32), "sensor": Budget(macs=10 * 16 * 32)}
    s = solver(budgets)
    found = s.nest(budgets, falling(GROUPS))["sensor"]
    assert found.around == ("phone",)
    assert found.ceiling == {"a": 16, "b": 32}
    told = s.binding("sensor", budgets["sensor"], found.keep, found.ceiling)
    assert told == {"macs": 0, "nesting": 2}


# ---- latency


def timed(net=NET, slow=1.0):
    """A class whose latency is 0.1 ms and a nanosecond per MAC, times `slow`."""
    model = CostModel(net)
    points = []
    for a, b in ((32, 64), (24, 48), (16, 32), (8, 16), (8, 64), (32, 8), (4, 4)):
        keep = {"a": a, "b": b}
        ms = slow * (0.1 + model.costs(keep).macs * 1e-6)
        points.append(LatencyPoint(keep=keep, median_ms=ms))
    table = LatencyTable(
        device_class="c",
        runtime="r",
        version="1",
        precision=Precision.FLOAT32,
        devices=1,
        points=tuple(points),
    )
    return LatencyModel.fit(net, table)


def test_a_latency_limit_is_kept_with_the_stated_error():
    latency, budgets = timed(), {"phone": Budget(latency_ms=0.11)}
    keep = solve(budgets, multiple=1, latency={"phone": latency})["phone"]
    assert keep == {"a": 22, "b": 45}  # 9,900 MACs; 10,000 take 0.11 ms
    assert latency.error < 1e-6
    assert latency.at_most(keep) <= 0.11
    assert all(latency.at_most({**keep, g: keep[g] + 1}) > 0.11 for g in GROUPS)


def test_a_latency_limit_without_a_table_decides_nothing():
    assert solve({"phone": Budget(latency_ms=0.001)})["phone"] == GROUPS


def test_a_latency_that_nothing_achieves():
    with pytest.raises(
        BudgetError,
        match=r"^class phone: latency_ms 0\.1 cannot be met, the smallest achievable is 0\.1006 "
        r"\(0\.1006 predicted, error 0 %\); raise the budget or lower channel_multiple$",
    ):
        solve({"phone": Budget(latency_ms=0.1)}, latency={"phone": timed()})


def test_a_slow_class_is_nested_in_a_fast_one_whatever_their_milliseconds():
    budgets = {"fast": Budget(latency_ms=0.11), "slow": Budget(latency_ms=0.115)}
    latency = {"fast": timed(), "slow": timed(slow=1.1)}
    for order in (("fast", "slow"), ("slow", "fast")):
        keep = solve({n: budgets[n] for n in order}, multiple=1, latency=latency)
        macs = {n: COSTS.costs(keep[n]).macs for n in keep}
        assert macs["slow"] < macs["fast"]
        assert all(keep["slow"][g] <= keep["fast"][g] for g in GROUPS)
        assert latency["fast"].at_most(keep["fast"]) <= 0.11
        assert latency["slow"].at_most(keep["slow"]) <= 0.115


def test_a_class_held_back_by_its_latency_does_not_hold_back_others():
    budgets = {"slow": Budget(macs=20_000, latency_ms=0.105), "small": Budget(macs=10_000)}
    keep = solve(budgets, multiple=1, latency={"slow": timed()})
    assert COSTS.costs(keep["slow"]).macs <= 5_000
    assert COSTS.costs(keep["small"]).macs > 9_000


# ---- properties


limits = st.one_of(st.none(), st.floats(0, 1))


@st.composite
def fleets(draw):
    """A network, a grid, and feasible budgets of up to four classes."""
    net = draw(chains())
    protection = Protection(
        frozenset(draw(st.sets(st.sampled_from(list(net.groups)), max_size=1))),
        draw(st.dictionaries(st.sampled_from(list(net.groups)), st.integers(1, 24), max_size=2)),
    )
    grid = Grid.of(net.groups, draw(st.sampled_from([1, 4, 8])), protection)
    model = CostModel(net)
    least, most = model.costs(grid.smallest()), model.costs(net.groups)

    def between(figure, share, factor=1):
        low, high = factor * getattr(least, figure), factor * getattr(most, figure)
        return None if share is None else max(1, low + int(share * (high - low)))

    budgets = {}
    for i in range(draw(st.integers(1, 4))):
        batch = draw(st.integers(1, 3))
        budgets[f"c{i}"] = Budget(
            flash_bytes=between("artifact_bytes", draw(limits)),
            ram_bytes=between("peak_activation_bytes", draw(limits), batch),
            macs=between("macs", draw(limits)),
            batch=batch,
        )
    return net, grid, budgets


def stepwise(net) -> LatencyModel:
    """A latency that rises in blocks of 4 units; a millisecond is its unit."""
    column = {g: i for i, g in enumerate(net.groups)}
    rows = [tuple(axis_row(axis, column) for axis in spec.axes) for spec in net.tensors]
    products = (Product((), (100,)), *(Product(lengths, (3,), 4) for lengths in rows))
    return LatencyModel(tuple(net.groups), products, unit_ms=1.0, error=0.1, worst=0.1, block=4)


@settings(deadline=None, max_examples=60)
@given(fleets(), st.sampled_from(Allocation), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_with_latencies_the_same_as_asking_for_every_cost_anew(case, how, shares):
    net, grid, budgets = case
    model, latency, scores = CostModel(net), stepwise(net), falling(net.groups, 0)
    least, most = latency.at_most(grid.smallest()), latency.at_most(net.groups)
    budgets = {
        name: budget.model_copy(update={"latency_ms": least + 1 + share * (most - least)})
        for (name, budget), share in zip(budgets.items(), shares, strict=False)
    }

    def costs(keep):
        return SimpleNamespace(**vars_of(model.costs(keep)), latency=int(latency.predict(keep)))

    s = BudgetSolver(
        model, dict.fromkeys(budgets, grid), allocation=how, latency=dict.fromkeys(budgets, latency)
    )
    for name, found in s.nest(budgets, scores).items():
        limits = budgets[name].limits() | {"latency": latency.cap(budgets[name].latency_ms)}
        budget = SimpleNamespace(limits=lambda limits=limits: limits)
        assert found.keep == plain_solver.solve(
            costs, grid, budget, scores, allocation=how, ceiling=found.ceiling
        )


def vars_of(found):
    return {name: getattr(found, name) for name in FIGURES}


@settings(deadline=None, max_examples=60)
@given(fleets(), st.sampled_from(Allocation), st.integers(0, 9))
def test_limits_hold_classes_nest_and_no_step_could_be_given_back(case, how, seed):
    net, grid, budgets = case
    model, scores = CostModel(net), falling(net.groups, seed)
    s = BudgetSolver(model, dict.fromkeys(budgets, grid), allocation=how)
    found = s.nest(budgets, scores)
    assert found == s.nest(budgets, scores)
    for name, budget in budgets.items():
        keep, ceiling = found[name].keep, found[name].ceiling
        assert budget.meets(model.costs(keep))
        for g, n in keep.items():
            assert n in grid.under(ceiling).levels[g]
            above = next((m for m in grid.levels[g] if m > n), None)
            if above is not None and above <= ceiling[g]:
                assert not budget.meets(model.costs({**keep, g: above}))
        for other, wider in budgets.items():
            if wider.covers(budget):
                assert all(keep[g] <= found[other].keep[g] for g in net.groups)


@settings(deadline=None, max_examples=60)
@given(fleets(), st.sampled_from(Allocation), st.integers(0, 9), st.sampled_from([0.25, 0.5]))
def test_the_same_as_asking_for_every_cost_anew(case, how, seed, floor):
    net, grid, budgets = case
    model, scores = CostModel(net), falling(net.groups, seed)
    s = BudgetSolver(model, dict.fromkeys(budgets, grid), allocation=how, floor=floor)
    for name, found in s.nest(budgets, scores).items():
        assert found.keep == plain_solver.solve(
            model.costs,
            grid,
            budgets[name],
            scores,
            allocation=how,
            floor=floor,
            ceiling=found.ceiling,
        )
