import re
from pathlib import Path

import pytest

from fleetprune.errors import ConfigError
from fleetprune_agent.config import AgentConfig, CsvData, FunctionData, NpzData, load_config

MINIMAL = """
device = "d1"
device_class = "phone"
fleet = "f"
root = "root.json"
state = "/var/lib/fleetprune"
[broker]
host = "broker.local"
[data]
kind = "npz"
path = "samples"
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "agent.toml"
    file.write_text(text)
    return file


def refused(folder: Path, text: str, message: str) -> None:
    file = write(folder, text)
    with pytest.raises(ConfigError, match=re.escape(f"{file}: {message}") + "$"):
        load_config(file)


def test_defaults_and_relative_paths(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    assert (config.device, config.device_class, config.fleet) == ("d1", "phone", "f")
    assert config.root == tmp_path / "root.json"
    assert config.state == Path("/var/lib/fleetprune")
    assert config.data == NpzData(kind="npz", path=tmp_path / "samples", held_out=0.2)
    assert (config.trains, config.threads) == (True, 1)
    assert (config.telemetry_s, config.refresh_s, config.max_outbox_bytes) == (900, 3600, 2**26)
    assert config.broker.address == "broker.local:1883"


def test_other_kinds_of_data(tmp_path):
    head = MINIMAL.split("[data]", maxsplit=1)[0]
    csv = '[data]\nkind = "csv"\npath = "/w.csv"\ncolumns = ["ax", "ay"]\nwindow = "w"\n'
    assert load_config(write(tmp_path, head + csv)).data == CsvData(
        kind="csv", path=Path("/w.csv"), columns=("ax", "ay"), window="w"
    )
    function = '[data]\nkind = "function"\nfunction = "my.sensors:read"\nheld_out = 0.5\n'
    assert load_config(write(tmp_path, head + function)).data == FunctionData(
        kind="function", function="my.sensors:read", held_out=0.5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("device =", "telemtry_s = 5\ndevice ="),
            "telemtry_s: unknown key, did you mean telemetry_s?",
        ),
        (("host =", "hots ="), "broker.hots: unknown key, did you mean host?"),
        (
            ("path =", 'pth = "x"\npath ='),
            "data.pth: unknown key, did you mean path?",
        ),
        (
            ("path =", "q = 1\npath ="),
            "data.q: unknown key, expected one of held_out, kind, path",
        ),
        (('fleet = "f"', ""), "fleet: field required"),
        (('"f"', "7"), "fleet: input should be a valid string, got 7"),
        (
            ('"npz"', '"nzp"'),
            'data.kind: expected one of npz, csv, function, got "nzp"',
        ),
        (
            ("device =", "threads = 0\ndevice ="),
            "threads: input should be greater than or equal to 1, got 0",
        ),
        (
            ("[data]", "[data]\nheld_out = 1"),
            "data.held_out: input should be less than 1, got 1",
        ),
        (
            ('"d1"', '"d/1"'),
            "device: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$', got \"d/1\"",
        ),
    ],
)
def test_one_clear_line(tmp_path, change, message):
    assert change[0] in MINIMAL
    refused(tmp_path, MINIMAL.replace(*change, 1), message)


def test_unreadable_and_not_toml(tmp_path):
    missing = tmp_path / "none.toml"
    with pytest.raises(
        ConfigError,
        match=rf"^{re.escape(str(missing))}: cannot be read: No such file or directory; "
        r"docs/bring-your-own\.md says what such a file holds$",
    ):
        load_config(missing)
    refused(tmp_path, "", "device, device_class, fleet, broker, root: field required (and 2 more)")
    refused(
        tmp_path,
        "device",
        "not TOML: Expected '=' after a key in a key/value pair (at end of document)",
    )


def test_a_password_is_not_shown(tmp_path):
    config = load_config(write(tmp_path, MINIMAL.replace("host =", 'password = "s3"\nhost =')))
    assert "s3" not in repr(config)


def test_the_example_that_is_shipped():
    deploy = Path(__file__).parents[2] / "deploy"
    config = load_config(deploy / "agent.toml")
    assert isinstance(config.data, CsvData)
    assert config.broker.ca_file == Path("/etc/fleetprune/ca.pem")
    defaults = AgentConfig.model_fields
    for key in ("threads", "telemetry_s", "refresh_s", "max_outbox_bytes", "trains"):
        assert getattr(config, key) == defaults[key].default
