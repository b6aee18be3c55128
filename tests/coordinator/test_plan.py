from pathlib import Path

import numpy as np
import pytest
import torch

from fleetprune.budgets import Allocation, Budget
from fleetprune.costs import CostModel, Costs
from fleetprune.errors import BudgetError
from fleetprune.latency import LatencyModel, LatencyPoint, LatencyTable, Precision
from fleetprune.layout import Activation, Architecture, Role, Segment, TensorSpec
from fleetprune.protection import Protection
from fleetprune.schedule import Schedule
from fleetprune_coordinator.config import load_fleet_config
from fleetprune_coordinator.plan import Planner
from fleetprune_coordinator.plan_report import as_json, explain
from fleetprune_coordinator.tracing import trace
from fleetprune_sim.models import transformer


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


def planner(budget, schedule=None, **options):
    options = {"multiple": 8, **options}
    return Planner(NET, {"phone": budget}, schedule=schedule or Schedule(), **options)


def test_the_dense_costs():
    dense = planner(Budget()).dense
    assert (dense.macs, dense.artifact_bytes) == (352, 1408)


def test_half_the_macs_is_half_the_units():
    assert planner(Budget(macs=176)).shapes(1, FLAT) == {"phone": {"h": 16}}


def test_a_class_shrinks_along_the_schedule():
    linear = Schedule(begin=1, end=4, power=1)
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


def test_every_class_that_cannot_be_is_named():
    budgets = {"phone": Budget(macs=87), "hub": Budget(), "sensor": Budget(flash_bytes=1)}
    with pytest.raises(BudgetError) as e:
        Planner(NET, budgets, schedule=Schedule())
    assert str(e.value) == (
        "class phone: macs 87 cannot be met, the smallest achievable is 88; raise the budget or "
        "lower channel_multiple; class sensor: flash_bytes 1 cannot be met, the smallest "
        "achievable is 352; raise the budget or lower channel_multiple"
    )


def test_a_class_has_its_own_multiple():
    budgets = {"phone": Budget(macs=11 * 13), "sensor": Budget(macs=11 * 13)}
    plan = Planner(NET, budgets, schedule=Schedule(), multiples={"sensor": 4})
    assert plan.shapes(1, FLAT) == {"phone": {"h": 8}, "sensor": {"h": 8}}
    plan = Planner(NET, {"sensor": budgets["sensor"]}, schedule=Schedule(), multiples={"sensor": 1})
    assert plan.shapes(1, FLAT) == {"sensor": {"h": 13}}


def test_protected_layers():
    plan = planner(Budget(macs=11 * 20), protection=Protection(least={"h": 15}))
    assert plan.shapes(1, FLAT)["phone"] == {"h": 16}


def test_memory_is_eased_at_its_batch():
    buffers = (Activation(per_unit={"h": 10}),)
    net = NET.model_copy(update={"activations": buffers, "live": ((0,),)})
    linear = Schedule(begin=1, end=4, power=1)
    plan = Planner(net, {"c": Budget(ram_bytes=160, batch=2)}, schedule=linear)
    assert [plan.shapes(r, FLAT)["c"]["h"] for r in (1, 2, 3, 4)] == [32, 24, 16, 8]


# ---- latency


def latency(ms_per_unit=0.01):
    points = [LatencyPoint(keep={"h": n}, median_ms=ms_per_unit * n) for n in (32, 24, 16, 8, 4)]
    table = LatencyTable(
        device_class="phone",
        runtime="r",
        version="1",
        precision=Precision.FLOAT32,
        devices=2,
        points=tuple(points),
    )
    return {"phone": LatencyModel.fit(NET, table)}, {"phone": table}


def test_latency_counts_once_it_is_measured():
    plan = planner(Budget(latency_ms=0.2))
    assert plan.shapes(1, FLAT) == {"phone": {"h": 32}}
    plan.learn_latency(latency()[0])
    assert plan.shapes(1, FLAT) == {"phone": {"h": 16}}


def test_a_latency_out_of_reach_changes_nothing():
    plan = planner(Budget(latency_ms=0.2), latency=latency()[0])
    with pytest.raises(BudgetError, match=r"^class phone: latency_ms 0\.2 cannot be met, the "):
        plan.learn_latency(latency(ms_per_unit=1.0)[0])
    assert plan.shapes(1, FLAT) == {"phone": {"h": 16}}


def test_latency_is_eased_along_the_schedule():
    linear = Schedule(begin=1, end=4, power=1)
    plan = planner(Budget(latency_ms=0.0801), linear, latency=latency()[0])
    kept = [plan.shapes(r, FLAT)["phone"]["h"] for r in (1, 2, 3, 4, 5)]
    assert kept == [32, 24, 16, 8, 8]


