import json
from pathlib import Path

import pytest
from signed_fleets import TWO_OF_THREE, Fleet

from fleetprune.errors import ConfigError, RegistryError, TrustError
from fleetprune.files import write_atomic
from fleetprune_coordinator.key_files import load_public_key, write_key
from fleetprune_coordinator.keys import KeyPlan, Quorum
from fleetprune_coordinator.roles import ROLES
from fleetprune_coordinator.rotation import renew, rotate


class KilledError(Exception):
    """The process is gone."""


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    fleet = Fleet(tmp_path)
    fleet.release(1)
    return fleet


def keys_here(fleet: Fleet) -> list[str]:
    return sorted(path.name for path in (fleet.folder / "keys").glob("*.pem"))


@pytest.mark.parametrize("role", ROLES)
def test_a_key_is_replaced_and_the_fleet_goes_on(fleet, role):
    device = fleet.device()
    assert fleet.stable(device) == 1
    (before,) = fleet.repository.signed.load().key_ids(role)
    done = rotate(fleet.repository, role)
    assert (done.role, done.retired, done.pending) == (role, (before,), None)
    assert fleet.repository.signed.load().key_ids(role) == list(done.added)
    (left,) = [name for name in keys_here(fleet) if name.startswith(role)]
    assert left == f"{role}-{done.added[0][:8]}.pem"
    assert fleet.stable(device) == fleet.stable(fleet.device("new")) == 1
    fleet.open().publish_graph(b"graph")
    fleet.repository.publish_graph(b"another")  # was open before: reads the keys anew
    fleet.release(2)
    assert fleet.stable(device) == 2


def test_a_device_that_was_off_follows_the_chain(fleet):
    device = fleet.device()
    assert fleet.stable(device) == 1
    for role in ("root", "timestamp", "root", "snapshot", "targets", "root"):
        rotate(fleet.repository, role)
    fleet.release(2)
    assert fleet.stable(device) == 2
    assert fleet.repository.read("metadata/7.root.json") is not None
    assert fleet.stable(fleet.device("new")) == 2


def test_a_broken_chain_is_not_followed(fleet):
    device = fleet.device()
    fleet.stable(device)
    for _ in range(3):
        rotate(fleet.repository, "root")
    third = fleet.public / "metadata" / "3.root.json"
    forged = json.loads(third.read_bytes())
    forged["signatures"] = json.loads((fleet.public / "metadata/4.root.json").read_bytes())[
        "signatures"
    ]
    third.write_text(json.dumps(forged))
    with pytest.raises(TrustError, match=r"^release repository: root was signed by 0/1 keys "):
        device.refresh()


@pytest.mark.parametrize("survives", range(4))
@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "root"])
def test_killed_while_a_key_is_replaced(fleet, role, survives):
    """Whatever the instant: the next refresh, or `publish`, makes it whole."""
    device, left = fleet.device(), [survives]
    fleet.stable(device)

    def write(path: Path, data: bytes) -> None:
        if not left[0]:
            raise KilledError
        left[0] -= 1
        write_atomic(path, data)

    writes = {"targets": 4, "root": 3}.get(role, 3)
    dying = fleet.open(write=write)
    if survives < writes:
        with pytest.raises(KilledError):
            rotate(dying, role)
    else:
        rotate(dying, role)
    restarted = fleet.open()
    restarted.refresh_timestamp()
    assert fleet.stable(device) == fleet.stable(fleet.device("new")) == 1
    for proposal in restarted.pending():
        if not (role == "targets" and survives == 3):  # signed anew by the refresh
            restarted.publish_pending(proposal.folder)
    assert fleet.stable(device) == 1


def test_one_of_several_keys_is_revoked(tmp_path):
    fleet = Fleet(tmp_path, TWO_OF_THREE)
    fleet.release(1)
    device = fleet.device()
    ids = fleet.repository.signed.load().key_ids("targets")
    names = ", ".join(k[:8] for k in ids)
    with pytest.raises(ConfigError) as e:
        rotate(fleet.repository, "targets")
    assert str(e.value) == f"role targets has 3 keys: say which to revoke of {names}"
    with pytest.raises(ConfigError) as e:
        rotate(fleet.repository, "targets", revoke=["xy"])
    assert (
        str(e.value)
        == f"no key of role targets with an id that begins with xy, expected one of: {names}"
    )
    done = rotate(fleet.repository, "targets", revoke=[ids[0][:12]])
    assert done.retired == (ids[0],)
    now = fleet.repository.signed.load()
    assert sorted(now.key_ids("targets")) == sorted([*ids[1:], *done.added])
    assert now.authority("targets").threshold == 2
    assert fleet.stable(device) == 1


