import hashlib
import json
import shutil
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from signed_fleets import PHONE, TWO_OF_THREE, Fleet
from tuf.api.metadata import Metadata

from fleetprune.errors import ConfigError, FleetpruneError, RegistryError, TrustError
from fleetprune.rollout import Rollout
from fleetprune_coordinator.proposals import PendingError, Proposal
from fleetprune_coordinator.rotation import rotate


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    """Two of three targets keys must sign; one is here."""
    fleet = Fleet(tmp_path, TWO_OF_THREE)
    fleet.release(1)
    fleet.take_away("targets-2", "targets-3", "root-1", "root-2", "root-3")
    return fleet


@pytest.fixture
def proposal(fleet: Fleet) -> Proposal:
    with pytest.raises(PendingError):
        fleet.release(2)
    (proposal,) = fleet.repository.pending()
    return proposal


def test_a_release_waits_for_signatures(fleet):
    device = fleet.device()
    with pytest.raises(PendingError) as e:
        fleet.release(2)
    ids = [fleet.key(f"targets-{n}").public_key.keyid[:8] for n in (2, 3)]
    folder = fleet.folder / "pending" / "targets-3"
    told = str(e.value)
    for key_id in ids:
        assert key_id in told
        told = told.replace(key_id, "KEY")
    assert told == (
        f"release 2 is not published, it waits for signatures in {folder}: targets.json: 1 more "
        f"signature of role targets (KEY, KEY). `fleetprune release sign {folder} --key FILE` "
        "adds one, then `fleetprune release publish`"
    )
    assert fleet.stable(device) == 1
    assert fleet.repository.latest_release() == 1
    assert not (fleet.public / "targets/releases/phone/2").exists()


def test_it_is_signed_elsewhere_and_published(fleet, proposal, tmp_path):
    """The folder alone is carried to a machine that has nothing else."""
    carried = shutil.copytree(proposal.folder, tmp_path / "stick")
    shutil.rmtree(proposal.folder)
    there = Proposal(carried)
    (manifest,) = there.manifests()
    assert (manifest.device_class, manifest.release, manifest.accuracy) == ("phone", 2, 0.5)
    assert there.sign(fleet.key("targets-3")) == ["targets"]
    assert there.lacks() == []
    device = fleet.device()
    about = fleet.repository.publish_pending(carried)
    assert (about.reason, about.to_all) == ("release 2", ("phone",))
    assert fleet.stable(device) == 2
    model = device.manifest("phone", 2).model
    assert device.target(model, tmp_path / "model").read_bytes() == b"model 2"
    assert not carried.exists()
    document = json.loads((fleet.public / "metadata/3.targets.json").read_bytes())
    assert len(document["signatures"]) == 2


def test_too_few_signatures_publish_nothing(fleet, proposal):
    before = fleet.repository.read("metadata/timestamp.json")
    proposal.sign(fleet.key("targets-1"))  # again: still one
    with pytest.raises(PendingError):
        fleet.repository.publish_pending(proposal.folder)
    assert fleet.repository.read("metadata/timestamp.json") == before


def test_a_key_that_does_not_count(fleet, proposal):
    stranger = CryptoSigner.generate_ed25519()
    with pytest.raises(ConfigError, match=r"^key [0-9a-f]{8} counts for nothing in .*targets-3, "):
        proposal.sign(stranger)
    with pytest.raises(ConfigError, match=r"^key [0-9a-f]{8} counts for nothing "):
        proposal.sign(fleet.key("root-1"))


def test_the_same_release_after_a_restart_is_the_same_proposal(fleet, proposal):
    proposal.sign(fleet.key("targets-3"))
    fleet.advance(hours=3)
    with pytest.raises(PendingError, match=r"^release 2 is not published"):
        fleet.release(2)
    assert Proposal(proposal.folder).lacks() == [], "signatures stay"
    with pytest.raises(RegistryError) as e:
        fleet.release(3)
    assert str(e.value) == (
        f"{proposal.folder} waits for signatures already (release 2): sign and publish it, or "
        "delete it"
    )


def test_a_proposal_that_is_overtaken(fleet, proposal):
    proposal.sign(fleet.key("targets-3"))
    copy = shutil.copytree(proposal.folder, fleet.place / "copy")
    fleet.repository.publish_pending(proposal.folder)
    with pytest.raises(PendingError):
        fleet.release(3)
    (third,) = fleet.repository.pending()
    third.sign(fleet.key("targets-2"))
    fleet.repository.publish_pending(third.folder)
    with pytest.raises(RegistryError) as e:
        fleet.repository.publish_pending(copy)
    assert str(e.value) == (
        f"{copy} was made from version 2 of targets.json, but this is version 4 now: delete it, "
        "and make it anew"
    )


def test_a_proposal_of_another_fleet(fleet, proposal, tmp_path):
    other = Fleet(tmp_path / "other")
    with pytest.raises(RegistryError) as e:
        other.repository.publish_pending(proposal.folder)
    assert str(e.value) == f"{proposal.folder} was made for another fleet's repository"
    with pytest.raises(TrustError) as e:
        proposal.check_root(Metadata.from_bytes(other.repository.root()))
    assert str(e.value) == (
        f"the given root is none of versions 1 to 1 in {proposal.folder}: it is another fleet's"
    )
    proposal.check_root(Metadata.from_bytes(fleet.repository.root()))