def test_a_dynamic_schedule_says_what_slack_it_has():
    linear = Schedule(begin=1, end=4, power=1)
    plan = planner(Budget(macs=11 * 8), linear)
    assert plan.shapes(1, FLAT, slack=0.0) == {"phone": {"h": 8}}
    assert plan.shapes(1, FLAT, slack=1.0) == {"phone": {"h": 32}}


# ---- from a description


DESCRIPTION = """
fleet = "f"
[model]
factory = "nets:mlp"
input_shape = [10]
classes = 2
[pruning]
channel_multiple = 4
allocation = "global"
floor = 0.25
minimum = { in = 0.4 }
[classes.hub]
[classes.phone]
macs_share = 0.5
multiple = 2
[classes.sensor]
macs = 1
ram_share = 1.0
batch = 3
"""


def test_the_planner_of_a_description(tmp_path: Path):
    path = tmp_path / "fleet.toml"
    path.write_text(DESCRIPTION.replace("macs = 1\n", ""))
    config = load_fleet_config(path)
    plan = Planner.of(config, NET)
    assert plan.allocation is Allocation.GLOBAL
    assert plan.shapes(1, FLAT) == {
        "hub": {"h": 32},
        "phone": {"h": 16},
        "sensor": {"h": 32},
    }
    assert plan.budgets["sensor"].batch == 3
    assert Planner.of(config, NET, allocation=Allocation.UNIFORM).allocation is Allocation.UNIFORM
    path.write_text(DESCRIPTION)
    with pytest.raises(BudgetError) as e:
        Planner.of(load_fleet_config(path), NET)
    assert str(e.value) == (
        "class sensor: macs 1 cannot be met, the smallest achievable is 176; raise the budget, "
        "lower channel_multiple or protect fewer layers"
    )


# ---- what a plan says


def test_a_plan_says_what_each_limit_allows_and_which_one_binds():
    budgets = {"phone": Budget(macs=11 * 20, flash_bytes=44 * 29, latency_ms=0.25)}
    models, tables = latency()
    plan = Planner(NET, budgets, schedule=Schedule(), multiple=4, latency=models)
    found = explain(plan, FLAT)["phone"]
    assert found.keep == {"h": 20}
    assert {limit.key: limit.alone["h"] for limit in found.limits} == {
        "flash_bytes": 28,
        "macs": 20,
        "latency_ms": 24,
    }
    assert {limit.key: limit.refuses for limit in found.limits} == {
        "flash_bytes": 0,
        "macs": 1,
        "latency_ms": 0,
    }
    assert (found.binds, found.nesting, found.around) == ("macs", 0, ())
    assert found.predicted_ms == pytest.approx(0.2)
    told = as_json(plan, {"phone": found}, tables)["classes"]["phone"]
    assert told["limits"]["macs"] == {
        "budget": 220,
        "reached": 220,
        "alone": {"units": 20, "keep": {"h": 20}},
        "refuses": 1,
    }
    assert told["costs"] == {"artifact_bytes": 880, "macs": 220, "peak_activation_bytes": 0}
    assert told["latency"]["devices"] == 2
    assert told["latency"]["predicted_ms"] == pytest.approx(0.2)


def test_a_plan_without_limits_and_one_inside_another():
    budgets = {"hub": Budget(), "phone": Budget(macs=200), "sensor": Budget(macs=200)}
    found = explain(Planner(NET, budgets, schedule=Schedule()), FLAT)
    assert (found["hub"].binds, found["hub"].limits) == (None, ())
    assert (found["phone"].binds, found["phone"].around) == ("macs", ("hub",))
    assert (found["sensor"].binds, found["sensor"].nesting) == (None, 1)
    assert found["sensor"].around == ("hub", "phone")


def test_heads_of_attention_are_cut_at_the_usual_multiple():
    architecture = trace(transformer(), torch.zeros(1, 6, 128))
    heads = {g for g, width in architecture.channels.items() if width > 1}
    assert {architecture.groups[g] for g in heads} == {4}
    dense = CostModel(architecture).costs(architecture.groups)
    plan = Planner(architecture, {"small": Budget(macs=dense.macs // 2)}, schedule=Schedule())
    flat = {g: np.ones(n, np.float32) for g, n in architecture.groups.items()}
    keep = plan.shapes(1, flat)["small"]
    assert all(keep[g] < 4 for g in heads)
    assert plan.costs(keep).macs <= dense.macs // 2
