"""`fleetprune release` as an operator runs it."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fleetprune.errors import ConfigError, TrustError
from fleetprune.rollout import Rollout
from fleetprune_coordinator.commands import app as coordinator_app
from fleetprune_coordinator.proposals import PendingError
from fleetprune_coordinator.release_command import app
from fleetprune_coordinator.releases import ReleaseContent, ReleaseRepository

FLEET = """\
fleet = "f"

[model]
factory = "nets:none"
input_shape = [4]
classes = 3

[classes.phone]
"""
PHONE = ReleaseContent(
    onnx=b"phone model",
    golden=b"phone golden",
    input_shape=(4,),
    macs=1200,
    accuracy=0.925,
    samples=200,
    max_latency_ms=3.0,
)


class Desk:
    """A fleet's folder and a terminal in it."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.config = folder / "fleet.toml"
        self.config.write_text(FLEET)
        self.releases = folder / "state" / "releases"
        words = ["init", "--config", str(self.config), *options]
        assert CliRunner().invoke(coordinator_app, words).exit_code == 0
        self.keys = self.releases / "keys"

    def repository(self) -> ReleaseRepository:
        return ReleaseRepository(self.releases, lambda: datetime.now(UTC))

    def call(self, *words: str, given: str | None = None, config: bool = True):
        more = ["--config", str(self.config)] if config else []
        return CliRunner().invoke(app, [*words, *more], input=given)

    def told(self, *words: str, config: bool = True):
        """What `--json` prints."""
        done = self.call(*words, "--json", config=config)
        assert done.exception is None, done.exception
        return json.loads(done.stdout)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch) -> Desk:
    monkeypatch.setenv("COLUMNS", "120")
    return Desk(tmp_path)


@pytest.fixture
def released(desk: Desk) -> Desk:
    desk.repository().publish_release(1, {"phone": PHONE}, to_all=True)
    return desk


def test_list_says_who_runs_what_and_why(released):
    repository = released.repository()
    repository.publish_release(2, {"phone": PHONE})
    repository.publish_release(3, {"phone": PHONE})
    repository.publish_rollout(
        Rollout(device_class="phone", serial=2, stable=1, candidate=3, share=500, canaries=("d1",))
    )
    states = {r["release"]: r["state"] for r in released.told("list")["releases"]}
    assert states == {
        1: "for devices that are not yet to run release 3",
        2: "signed; no rollout names it",
        3: "rolled out to 5 % of devices and 1 by name",
    }
    shown = released.call("list").stdout
    assert "rolled out to 5 % of devices and 1 by name" in shown
    assert "92.5%" in shown


def test_keys_says_which_are_here(desk, tmp_path):
    (desk.keys / "root-1.pem").rename(tmp_path / "root-1.pem")
    data = desk.told("keys")
    assert {k["role"]: k["here"] for k in data} == {
        "root": False,
        "targets": True,
        "snapshot": True,
        "timestamp": True,
        "rollouts": True,
        "graphs": True,
    }
    assert {(k["threshold"], k["version"]) for k in data} == {(1, 1)}
    shown = desk.call("keys").stdout
    assert "elsewhere" in shown
    assert data[0]["key"][:16] in shown


def test_verify_prints_the_chain(released):
    done = released.call("verify")
    assert done.exit_code == 0
    assert done.stdout.endswith("all is signed: 4 files\n")
    data = released.told("verify", "--class", "phone")
    assert [(r["role"], r["version"]) for r in data["roles"]] == [
        ("root", 1),
        ("timestamp", 2),
        ("snapshot", 2),
        ("targets", 2),
        ("rollouts", 2),
        ("graphs", 1),
    ]
    assert all(r["keys"] == r["signed_by"] for r in data["roles"])
    assert [(f["path"], f["state"]) for f in data["files"]] == [
        ("releases/phone/1/golden.npz", "verified"),
        ("releases/phone/1/manifest.json", "verified"),
        ("releases/phone/1/model.onnx", "verified"),
        ("rollouts/phone.json", "verified"),
    ]
    assert data["rollouts"][0]["stable"] == 1
    assert data["problems"] == []


def test_verify_of_a_copy_needs_no_fleet(released, tmp_path):
    public = released.releases / "public"
    root = tmp_path / "root.json"
    root.write_bytes((public / "metadata/1.root.json").read_bytes())
    data = released.told("verify", "--public", str(public), "--root", str(root), config=False)
    assert len(data["files"]) == 4


def wrong(desk: Desk, *options: str) -> str:
    done = desk.call("verify", *options)
    assert isinstance(done.exception, TrustError)
    return str(done.exception)


def stored(desk: Desk, name: str) -> Path:
    (path,) = (desk.releases / "public/targets").rglob(f"*.{name}")
    return path


def test_verify_notices_other_bytes(released):
    model = stored(released, "model.onnx")
    sha = model.name.split(".")[0]
    model.write_bytes(b"phone MODEL")
    assert wrong(released).startswith(
        "the repository does not hold: releases/phone/1/model.onnx is another file: its sha256 is "
    )
    assert wrong(released).endswith(f"signed is {sha}")
    model.write_bytes(b"short")
    assert wrong(released) == (
        "the repository does not hold: releases/phone/1/model.onnx is 5 bytes, "
        "its signed length is 11"
    )
    model.unlink()
    stored(released, "golden.npz").unlink()
    assert wrong(released) == (
        "the repository does not hold: releases/phone/1/golden.npz is missing, and 1 more"
    )
    data = json.loads(released.call("verify", "--json").stdout)
    assert data["problems"][1] == "releases/phone/1/model.onnx is missing"


