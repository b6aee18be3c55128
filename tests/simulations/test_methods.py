"""What defines each method that trains widths of one dense model, on numbers worked by hand."""

import numpy as np
import pytest

from fleetprune.criteria import Criterion
from fleetprune.errors import ConfigError
from fleetprune.layout import Architecture, Role, Segment, TensorSpec
from fleetprune_coordinator.aggregate import Aggregate
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.fleet_model import FleetModel, initial_model, remask
from fleetprune_coordinator.graph_library import student_index
from fleetprune_coordinator.ledger import Ledger
from fleetprune_sim.methods import METHODS, find_method
from fleetprune_sim.methods.heterofl import ABSENT, label_mask

DEVICES = {"gateway": 10, "phone": 10, "sensor": 20}


def fleet(**training) -> FleetConfig:
    return FleetConfig.model_validate(
        {
            "fleet": "f",
            "model": {
                "factory": "fleetprune_sim.models:mlp",
                "input_shape": [64],
                "classes": 10,
            },
            "training": {"devices_per_round": 8, **training},
            "classes": {"gateway": {}, "phone": {"macs_share": 0.5}, "sensor": {"macs_share": 0.1}},
        }
    )


def units(n: int) -> tuple[Architecture, FleetModel]:
    """One vector of `n` units worth 0, 10, 20, ...; three classes of 4, 2 and 1 units."""
    spec = TensorSpec(name="w", role=Role.PARAMETER, axes=((Segment(group="g", units=n),),))
    architecture = Architecture(groups={"g": n}, tensors=(spec,))
    params = {"w": 10 * np.arange(n, dtype=np.float32)}
    shapes = {"gateway": {"g": n}, "phone": {"g": 2}, "sensor": {"g": 1}}
    return architecture, initial_model(architecture, params, {}, shapes)


def step(name: str, architecture: Architecture, model: FleetModel, number: int, **training):
    """The state after a round's new order, if the method gives one."""
    ledger = Ledger(architecture, {"g": 1})
    scores = find_method(name).policy().scores(fleet(**training).training, number, ledger, model)
    return model if scores is None else remask(architecture, model, scores, model.shapes)[0]


def windows(model: FleetModel) -> dict[str, list[float]]:
    """The weights that each class trains."""
    return {name: sorted(model.params["w"][: k["g"]].tolist()) for name, k in model.shapes.items()}


def plan(name: str, **training):
    return find_method(name).plan(fleet(**training), DEVICES)


def test_methods_are_found_by_name_and_say_where_they_come_from():
    for name, method in METHODS.items():
        found = find_method(name)
        assert (found.name, type(found)) == (name, method)
        assert found.title
        assert found.paper
    with pytest.raises(ConfigError, match=r"^no method 'fedsgd', expected one of dense, small, "):
        find_method("fedsgd")


def test_dense_gives_everyone_the_whole_model_in_disregard_of_budgets():
    found = plan("dense")
    assert found.serves == {"gateway": "dense", "phone": "dense", "sensor": "dense"}
    (budget,) = found.config.classes.values()
    assert (budget.macs_share, budget.macs, budget.flash_bytes, budget.trains) == (None,) * 3 + (
        True,
    )
    training = found.config.training
    assert (training.codec, training.down_codec, training.top_k) == ("fp32", "fp32", 1.0)
    assert (training.distill_weight, training.proximal, training.adjust_logits) == (0, 0, False)


def test_dense_averages_by_samples():
    architecture, _ = units(3)
    aggregate = Aggregate(architecture, {"dense": {"g": 3}})
    for update, samples in (([1, 2, 3], 2), ([2, 4, 6], 4), ([1, 3, 5], 2)):
        aggregate.add("dense", np.array(update, np.float32), samples)
    assert aggregate.result()[0]["w"].tolist() == [1.5, 3.25, 5.0]


def test_small_gives_everyone_what_fits_the_tightest_class():
    found = plan("small")
    assert found.serves == dict.fromkeys(DEVICES, "small")
    (budget,) = found.config.classes.values()
    assert budget.macs_share == 0.1


def test_exclude_asks_only_the_strong_and_as_often_as_any_other_method():
    found = plan("exclude")
    assert found.serves == {"gateway": "exclude", "phone": None, "sensor": None}
    # 10 of 40 devices are strong, so of 8 a round they would have 2.
    assert found.config.training.devices_per_round == 2
    (budget,) = found.config.classes.values()
    assert budget.macs_share is None


