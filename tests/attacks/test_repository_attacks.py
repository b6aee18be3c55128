"""One hostile repository per defence; whoever sits between may do anything but sign.

Each test first lets the device see the honest repository, then attacks, then checks the message
and that the device still believes what it believed.
"""

import hashlib
from datetime import timedelta
from pathlib import Path

import pytest
from models import gemm
from repositories import DELEGATED, NOW, ROLES, Clock, MemoryRepository
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import MetaFile

from fleetprune.errors import HostileInputError, TransportError, TrustError
from fleetprune_agent.trust import MAX_DOCUMENT, TrustedRepository

MANIFEST, ROLLOUT = "releases/phone/1/manifest.json", "rollouts/phone.json"
OTHER_ROOT = " that this device's root of trust names: is it the root.json of this fleet?"


@pytest.fixture
def repository() -> MemoryRepository:
    repository = MemoryRepository()
    repository.release(1)
    return repository


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def trusted(tmp_path: Path, repository: MemoryRepository, clock: Clock) -> TrustedRepository:
    trusted = TrustedRepository(tmp_path / "trust", repository.bootstrap, repository, clock)
    trusted.refresh()
    assert trusted.manifest("phone", 1).release == 1
    return trusted


def refused(trusted: TrustedRepository) -> str:
    with pytest.raises(TrustError) as e:
        trusted.refresh()
    return str(e.value)


def published(repository: MemoryRepository, role: str) -> str:
    """Path of a target that a delegated role signs."""
    path = {"rollouts": ROLLOUT, "graphs": "graphs/x.onnx"}[role]
    if role == "graphs":
        repository.add(path, b"graph")
        repository.bump()
    return path


def restarted(trusted: TrustedRepository, repository, clock) -> TrustedRepository:
    return TrustedRepository(trusted._dir, repository.bootstrap, repository, clock)


@pytest.mark.parametrize(
    ("role", "days", "message"),
    [
        ("timestamp", 2, "timestamp.json is expired"),
        ("snapshot", 8, "snapshot.json is expired"),
        ("targets", 91, "New targets is expired"),
        ("root", 366, "Final root.json is expired"),
    ],
)
def test_freeze(trusted, repository, clock, role, days, message):
    """Serving old metadata for ever, so that a fix never arrives."""
    clock.advance(days=days)
    for payload in (repository.timestamp, repository.snapshot, repository.targets):
        if payload.type != role:
            payload.expires = clock.now + timedelta(days=1)
    repository.bump()
    day = clock.now.strftime("%Y-%m-%d 12:00:00")
    assert refused(trusted) == f"release repository: {message}, this device's clock says {day} UTC"


@pytest.mark.parametrize("role", DELEGATED)
def test_freeze_of_a_delegated_role(trusted, repository, clock, role):
    """An old rollout for ever: the fleet would stay half-way."""
    path = published(repository, role)
    clock.advance(days=8)
    for payload in (repository.timestamp, repository.snapshot):
        payload.expires = clock.now + timedelta(days=1)
    repository.bump()
    trusted.refresh()
    with pytest.raises(TrustError) as e:
        trusted.describe(path)
    assert str(e.value) == (
        f"release repository: New {role} is expired, "
        "this device's clock says 2026-03-09 12:00:00 UTC"
    )


def test_rollback_of_the_timestamp(trusted, repository, clock):
    repository.timestamp.version = 1
    for device in (trusted, restarted(trusted, repository, clock)):
        assert refused(device) == "release repository: New timestamp version 1 must be >= 2"


def test_rollback_of_the_snapshot(trusted, repository, clock):
    repository.timestamp.version += 1
    repository.snapshot.version = repository.timestamp.snapshot_meta.version = 1
    for device in (trusted, restarted(trusted, repository, clock)):
        assert (
            refused(device)
            == "release repository: New snapshot version must be >= 2, got version 1"
        )


def test_rollback_of_the_targets(trusted, repository, clock):
    """Signed by a stolen snapshot key: back to the targets before release 1."""
    repository.bump()
    repository.targets.version = repository.snapshot.meta["targets.json"].version = 1
    for device in (trusted, restarted(trusted, repository, clock)):
        # python-tuf says expected and got the wrong way round
        assert refused(device) == "release repository: Expected targets.json version 1, got 2."


@pytest.mark.parametrize("role", [role for role in ROLES if role != "root"])
def test_wrong_key(trusted, repository, role):
    repository.signers[role] = CryptoSigner.generate_ed25519()
    repository.bump()
    assert refused(trusted) == f"release repository: {role} was signed by 0/1 keys" + OTHER_ROOT