def test_verify_notices_another_root(released, tmp_path):
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    other = Desk(other_folder)
    root = other.releases / "public/metadata/1.root.json"
    assert wrong(released, "--root", str(root)) == (
        "the repository does not hold: timestamp was signed by 0/1 keys that the root given "
        "names: is it the root of this fleet?"
    )


def test_verify_notices_broken_metadata(released):
    metadata = released.releases / "public/metadata"
    (metadata / "2.rollouts.json").rename(metadata / "away")
    assert wrong(released) == "the repository does not hold: metadata/2.rollouts.json is missing"
    (metadata / "away").rename(metadata / "2.rollouts.json")
    (metadata / "timestamp.json").write_bytes(b" " * 20000)
    assert wrong(released) == (
        "the repository does not hold: metadata/timestamp.json is longer than 16384 bytes"
    )


def test_verify_of_a_class_that_has_nothing(released):
    assert wrong(released, "--class", "watch") == (
        "the repository does not hold: nothing is signed for class watch"
    )


def test_verify_without_a_root(desk, tmp_path):
    done = desk.call("verify", "--root", str(tmp_path / "absent"))
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception) == (
        f"cannot read the root of trust {tmp_path}/absent: No such file or directory; "
        "`fleetprune coordinator init` makes it, --root names another"
    )


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch) -> tuple[Desk, Path]:
    """A release that one of two keys has signed; the other key is elsewhere."""
    monkeypatch.setenv("COLUMNS", "120")
    desk = Desk(tmp_path, "--targets-keys", "2", "--targets-threshold", "2")
    (desk.keys / "targets-2.pem").rename(tmp_path / "targets-2.pem")
    with pytest.raises(PendingError):
        desk.repository().publish_release(1, {"phone": PHONE}, to_all=True)
    return desk, desk.releases / "pending" / "targets-2"


def test_a_person_sees_what_is_signed_and_is_asked(waiting, tmp_path):
    desk, pending = waiting
    words = ("sign", str(pending), "--key", str(tmp_path / "targets-2.pem"))
    refused = desk.call(*words, given="n\n", config=False)
    assert refused.exit_code == 1
    assert desk.repository().pending()[0].lacks() != []
    (data,) = desk.told("list")["pending"]
    sha = data["releases"][0]["sha256"]
    for line in (
        "  phone release 1: 11 bytes",
        f"    sha256    {sha}",
        "    accuracy  92.5% of 200 samples",
        "    budget    1,200 MACs, at most 3 ms",
        "  3 new files, 1 of them models",
        "  then run by all devices of: phone",
    ):
        assert line in refused.stdout.splitlines()
    done = desk.call(*words, given="y\n", config=False)
    assert done.exit_code == 0, done.exception
    assert "It has all its signatures: `fleetprune release publish` on the coordinator." in (
        done.stdout
    )
    assert desk.call("publish").stdout == "Published: release 1.\n"
    assert desk.told("verify")["problems"] == []


def test_signing_and_publishing_for_scripts(waiting, tmp_path):
    desk, pending = waiting
    done = desk.call("publish")
    assert isinstance(done.exception, PendingError)
    root = desk.releases / "public/metadata/1.root.json"
    key = str(tmp_path / "targets-2.pem")
    data = desk.told("sign", str(pending), "--key", key, "--root", str(root), "--yes", config=False)
    assert (data["signed"], data["missing"], data["reason"]) == (["targets"], [], "release 1")
    assert desk.told("publish", str(pending)) == {"published": ["release 1"]}
    assert str(desk.call("publish").exception) == "nothing waits for signatures"


def test_rotate_and_renew(released, tmp_path):
    done = released.call("rotate", "timestamp")
    assert done.stdout.startswith("Role timestamp: key ")
    assert done.stdout.endswith(", and published.\n")
    assert (
        released.call("renew", "targets").stdout == "targets.json is signed anew, and published.\n"
    )
    (released.keys / "root-1.pem").rename(tmp_path / "root-1.pem")
    data = released.told("rotate", "snapshot")
    assert data["pending"] == str(released.releases / "pending" / "root-3")
    shown = released.call("list").stdout
    assert "another key for role snapshot waits for signatures in " in shown
    words = ("sign", data["pending"], "--key", str(tmp_path / "root-1.pem"), "--yes")
    signed = released.call(*words, config=False)
    assert f"  role snapshot: 1 of {data['retired'][0][:8]} -> 1 of {data['added'][0][:8]}" in (
        signed.stdout.splitlines()
    )
    assert released.call("publish").exit_code == 0
    assert released.told("verify")["problems"] == []


def test_a_key_made_elsewhere(released, tmp_path, monkeypatch):
    made = released.told("keygen", str(tmp_path / "k.pem"), "--no-encrypt", config=False)
    assert made["public"] == f"{tmp_path}/k.pem.pub"
    data = released.told("rotate", "root", "--add", made["public"])
    assert data["added"] == [made["key"]]
    released.call("sign", data["pending"], "--key", made["private"], "--yes", config=False)
    assert released.call("publish").exit_code == 0
    monkeypatch.delenv("FLEETPRUNE_PASSPHRASE_FILE", raising=False)
    done = released.call("keygen", str(tmp_path / "l.pem"), config=False)
    assert str(done.exception) == (
        "no passphrase: name a file that holds one in FLEETPRUNE_PASSPHRASE_FILE"
    )


def test_a_list_of_nothing_says_so(tmp_path):
    desk = Desk(tmp_path)
    assert desk.call("list").stdout.splitlines()[0].startswith("No release is signed yet")
    assert desk.told("list")["releases"] == []
