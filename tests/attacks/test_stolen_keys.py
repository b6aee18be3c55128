"""What a thief of each key can do, what not, and that replacing the key ends it.

The thief sits between and has a copy of everything that was ever public. Each test first lets the
device see the honest repository.
"""

from copy import deepcopy
from datetime import timedelta

import pytest
from models import gemm
from repositories import NOW, Clock, MemoryRepository

from fleetprune.errors import TransportError, TrustError
from fleetprune_agent.trust import TrustedRepository

OTHER_ROOT = " that this device's root of trust names: is it the root.json of this fleet?"
ONLINE = ("timestamp", "snapshot", "rollouts", "graphs")
LAST = 2**32 - 1
"""The highest serial that there is."""


@pytest.fixture
def repository() -> MemoryRepository:
    repository = MemoryRepository()
    repository.release(1)
    repository.release(2)
    return repository


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def trusted(tmp_path, repository, clock) -> TrustedRepository:
    trusted = TrustedRepository(tmp_path / "trust", repository.bootstrap, repository, clock)
    assert trusted.rollout("phone").stable == 2
    return trusted


def stolen(repository: MemoryRepository, *roles: str) -> MemoryRepository:
    """The thief's repository: the public files and some keys; what else is signed is a guess."""
    thief = MemoryRepository()
    for name in ("root", "targets", "snapshot", "timestamp", "delegated", "blobs", "serials"):
        setattr(thief, name, deepcopy(getattr(repository, name)))
    thief.signers |= {role: repository.signers[role] for role in roles}
    copies = {
        f"metadata/{repository.root.version}.root.json": repository.signed(repository.root),
        f"metadata/{repository.snapshot.version}.snapshot.json": repository.signed(
            repository.snapshot
        ),
        **{
            f"metadata/{targets.version}.{role}.json": repository.signed(targets, role)
            for role, targets in repository.content().items()
        },
    }
    thief.overrides |= copies
    return thief


def through(trusted: TrustedRepository, source: MemoryRepository) -> TrustedRepository:
    """The device as it is, reached over another road."""
    return TrustedRepository(trusted._dir, trusted._root, source, trusted._now)


def refused(trusted: TrustedRepository) -> str:
    with pytest.raises(TrustError) as e:
        trusted.refresh()
        trusted.rollout("phone")
    return str(e.value)


def recovers(trusted, repository, *roles: str) -> None:
    """After the keys were replaced the device follows the owner, and the thief no more."""
    retired = {role: repository.replace_key(role) for role in roles}
    repository.roll_out(stable=1)
    owner = through(trusted, repository)
    owner.refresh()
    assert owner.rollout("phone").stable == 1
    thief = deepcopy(repository)
    thief.signers |= retired
    thief.release(3)
    refused(through(trusted, thief))


def test_timestamp_key(trusted, repository, clock):
    """Can keep a device from news until the snapshot expires, or refuse it service; no more."""
    thief = stolen(repository, "timestamp")
    repository.roll_out(stable=1)
    clock.advance(days=6)
    thief.timestamp.version += 1
    thief.timestamp.expires = clock.now + timedelta(days=300)
    through(trusted, thief).refresh()
    assert through(trusted, thief).rollout("phone").stable == 2, "frozen"
    clock.advance(days=2)
    assert "snapshot.json is expired" in refused(through(trusted, thief))


def test_timestamp_key_names_no_other_snapshot(trusted, repository):
    thief = stolen(repository, "timestamp")
    thief.roll_out(stable=1)  # signed by keys that the thief does not have
    assert refused(through(trusted, thief)) == (
        "release repository: snapshot was signed by 0/1 keys" + OTHER_ROOT
    )


def test_timestamp_key_used_to_shut_the_owner_out(trusted, repository):
    """A version so high that no honest one is newer; a new key begins anew."""
    thief = stolen(repository, "timestamp")
    thief.timestamp.version = 10**9
    through(trusted, thief).refresh()
    assert refused(through(trusted, repository)).endswith(
        f"New timestamp version {repository.timestamp.version} must be >= 1000000000"
    )
    recovers(trusted, repository, "timestamp")


def test_snapshot_key_alone(trusted, repository):
    """Nothing: a timestamp must name what it signs."""
    thief = stolen(repository, "snapshot")
    thief.overrides["metadata/timestamp.json"] = repository.signed(repository.timestamp)
    thief.overrides.pop(f"metadata/{repository.snapshot.version}.snapshot.json")
    thief.snapshot.meta["rollouts.json"].version = 1
    through(trusted, thief).refresh()
    assert through(trusted, thief).rollout("phone").stable == 2
    thief.snapshot.version += 1
    through(trusted, thief).refresh()
    assert through(trusted, thief).rollout("phone").stable == 2


def test_snapshot_and_timestamp_keys(trusted, repository):
    """Cannot go back; can shut the owner out, until both keys are replaced."""
    back = stolen(repository, "snapshot", "timestamp")
    back.overrides.clear()
    back.snapshot.version += 1
    back.timestamp.version += 1
    back.timestamp.snapshot_meta.version = back.snapshot.version
    back.snapshot.meta["rollouts.json"].version = 1
    assert refused(through(trusted, back)) == (
        "release repository: Expected rollouts.json version 1, got 3."  # the wrong way round
    )
    ahead = back
    ahead.snapshot.meta["rollouts.json"].version = 10**9
    ahead.snapshot.meta["targets.json"].version = repository.targets.version
    ahead.overrides[f"metadata/{repository.targets.version}.targets.json"] = repository.signed(
        repository.targets
    )
    through(trusted, ahead).refresh()
    with pytest.raises(TransportError, match=r"metadata/1000000000.rollouts.json not found"):
        through(trusted, ahead).rollout("phone")
    repository.bump()
    repository.bump()
    assert refused(through(trusted, repository)) == (
        "release repository: Expected rollouts.json version 5, got 1000000000."
    )
    recovers(trusted, repository, "timestamp", "snapshot")


