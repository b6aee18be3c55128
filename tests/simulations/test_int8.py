"""Quantised releases of a whole fleet: from devices' counts to files that devices accept."""

import json
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fleetprune.errors import BudgetError
from fleetprune_agent.health import examine
from fleetprune_agent.slot_files import GOLDEN, MODEL
from fleetprune_agent.trial import Evidence, Request
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.export import Format, export
from fleetprune_coordinator.int8 import Verdict
from fleetprune_coordinator.quantise import all_integer
from fleetprune_coordinator.records import Phase
from fleetprune_coordinator.round_plan import RANGES
from fleetprune_sim.data import digits
from fleetprune_sim.loop import LoopDevice, open_coordinator, train
from fleetprune_sim.models import digits_cnn

DEVICES = {f"hub-{i}": "hub" for i in range(3)} | {f"sensor-{i}": "sensor" for i in range(3)}


@pytest.fixture(scope="module")
def data():
    return digits.load(list(DEVICES), seed=0)


@pytest.fixture(scope="module")
def start(data, tmp_path_factory):
    """A network that knows digits, trained in one place."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = digits_cnn()
    x = torch.tensor(np.concatenate([d.x_train for d in data.devices.values()]))
    y = torch.tensor(np.concatenate([d.y_train for d in data.devices.values()]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("start") / "start.pt"
    torch.save(model.state_dict(), path)
    return path


def describe(folder, data, start, *, test=True, sensor=None, **pruning):
    folder.mkdir(exist_ok=True)
    np.savez(folder / "test.npz", x=data.x_test, y=data.y_test)
    return FleetConfig.model_validate(
        {
            "fleet": "digits",
            "state": folder / "state",
            "model": {
                "factory": "fleetprune_sim.models:digits_cnn",
                "input_shape": (1, 8, 8),
                "classes": 10,
                "initial": start,
            },
            "data": {"test": folder / "test.npz"} if test else {},
            "training": {"rounds": 2, "calibration_passes": 2, "learning_rate": 0.02},
            "pruning": pruning,
            "classes": {
                "hub": {},
                "sensor": {"trains": False} | (sensor or {"macs_share": 0.5}),
            },
        }
    )


def devices(data):
    return {
        name: LoopDevice(
            kind, kind == "hub", data.devices[name].x_train, data.devices[name].y_train
        )
        for name, kind in DEVICES.items()
    }


@pytest.fixture(scope="module")
def trained(data, start, tmp_path_factory):
    """A fleet whose rounds are done, and the phases and steps that they had."""
    folder, fleet, seen = tmp_path_factory.mktemp("trained"), devices(data), []
    with open_coordinator(describe(folder, data, start, int8=True), fleet) as coordinator:
        train(coordinator, fleet, lambda metrics: seen.append((metrics["phase"], metrics["step"])))
        tasks = coordinator.registry.tasks(2, Phase.CALIBRATE, step=RANGES)
    return folder / "state", seen, [t.task.shape for t in tasks]


@contextmanager
def taken_up(trained, config):
    """A coordinator on a copy of the trained state; it has nothing left to do."""
    shutil.copytree(trained[0], config.state)
    events = config.state.parent / "events.jsonl"
    with open_coordinator(config, {}, events) as coordinator, coordinator.events:
        assert coordinator.rounds.remaining() == []
        yield coordinator


def told(config):
    """What the last release's event says of each class."""
    lines = (config.state.parent / "events.jsonl").read_text().splitlines()
    (*_, release) = (e for e in map(json.loads, lines) if e["event"] == "release")
    return release["classes"]


def test_the_measuring_step_is_the_last_and_is_done_once(trained):
    _, seen, shapes = trained
    assert seen[-1] == ("calibrate", RANGES)
    assert seen.count(("calibrate", RANGES)) == 1
    # The hubs count for both classes, the sensors for their own.
    assert sorted(shapes) == ["hub"] * 3 + ["sensor"] * 6


def test_int8_files_are_within_a_point_and_a_quarter_of_the_size(tmp_path, data, start, trained):
    config = describe(tmp_path, data, start, int8=True)
    with taken_up(trained, config) as coordinator:
        released = coordinator.release()
        again = coordinator.release()
    assert {n: r.manifest for n, r in again.items()} == {n: r.manifest for n, r in released.items()}
    for name, one in released.items():
        verdict = Verdict(**told(config)[name]["int8"])
        assert verdict.int8
        assert verdict.reason == ""
        assert verdict.float_accuracy > 0.9
        assert verdict.float_accuracy - verdict.accuracy <= 0.01
        assert verdict.agreement >= 0.99
        assert round(one.manifest.accuracy, 4) == verdict.accuracy
        file = one.artifact
        assert file.int8
        assert all_integer(file.onnx)
        assert len(file.onnx) == told(config)[name]["bytes"] < 0.3 * 4 * file.parameters
        counted = coordinator.planner.costs(coordinator.rounds.model.shapes[name])
        assert file.costs.artifact_bytes <= counted.artifact_bytes
        assert file.costs.peak_activation_bytes == counted.peak_activation_bytes


