from dataclasses import replace

import numpy as np
import pytest

from fleetprune.budgets import Allocation, Budget
from fleetprune.errors import BudgetError
from fleetprune.layout import Architecture, Role, Segment, TensorSpec
from fleetprune.patterns import Granularity, Pattern
from fleetprune.schedule import Schedule
from fleetprune.weight_masks import DECODER_BYTES
from fleetprune_coordinator.plan import Planner
from fleetprune_coordinator.weight_pruning import SHARED_BYTES, WeightPruning, WeightRule


def axis(units, group=None, block=1):
    return (Segment(group=group, units=units, block=block),)


def tensor(name, *axes, **options):
    return TensorSpec(name=name, role=Role.PARAMETER, axes=axes, **{"positions": 1, **options})


# 40 inputs -> h = 40 -> 40 outputs: two weights of 1600, a bias and a norm of 40 each, in float32.
NET = Architecture(
    groups={"h": 40},
    tensors=(
        tensor("in.weight", axis(40, "h"), axis(40)),
        tensor("in.bias", axis(40, "h"), positions=0),
        tensor("norm.weight", axis(40, "h"), positions=0, artifact_bytes=0),
        tensor("out.weight", axis(40), axis(40, "h")),
    ),
    overhead_bytes=100,
)
KEEP = {"h": 40}
DENSE = 100 + 4 * (1600 + 40 + 1600)
WEIGHT = WeightRule(Granularity.WEIGHT)
LEAST = 100 + 160 + SHARED_BYTES + 2 * (DECODER_BYTES + 7 * 5)
"""One weight of each, the last one, which is 1599 = 6 * 255 + 69 away from the beginning."""
ONES = {name: np.ones((40, 40), np.float32) for name in ("in.weight", "out.weight")}


def planner(budget, rule=WEIGHT, net=NET, schedule=None, **options):
    return Planner(net, {"phone": budget}, schedule=schedule or Schedule(), weights=rule, **options)