@pytest.mark.parametrize("role", DELEGATED)
def test_wrong_key_of_a_delegated_role(trusted, repository, role):
    path = published(repository, role)
    repository.signers[role] = repository.signers["timestamp"]
    repository.bump()
    trusted.refresh()
    with pytest.raises(TrustError) as e:
        trusted.describe(path)
    assert str(e.value) == f"release repository: {role} was signed by 0/1 keys" + OTHER_ROOT


@pytest.mark.parametrize("role", DELEGATED)
@pytest.mark.parametrize(
    "path",
    [
        "releases/phone/9/manifest.json",
        "releases/phone/9/model.onnx",
        "rollouts/phone/x.json",
        "graphs/deep/x.onnx",
        "top.json",
        "rollouts",
    ],
)
def test_a_delegated_key_signs_nothing_outside_its_paths(trusted, repository, role, path):
    """Whoever has the key for rollouts or graphs still cannot make a release."""
    repository.add(path, b"evil", role)
    repository.bump()
    trusted.refresh()
    with pytest.raises(TrustError) as e:
        trusted.describe(path)
    assert str(e.value) == f"the release repository has no target {path}"


@pytest.mark.parametrize(
    ("role", "path"), [("graphs", "rollouts/watch.json"), ("rollouts", "graphs/x.onnx")]
)
def test_delegated_roles_do_not_sign_for_each_other(trusted, repository, role, path):
    repository.add(path, b"evil", role)
    repository.bump()
    trusted.refresh()
    with pytest.raises(TrustError) as e:
        trusted.describe(path)
    assert str(e.value) == f"the release repository has no target {path}"


def test_a_release_that_only_a_rollout_names(trusted, repository):
    """The key for rollouts chooses among releases; it does not make them."""
    repository.roll_out(stable=7)
    trusted.refresh()
    assert trusted.rollout("phone").stable == 7
    with pytest.raises(TrustError) as e:
        trusted.manifest("phone", 7)
    assert str(e.value) == "the release repository has no target releases/phone/7/manifest.json"


def test_wrong_root_key(trusted, repository):
    """A new root that hands all roles to the attacker, signed by the attacker."""
    thief = CryptoSigner.generate_ed25519()
    repository.root.version = 2
    repository.root.add_key(thief.public_key, "root")
    repository.signers["root"] = thief
    assert refused(trusted) == "release repository: root was signed by 0/1 keys" + OTHER_ROOT


def test_a_key_of_another_role_does_not_count(trusted, repository):
    repository.signers["targets"] = repository.signers["timestamp"]
    repository.bump()
    assert refused(trusted) == "release repository: targets was signed by 0/1 keys" + OTHER_ROOT


def test_metadata_of_another_role(trusted, repository):
    repository.overrides["metadata/timestamp.json"] = repository.signed(repository.snapshot)
    assert refused(trusted) == "release repository: Expected 'timestamp', got 'snapshot'"


def test_mix_and_match(trusted, repository):
    """The new snapshot with the targets of before: a set that never existed."""
    old = repository.signed(repository.targets)
    repository.release(2)
    repository.overrides["metadata/3.targets.json"] = old
    assert refused(trusted) == "release repository: Expected targets v3, got v2."


def test_metadata_other_than_its_signed_hash(trusted, repository):
    repository.bump()
    honest = repository.signed(repository.snapshot)
    repository.timestamp.snapshot_meta = MetaFile.from_data(3, honest, ["sha256"])
    repository.snapshot.expires += timedelta(days=1)
    message = refused(trusted)
    assert message.startswith("release repository: Observed hash ")
    assert message.endswith(hashlib.sha256(honest).hexdigest())


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("2.root.json", 512000),
        ("timestamp.json", 16384),
        ("3.snapshot.json", 2000000),
        ("3.targets.json", 5000000),
    ],
)
def test_oversized_metadata(trusted, repository, name, limit):
    repository.bump()
    repository.overrides[f"metadata/{name}"] = b" " * (limit + 1)
    assert refused(trusted) == f"metadata/{name} is longer than {limit} bytes"


