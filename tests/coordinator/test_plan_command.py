"""`fleetprune plan`: what it says, and what it says of wrong input."""

import json
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fleetprune.costs import CostModel
from fleetprune.errors import BudgetError, ConfigError, TraceError
from fleetprune.latency import LatencyPoint, LatencyTable, Precision
from fleetprune_coordinator.config import load_fleet_config
from fleetprune_coordinator.coordinator import load_model
from fleetprune_coordinator.describe import describe
from fleetprune_coordinator.plan_command import app
from fleetprune_coordinator.registry import Registry
from fleetprune_coordinator.timing import digest

MODEL = """\
from torch import nn


def mlp(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, hidden), nn.ReLU(), nn.Linear(hidden, 16), nn.ReLU(),
                         nn.Linear(16, 3))
"""

FLEET = """\
fleet = "f"

[model]
factory = "planned_nets:mlp"
arguments = { hidden = 32 }
input_shape = [5]
classes = 3

[classes.hub]

[classes.meter]
macs_share = 0.5
latency_ms = 5
trains = false
"""
# 32 * 5 + 16 * 32 + 3 * 16 = 720 MACs; 16 and 16 units have 384, 16 and 8 have 232, 24 and 8 336.


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "planned_nets.py").write_text(MODEL)
    (tmp_path / "fleet.toml").write_text(FLEET)
    return tmp_path / "fleet.toml"


def call(*words: str):
    return CliRunner().invoke(app, list(words))


def change(config: Path, old: str, new: str) -> None:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


def measured(config: Path, ms_per_mac: float, precision: Precision = Precision.FLOAT32) -> None:
    """Put a table of the meters into the registry."""
    fleet = load_fleet_config(config)
    architecture = describe(load_model(fleet), torch.zeros(1, 5), fleet)
    model = CostModel(architecture)
    points = []
    for a, b in ((32, 16), (24, 16), (16, 16), (16, 8), (8, 8), (32, 8)):
        keep = dict(zip(architecture.groups, (a, b), strict=True))
        ms = ms_per_mac * model.costs(keep).macs
        points.append(LatencyPoint(keep=keep, median_ms=ms))
    table = LatencyTable(
        device_class="meter",
        runtime="onnxruntime",
        version="1.32.0",
        precision=precision,
        devices=3,
        points=tuple(points),
    )
    with Registry.open(fleet.state, time.time) as registry:
        registry.set_classes({"hub": True, "meter": False})
        registry.set_latency(table, digest(architecture))