def refusal(budget, rule=WEIGHT, **options):
    with pytest.raises(BudgetError) as e:
        planner(budget, rule, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


def counts(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


# ---- which weights


def test_weights_that_multiply_are_pruned_and_nothing_else():
    assert WeightPruning(NET, WEIGHT).names == ("in.weight", "out.weight")
    assert WeightPruning(NET, replace(WEIGHT, granularity=Granularity.HYBRID)).names
    assert WeightPruning(NET, WeightRule()).names == ()


@pytest.mark.parametrize(
    ("spared", "left"),
    [
        (("in",), ("out.weight",)),
        (("out",), ("in.weight",)),
        (("*",), ()),
        (("h",), ("out.weight",)),  # by the group that it makes
    ],
)
@pytest.mark.parametrize("key", ["exclude", "dense_layers"])
def test_layers_that_are_named_stay_dense(key, spared, left):
    assert WeightPruning(NET, replace(WEIGHT, **{key: spared})).names == left


@pytest.mark.parametrize("key", ["exclude", "dense_layers"])
def test_a_layer_that_is_not_there_is_refused(key):
    with pytest.raises(BudgetError) as e:
        WeightPruning(NET, replace(WEIGHT, **{key: ("inn",)}))
    assert str(e.value) == f"pruning.{key}: no layer 'inn', did you mean in?"


# ---- within the bytes


def test_a_class_without_a_limit_keeps_all():
    assert planner(Budget()).masks(1, {"phone": KEEP}, ONES) == {}
    assert planner(Budget(flash_bytes=DENSE)).masks(1, {"phone": KEEP}, ONES) == {}


def test_a_class_keeps_what_its_bytes_allow():
    uniform = replace(WEIGHT, allocation=Allocation.UNIFORM)
    # Of each: 200 bytes of marks, 800 values and a zero.
    limit = 100 + 160 + SHARED_BYTES + 2 * (DECODER_BYTES + 200 + 4 * 801)
    plan = planner(Budget(flash_bytes=limit), uniform)
    masks = plan.masks(1, {"phone": KEEP}, ONES)["phone"]
    assert counts(masks) == {"in.weight": 800, "out.weight": 800}
    assert plan.weights.bytes(KEEP, masks) == limit
    fewer = planner(Budget(flash_bytes=limit - 1), uniform).masks(1, {"phone": KEEP}, ONES)
    assert sum(counts(fewer["phone"]).values()) == 1599


def test_a_dense_layer_counts_whole():
    rule = replace(WEIGHT, dense_layers=("in",))
    plan = planner(Budget(flash_bytes=DENSE - 3000), rule)
    masks = plan.masks(1, {"phone": KEEP}, ONES)["phone"]
    assert masks.keys() == {"out.weight"}
    bytes_ = plan.weights.bytes(KEEP, masks)
    assert DENSE - 3004 < bytes_ <= DENSE - 3000
    assert plan.weights.bytes(KEEP, {}) == DENSE


def test_bytes_are_those_of_the_quantised_file_where_that_ships():
    counted = NET.model_copy(
        update={
            "tensors": tuple(
                s.model_copy(update={"artifact_bytes": min(1, s.artifact_bytes)})
                for s in NET.tensors
            )
        }
    )
    limit = 100 + 40 + SHARED_BYTES + 2 * (DECODER_BYTES + 200 + 801)
    uniform = replace(WEIGHT, allocation=Allocation.UNIFORM)
    plan = planner(Budget(flash_bytes=limit), uniform, counted=counted)
    masks = plan.masks(1, {"phone": KEEP}, ONES)["phone"]
    assert counts(masks) == {"in.weight": 800, "out.weight": 800}


def test_a_schedule_begins_at_the_file_that_ships():
    """Half-way to 0 of a dense file of 3540 bytes in int8, not of one of 13060 in float32."""
    counted = NET.model_copy(
        update={"tensors": tuple(s.model_copy(update={"artifact_bytes": 1}) for s in NET.tensors)}
    )
    schedule = Schedule.model_validate({"curve": "linear", "begin": 1, "end": 5})
    plan = planner(Budget(flash_bytes=2000), counted=counted, schedule=schedule)
    assert plan.masks(1, {"phone": KEEP}, ONES) == {}
    masks = plan.masks(2, {"phone": KEEP}, ONES)["phone"]  # 2000 + 3/4 of the rest
    assert sum(counts(masks).values()) < 3200


def test_a_class_is_cut_by_scores_of_its_own_part():
    """A hybrid class of 20 units: of their weights, the large ones stay."""
    rule = WeightRule(Granularity.HYBRID, allocation=Allocation.UNIFORM)
    plan = planner(Budget(macs=1600, flash_bytes=4000), rule, multiple=4)
    (keep,) = plan.shapes(1, {"h": np.ones(40, np.float32)}).values()
    assert keep == {"h": 20}
    scores = {name: np.zeros((40, 40), np.float32) for name in ONES}
    scores["in.weight"][19, 30:] = 1
    scores["in.weight"][20:] = 9  # of units that it has not
    masks = plan.masks(1, {"phone": keep}, scores)["phone"]
    assert masks["in.weight"].shape == (20, 40)
    assert masks["out.weight"].shape == (40, 20)
    assert masks["in.weight"][19, 30:].all()


def test_the_least_that_it_can_be_always_fits_wherever_it_stands():
    plan = planner(Budget(flash_bytes=LEAST))
    for place in ((0, 0), (20, 20), (39, 39)):
        scores = {name: np.zeros((40, 40), np.float32) for name in ONES}
        for values in scores.values():
            values[place] = 1
        masks = plan.masks(1, {"phone": KEEP}, scores)["phone"]
        assert all(mask[place] for mask in masks.values())
        assert plan.weights.bytes(KEEP, masks) <= LEAST


def test_too_few_bytes_for_one_weight_per_layer_are_refused():
    assert refusal(Budget(flash_bytes=LEAST - 1)) == (
        f"class phone: flash_bytes {LEAST - 1} cannot be met, the smallest achievable with pattern "
        f"1x1 is {LEAST}; raise the budget"
    )


def test_time_and_memory_are_the_units():
    assert refusal(Budget(macs=3199)) == (
        "class phone: macs 3199 cannot be met, the smallest achievable is 3200; single weights "
        'save bytes alone: raise the budget or set pruning.granularity = "hybrid"'
    )
    planner(Budget(macs=3200))
    hybrid = WeightRule(Granularity.HYBRID)
    assert planner(Budget(macs=3199), hybrid).shapes(1, {"h": np.ones(40, np.float32)}) == {
        "phone": {"h": 32}
    }


def test_units_do_not_answer_for_bytes_where_weights_do():
    hybrid = WeightRule(Granularity.HYBRID)
    flat = {"h": np.ones(40, np.float32)}
    assert planner(Budget(flash_bytes=4000), hybrid).shapes(1, flat) == {"phone": KEEP}
    assert planner(Budget(flash_bytes=4000), WEIGHT).shapes(1, flat) == {"phone": KEEP}
    assert planner(Budget(flash_bytes=4000), WeightRule()).shapes(1, flat)["phone"]["h"] < 40


@pytest.mark.parametrize("curve", ["constant", "linear", "polynomial", "cosine"])
def test_density_falls_with_the_schedule(curve):
    schedule = Schedule.model_validate(
        {"curve": curve, "begin": 2, "end": 6}
        if curve != "constant"
        else {"curve": curve, "begin": 2}
    )
    plan = planner(Budget(flash_bytes=3000), schedule=schedule)
    left, bytes_ = [], []
    for number in range(1, 9):
        masks = plan.masks(number, {"phone": KEEP}, ONES).get("phone", {})
        left.append(sum(counts(masks).values()) if masks else 3200)
        bytes_.append(plan.weights.bytes(KEEP, masks))
    assert left == sorted(left, reverse=True)
    assert left[-1] < left[0]
    assert bytes_[-1] <= 3000 < bytes_[0]
    assert left[-1] == left[-2]


def test_a_dynamic_schedule_says_how_far_it_is():
    schedule = Schedule.model_validate({"curve": "dynamic", "end": 9})
    plan = planner(Budget(flash_bytes=3000), schedule=schedule)
    left = [
        sum(counts(plan.masks(2, {"phone": KEEP}, ONES, slack)["phone"]).values())
        for slack in (0.5, 0.2, 0.0)
    ]
    assert left[0] > left[1] > left[2]
    assert plan.masks(2, {"phone": KEEP}, ONES, 1.0) == {}


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_scores_that_say_nothing_are_refused(value):
    plan = planner(Budget(flash_bytes=3000))
    scores = {**ONES, "out.weight": np.full((40, 40), value, np.float32)}
    with pytest.raises(BudgetError) as e:
        plan.masks(1, {"phone": KEEP}, scores)
    assert str(e.value) == (
        "class phone: scores of out.weight: expected finite numbers of at least 0"
    )


def test_units_that_leave_no_room_for_weights_are_refused_with_their_class():
    """Where scores decide how many units stay, more may stay than was to be expected."""
    plan = planner(Budget(flash_bytes=LEAST), WeightRule(Granularity.HYBRID))
    for less, room in ((100, 730), (2000, 0)):
        plan.budgets["phone"] = Budget(flash_bytes=max(1, LEAST - less))
        with pytest.raises(BudgetError) as e:
            plan.masks(1, {"phone": KEEP}, ONES)
        assert str(e.value) == (
            f"class phone: {room} bytes for the weights of 2 layers, which take at least 770: "
            "raise flash_bytes"
        )


# ---- patterns

TWO_OF_FOUR = replace(WEIGHT, pattern=Pattern.parse("2:4"))


def test_two_of_four_need_no_limit():
    masks = planner(Budget(), TWO_OF_FOUR).masks(1, {"phone": KEEP}, ONES)["phone"]
    for mask in masks.values():
        assert (mask.reshape(40, 10, 4).sum(axis=2) == 2).all()


def test_two_of_four_follow_the_schedule():
    schedule = Schedule.model_validate({"curve": "linear", "begin": 1, "end": 5})
    plan = planner(Budget(), TWO_OF_FOUR, schedule=schedule)
    left = [counts(plan.masks(r, {"phone": KEEP}, ONES)["phone"])["in.weight"] for r in range(1, 7)]
    assert left == [1600, 1200, 1200, 800, 800, 800]  # whole weights of four, rounded down


def test_two_of_four_that_do_not_fit_are_refused():
    # Of each 200 bytes of marks, 800 values and a zero.
    least = 100 + 160 + SHARED_BYTES + 2 * (DECODER_BYTES + 200 + 4 * 801)
    planner(Budget(flash_bytes=least), TWO_OF_FOUR)
    assert refusal(Budget(flash_bytes=least - 1), TWO_OF_FOUR) == (
        f"class phone: flash_bytes {least - 1} cannot be met, the smallest achievable with pattern "
        f"2:4 is {least}; raise the budget or choose a pattern that leaves less"
    )


def test_a_pattern_that_does_not_divide_a_layer_is_refused_with_its_name():
    assert refusal(Budget(), replace(WEIGHT, pattern=Pattern.parse("1:3"))) == (
        "class phone: layer in has 40 inputs, which 3 does not divide (pattern 1:3); name it "
        "in pruning.dense_layers"
    )
    assert "layer in has 40 outputs, which 16 does not" in refusal(
        Budget(), replace(WEIGHT, pattern=Pattern.parse("16x1"))
    )
    rule = replace(WEIGHT, pattern=Pattern.parse("1:3"), dense_layers=("in", "out"))
    assert planner(Budget(), rule).masks(1, {"phone": KEEP}, ONES) == {}


def test_a_width_that_a_class_passes_on_its_way_has_to_be_divided_too():
    """At the end it has 20 units, at first 40; with a multiple of 2 there are 22 in between."""
    hybrid = replace(TWO_OF_FOUR, granularity=Granularity.HYBRID)
    budget = Budget(macs=1600)
    flat = {"h": np.ones(40, np.float32)}
    schedule = Schedule.model_validate({"curve": "linear", "begin": 1, "end": 9})
    assert refusal(budget, hybrid, schedule=schedule, multiple=2) == (
        "class phone: layer out may have 2 inputs, which 4 does not divide (pattern 2:4); name it "
        "in pruning.dense_layers, or set channel_multiple to a multiple of it"
    )
    plan = planner(budget, hybrid, schedule=schedule, multiple=4)
    for number in range(1, 11):
        shapes = plan.shapes(number, flat)
        assert plan.masks(number, shapes, ONES)["phone"]["out.weight"].shape == (
            40, shapes["phone"]["h"]
        )  # fmt: skip
    # Where nothing is cut, only the full width counts.
    planner(Budget(), TWO_OF_FOUR, multiple=2)


def test_blocks_are_whole():
    rule = replace(WEIGHT, pattern=Pattern.parse("4x1"))
    plan = planner(Budget(flash_bytes=5000), rule)
    rng = np.random.default_rng(0)
    scores = {name: rng.random((40, 40)).astype(np.float32) for name in ONES}
    masks = plan.masks(1, {"phone": KEEP}, scores)["phone"]
    for mask in masks.values():
        assert set(mask.reshape(10, 4, 40).sum(axis=1).ravel().tolist()) == {0, 4}
    assert plan.weights.bytes(KEEP, masks) <= 5000


def test_bytes_are_limited_where_all_layers_are_spared():
    hybrid = WeightRule(Granularity.HYBRID, dense_layers=("*",))
    plan = planner(Budget(flash_bytes=9000), hybrid)
    keep = plan.shapes(1, {"h": np.zeros(40, np.float32)})["phone"]  # units answer for them
    assert plan.costs(keep).artifact_bytes <= 9000 < plan.dense.artifact_bytes
    whole = replace(hybrid, granularity=Granularity.WEIGHT)
    assert "flash_bytes 9000 cannot be met" in refusal(Budget(flash_bytes=9000), whole)
