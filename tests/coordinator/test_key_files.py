from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from signed_fleets import NOW

from fleetprune.errors import ConfigError
from fleetprune_coordinator.key_files import (
    LockedKeyError,
    load_key,
    load_public_key,
    passphrase_from_environment,
    write_key,
)
from fleetprune_coordinator.keys import KeyPlan, Quorum, init_repository
from fleetprune_coordinator.releases import ReleaseRepository
from fleetprune_coordinator.rotation import rotate


@pytest.fixture
def phrase(tmp_path: Path, monkeypatch) -> Path:
    path = tmp_path / "phrase"
    path.write_text("correct horse\nwhat follows is no part of it\n")
    monkeypatch.setenv("FLEETPRUNE_PASSPHRASE_FILE", str(path))
    return path


def test_a_key_and_its_public_half(tmp_path):
    signer = write_key(tmp_path / "k.pem")
    assert (tmp_path / "k.pem").stat().st_mode & 0o777 == 0o600
    assert load_key(tmp_path / "k.pem").public_key.keyid == signer.public_key.keyid
    assert load_public_key(tmp_path / "k.pem.pub").keyid == signer.public_key.keyid
    assert b"PRIVATE" not in (tmp_path / "k.pem.pub").read_bytes()
    with pytest.raises(ConfigError, match=r"/k.pem exists: keys are never overwritten$"):
        write_key(tmp_path / "k.pem")


def test_an_encrypted_key_needs_its_passphrase(tmp_path, phrase, monkeypatch):
    signer = write_key(tmp_path / "k.pem", passphrase_from_environment())
    assert signer.private_bytes not in (tmp_path / "k.pem").read_bytes()
    assert load_key(tmp_path / "k.pem").public_key.keyid == signer.public_key.keyid
    phrase.write_text("another\n")
    with pytest.raises(ConfigError) as e:
        load_key(tmp_path / "k.pem")
    assert str(e.value) == (
        f"cannot read the private key {tmp_path}/k.pem: its passphrase is another one"
    )
    monkeypatch.delenv("FLEETPRUNE_PASSPHRASE_FILE")
    with pytest.raises(LockedKeyError) as e:
        load_key(tmp_path / "k.pem")
    assert str(e.value) == (
        f"{tmp_path}/k.pem is encrypted: name a file with the passphrase in "
        "FLEETPRUNE_PASSPHRASE_FILE"
    )


def test_a_repository_with_encrypted_keys(tmp_path, phrase, monkeypatch):
    init_repository(tmp_path / "r", NOW, passphrase=passphrase_from_environment())
    for path in (tmp_path / "r/keys").iterdir():
        assert b"ENCRYPTED" in path.read_bytes()
    repository = ReleaseRepository(tmp_path / "r", lambda: NOW)
    repository.publish_graph(b"graph")
    rotate(repository, "snapshot")
    (made,) = (tmp_path / "r/keys").glob("snapshot-*.pem")
    assert b"ENCRYPTED" in made.read_bytes()
    monkeypatch.delenv("FLEETPRUNE_PASSPHRASE_FILE")
    with pytest.raises(ConfigError) as e:
        ReleaseRepository(tmp_path / "r", lambda: NOW)
    start, _, end = str(e.value).partition("expected one of: ")
    assert start == "no private key of role snapshot in keys/, "
    assert end[8:] == (
        f"; graphs-1.pem, rollouts-1.pem, root-1.pem, {made.name}, targets-1.pem, "
        "timestamp-1.pem are encrypted: name a file with the passphrase in "
        "FLEETPRUNE_PASSPHRASE_FILE"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), (None, "No such file or directory")],
)
def test_a_passphrase_file_that_holds_none(phrase, content, message):
    phrase.unlink()
    if content is not None:
        phrase.write_text(content)
    with pytest.raises(ConfigError, match=message):
        passphrase_from_environment()


def test_only_ed25519_counts_on_devices(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "k.pem").write_bytes(pem)
    with pytest.raises(ConfigError, match=r"/k.pem: expected an ed25519 key$"):
        load_key(tmp_path / "k.pem")
    for path in (tmp_path / "k.pem", tmp_path / "absent"):
        with pytest.raises(ConfigError, match=r"^cannot read the public key "):
            load_public_key(path)


@pytest.mark.parametrize(("keys", "threshold"), [(0, 0), (1, 0), (2, 3), (17, 2)])
def test_thresholds_that_cannot_be(tmp_path, keys, threshold):
    plan = KeyPlan(targets=Quorum(keys, threshold))
    with pytest.raises(ConfigError) as e:
        init_repository(tmp_path / "r", NOW, keys=plan)
    assert str(e.value) == (
        f"{threshold} of {keys} keys for role targets: expected at least 1 of at most 16, and no "
        "more than there are"
    )
    assert not (tmp_path / "r").exists()
