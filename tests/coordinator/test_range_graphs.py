"""Models that cannot be quantised: float32 ships with "auto", and true is refused at once."""

import json
import logging

import numpy as np
import pytest
from torch import Tensor, nn

from fleetprune.errors import ConfigError, GraphError
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.export import Format, export
from fleetprune_coordinator.records import Phase
from fleetprune_coordinator.round_plan import RANGES
from fleetprune_sim.loop import LoopDevice, open_coordinator, train
from tests.simulations.fleets import tiny_config, tiny_devices

NOTHING = "the model has no operator that can run on integers"
MIXED = "its tensors mix samples"


class Upsampler(nn.Module):
    """Two transposed convolutions, for which onnxruntime has no integer kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ConvTranspose1d(2, 8, 3)
        self.out = nn.ConvTranspose1d(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.wide(x).relu()).mean(2)


def upsampling(folder, int8) -> FleetConfig:
    made = tiny_config(folder, rounds=1).model_dump()
    made["model"] |= {
        "factory": f"{__name__}:Upsampler",
        "arguments": {},
        "input_shape": [2, 4],
    }
    made["pruning"]["int8"] = int8
    return FleetConfig.model_validate(made)


def devices() -> dict[str, LoopDevice]:
    rng = np.random.default_rng(0)
    return {
        name: LoopDevice(
            of, True, rng.normal(size=(20, 2, 4)).astype(np.float32), np.arange(20) % 3
        )
        for name, of in (("d0", "large"), ("d1", "small"))
    }


def reasons(events) -> dict[str, str]:
    told = map(json.loads, events.read_text().splitlines())
    (*_, release) = (event for event in told if event["event"] == "release")
    return {name: one["int8"]["reason"] for name, one in release["classes"].items()}


def test_auto_ships_float32_and_says_why(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "fleetprune_coordinator.range_graphs")
    seen, events = [], tmp_path / "events.jsonl"
    config = upsampling(tmp_path, "auto")
    with open_coordinator(config, devices(), events) as coordinator, coordinator.events:
        coordinator.rounds.prepare()
        train(coordinator, devices(), lambda m: seen.append((m["phase"], m["step"])))
        assert coordinator.rounds.ranges == {}
    assert ("calibrate", RANGES) not in seen
    assert [r.getMessage() for r in caplog.records] == [
        f"class {name} keeps its float32 file: {NOTHING}" for name in ("large", "small")
    ]
    # The reason is known after a restart as well.
    with open_coordinator(config, devices(), events) as coordinator, coordinator.events:
        assert coordinator.rounds.remaining() == []
        released = coordinator.release()
    assert not any(one.artifact.int8 for one in released.values())
    assert reasons(events) == {"large": NOTHING, "small": NOTHING}
    with pytest.raises(ConfigError) as caught:
        export(config, "small", Format.ONNX, tmp_path / "small.onnx", int8=True)
    assert str(caught.value) == f"class small cannot be quantised: {NOTHING}"


def test_true_is_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError) as caught:
        open_coordinator(upsampling(tmp_path, True), devices())
    assert str(caught.value) == (
        f"pruning.int8 is true, but the model cannot be quantised: {NOTHING}; "
        'set it to "auto" or false'
    )


def tiny(folder, int8) -> FleetConfig:
    made = tiny_config(folder, rounds=1).model_dump()
    made["pruning"]["int8"] = int8
    return FleetConfig.model_validate(made)


def without(coordinator, monkeypatch, name: str) -> None:
    """As if the model of one class could not be counted."""
    library, keep = coordinator.rounds._library, dict(coordinator.rounds.model.shapes[name])
    real = library.ranges

    def ranges(asked):
        if dict(asked) == keep:
            raise GraphError(MIXED)
        return real(asked)

    monkeypatch.setattr(library, "ranges", ranges)


def test_one_class_without_ranges_leaves_the_others_theirs(tmp_path, monkeypatch):
    events = tmp_path / "events.jsonl"
    opened = open_coordinator(tiny(tmp_path, "auto"), tiny_devices(), events)
    with opened as coordinator, coordinator.events:
        without(coordinator, monkeypatch, "small")
        coordinator.rounds.prepare()
        train(coordinator, tiny_devices())
        tasks = coordinator.registry.tasks(1, Phase.CALIBRATE, step=RANGES)
        assert {t.task.shape for t in tasks} == {"large"}
        assert list(coordinator.rounds.ranges) == ["large"]
        coordinator.release()
    assert reasons(events)["small"] == MIXED
    assert "data.test" in reasons(events)["large"]


def test_with_true_a_class_without_ranges_ends_the_work(tmp_path, monkeypatch):
    with open_coordinator(tiny(tmp_path, True), tiny_devices()) as coordinator:
        without(coordinator, monkeypatch, "small")
        with pytest.raises(GraphError) as caught:
            coordinator.rounds.prepare()
    assert str(caught.value) == (
        f"pruning.int8 is true, but the model of class small cannot be quantised: {MIXED}"
    )