def test_a_plan_for_people(config, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = call(str(config))
    assert done.exit_code == 0, done.exception
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert max(len(line) for line in lines[1:]) <= 80
    assert lines[0].startswith("f: 48 units in 2 groups; the dense model has ")
    assert lines[0].endswith("allocation uniform")
    rows = [line.split() for line in lines if line]
    assert ["hub", "none", "-", "-", "-", "48", "units"] in rows
    assert ["meter", "macs", "360", "336", "93.3", "%", "32", "units", "yes"] in rows
    assert any(row[:1] == ["latency_ms"] and row[2:5] == ["not", "timed", "yet"] for row in rows)
    assert ["0", "32", "32", "24"] in rows
    assert ["2", "16", "16", "8"] in rows
    assert ["MACs", "720", "720", "336"] in rows
    assert lines[-1] == (
        "meter: latency_ms is not planned for, no device has timed files in float32 yet"
    )


def test_a_plan_as_json(config):
    done = call(str(config), "--json", "--allocation", "global")
    assert done.exit_code == 0, done.exception
    plan = json.loads(done.stdout)
    assert (plan["fleet"], plan["schema"], plan["allocation"]) == ("f", 1, "global")
    assert plan["groups"] == {"0": 32, "2": 16}
    meter = plan["classes"]["meter"]
    assert meter["costs"]["macs"] <= 360
    assert meter["limits"]["macs"]["budget"] == 360
    assert meter["binds"] == "macs"
    assert meter["inside"] == ["hub"]
    assert meter["latency"] is None
    assert plan["classes"]["hub"]["keep"] == plan["groups"]


def test_what_devices_measured_is_planned_with(config):
    measured(config, ms_per_mac=0.02)  # 250 MACs in 5 ms
    done = call(str(config))
    assert done.exit_code == 0, done.exception
    rows = [line.split() for line in done.stdout.splitlines() if line]
    assert ["latency_ms", "5", "4.64", "92.8", "%", "24", "units", "yes"] in rows
    assert ["predicted", "ms", "-", "4.64"] in rows
    assert (
        "meter: 3 of its devices timed 6 shapes in float32 with onnxruntime 1.32.0; "
        "predictions are within 0 %"
    ) in done.stdout
    meter = json.loads(call(str(config), "--json").stdout)["classes"]["meter"]
    assert meter["keep"] == {"0": 16, "2": 8}
    assert (meter["latency"]["shapes"], meter["latency"]["precision"]) == (6, "float32")
    assert meter["latency"]["predicted_ms"] == pytest.approx(4.64)


@pytest.mark.parametrize(("int8", "told"), [("true", "int8"), ('"auto"', "float32")])
def test_only_what_was_timed_of_the_files_that_ship_is_planned_with(config, int8, told):
    """0.02 ms per MAC in float32 allow 250 MACs, 0.01 in int8 would allow 500."""
    measured(config, ms_per_mac=0.02)
    change(config, "[classes.hub]", f"[pruning]\nint8 = {int8}\n\n[classes.hub]")
    if told == "int8":
        assert (
            "meter: latency_ms is not planned for, no device has timed files in int8 yet"
        ) in call(str(config)).stdout
    measured(config, ms_per_mac=0.01, precision=Precision.INT8)
    assert f"timed 6 shapes in {told} with onnxruntime 1.32.0" in call(str(config)).stdout
    meter = json.loads(call(str(config), "--json").stdout)["classes"]["meter"]
    assert meter["latency"]["precision"] == told
    assert meter["costs"]["macs"] == {"int8": 336, "float32": 232}[told]  # 360 of MACs alone


def test_a_table_of_another_model_is_not_used(config):
    measured(config, ms_per_mac=0.02)
    change(config, "hidden = 32", "hidden = 40")
    assert json.loads(call(str(config), "--json").stdout)["classes"]["meter"]["latency"] is None


def test_a_registry_that_cannot_be_read_is_said_and_left(config, capsys):
    state = config.parent / "state"
    state.mkdir()
    (state / "registry.db").write_bytes(b"no database at all" * 100)
    done = call(str(config))
    assert done.exit_code == 0
    assert done.stderr == (
        f"fleetprune: cannot use {state / 'registry.db'}: file is not a database; planned without "
        "latencies\n"
    )


def test_nothing_is_written(config):
    before = sorted(p.name for p in config.parent.iterdir())
    call(str(config))
    assert sorted(p.name for p in config.parent.iterdir() if p.name != "__pycache__") == before


def test_weights_decide_where_the_model_comes_trained(config):
    fleet = load_fleet_config(config)
    model = load_model(fleet)
    with torch.no_grad():
        model[2].weight[:] = 100.0  # whoever cuts the second layer's units loses most
    torch.save(model.state_dict(), config.parent / "start.pt")
    change(config, "classes = 3", 'classes = 3\ninitial = "start.pt"')
    meter = json.loads(call(str(config), "--json", "--allocation", "global").stdout)
    assert meter["classes"]["meter"]["keep"] == {"0": 8, "2": 16}


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        (
            "macs_share = 0.5",
            "macs = 127\nflash_bytes = 9",
            BudgetError,
            r"^class meter: flash_bytes 9 and macs 127 cannot be met, the smallest achievable are "
            r"\d+ and 128; raise the budget or lower channel_multiple$",
        ),
        (
            "[classes.hub]",
            '[pruning]\nexclude = ["9"]\n[classes.hub]',
            BudgetError,
            r"^pruning\.exclude: no layer '9', expected one of 0, 2, 4$",
        ),
        (
            "classes = 3",
            "classes = 4",
            TraceError,
            r"^the model has 3 outputs, but fleet\.toml names 4 classes$",
        ),
        (
            "hidden = 32",
            "hiden = 32",
            ConfigError,
            r"^model\.factory planned_nets:mlp: TypeError: ",
        ),
    ],
)
def test_bad_input_is_one_line(config, old, new, error, message):
    change(config, old, new)
    raised = call(str(config)).exception
    assert isinstance(raised, error)
    assert "\n" not in str(raised)
    with pytest.raises(error, match=message):
        raise raised