def test_a_release_that_a_rollout_has_named_meanwhile_is_not_dropped(fleet):
    for number in range(2, 9):
        with pytest.raises(PendingError):
            fleet.release(number)
        (waiting,) = fleet.repository.pending()
        waiting.sign(fleet.key("targets-2"))
        fleet.repository.publish_pending(waiting.folder)
    with pytest.raises(PendingError):
        fleet.repository.publish_release(9, {"phone": PHONE})
    (waiting,) = fleet.repository.pending()
    assert waiting.dropped()[0].startswith("releases/phone/1/")
    waiting.sign(fleet.key("targets-2"))
    fleet.repository.publish_rollout(
        Rollout(device_class="phone", serial=99, stable=8, candidate=1)
    )
    with pytest.raises(RegistryError, match=r"^release 1 is not signed for class phone: "):
        fleet.repository.publish_pending(waiting.folder)
    assert fleet.repository.rollout("phone").candidate == 1


def edit(path: Path, change) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def swap_model(folder: Path) -> None:
    (folder / "files/releases/phone/2/model.onnx").write_bytes(b"evil 22")


def longer_model(folder: Path) -> None:
    (folder / "files/releases/phone/2/model.onnx").write_bytes(b"model 2 and more")


def lose_golden(folder: Path) -> None:
    (folder / "files/releases/phone/2/golden.npz").unlink()


def older_version(folder: Path) -> None:
    edit(folder / "targets.json", lambda d: d["signed"].update(version=9))


def leave_folder(folder: Path) -> None:
    def change(document):
        targets = document["signed"]["targets"]
        targets["../../keys/x.pem"] = targets["releases/phone/2/model.onnx"]

    edit(folder / "targets.json", change)


def other_before(folder: Path) -> None:
    """Hides a release that was never signed among those that were."""

    def change(document):
        targets = document["signed"]["targets"]
        targets["releases/phone/7/model.onnx"] = targets["releases/phone/1/model.onnx"]

    edit(folder / "before/targets.json", change)
    edit(folder / "targets.json", change)


def other_key_under_an_old_id(folder: Path) -> None:
    """The list of key ids would look the same."""

    def change(document):
        delegations = document["signed"]["delegations"]
        (key_id,) = delegations["roles"][0]["keyids"]
        delegations["keys"][key_id]["keyval"]["public"] = "ab" * 32

    edit(folder / "targets.json", change)


def other_manifest(folder: Path) -> None:
    """Says the model of release 1 is signed as that of release 2."""
    path = folder / "files/releases/phone/2/manifest.json"
    edit(path, lambda d: d.update(sha256="0" * 64))

    def change(document):
        info = document["signed"]["targets"]["releases/phone/2/manifest.json"]
        info["length"] = path.stat().st_size
        info["hashes"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()

    edit(folder / "targets.json", change)


TAMPERED = {
    swap_model: "model.onnx is not the file that would be signed as releases/phone/2/model.onnx",
    longer_model: "model.onnx is not the file that would be signed as releases/phone/2/model.onnx",
    lose_golden: "golden.npz is missing",
    older_version: "targets.json is version 9, expected 3: the one after before/targets.json",
    leave_folder: "leaves its folder",
    other_before: "before/targets.json is not signed by its root's keys",
    other_key_under_an_old_id: "is not the key that its id names",
    other_manifest: "the manifest of release 2 for phone names another model than the one that",
}


@pytest.mark.parametrize("tamper", TAMPERED, ids=lambda f: f.__name__)
def test_nobody_signs_something_else_than_what_is_shown(proposal, tamper):
    tamper(proposal.folder)
    with pytest.raises(TrustError) as e:
        Proposal(proposal.folder)
    assert TAMPERED[tamper] in str(e.value)


def test_what_is_no_proposal(tmp_path, proposal):
    with pytest.raises(ConfigError, match=r"^.*/absent holds no proposal: "):
        Proposal(tmp_path / "absent")
    (proposal.folder / "targets.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no proposal: nothing is to be signed$"):
        Proposal(proposal.folder)
    (proposal.folder / "proposal.json").write_text('{"reason": "x", "more": 1}')
    with pytest.raises(ConfigError, match=r"holds no proposal: 1 validation error for About$"):
        Proposal(proposal.folder)


def test_a_proposal_cut_off_at_any_byte_fails_cleanly(proposal):
    for name in ("targets.json", "before/targets.json", "before/1.root.json", "proposal.json"):
        path = proposal.folder / name
        whole = path.read_bytes()
        for end in range(0, len(whole) - 1, 97):
            path.write_bytes(whole[:end])
            with pytest.raises(FleetpruneError):
                Proposal(proposal.folder)
        path.write_bytes(whole)
    Proposal(proposal.folder)


def test_a_change_of_keys_shows_which(fleet):
    done = rotate(fleet.repository, "rollouts")
    (waiting,) = fleet.repository.pending()
    assert waiting.about.resign == ("rollouts",)
    waiting.sign(fleet.key("targets-2"))
    fleet.repository.publish_pending(waiting.folder)
    assert fleet.repository.signed.load().key_ids("rollouts") == list(done.added)
    assert fleet.stable(fleet.device()) == 1
