"""Schedules over whole trainings: what each round's classes hold, and where a kill leaves it."""

from itertools import pairwise

import numpy as np
import pytest

from fleetprune.dynamic_schedule import Move, Threshold
from fleetprune.errors import ConfigError
from fleetprune.schedule import Schedule
from fleetprune_coordinator.records import Phase
from fleetprune_coordinator.tightening import Tightening
from fleetprune_sim.loop import open_coordinator, train
from tests.simulations.fleets import tiny_config, tiny_devices

DENSE, CUT = 16, 8
"""Hidden units of the tiny model, and of its smaller class."""


def config(folder, schedule, **training):
    made = tiny_config(folder, rounds=6, remask_every=0, **training)
    return made.model_copy(update={"schedule": Schedule.model_validate(schedule)})


def widths(coordinator):
    """Units of the smaller class in each training round."""
    registry = coordinator.registry
    masks = {r.number: r.mask_version for r in registry.rounds() if r.phase is Phase.TRAIN}
    return [registry.mask(version).keep["small"]["0"] for _, version in sorted(masks.items())]


@pytest.mark.parametrize(
    ("schedule", "held"),
    [
        ({}, [8, 8, 8, 8, 8, 8]),
        ({"curve": "linear", "end": 5}, [12, 12, 8, 8, 8, 8]),
        ({"curve": "linear", "end": 6, "frequency": 3}, [16, 16, 12, 12, 12, 8]),
        ({"curve": "one_shot", "begin": 4}, [16, 16, 16, 8, 8, 8]),
    ],
)
def test_classes_shrink_with_the_schedule_though_masks_never_change_otherwise(
    tmp_path, schedule, held
):
    with open_coordinator(config(tmp_path, schedule), tiny_devices()) as coordinator:
        train(coordinator, tiny_devices())
        # A round's tasks are made with the mask that stood when it was opened.
        assert widths(coordinator) == held
        assert coordinator.rounds.model.shapes["small"]["0"] == CUT


def test_after_a_single_shot_masks_stay(tmp_path):
    shot = config(tmp_path, {"curve": "one_shot"})
    often = shot.training.model_copy(update={"remask_every": 1, "last_remask": 6})
    with open_coordinator(shot.model_copy(update={"training": often}), tiny_devices()) as opened:
        train(opened, tiny_devices())
        assert opened.rounds.model.mask_version == 0


def test_a_dynamic_schedule_cuts_while_the_loss_is_stable(tmp_path):
    quick = {"curve": "dynamic", "end": 6, "step": 0.5, "window": 1, "stable": 1.0}
    with open_coordinator(config(tmp_path, quick), tiny_devices()) as coordinator:
        train(coordinator, tiny_devices())
        told = [
            (r.metrics["slack"], r.metrics.get("schedule"))
            for r in coordinator.registry.rounds()
            if r.phase is Phase.TRAIN
        ]
        assert told[:4] == [(1.0, "wait"), (0.5, "cut"), (0.5, "wait"), (0.0, "cut")]
        assert widths(coordinator)[1:5] == [16, 12, 12, 8]


def test_a_dynamic_schedule_that_never_settles_ends_at_its_end(tmp_path):
    never = {"curve": "dynamic", "end": 5, "window": 1, "stable": 0.0}
    with open_coordinator(config(tmp_path, never), tiny_devices()) as coordinator:
        train(coordinator, tiny_devices())
        assert widths(coordinator)[-2:] == [8, 8]


def test_it_backs_off_when_accuracy_on_the_validation_set_falls(tmp_path):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 6)).astype(np.float32)
    np.savez(tmp_path / "validation.npz", x=x, y=x[:, :3].argmax(axis=1))
    quick = {"curve": "dynamic", "end": 6, "step": 0.5, "window": 1, "stable": 1.0}
    made = config(tmp_path, quick)
    data = made.data.model_copy(update={"validation": tmp_path / "validation.npz"})
    made = made.model_copy(update={"data": data})
    with open_coordinator(made, tiny_devices()) as coordinator:
        state = coordinator.rounds.cutting.tightening
        seen = []
        watch = state._watch
        assert watch is not None
        accuracies = iter([0.9, 0.9, 0.5, 0.9, 0.9, 0.9])

        def watched(model):
            seen.append(watch(model))
            return next(accuracies)

        state._watch = watched
        train(coordinator, tiny_devices())
        told = [
            r.metrics.get("schedule")
            for r in coordinator.registry.rounds()
            if r.phase is Phase.TRAIN
        ]
        assert told[:3] == ["wait", "cut", "back off"]
        assert all(0.0 <= accuracy <= 1.0 for accuracy in seen)
        assert len(set(seen)) > 1


def test_a_validation_set_of_another_model_is_refused(tmp_path):
    np.savez(tmp_path / "validation.npz", x=np.zeros((3, 5), np.float32), y=np.zeros(3))
    made = config(tmp_path, {"curve": "dynamic", "end": 6})
    data = made.data.model_copy(update={"validation": tmp_path / "validation.npz"})
    with pytest.raises(ConfigError) as e:
        open_coordinator(made.model_copy(update={"data": data}), tiny_devices())
    assert str(e.value) == (
        f"data.validation {tmp_path}/validation.npz: x of shape (3, 5) and y of (3,), "
        "expected (n, 6) and (n,)"
    )


def test_a_kill_leaves_it_where_it_was():
    schedule = Schedule(curve="dynamic", end=9)
    one = Tightening(schedule)
    one.threshold = Threshold(0.25, (0.5, 0.75), 0.875, Move.BACK_OFF)
    two = Tightening(schedule)
    two.restore(one.arrays())
    assert two.threshold == one.threshold
    fresh = Tightening(schedule)
    fresh.restore(Tightening(schedule).arrays())
    assert fresh.threshold == Tightening(schedule).threshold
    still = Tightening(Schedule())
    still.restore(still.arrays())
    assert (still.arrays(), still.slack, still.metrics(3)) == ({}, None, {})


def test_regrowth_bounds_what_a_new_mask_replaces(tmp_path):
    made = tiny_config(tmp_path, rounds=4, remask_every=1, last_remask=4, regrow=0.25)
    with open_coordinator(made, tiny_devices()) as coordinator:
        train(coordinator, tiny_devices())
        registry = coordinator.registry
        kept = [
            set(registry.mask(v).order["0"][:CUT].tolist())
            for v in range(coordinator.rounds.model.mask_version + 1)
        ]
    moved = [len(after - before) for before, after in pairwise(kept)]
    # floor(8 * 0.25 * cosine): at most one after the first round, none from the second on
    assert all(n <= 1 for n in moved)
