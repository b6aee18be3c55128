"""What `fleetprune coordinator` and its start say to an operator, without a broker."""

import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fleetprune.errors import ConfigError
from fleetprune.messages import Enrol, Telemetry
from fleetprune_coordinator.commands import app
from fleetprune_coordinator.config import load_fleet_config
from fleetprune_coordinator.coordinator import Coordinator
from fleetprune_coordinator.events import EventLog

MODEL = """\
from torch import nn


def mlp(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, 3))
"""

FLEET = """\
fleet = "f"

[model]
factory = "told_nets:mlp"
arguments = { hidden = 16 }
input_shape = [5]
classes = 3

[classes.hub]

[classes.meter]
macs_share = 0.5
trains = false
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "told_nets.py").write_text(MODEL)
    (tmp_path / "fleet.toml").write_text(FLEET)
    return tmp_path / "fleet.toml"


def call(*words: str, config: Path):
    return CliRunner().invoke(app, [*words, "--config", str(config)])


def change(config: Path, old: str, new: str) -> None:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


def start(config: Path) -> Coordinator:
    return Coordinator(load_fleet_config(config), time.time, EventLog(None, time.time))


def refused(config: Path) -> str:
    with pytest.raises(ConfigError) as e:
        start(config)
    return str(e.value)


def test_init_names_the_devices_root_of_trust_and_is_refused_twice(config):
    done = call("init", config=config)
    root = config.parent / "state/releases/public/metadata/1.root.json"
    assert done.exit_code == 0
    assert f"Give every device {root} as its root of trust." in done.stdout
    assert root.is_file()
    assert "keys are never overwritten" in str(call("init", config=config).exception)


def test_status_before_the_first_start(config):
    call("init", config=config)
    state = config.parent / "state"
    assert str(call("status", config=config).exception) == (
        f"{state} holds no registry yet: `fleetprune coordinator serve` makes it"
    )
    assert not (state / "registry.db").exists()


def test_status_fits_a_terminal_and_tells_what_devices_report(config, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    call("init", config=config)
    with start(config) as coordinator:
        for name in ("greenhouse-north-1", "greenhouse-north-2"):
            coordinator.registry.enrol(
                Enrol(
                    device=name,
                    device_class="hub",
                    agent_version="0.1.0",
                    trains=True,
                    samples=100,
                    rss_mb=101.6,
                )
            )
        coordinator.registry.record_telemetry(
            Telemetry(device="greenhouse-north-1", device_class="hub", error="release 1: too slow")
        )
    done = call("status", config=config)
    assert done.exit_code == 0, done.exception
    assert done.stdout.endswith("\ngreenhouse-north-1: release 1: too slow\n")
    lines = done.stdout.splitlines()
    assert lines[0] == "f: round 0 of 20; release 0"
    assert max(len(line) for line in lines) <= 80
    (row,) = (line for line in lines if "greenhouse-north-2" in line)
    assert re.split(r"\s{2,}", row.strip())[-5:] == ["0", "unknown", "-", "-", "102"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "hidden = 16",
            "hidden = 24",
            "{state} holds the training of another model than told_nets:mlp with these arguments: "
            "give this one another `state`",
        ),
        (
            "[classes.meter]",
            "[classes.metre]",
            "{state} holds the training of classes hub, meter, but fleet.toml has hub, metre: "
            "go back, or give these another `state`",
        ),
    ],
)
def test_a_state_of_something_else(config, old, new, message):
    call("init", config=config)
    start(config).registry.close()
    start(config).registry.close()
    change(config, old, new)
    assert refused(config) == message.format(state=config.parent / "state")
    change(config, new, old)
    start(config).registry.close()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((4, 6)), np.zeros(4, int), "x of shape (4, 6) and y of (4,), expected (n, 5)"),
        (np.full((4, 5), np.nan), np.zeros(4, int), "x has values that are not finite"),
        (np.zeros((4, 5)), np.arange(4), "labels 0..3, expected 0..2"),
        (np.zeros((4, 5)), np.arange(4) - 1, "labels -1..2, expected 0..2"),
    ],
)
def test_a_test_set_that_does_not_fit(config, x, y, message):
    call("init", config=config)
    path = config.parent / "test.npz"
    np.savez(path, x=x, y=y)
    change(config, "[classes.hub]", '[data]\ntest = "test.npz"\n\n[classes.hub]')
    assert refused(config).startswith(f"data.test {path}: {message}")


def test_a_test_set_that_is_damaged(config):
    call("init", config=config)
    path = config.parent / "test.npz"
    np.savez(path, x=np.zeros((4, 5)), y=np.zeros(4, int))
    path.write_bytes(path.read_bytes()[:200])
    change(config, "[classes.hub]", '[data]\ntest = "test.npz"\n\n[classes.hub]')
    assert refused(config).startswith(f"data.test {path}: expected an .npz with x and y: ")


@pytest.mark.parametrize("content", ["x", "not a model\n", "a list of things\n\n", ""])
def test_initial_weights_that_are_none(config, content):
    call("init", config=config)
    path = config.parent / "start.pt"
    change(config, "classes = 3", 'classes = 3\ninitial = "start.pt"')
    path.write_text(content)
    told = (
        f"model.initial {path} is no state_dict of tensors alone: save it with "
        "torch.save(model.state_dict(), path)"
    )
    assert refused(config) == told
    torch.save({"epoch": 3, "model": nn.Linear(2, 2).state_dict()}, path)
    assert refused(config) == told


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (
            nn.Linear(2, 2),
            "it lacks 0.weight, 0.bias, 1.weight and 6 more, and has weight, bias besides",
        ),
        (
            nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
            "it has 0.weight (8, 5) instead of (16, 5), 0.bias (8,) instead of (16,), "
            "1.weight (8,) instead of (16,) and 4 more",
        ),
        (
            nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.ReLU(), nn.Linear(16, 3)),
            "it lacks 1.weight, 1.bias, 1.running_mean and 2 more",
        ),
    ],
    ids=["other", "narrower", "without norm"],
)
def test_initial_weights_that_do_not_fit(config, other, difference):
    call("init", config=config)
    path = config.parent / "start.pt"
    change(config, "classes = 3", 'classes = 3\ninitial = "start.pt"')
    torch.save(other.state_dict(), path)
    assert refused(config) == (
        f"model.initial {path} does not fit the model: {difference}; expected a state_dict of "
        "told_nets:mlp with these arguments"
    )
