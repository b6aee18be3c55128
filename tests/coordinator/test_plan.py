import numpy as np
import pytest

from fleetprune.budgets import Budget
from fleetprune.costs import Costs
from fleetprune.errors import BudgetError
from fleetprune.layout import Architecture, Role, Segment, TensorSpec
from fleetprune.schedule import PolynomialDecay
from fleetprune_coordinator.plan import Planner


def one(units, group=None):
    return (Segment(group=group, units=units),)


# 10 inputs -> h -> 1 output: 11 MACs and 44 bytes per unit of h.
NET = Architecture(
    groups={"h": 32},
    tensors=(
        TensorSpec(
            name="in.weight", role=Role.PARAMETER, axes=(one(32, "h"), one(10)), positions=1
        ),
        TensorSpec(
            name="out.weight", role=Role.PARAMETER, axes=(one(1), one(32, "h")), positions=1
        ),
    ),
)
FLAT = {"h": np.ones(32, np.float32)}


def planner(budget, schedule=None):
    return Planner(NET, {"phone": budget}, schedule=schedule or PolynomialDecay(), multiple=8)


def test_the_dense_costs():
    dense = planner(Budget()).dense
    assert (dense.macs, dense.artifact_bytes) == (352, 1408)


def test_half_the_macs_is_half_the_units():
    assert planner(Budget(macs=176)).shapes(1, FLAT) == {"phone": {"h": 16}}


def test_a_class_shrinks_along_the_schedule():
    linear = PolynomialDecay(begin=1, end=4, power=1)
    plan = planner(Budget(macs=11 * 8), linear)
    kept = [plan.shapes(r, FLAT)["phone"]["h"] for r in (1, 2, 3, 4, 5)]
    assert kept == [32, 24, 16, 8, 8]


def test_an_infeasible_budget_is_refused_before_any_round():
    with pytest.raises(
        BudgetError,
        match=r"^class phone: macs 87 cannot be met, the smallest achievable is 88; "
        r"raise the budget or lower channel_multiple$",
    ):
        planner(Budget(macs=87))


def test_a_file_over_its_budget_is_refused():
    plan = planner(Budget(flash_bytes=1000, macs=352))
    plan.check("phone", Costs(artifact_bytes=1000, macs=352, peak_activation_bytes=0))
    with pytest.raises(BudgetError, match=r"^class phone: artifact_bytes 1001 > 1000$"):
        plan.check("phone", Costs(artifact_bytes=1001, macs=352, peak_activation_bytes=0))
