"""The coordinator, the strategy and the agent core together, without a network."""

import numpy as np
import pytest

from fleetprune_coordinator.records import Phase
from fleetprune_sim.loop import open_coordinator, train
from tests.simulations.fleets import tiny_config, tiny_devices


class StopHereError(Exception):
    """Stands for a power cut."""


def run(folder, stop_after=None, **training):
    """Train; returns the parameters, the masks seen and the metrics."""
    devices = tiny_devices()
    seen = []

    def on_round(metrics):
        seen.append(metrics)
        if stop_after == len(seen):
            raise StopHereError

    with open_coordinator(tiny_config(folder, **training), devices) as coordinator:
        try:
            train(coordinator, devices, on_round)
        except StopHereError:
            return None, seen
        return coordinator.rounds.model, seen


def test_the_loss_falls_and_both_classes_are_trained(tmp_path):
    model, seen = run(tmp_path, rounds=8, epochs=4)
    losses = [m["loss"] for m in seen if m["phase"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
    assert all(m["answers"] == 4 and m["refused"] == 0 for m in seen if m["phase"] == "train")
    (group,) = model.shapes["large"]
    assert model.shapes["small"][group] < model.shapes["large"][group] == 16


def test_a_run_is_the_same_to_the_bit_for_the_same_seed(tmp_path):
    one, _ = run(tmp_path / "a")
    two, _ = run(tmp_path / "b")
    for name, values in one.params.items():
        np.testing.assert_array_equal(values, two.params[name])


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_that_was_cut_short_goes_on_and_ends_the_same(tmp_path, after):
    whole, _ = run(tmp_path / "whole", codec="fp32")
    run(tmp_path / "cut", stop_after=after, codec="fp32")
    resumed, seen = run(tmp_path / "cut", codec="fp32")
    assert [m["round"] for m in seen if m["phase"] == "train"] == list(range(after + 1, 5))
    assert resumed.mask_version == whole.mask_version
    for name, values in whole.params.items():
        np.testing.assert_array_equal(values, resumed.params[name])


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    run(tmp_path)
    _, seen = run(tmp_path)
    assert seen == []


def test_a_longer_training_is_calibrated_again(tmp_path):
    run(tmp_path)
    _, seen = run(tmp_path, rounds=6)
    assert [(m["phase"], m["round"]) for m in seen] == [
        ("train", 5),
        ("train", 6),
        ("calibrate", 6),
    ]


def test_the_registry_keeps_rounds_tasks_and_masks(tmp_path):
    devices = tiny_devices()
    with open_coordinator(tiny_config(tmp_path), devices) as coordinator:
        train(coordinator, devices)
        registry = coordinator.registry
        assert [r.number for r in registry.rounds() if r.phase is Phase.TRAIN] == [1, 2, 3, 4]
        assert len(registry.tasks(1, Phase.TRAIN)) == 4
        assert registry.latest_mask().version == coordinator.rounds.model.mask_version


def test_every_released_file_is_within_its_budget(tmp_path):
    devices = tiny_devices()
    with open_coordinator(tiny_config(tmp_path), devices) as coordinator:
        train(coordinator, devices)
        released = coordinator.release()
        for name, r in released.items():
            assert coordinator.planner.budgets[name].meets(r.artifact.costs)
            assert r.artifact.costs.artifact_bytes == len(r.artifact.onnx) == r.manifest.size
            expected = coordinator.planner.costs(coordinator.rounds.model.shapes[name])
            assert r.artifact.costs.macs == expected.macs
            assert r.artifact.costs.artifact_bytes <= expected.artifact_bytes
        small = released["small"].artifact.costs.macs
        assert small <= 0.5 * coordinator.planner.dense.macs
        assert coordinator.registry.releases()[0].number == 1


def test_a_release_that_is_out_already_is_not_published_again(tmp_path):
    devices = tiny_devices()
    with open_coordinator(tiny_config(tmp_path), devices) as coordinator:
        train(coordinator, devices)
        first = coordinator.release()
    with open_coordinator(tiny_config(tmp_path), devices) as coordinator:
        again = coordinator.release()
        assert {n: r.manifest for n, r in again.items()} == {
            n: r.manifest for n, r in first.items()
        }
        assert coordinator.repository.latest_release() == 1


def test_a_release_is_recorded_though_the_coordinator_was_killed_after_publishing(
    tmp_path, monkeypatch
):
    def killed(*records):
        raise StopHereError

    with open_coordinator(tiny_config(tmp_path), tiny_devices()) as coordinator:
        monkeypatch.setattr(coordinator.registry, "add_release", killed)
        with pytest.raises(StopHereError):
            coordinator.release()
        assert coordinator.repository.latest_release() == 1
    for _ in range(2):
        with open_coordinator(tiny_config(tmp_path), tiny_devices()) as coordinator:
            coordinator.release()
            assert {(r.number, r.device_class) for r in coordinator.registry.releases()} == {
                (1, "large"),
                (1, "small"),
            }
