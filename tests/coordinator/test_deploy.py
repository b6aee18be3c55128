"""`fleetprune access` and `fleetprune deploy mosquitto`, as an operator calls them."""

import json
import re
import stat
import sys
from pathlib import Path, PurePosixPath

import pytest
from typer.testing import CliRunner

from fleetprune.errors import ConfigError, InstallError
from fleetprune_coordinator.access_command import app as access_app
from fleetprune_coordinator.authority import Authority
from fleetprune_coordinator.deploy_command import app as deploy_app
from fleetprune_coordinator.mosquitto import DATA, Place, access_list, configuration
from fleetprune_coordinator.trial import try_mosquitto
from fleetprune_sim.broker import find_mosquitto
from tests.access_fleet import FLEET_TOML, Key, make_fleet, opened

ROOT = Path(__file__).parents[2]
needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")


def call(app, *arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture
def toml(tmp_path):
    make_fleet(tmp_path)
    return tmp_path / "fleet.toml"


def test_the_example_in_the_repository_is_what_the_command_writes():
    place = Place(PurePosixPath("/etc/mosquitto/fleetprune"), DATA)
    folder = ROOT / "deploy" / "mosquitto"
    assert (folder / "fleetprune.conf").read_text() == configuration(8883, place)
    assert (folder / "fleetprune.acl").read_text() == access_list("fleet1")
    assert sorted(p.name for p in folder.iterdir()) == ["fleetprune.acl", "fleetprune.conf"]


def test_init_says_what_to_do_next(tmp_path):
    (tmp_path / "fleet.toml").write_text(
        FLEET_TOML.replace("[access]", '[access]\nbroker_names = ["b.example.org", "192.0.2.1"]')
    )
    done = call(access_app, "init", "-c", tmp_path / "fleet.toml", "--json")
    said = json.loads(done.stdout)
    authority = Authority(Path(said["authority"]))
    assert said["fingerprint"] == authority.fingerprint
    assert said["servers"] == {
        "broker": ["b.example.org", "192.0.2.1"],
        "join": ["b.example.org", "192.0.2.1"],
    }
    assert authority.own_names("join") == ["b.example.org", "192.0.2.1"]
    with pytest.raises(ConfigError, match=r"keys are never overwritten$"):
        call(access_app, "init", "-c", tmp_path / "fleet.toml")


def test_a_token_s_way_through_the_commands(toml):
    done = call(access_app, "token", "d1", "--class", "phone", "--hours", "2", "-c", toml)
    token = done.stdout.strip()
    assert re.fullmatch(r"[0-9a-f]{12}\.[A-Za-z0-9_-]{32}\.d1", token)
    assert done.stderr.startswith("for d1, class phone, within 2 h. ")
    with pytest.raises(ConfigError) as e:
        call(access_app, "token", "d1", "--class", "watch", "-c", toml)
    assert str(e.value) == "class 'watch' is not one of this fleet's: phone, tablet"

    access = opened(make_config(toml))
    access.join(token, Key.new().request("d1"))
    (device,) = json.loads(call(access_app, "list", "-c", toml, "--json").stdout)["devices"]
    assert (device["device"], device["class"], device["state"]) == ("d1", "phone", "joined")
    shown = call(access_app, "list", "-c", toml).stdout
    assert re.search(r"d1 +phone +joined +\d{4}-\d\d-\d\d", shown)

    said = call(access_app, "revoke", "d1", "--reason", "sold", "-c", toml).stdout
    assert said.startswith("d1 is revoked; the coordinator does not listen to it from now on\n")
    assert "the broker does not know yet: run `fleetprune deploy mosquitto` again" in said
    (device,) = json.loads(call(access_app, "list", "-c", toml, "--json").stdout)["devices"]
    assert (device["state"], device["reason"][10:]) == ("revoked", ": sold")
    assert access.gate.refusal("d1") == "device d1 is revoked: sold"
    access.close()


def make_config(toml):
    from fleetprune_coordinator.config import load_fleet_config  # noqa: PLC0415

    return load_fleet_config(toml)


def test_revoking_updates_the_broker_s_files_and_makes_it_read_them(tmp_path):
    out, told = tmp_path / "mosquitto", tmp_path / "told"
    command = json.dumps([sys.executable, "-c", f"open({str(told)!r}, 'a').write('x')"])
    text = FLEET_TOML.replace(
        "[access]", f"[access]\ndeployed = {json.dumps(str(out))}\nreload = {command}"
    )
    fleet = make_fleet(tmp_path, text)
    toml = tmp_path / "fleet.toml"
    access = opened(fleet)
    access.join(access.make_token("d1", "phone", 60), Key.new().request("d1"))
    with pytest.raises(ConfigError, match=r"^access.deployed: no folder "):
        call(access_app, "revoke", "d1", "-c", toml)
    call(deploy_app, "mosquitto", "--out", out, "-c", toml)
    clean = access_list("f1")
    before = (out / "revoked.crl").read_bytes()
    assert (out / "fleetprune.acl").read_text() == access_list("f1", ["d1"])  # it is revoked
    said = call(access_app, "revoke", "d1", "-c", toml).stdout
    assert said.splitlines()[-1] == f"{out} is up to date, and the broker has read it"
    assert (out / "fleetprune.acl").read_text() == access_list("f1", ["d1"])
    assert (out / "revoked.crl").read_bytes() != before
    call(access_app, "token", "d1", "--class", "phone", "-c", toml)
    assert (out / "fleetprune.acl").read_text() == clean
    assert told.read_text() == "xx"
    access.close()


def test_a_reload_that_fails_is_said(tmp_path):
    out = tmp_path / "mosquitto"
    text = FLEET_TOML.replace(
        "[access]", f'[access]\ndeployed = {json.dumps(str(out))}\nreload = ["false"]'
    )
    fleet = make_fleet(tmp_path, text)
    access = opened(fleet)
    access.join(access.make_token("d1", "phone", 60), Key.new().request("d1"))
    call(deploy_app, "mosquitto", "--out", out, "-c", tmp_path / "fleet.toml")
    with pytest.raises(InstallError, match=r"^access.reload 'false' failed: exit code 1$"):
        call(access_app, "revoke", "d1", "-c", tmp_path / "fleet.toml")
    assert access.gate.refusal("d1") is not None  # whatever became of the broker
    access.close()


def test_files_of_the_broker(toml, tmp_path):
    out = tmp_path / "mosquitto"
    done = call(deploy_app, "mosquitto", "--out", out, "--place", "/srv/m", "-c", toml, "--json")
    files = [Path(f) for f in json.loads(done.stdout)["files"]]
    assert sorted(f.name for f in files) == [
        "broker.crt",
        "broker.key",
        "ca.crt",
        "fleetprune.acl",
        "fleetprune.conf",
        "revoked.crl",
    ]
    assert stat.S_IMODE((out / "broker.key").stat().st_mode) == 0o600
    text = (out / "fleetprune.conf").read_text()
    assert "\nlistener 8883\ncafile /srv/m/ca.crt\n" in text
    assert "\ncrlfile /srv/m/revoked.crl\n" in text
    assert not [f for f in out.iterdir() if f.name.startswith(("ca.key", "coordinator"))]


@needs_mosquitto
def test_mosquitto_takes_what_is_written(toml, tmp_path):
    out = tmp_path / "mosquitto"
    done = call(deploy_app, "mosquitto", "--out", out, "--check", "-c", toml)
    assert "mosquitto takes it (" in done.stdout
    before = sorted(p.name for p in out.iterdir())
    (out / "fleetprune.conf").write_text("listener 8883\nnonsense true\n")
    with pytest.raises(InstallError, match=r"^mosquitto does not take .*nonsense"):
        try_mosquitto(out)
    assert sorted(p.name for p in out.iterdir()) == before


def test_reissue_keeps_the_keys(toml):
    fleet = make_config(toml)
    folder = fleet.state / "access"
    keys = {p.name: p.read_bytes() for p in folder.glob("*.key")}
    before = {p.name: p.read_bytes() for p in folder.glob("*.crt")}
    said = json.loads(call(access_app, "reissue", "-c", toml, "--json").stdout)
    assert sorted(said) == ["blocks", "broker", "coordinator", "join"]
    assert {p.name: p.read_bytes() for p in folder.glob("*.key")} == keys
    after = {p.name: p.read_bytes() for p in folder.glob("*.crt")}
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"blocks.crt", "broker.crt", "coordinator.crt", "join.crt"}


def test_without_an_authority(tmp_path):
    (tmp_path / "fleet.toml").write_text(FLEET_TOML)
    for app, *arguments in (
        (access_app, "token", "d1", "--class", "phone"),
        (access_app, "list"),
        (deploy_app, "mosquitto", "--out", tmp_path / "m"),
    ):
        with pytest.raises(ConfigError) as e:
            call(app, *arguments, "-c", tmp_path / "fleet.toml")
        assert str(e.value) == (
            f"no authority in {tmp_path / 'state' / 'access'}: `fleetprune access init` makes one"
        )
    assert not (tmp_path / "m").exists()
