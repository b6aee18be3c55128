"""Models out of the registry: every format read back and compared, smaller where they are cut."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fleetprune.errors import ConfigError
from fleetprune_coordinator.artifacts import predict
from fleetprune_coordinator.config import load_fleet_config
from fleetprune_coordinator.coordinator import Coordinator
from fleetprune_coordinator.events import EventLog
from fleetprune_coordinator.export import Format, described_by, export, load
from fleetprune_coordinator.export_command import app
from fleetprune_coordinator.keys import RELEASES, init_repository

FLEET = """\
fleet = "f"

[model]
factory = "exported_nets:net"
arguments = { wide = 24 }
input_shape = [2, 8, 8]
labels = ["a", "b", "c"]

[pruning]
channel_multiple = 4

[classes.hub]

[classes.meter]
macs_share = 0.25
trains = false
"""

NETS = """\
from torch import nn


def net(wide: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
        nn.Conv2d(wide, 2 * wide, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * wide, 3),
    )
"""

X = np.random.default_rng(0).normal(size=(5, 2, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A fleet with one release, and what its models make of X in float64."""
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "exported_nets.py").write_text(NETS)
    (folder / "fleet.toml").write_text(FLEET)
    config = load_fleet_config(folder / "fleet.toml")
    init_repository(config.state / RELEASES, datetime.now(UTC))
    with Coordinator(config, time.time, EventLog(None, time.time)) as coordinator:
        released = coordinator.release()
    outputs = {name: predict(one.artifact.onnx, X) for name, one in released.items()}
    return config, outputs, {name: one.artifact.onnx for name, one in released.items()}


def apart(outputs, expected):
    return float(np.abs(np.asarray(outputs) - expected).max())


def test_an_onnx_file(fleet, tmp_path):
    config, outputs, _ = fleet
    (one,) = export(config, "meter", Format.ONNX, tmp_path / "meter.onnx")
    assert (one.path, one.device_class) == (tmp_path / "meter.onnx", "meter")
    assert one.bytes == one.path.stat().st_size
    assert apart(predict(one.path.read_bytes(), X), outputs["meter"]) < 1e-5


def test_a_state_dict_and_the_network_that_it_is_of(fleet, tmp_path):
    config, outputs, _ = fleet
    (one,) = export(config, "meter", Format.STATE_DICT, tmp_path / "meter.pt")
    model = load(one.path, config.folder)
    assert not model.training
    with torch.no_grad():
        assert apart(model(torch.tensor(X)), outputs["meter"]) < 1e-5
    assert sum(p.numel() for p in model.parameters()) == one.parameters
    said = json.loads(described_by(one.path).read_text())
    assert said == {
        "factory": "exported_nets:net",
        "arguments": {"wide": 24},
        "input_shape": [2, 8, 8],
        "labels": ["a", "b", "c"],
        "device_class": "meter",
        "keep": {"0": model[0].out_channels, "3": model[3].out_channels},
        "exclude": [],
    }
    assert model[0].out_channels < 24


RECURRENT = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.rnn = nn.Linear(5, 6), nn.LSTM(6, 4, batch_first=True)
        self.after, self.fc = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.after(self.rnn(self.before(x))[0][:, -1])))