def test_rollouts_key_alone(trusted, repository):
    """Nothing: a snapshot must name what it signs."""
    thief = stolen(repository, "rollouts")
    thief.overrides["metadata/timestamp.json"] = repository.signed(repository.timestamp)
    thief.overrides.pop(f"metadata/{repository.delegated['rollouts'].version}.rollouts.json")
    thief.delegated["rollouts"].version += 1
    thief.delegated["rollouts"].targets.clear()
    through(trusted, thief).refresh()
    assert through(trusted, thief).rollout("phone").stable == 2, "what the device has stays"


def test_all_online_keys(trusted, repository, tmp_path):
    """The coordinator's machine is taken: the thief chooses among signed releases, makes none."""
    thief = stolen(repository, *ONLINE)
    thief.overrides = {
        f"metadata/{repository.targets.version}.targets.json": repository.signed(repository.targets)
    }

    def publish() -> TrustedRepository:
        """All online roles signed anew; targets as the owner left them."""
        for role in ("rollouts", "graphs"):
            thief.delegated[role].version += 1
            thief.snapshot.meta[f"{role}.json"].version = thief.delegated[role].version
        thief.snapshot.version += 1
        thief.timestamp.version += 1
        thief.timestamp.snapshot_meta.version = thief.snapshot.version
        return through(trusted, thief)

    evil = thief.roll_out(stable=1, serial=LAST)
    thief.targets, thief.snapshot.meta["targets.json"] = (
        deepcopy(repository.targets),
        deepcopy(repository.snapshot.meta["targets.json"]),
    )
    device = publish()
    assert device.rollout("phone") == evil, "an older release that the owner did sign"
    assert device.manifest("phone", 1).release == 1

    thief.add("rollouts/phone.json", evil.model_copy(update={"stable": 9}).to_bytes())
    for path in ("releases/phone/9/model.onnx", "releases/phone/9/manifest.json"):
        thief.add(path, gemm(9), "rollouts")
        thief.add(path, gemm(9), "graphs")
    device = publish()
    assert device.rollout("phone").stable == 9
    with pytest.raises(TrustError) as e:
        device.manifest("phone", 9)
    assert str(e.value) == "the release repository has no target releases/phone/9/manifest.json"

    before = device.origin
    recovers(trusted, repository, *ONLINE)
    owner = through(trusted, repository)
    owner.refresh()
    assert owner.origin != before, "serials that the thief has used up do not count any more"
    assert owner.rollout("phone", serial=0).serial < LAST


def test_graphs_key_with_all_that_names_it(trusted, repository, tmp_path):
    """Can have devices train with other graphs, never run another model."""
    thief = deepcopy(repository)
    thief.add("graphs/x.onnx", b"evil")
    thief.bump()
    assert through(trusted, thief).describe("graphs/x.onnx").size == 4
    retired = repository.replace_key("graphs")
    repository.add("graphs/y.onnx", b"good!")
    repository.bump()
    assert through(trusted, repository).describe("graphs/y.onnx").size == 5
    repository.signers["graphs"] = retired
    repository.bump()
    device = through(trusted, repository)
    with pytest.raises(TrustError) as e:
        device.describe("graphs/y.onnx")
    assert str(e.value) == "release repository: graphs was signed by 0/1 keys" + OTHER_ROOT


def test_the_origin_of_serials_is_the_fleet_and_its_key_for_rollouts(trusted, repository):
    assert trusted.origin == through(trusted, repository).origin
    before = trusted.origin
    repository.replace_key("timestamp")
    trusted.refresh()
    assert trusted.origin == before
    repository.replace_key("rollouts")
    trusted.refresh()
    assert trusted.origin != before


def test_another_fleets_repository(trusted, tmp_path):
    """Honest, but not ours: a broker that serves two fleets mixes them up."""
    other = MemoryRepository()
    other.release(7)
    repositories = {
        "a device that knows its own": through(trusted, other),
        "a new device": TrustedRepository(tmp_path / "new", trusted._root, other, Clock(NOW)),
    }
    for device in repositories.values():
        assert refused(device) == (
            "release repository: timestamp was signed by 0/1 keys" + OTHER_ROOT
        )


def test_another_fleets_newer_root(trusted, repository):
    other = MemoryRepository()
    other.release(7)
    other.replace_key("snapshot")  # its root is version 2 now
    assert refused(through(trusted, other)) == (
        "release repository: root was signed by 0/1 keys" + OTHER_ROOT
    )


@pytest.mark.parametrize(
    "path", ["../rollouts/phone.json", "rollouts/../../x", "/etc/passwd", "releases/../x"]
)
def test_a_signed_path_that_leaves_its_folder_is_only_a_name(trusted, repository, tmp_path, path):
    """Even the owner's key cannot make a device write elsewhere: it chooses the file itself."""
    repository.add(path, b"evil", "targets")
    repository.blobs[trusted_blob(path, repository)] = b"evil"
    repository.bump()
    trusted.refresh()
    into = trusted.target(path, tmp_path / "into")
    assert into.read_bytes() == b"evil"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["into", "trust"]


def trusted_blob(path: str, repository: MemoryRepository) -> str:
    folder, slash, name = path.rpartition("/")
    digest = repository.targets.targets[path].hashes["sha256"]
    return f"targets/{folder}{slash}{digest}.{name}"
