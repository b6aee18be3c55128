"""New masks without a fleet: rounds are changes of the dense weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fleetprune.budgets import Budget
from fleetprune.criteria import Criterion
from fleetprune.patterns import Granularity, Pattern
from fleetprune.schedule import Schedule
from fleetprune_coordinator.config import TrainingConfig
from fleetprune_coordinator.cutting import Cutting
from fleetprune_coordinator.fleet_model import initial_model
from fleetprune_coordinator.plan import Planner
from fleetprune_coordinator.policy import Policy
from fleetprune_coordinator.resize import read
from fleetprune_coordinator.tracing import trace
from fleetprune_coordinator.weight_pruning import WeightRule
from fleetprune_sim.models import mlp

INPUTS, HIDDEN, CLASSES = 32, 64, 4


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    network = mlp(INPUTS, HIDDEN, CLASSES)
    architecture = trace(network, torch.zeros(1, INPUTS))
    params, stats = read(network)
    return architecture, params, stats


class Fleet:
    """Cutting and its model, and rounds that move weights at random."""

    def __init__(self, traced, budgets, rule, schedule=None, **training):
        self.architecture, params, stats = traced
        self.planner = Planner(
            self.architecture, budgets, schedule=schedule or Schedule(), weights=rule
        )
        settings = TrainingConfig.model_validate(
            {"rounds": 8, "remask_every": 2, "last_remask": 8, "criterion": "magnitude", **training}
        )
        self.cutting = Cutting(
            settings, self.architecture, self.planner, Policy(), watch=None, flow=lambda p: p
        )
        self.cutting.start(None)
        flat = {g: np.zeros(n, np.float32) for g, n in self.architecture.groups.items()}
        model = initial_model(self.architecture, params, stats, self.planner.shapes(1, flat))
        self.cutting.start(model)
        self.model = self.cutting.prune_weights(
            model, 0, before=model, criterion=Criterion.MAGNITUDE
        )

    def round(self, number, seed=None, loss=1.0):
        rng = np.random.default_rng(number if seed is None else seed)
        before = self.model.params
        after = {n: v + rng.normal(0, 0.1, v.shape).astype(np.float32) for n, v in before.items()}
        everyone = {n: np.ones_like(v) for n, v in before.items()}
        self.cutting.trained(before, after, everyone)
        model = replace(self.model, params=after)
        self.model = self.cutting.after_round(number, loss, model)

    def left(self, name="small"):
        return {t: int(kept.sum()) for t, kept in self.model.supports.get(name, {}).items()}

    def bytes(self, name="small"):
        keep, masks = self.model.shapes[name], self.model.supports.get(name, {})
        return self.planner.weights.bytes(keep, masks)


WEIGHT = WeightRule(Granularity.WEIGHT)
TIGHT = {"large": Budget(), "small": Budget(flash_bytes=6000)}


def test_masks_stand_before_the_first_round(traced):
    fleet = Fleet(traced, TIGHT, WEIGHT)
    assert fleet.model.mask_version == 1
    assert fleet.model.supports.keys() == {"small"}
    assert 5990 < fleet.bytes() <= 6000
    kept = fleet.model.supports["small"]["0.weight"]
    size = np.abs(fleet.model.params["0.weight"])
    assert size[kept].min() >= size[~kept].max()
    np.testing.assert_array_equal(fleet.model.params["0.weight"], traced[1]["0.weight"])


def test_masks_change_as_often_as_is_asked(traced):
    fleet = Fleet(traced, TIGHT, WEIGHT)
    versions = []
    for number in range(1, 7):
        before = fleet.model.supports["small"]["0.weight"]
        fleet.round(number)
        versions.append(fleet.model.mask_version)
        same = np.array_equal(before, fleet.model.supports["small"]["0.weight"])
        assert same == (number % 2 == 1)
        assert fleet.bytes() <= 6000
    assert versions == [1, 2, 2, 3, 3, 4]


def test_where_masks_would_be_the_same_nothing_changes(traced):
    fleet = Fleet(traced, TIGHT, WEIGHT)
    before = fleet.model
    fleet.model = fleet.cutting.after_round(2, 1.0, before)
    assert fleet.model is before  # devices keep their residuals


@pytest.mark.parametrize("curve", ["linear", "polynomial", "cosine"])
def test_density_falls_from_round_to_round(traced, curve):
    schedule = Schedule.model_validate({"curve": curve, "begin": 1, "end": 7})
    fleet = Fleet(traced, TIGHT, WEIGHT, schedule, remask_every=0)
    assert fleet.left() == {}
    bytes_ = [fleet.bytes()]
    for number in range(1, 8):
        fleet.round(number)
        bytes_.append(fleet.bytes())
    # A weight less saves four bytes, but at a schedule's first step none saves anything yet.
    assert bytes_ == sorted(bytes_, reverse=True)
    assert 5990 < bytes_[-1] <= 6000
    assert len(set(bytes_[1:-1])) > 3
    assert fleet.model.supports.keys() == {"small"}


def test_after_a_single_shot_masks_stay(traced):
    schedule = Schedule.model_validate({"curve": "one_shot", "begin": 3})
    fleet = Fleet(traced, TIGHT, WEIGHT, schedule, remask_every=1)
    seen = []
    for number in range(1, 7):
        fleet.round(number)
        kept = fleet.model.supports.get("small", {}).get("0.weight")
        seen.append(None if kept is None else kept.tobytes())
    assert seen[0] is None  # of round 2
    assert seen[1] is not None  # of round 3
    assert len(set(seen[1:])) == 1


def test_a_dynamic_schedule_prunes_on_while_the_loss_is_stable(traced):
    quick = {"curve": "dynamic", "end": 8, "step": 0.4, "window": 1, "stable": 1.0}
    fleet = Fleet(traced, TIGHT, WEIGHT, Schedule.model_validate(quick), remask_every=0)
    bytes_ = []
    for number in range(1, 9):
        fleet.round(number)
        bytes_.append(fleet.bytes())
    assert bytes_ == sorted(bytes_, reverse=True)
    assert bytes_[-1] <= 6000
    assert len(set(bytes_)) >= 3


def test_a_pruned_weight_comes_back_when_it_has_grown(traced):
    fleet = Fleet(traced, TIGHT, WEIGHT)
    place = tuple(np.argwhere(~fleet.model.supports["small"]["0.weight"])[0])
    params = dict(fleet.model.params)
    params["0.weight"] = params["0.weight"].copy()
    params["0.weight"][place] = 9.0  # as devices of the other class have trained it
    fleet.model = fleet.cutting.after_round(2, 1.0, replace(fleet.model, params=params))
    assert fleet.model.supports["small"]["0.weight"][place]


def test_units_are_cut_first_and_then_weights_inside_them(traced):
    budgets = {"large": Budget(), "small": Budget(macs=1200, flash_bytes=3000)}
    fleet = Fleet(traced, budgets, WeightRule(Granularity.HYBRID))
    for number in range(1, 5):
        (units,) = fleet.model.shapes["small"].values()
        assert units == 32
        support = fleet.model.supports["small"]
        assert support["0.weight"].shape == (32, INPUTS)
        assert 2990 < fleet.bytes() <= 3000
        fleet.round(number)
    assert fleet.model.shapes["large"] == fleet.architecture.groups
    assert "large" not in fleet.model.supports


@pytest.mark.parametrize(("text", "n", "m"), [("2:4", 2, 4), ("1:8", 1, 8)])
def test_n_of_m_hold_in_every_round_and_class(traced, text, n, m):
    rule = WeightRule(Granularity.WEIGHT, Pattern.parse(text))
    fleet = Fleet(traced, {"large": Budget(), "small": Budget()}, rule)
    for number in range(1, 4):
        for support in fleet.model.supports.values():
            for kept in support.values():
                assert (kept.reshape(kept.shape[0], -1, m).sum(axis=2) == n).all()
        fleet.round(number)
    assert fleet.model.supports.keys() == {"large", "small"}


def test_blocks_stay_whole_in_every_round(traced):
    rule = WeightRule(Granularity.WEIGHT, Pattern.parse("4x1"))
    fleet = Fleet(traced, TIGHT, rule)
    for number in range(1, 4):
        for kept in fleet.model.supports["small"].values():
            sums = kept.reshape(kept.shape[0] // 4, 4, -1).sum(axis=1)
            assert set(sums.ravel().tolist()) <= {0, 4}
        assert 5970 < fleet.bytes() <= 6000
        fleet.round(number)


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "movement", "snip", "sensitivity"])
def test_a_restart_goes_on_to_the_same_masks(traced, criterion):
    schedule = Schedule.model_validate({"begin": 1, "end": 6})
    budgets = {"large": Budget(), "small": Budget(macs=1400, flash_bytes=3000)}
    rule = WeightRule(Granularity.HYBRID)

    def fresh():
        return Fleet(traced, budgets, rule, schedule, criterion=criterion, remask_every=1)

    whole, first = fresh(), fresh()
    for number in range(1, 4):
        whole.round(number)
        first.round(number)
    second = fresh()
    second.model = first.model
    second.cutting.start(first.model, first.cutting.ledger.arrays())
    second.cutting.restore(first.cutting.arrays())
    for number in range(4, 8):
        whole.round(number)
        second.round(number)
    assert second.model.mask_version == whole.model.mask_version
    one, other = whole.model.supports["small"], second.model.supports["small"]
    assert {n: k.tobytes() for n, k in one.items()} == {n: k.tobytes() for n, k in other.items()}