def test_a_device_accepts_the_file_and_knows_its_labels_by_the_golden_samples(
    tmp_path, data, start, trained
):
    config = describe(tmp_path, data, start, int8=True)
    with taken_up(trained, config) as coordinator:
        released = coordinator.release()
    for one in released.values():
        (tmp_path / MODEL).write_bytes(one.artifact.onnx)
        (tmp_path / GOLDEN).write_bytes(one.artifact.golden)
        examine(Request(folder=str(tmp_path), manifest=one.manifest, runs=1), Evidence())
        with np.load(tmp_path / GOLDEN) as golden:
            ordered, spread = np.sort(golden["y"], axis=1), np.ptp(golden["y"])
        # Whatever is within the tolerance has the same largest output.
        assert (ordered[:, -1] - ordered[:, -2] > 2 * one.manifest.tolerance).all()
        assert one.manifest.tolerance < 0.05 * spread


def test_int8_makes_room_for_wider_models(tmp_path, data, start):
    """A flash budget of a quarter of the dense float32 file holds nearly the whole network."""
    kept, limits = [], []
    for name, pruning in (("wide", {"int8": True}), ("narrow", {})):
        sensor = {"flash_share": 0.26}
        config = describe(tmp_path / name, data, start, sensor=sensor, **pruning)
        with open_coordinator(config, {}) as coordinator:
            flat = {g: np.ones(n, np.float32) for g, n in coordinator.architecture.groups.items()}
            kept.append(sum(coordinator.planner.shapes(3, flat)["sensor"].values()))
            limits.append(coordinator.planner.budgets["sensor"].flash_bytes)
    assert kept[0] > 1.5 * kept[1]
    assert limits[0] == limits[1] == int(0.26 * coordinator.planner.dense.artifact_bytes)


def test_the_float32_file_ships_where_int8_costs_too_much(tmp_path, data, start, trained):
    config = describe(tmp_path, data, start, int8="auto")
    with taken_up(trained, config) as coordinator:
        coordinator.rounds.ranges["sensor"] *= 0.001  # as if devices had seen hardly anything
        released = coordinator.release()
    assert [told(config)[name]["int8"]["int8"] for name in ("hub", "sensor")] == [True, False]
    verdict = Verdict(**told(config)["sensor"]["int8"])
    lost = verdict.float_accuracy - verdict.accuracy
    assert lost > 0.3
    reason = rf"int8 loses {lost:.3f}\d of accuracy, allowed are 0.01"
    assert re.fullmatch(reason, verdict.reason)
    assert not released["sensor"].artifact.int8
    assert round(released["sensor"].manifest.accuracy, 4) == verdict.float_accuracy
    assert released["sensor"].manifest.tolerance == 1e-3


def test_what_does_not_fit_in_float32_ships_in_int8_all_the_same(tmp_path, data, start, trained):
    config = describe(tmp_path, data, start, int8=True, int8_loss=0)
    with taken_up(trained, config) as coordinator:
        coordinator.rounds.ranges["sensor"] *= 0.001
        float_bytes = 4 * coordinator.artifact("sensor").parameters
        tight = coordinator.planner.budgets["sensor"].model_copy(
            update={"flash_bytes": float_bytes}
        )
        coordinator.planner.budgets["sensor"] = tight
        assert coordinator.release()["sensor"].artifact.int8
    assert told(config)["sensor"]["int8"]["reason"].endswith(
        " of accuracy, allowed are 0; the float32 file is over the budget"
    )


@pytest.mark.parametrize("int8", [True, "auto"])
def test_without_a_test_set_only_those_who_insist_get_int8(tmp_path, data, start, trained, int8):
    config = describe(tmp_path, data, start, test=False, int8=int8)
    with taken_up(trained, config) as coordinator:
        released = coordinator.release()
    assert {one.artifact.int8 for one in released.values()} == {int8 is True}
    reason = "there is no test set (data.test) to measure what int8 costs"
    assert told(config)["hub"]["int8"]["reason"] == (reason if int8 == "auto" else "")


def test_ranges_that_nobody_measured(tmp_path, data, start, trained):
    config = describe(tmp_path, data, start, int8=True)
    with taken_up(trained, config) as coordinator:
        coordinator.rounds.ranges.clear()
        made = coordinator.artifact("sensor")
        assert not made.int8
        tight = coordinator.planner.budgets["sensor"].model_copy(update={"flash_bytes": 1000})
        coordinator.planner.budgets["sensor"] = tight
        with pytest.raises(BudgetError) as caught:
            coordinator.artifact("sensor")
    assert str(caught.value) == (
        f"class sensor: artifact_bytes {len(made.onnx)} > 1000; its file is not quantised: "
        "no device has measured the ranges of activations"
    )


def test_the_quantised_file_can_be_exported(tmp_path, data, start, trained):
    config = describe(tmp_path, data, start, int8=True)
    with taken_up(trained, config) as coordinator:
        released = coordinator.release()
    export(config, "sensor", Format.ONNX, tmp_path / "sensor.onnx", int8=True)
    assert (tmp_path / "sensor.onnx").read_bytes() == released["sensor"].artifact.onnx