def test_oversized_metadata_from_a_source_that_ignores_the_bound(trusted, repository, monkeypatch):
    monkeypatch.setattr(repository, "read", lambda name, max_bytes: b" " * (max_bytes + 1))
    assert refused(trusted) == "metadata/2.root.json is 512001 bytes, expected at most 512000"


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[" * 16000, b'{"signed": {}, "signatures": []}', b"\xff\xfe", b"null"],
    ids=["empty", "cut", "deep", "hollow", "not-utf8", "null"],
)
def test_garbage(trusted, repository, data):
    repository.overrides["metadata/timestamp.json"] = data
    assert refused(trusted) == "release repository: Failed to deserialize JSON"


def test_metadata_cut_off_at_every_byte(trusted, repository):
    whole = repository.signed(repository.timestamp)
    for end in range(len(whole)):
        repository.overrides["metadata/timestamp.json"] = whole[:end]
        assert refused(trusted) == "release repository: Failed to deserialize JSON"


def test_a_bit_flipped_in_any_byte_of_metadata(trusted, repository):
    repository.bump()
    whole = repository.signed(repository.timestamp)
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        repository.overrides["metadata/timestamp.json"] = bytes(flipped)
        assert refused(trusted)
    repository.overrides["metadata/timestamp.json"] = whole
    trusted.refresh()


def test_swapped_target_bytes(trusted, repository, tmp_path):
    evil = gemm(6)
    manifest = trusted.manifest("phone", 1)
    assert len(evil) == manifest.size
    repository.blobs[trusted.describe(manifest.model).blob] = evil
    with pytest.raises(TrustError) as e:
        trusted.target(manifest.model, tmp_path / "model.onnx")
    assert str(e.value) == (
        f"target releases/phone/1/model.onnx has sha256 {hashlib.sha256(evil).hexdigest()}, "
        f"its signed hash is {manifest.sha256}"
    )
    assert list(tmp_path.glob("model.onnx*")) == []


def test_endless_target(trusted, repository, tmp_path, monkeypatch):
    """A source that writes more than it was told to is caught before anything is hashed."""
    manifest = trusted.manifest("phone", 1)

    def endless(name: str, size: int, sha256: str, into: Path) -> None:
        into.write_bytes(b"\0" * (size + 1))
        into.with_name(f"{into.name}.map").write_bytes(b"progress")

    monkeypatch.setattr(repository, "pull", endless)
    with pytest.raises(TrustError) as e:
        trusted.target(manifest.model, tmp_path / "model.onnx")
    assert str(e.value) == (
        f"target releases/phone/1/model.onnx is {manifest.size + 1} bytes, "
        f"its signed length is {manifest.size}"
    )
    assert list(tmp_path.glob("model.onnx*")) == []


def test_short_target(trusted, repository, tmp_path):
    manifest = trusted.manifest("phone", 1)
    repository.blobs[trusted.describe(manifest.model).blob] = b"short"
    with pytest.raises(TrustError, match=f"is 5 bytes, its signed length is {manifest.size}$"):
        trusted.target(manifest.model, tmp_path / "model.onnx")


def test_endless_manifest(trusted, repository):
    signed = trusted.describe("releases/phone/1/manifest.json")
    repository.blobs[signed.blob] += b" "
    with pytest.raises(TrustError) as e:
        trusted.manifest("phone", 1)
    assert str(e.value) == f"{signed.blob} is longer than {signed.size} bytes"


def test_swapped_manifest(trusted, repository):
    signed = trusted.describe("releases/phone/1/manifest.json")
    repository.blobs[signed.blob] = b"{" + b" " * (signed.size - 1)
    with pytest.raises(TrustError, match=r"^release repository: Observed hash "):
        trusted.manifest("phone", 1)


def test_manifest_for_another_class(trusted, repository):
    """Signed, but put in the wrong place: a small device must not get a large model."""
    gateway = repository.release(2, "gateway")
    repository.add("releases/phone/2/manifest.json", gateway.to_bytes())
    repository.add("rollouts/phone.json", repository.roll_out("gateway", stable=2).to_bytes())
    repository.bump()
    trusted.refresh()
    with pytest.raises(TrustError) as e:
        trusted.manifest("phone", 2)
    assert str(e.value) == "releases/phone/2/manifest.json is for class gateway, expected phone"
    with pytest.raises(TrustError) as e:
        trusted.rollout("phone")
    assert str(e.value) == "rollouts/phone.json is for class gateway, expected phone"


def test_manifest_of_another_release(trusted, repository):
    """Signed, but under a newer number: a device would believe that it is up to date."""
    old = trusted.manifest("phone", 1)
    repository.add("releases/phone/2/manifest.json", old.to_bytes())
    repository.bump()
    trusted.refresh()
    with pytest.raises(TrustError) as e:
        trusted.manifest("phone", 2)
    assert str(e.value) == "releases/phone/2/manifest.json is of release 1"