def test_heterofl_trains_fixed_leading_units_and_averages_where_they_overlap():
    architecture, model = units(4)
    for number in (1, 2, 3):
        model = step("heterofl", architecture, model, number)
    assert windows(model) == {"gateway": [0, 10, 20, 30], "phone": [0, 10], "sensor": [0]}
    aggregate = Aggregate(architecture, model.shapes)
    aggregate.add("gateway", np.array([1, 1, 1, 1], np.float32), 1)
    aggregate.add("phone", np.array([3, 3], np.float32), 1)
    aggregate.add("sensor", np.array([8], np.float32), 2)
    # (1 + 3 + 2*8) / 4, (1 + 3) / 2, then the gateway alone.
    assert aggregate.result()[0]["w"].tolist() == [5, 2, 1, 1]
    assert find_method("heterofl").policy().partners(
        plan("heterofl").config.training, model.shapes, "gateway"
    ) == [None]


def test_heterofl_leaves_labels_out_of_the_loss_that_a_device_does_not_have():
    mask = label_mask(np.array([0, 2, 2]), 4)
    assert mask.tolist() == [0, ABSENT, 0, ABSENT]
    logits = np.array([1.0, 50.0, 1.0, 2.0]) + mask
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    # However large, the logit of an absent label has next to no share and so no gradient...
    present = label_mask(np.array([0, 1, 2, 3]), 4)
    assert present.tolist() == [0, 0, 0, 0]
    # ... up to logits of about 30.
    assert shares[3] < 1e-12


def test_fedrolex_rolls_every_class_s_window_by_one_unit_a_round():
    architecture, model = units(4)
    seen = [windows(model)]
    for number in (1, 2, 3, 4):
        model = step("fedrolex", architecture, model, number, rounds=9)
        seen.append(windows(model))
    assert [w["sensor"] for w in seen] == [[0], [10], [20], [30], [0]]
    assert [w["phone"] for w in seen] == [[0, 10], [10, 20], [20, 30], [0, 30], [0, 10]]
    assert all(w["gateway"] == [0, 10, 20, 30] for w in seen)


def test_fedrolex_ships_the_window_of_the_last_round():
    architecture, model = units(4)
    after = step("fedrolex", architecture, model, 9, rounds=9)
    assert after is model


def test_fjord_draws_every_width_that_a_device_can_hold_and_teaches_it_by_the_widest():
    architecture, model = units(4)
    method = find_method("fjord")
    training = plan("fjord").config.training
    widths = {n: method.policy().partners(training, model.shapes, n) for n in model.shapes}
    assert widths == {
        "gateway": [None, {"g": 2}, {"g": 1}],
        "phone": [None, {"g": 1}],
        "sensor": [None],
    }
    assert (training.distill_weight, training.student_task_weight, training.mutual_weight) == (
        1.0,
        0.0,
        0.0,
    )
    # Ordered dropout: a narrower width is always the leading part of the wider one.
    assert student_index(architecture, {"g": 4}, {"g": 2}) == {"w": (slice(0, 2),)}
    assert windows(step("fjord", architecture, model, 5)) == windows(model)


def test_nested_teaches_narrower_classes_and_puts_units_in_the_order_of_their_importance():
    architecture, model = units(4)
    method = find_method("nested")
    config = fleet(remask_every=5, rounds=20)
    assert method.plan(config, DEVICES).config == config
    partners = method.policy().partners(config.training, model.shapes, "gateway")
    assert partners == [{"g": 2}, {"g": 1}]
    assert method.policy().partners(config.training, model.shapes, "sensor") == [None]
    ledger = Ledger(architecture, {"g": 1})
    ledger.add_scores(Criterion.TAYLOR, {"g": 4}, np.array([1, 2, 8, 4], np.float32), 1, 1)
    ledger.close_round()
    assert method.policy().scores(config.training, 4, ledger, model) is None
    scores = method.policy().scores(config.training, 5, ledger, model)
    after, _ = remask(architecture, model, scores, model.shapes)
    assert windows(after) == {"gateway": [0, 10, 20, 30], "phone": [20, 30], "sensor": [20]}
    # In the second half of the rounds the masks have time to settle.
    assert method.policy().scores(config.training, 15, ledger, model) is None


def test_devices_report_scores_only_as_long_as_masks_may_change():
    policy = find_method("nested").policy()
    settings = fleet(remask_every=4, rounds=20).training
    assert [n for n in range(1, 21) if policy.listens(settings, n)] == list(range(1, 9))
    assert not policy.listens(fleet(remask_every=0).training, 1)
    assert not policy.listens(fleet(criterion="magnitude").training, 1)