def test_a_key_made_elsewhere_is_added_by_its_public_half(fleet):
    signer = write_key(fleet.elsewhere / "new.pem")
    public = load_public_key(fleet.elsewhere / "new.pem.pub")
    done = rotate(fleet.repository, "targets", add=[public])
    assert done.added == (signer.public_key.keyid,)
    assert done.pending is not None, "targets.json needs the new key's signature"
    assert "targets-1.pem" in keys_here(fleet), "until it is published"
    (proposal,) = fleet.repository.pending()
    assert proposal.sign(signer) == ["targets"]
    fleet.repository.publish_pending(proposal.folder)
    assert "targets-1.pem" not in keys_here(fleet)
    assert fleet.stable(fleet.device()) == 1


def test_root_keys_of_before_and_after_must_sign(tmp_path):
    fleet = Fleet(tmp_path, KeyPlan(root=Quorum(2, 2)))
    fleet.release(1)
    device = fleet.device()
    fleet.stable(device)
    fleet.take_away("root-1", "root-2")
    old = fleet.key("root-1").public_key.keyid
    done = rotate(fleet.repository, "root", revoke=[old])
    (proposal,) = fleet.repository.pending()
    by = [(lack.by, lack.missing) for lack in proposal.lacks()]
    assert by == [("the root keys of today", 2), ("the new root keys", 1)]
    proposal.sign(fleet.key("root-2"))
    assert [(k.by, k.missing) for k in proposal.lacks()] == [("the root keys of today", 1)]
    with pytest.raises(RegistryError, match=r"^another key for role root is not published, it "):
        fleet.repository.publish_pending(proposal.folder)
    proposal.sign(fleet.key("root-1"))
    fleet.repository.publish_pending(proposal.folder)
    assert fleet.stable(device) == 1
    assert set(done.added) <= set(fleet.repository.signed.load().key_ids("root"))


def test_more_targets_keys_are_lost_than_can_be_spared(tmp_path):
    """Two of three must sign and one is left: the root keys put others in their place."""
    fleet = Fleet(tmp_path, TWO_OF_THREE)
    fleet.release(1)
    device = fleet.device()
    fleet.stable(device)
    ids = fleet.repository.signed.load().key_ids("targets")
    for n in (1, 2, 3):
        if fleet.key(f"targets-{n}").public_key.keyid in ids[:2]:
            (fleet.folder / "keys" / f"targets-{n}.pem").unlink()
    public = [load_public_key(tmp_path / f"{n}.pub") for n in "a" if write_key(tmp_path / "a")]
    with pytest.raises(ConfigError, match=r"^1 keys to add, expected 2: one for each$"):
        rotate(fleet.repository, "targets", revoke=ids[:2], add=public)
    done = rotate(fleet.repository, "targets", revoke=ids[:2])
    assert (done.retired, len(done.added), done.pending) == (tuple(ids[:2]), 2, None)
    fleet.release(2)
    assert fleet.stable(device) == 2


def test_only_one_change_of_the_same_metadata_waits(tmp_path):
    fleet = Fleet(tmp_path)
    fleet.take_away("root-1")
    waiting = rotate(fleet.repository, "snapshot").pending
    before = keys_here(fleet)
    with pytest.raises(RegistryError) as e:
        rotate(fleet.repository, "timestamp")
    assert str(e.value) == (
        f"{waiting} waits for signatures already (another key for role snapshot): sign and "
        "publish it, or delete it"
    )
    assert keys_here(fleet) == before, "no key was made in vain"


def test_what_is_offline_is_renewed_and_never_holds_up_the_rest(tmp_path):
    fleet = Fleet(tmp_path)
    fleet.release(1)
    fleet.take_away("targets-1", "root-1")
    device = fleet.device()
    assert fleet.repository.expiring() == []
    fleet.advance(days=46)
    assert fleet.repository.expiring() == [
        "targets.json expires in 44 days, on 2026-05-30, and its keys are not here: "
        "`fleetprune release renew targets`, and sign what that makes"
    ]
    assert fleet.repository.refresh_timestamp() is True
    assert fleet.stable(device) == 1
    fleet.repository.roll_out_to_all(1, ["phone"])
    fleet.repository.publish_graph(b"graph")
    renew(fleet.repository, "targets")
    (proposal,) = fleet.repository.pending()
    assert proposal.sign(fleet.key("targets-1")) == ["targets"]
    fleet.repository.publish_pending(proposal.folder)
    assert fleet.repository.expiring() == []
    assert fleet.stable(device) == 1
    fleet.advance(days=91)
    fleet.repository.refresh_timestamp()
    assert fleet.repository.expiring()[0].startswith("targets.json expired on 2026-07-15, and ")


def test_nonsense_is_refused(fleet):
    with pytest.raises(ConfigError, match=r"^there is no role mirror, expected one of: root, tar"):
        rotate(fleet.repository, "mirror")
    with pytest.raises(ConfigError) as e:
        renew(fleet.repository, "snapshot")
    assert str(e.value) == (
        "snapshot.json is signed anew by `fleetprune coordinator serve`, "
        "expected one of: root, targets"
    )