def test_replayed_rollout(trusted, repository, clock):
    """Release 2 was called back; whoever sits between would like it to stay."""
    repository.release(2)
    trusted.refresh()
    bad = repository.signed(repository.delegated["rollouts"], "rollouts")
    name = f"metadata/{repository.delegated['rollouts'].version + 1}.rollouts.json"
    assert trusted.rollout("phone").stable == 2
    back = repository.roll_out(stable=1)
    repository.overrides[name] = bad
    trusted.refresh()
    with pytest.raises(TrustError) as e:
        trusted.rollout("phone")
    assert str(e.value) == "release repository: Expected rollouts v4, got v3."
    repository.overrides.clear()
    trusted.refresh()
    assert trusted.rollout("phone") == back, "an authorised return to an older release"
    assert trusted.manifest("phone", 1).release == 1

    repository.delegated["rollouts"].version = 2
    repository.bump()
    assert refused(restarted(trusted, repository, clock)) == (
        "release repository: Expected rollouts.json version 3, got 4."  # the wrong way round
    )


def test_older_rollout_under_newer_metadata(trusted, repository):
    """Signed with a stolen key, or by a coordinator that was restored from a backup."""
    repository.roll_out(stable=1, serial=5)
    trusted.refresh()
    assert trusted.rollout("phone", serial=5).serial == 5
    with pytest.raises(TrustError) as e:
        trusted.rollout("phone", serial=6)
    assert str(e.value) == "rollouts/phone.json is rollout 5, older than 6, which was followed"


def test_manifest_at_odds_with_the_signed_model(trusted, repository):
    repository.release(2, fields={"sha256": "0" * 64})
    trusted.refresh()
    with pytest.raises(TrustError) as e:
        trusted.manifest("phone", 2)
    assert str(e.value) == (
        "releases/phone/2/manifest.json names another model than the one signed as "
        "releases/phone/2/model.onnx"
    )


def document(trusted, repository, path: str, data: bytes) -> str:
    """How the device refuses a signed document."""
    repository.add(path, data)
    repository.bump()
    trusted.refresh()
    with pytest.raises(TrustError) as e:
        _ = trusted.rollout("phone") if path == ROLLOUT else trusted.manifest("phone", 1)
    return str(e.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [(MANIFEST, "Manifest: release: Field required"), (ROLLOUT, "Rollout: device_class: Field")],
)
def test_malformed_documents(trusted, repository, path, message):
    assert document(trusted, repository, path, b"{}").startswith(f"{path}: {message}")


@pytest.mark.parametrize("path", [MANIFEST, ROLLOUT])
def test_oversized_documents(trusted, repository, path):
    message = document(trusted, repository, path, b" " * (MAX_DOCUMENT + 1))
    assert message == f"{path} is 32769 bytes, expected at most 32768"
    assert not any("targets/rollouts" in name for name in repository.asked)


def test_a_target_path_cannot_leave_its_folder(trusted):
    """Unsigned messages name targets too; what is not signed does not exist."""
    for path in (
        "../keys/root.pem",
        "/etc/passwd",
        "rollouts/../releases/phone/1/model.onnx",
        "rollouts/../../x",
    ):
        with pytest.raises(TrustError) as e:
            trusted.describe(path)
        assert str(e.value) == f"the release repository has no target {path}"


def test_every_attack_leaves_the_device_able_to_go_on(trusted, repository, clock):
    """After any refusal the honest repository is believed again, in the same state."""
    attacks = [b"", b"{", repository.signed(repository.snapshot), b" " * 20000]
    for attack in attacks:
        repository.overrides["metadata/timestamp.json"] = attack
        with pytest.raises((HostileInputError, TransportError)):
            trusted.refresh()
        repository.overrides.clear()
        trusted.refresh()
        assert trusted.manifest("phone", 1).release == 1
    assert clock.now == NOW


def test_a_delegated_role_whose_name_is_a_number(trusted, repository, monkeypatch):
    """python-tuf would raise a TypeError; what a stolen key signs must not end the agent."""
    repository.bump()
    plain = repository.targets.to_dict()
    plain["delegations"]["roles"][-1]["name"] = 1
    monkeypatch.setattr(repository.targets, "to_dict", lambda: plain)
    with pytest.raises(TrustError, match=r"^release repository: malformed metadata: TypeError: "):
        trusted.describe("graphs/a.onnx")