"""


def test_an_excluded_layer_that_cannot_be_traced_is_whole_in_every_file(tmp_path):
    (tmp_path / "recurrent_nets.py").write_text(RECURRENT)
    text = (
        FLEET.replace("exported_nets:net", "recurrent_nets:Net")
        .replace("arguments = { wide = 24 }\n", "")
        .replace("[2, 8, 8]", "[7, 5]")
        .replace("channel_multiple = 4", 'channel_multiple = 2\nexclude = ["rnn"]')
        .replace("macs_share = 0.25", "macs_share = 0.98")
    )
    (tmp_path / "fleet.toml").write_text(text)
    config = load_fleet_config(tmp_path / "fleet.toml")
    init_repository(config.state / RELEASES, datetime.now(UTC))
    with Coordinator(config, time.time, EventLog(None, time.time)) as coordinator:
        assert coordinator.architecture.groups == {"after": 8}
        released = coordinator.release()
    x = np.random.default_rng(0).normal(size=(5, 7, 5)).astype(np.float32)
    expected = predict(released["meter"].artifact.onnx, x)
    (onnx,) = export(config, "meter", Format.ONNX, tmp_path / "meter.onnx")
    assert apart(predict(onnx.path.read_bytes(), x), expected) < 1e-5
    (state,) = export(config, "meter", Format.STATE_DICT, tmp_path / "meter.pt")
    assert json.loads(described_by(state.path).read_text())["exclude"] == ["rnn"]
    model = load(state.path, config.folder)
    assert (model.rnn.hidden_size, model.after.out_features < 8) == (4, True)
    with torch.no_grad():
        assert apart(model(torch.tensor(x)), expected) < 1e-5


def test_a_torch_export_program(fleet, tmp_path):
    config, outputs, _ = fleet
    (one,) = export(config, "meter", Format.TORCH_EXPORT, tmp_path / "meter.pt2")
    program = torch.export.load(one.path).module()
    for count in (1, 5):  # any batch size
        with torch.no_grad():
            got = program(torch.tensor(X[:count]))
        assert apart(got, outputs["meter"][:count]) < 1e-5


@pytest.mark.parametrize("kind", list(Format))
def test_bytes_follow_density(fleet, tmp_path, kind):
    config, _, _ = fleet
    dense, cut = (export(config, name, kind, tmp_path / name)[0] for name in ("hub", "meter"))
    kept = cut.parameters / dense.parameters
    assert kept < 0.4
    # What is not weights: the graph, names, torch's archive.
    around = 25_000 if kind is Format.TORCH_EXPORT else 4_000
    assert abs((dense.bytes - cut.bytes) - 4 * (dense.parameters - cut.parameters)) < around / 4
    assert cut.bytes < 4 * cut.parameters + around


def test_a_releases_own_files(fleet, tmp_path):
    config, _, files = fleet
    written = export(config, "1", Format.ONNX, tmp_path / "all")
    assert {one.device_class: one.path.read_bytes() for one in written} == files
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["hub.onnx", "meter.onnx"]


def test_the_command(fleet, tmp_path):
    config, _, _ = fleet
    toml, out = config.folder / "fleet.toml", tmp_path / "new" / "meter.onnx"
    words = ["meter", "--out", str(out), "--config", str(toml)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.exception
    size = out.stat().st_size
    assert done.stdout.startswith(f"meter: {out}, {size:,} bytes, ")
    said = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [(one["class"], one["path"], one["bytes"]) for one in said] == [
        ("meter", str(out), size)
    ]


def refused(config, message, what="meter", kind=Format.ONNX, **options):
    with pytest.raises(ConfigError) as caught:
        export(config, what, kind, Path("/nowhere/out"), **options)
    assert str(caught.value) == message


def test_what_there_is_not(fleet):
    config, _, _ = fleet
    refused(
        config, "no device class 'metre': the fleet has hub, meter, did you mean meter?", "metre"
    )
    refused(config, "no release 7: there are 1 to 1", "7")
    refused(
        config,
        "release 1 is made of ONNX files: give --format onnx, or a device class for its model as "
        "it stands now",
        "1",
        Format.STATE_DICT,
    )
    refused(
        config,
        "class meter: nobody has measured the ranges of its activations: set pruning.int8 and let "
        "the coordinator finish a training",
        int8=True,
    )
    refused(
        config, "int8 is for --format onnx, not for state_dict", kind=Format.STATE_DICT, int8=True
    )
    empty = config.model_copy(update={"state": config.folder / "other"})
    refused(
        empty,
        f"{empty.state} holds no registry yet: `fleetprune coordinator serve` makes it",
    )
    other = config.model.model_copy(update={"arguments": {"wide": 16}})
    changed = config.model_copy(update={"model": other})
    changed._folder = config.folder
    refused(
        changed,
        f"{config.state} holds the training of another model than exported_nets:net with these "
        "arguments: give this one another `state`",
    )


def not_loaded(path, message, folder):
    with pytest.raises(ConfigError) as caught:
        load(path, folder)
    assert str(caught.value) == message


def test_state_dicts_that_cannot_be_loaded(fleet, tmp_path):
    config, _, _ = fleet
    path = tmp_path / "meter.pt"
    there = config.folder
    not_loaded(path, f"{path}: No such file or directory: {described_by(path)}", there)
    export(config, "meter", Format.STATE_DICT, path)
    text = described_by(path).read_text()
    described_by(path).write_text(text.replace("keep", "kept"))
    not_loaded(path, f"{described_by(path)} is no description of a state_dict", there)
    described_by(path).write_text(text.replace('"wide": 24', '"wide": 4'))
    fit = f"{path} does not fit what exported_nets:net makes: group 0: keep 12, expected 1..4"
    not_loaded(path, fit, there)
    described_by(path).write_text(text.replace('"0": 12', '"0": 8'))
    with pytest.raises(ConfigError, match=r"meter.pt does not fit what exported_nets:net makes: "):
        load(path, there)
    described_by(path).write_text(text)
    path.write_bytes(path.read_bytes()[:100])
    not_loaded(path, f"{path} is no state_dict", there)
