"""`fleetprune agent status`: where an installation stands, and why."""

import json

import pytest
from devices import Device
from typer.testing import CliRunner

from fleetprune_agent.commands import app
from fleetprune_agent.install import Checks


@pytest.fixture
def device(tmp_path):
    (tmp_path / "agent.toml").write_text(
        'device = "d1"\ndevice_class = "phone"\nfleet = "f"\nroot = "root.json"\nstate = "state"\n'
        '[broker]\n[data]\nkind = "npz"\npath = "samples.npz"\n'
    )
    return Device(tmp_path / "state")


def status(device: Device, *words: str) -> str:
    config = device.folder.parent / "agent.toml"
    done = CliRunner().invoke(app, ["status", "--config", str(config), *words])
    assert done.exit_code == 0, done.output
    return done.output


def as_json(device: Device) -> dict:
    return json.loads(status(device, "--json"))


def test_a_new_device(device):
    told = as_json(device)
    assert (told["release"], told["state"], told["phase"], told["wanted"]) == (
        0,
        "empty",
        "idle",
        0,
    )
    assert (told["reason"], told["plan"], told["crashes"]) == (None, 0, 0)


def test_what_waits_and_why(device):
    device.get(1)
    device.repository.release(2)
    device.install(Checks(may_fetch=lambda _bytes: "quiet hours until 06:00"))
    told = as_json(device)
    assert (told["release"], told["state"], told["phase"], told["wanted"]) == (
        1,
        "committed",
        "wanted",
        2,
    )
    assert told["reason"] == "quiet hours until 06:00"
    lines = [" ".join(line.split()) for line in status(device).splitlines()]
    assert {"phase wanted", "wanted 2", "reason quiet hours until 06:00", "plan 2"} <= set(lines)


def test_what_failed_and_what_runs_instead(device):
    device.repository.release(1, "tiny", to_all=False)
    device.repository.release(1, samples=b"none", fields={"smaller": "tiny"})
    device.install()
    told = as_json(device)
    assert (told["release"], told["variant"], told["phase"]) == (1, "tiny", "trial")
    assert told["reason"].startswith("phone's model: golden samples: ")
    device.slots.rollback("it raised")
    assert as_json(device)["phase"] == "trial", "there is nothing else to run"


def test_status_changes_nothing_even_where_files_are_damaged(device):
    device.get(1)
    pointer = device.slots.folder / "active.json"
    pointer.write_bytes(b"{")
    (device.folder / "last.json").write_bytes(b"{")
    told = as_json(device)
    assert (told["release"], told["last_report"]) == (1, None)
    assert pointer.read_bytes() == b"{"
