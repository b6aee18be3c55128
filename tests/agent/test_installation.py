"""The states of an installation: what is wanted, tried instead, made from a delta, or refused."""

import hashlib
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from devices import Device
from models import INPUTS, ZEROS, chooses, gemm, golden, npz

from fleetprune.errors import InstallError, TransportError, TrustError, WireError
from fleetprune_agent.compatibility import Machine
from fleetprune_agent.install import Checks, InstallOutcome, Status
from fleetprune_agent.journal import Phase, Standing
from fleetprune_agent.trial import Evidence, InChild, TrialStoppedError
from fleetprune_coordinator.delta_maker import make

WRONG = gemm(99)
"""Fails the golden samples of every release."""
TOO_FAR = "golden samples: outputs differ by up to 97, allowed are 0.001"


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def phases(device: Device) -> list[str]:
    """What the journal says from now on, in order."""
    seen: list[str] = []
    note = device.slots.journal.note

    def spy(**changes):
        note(**changes)
        phase = device.slots.journal.read().phase.value
        if not seen or seen[-1] != phase:
            seen.append(phase)

    device.slots.journal.note = spy
    return seen


def test_the_phases_of_an_installation(device):
    seen = phases(device)
    device.repository.release(1)
    device.install()
    assert seen == ["idle", "wanted", "downloading", "verifying", "checking", "trial"]
    device.slots.commit()
    assert device.stands() == Standing(Phase.COMMITTED, 1)
    device.install()
    assert device.slots.journal.read().phase is Phase.COMMITTED


def test_a_class_without_a_rollout_stays_quiet(device):
    assert device.install() == InstallOutcome(Status.NONE, 0)
    device.repository.release(1, to_all=False)
    assert device.install() == InstallOutcome(Status.NONE, 0)
    assert device.stands() == Standing(Phase.IDLE, 0)


def test_only_the_cohort_gets_the_candidate(tmp_path):
    canary, other = Device(tmp_path / "a", "d1"), Device(tmp_path / "b", "d2")
    for device in (canary, other):
        device.get(1)
        device.repository.release(2, to_all=False)
        device.repository.roll_out(stable=1, candidate=2, share=0, canaries=("d1",))
        device.install()
    assert (canary.answer(), other.answer()) == (2, 1)


def test_a_pause_keeps_what_runs(device):
    device.get(1)
    device.repository.release(2, to_all=False)
    device.repository.roll_out(stable=2, paused=True)
    assert device.install() == InstallOutcome(Status.CURRENT, 1)


# Returns to an older release.


def test_an_authorised_return_to_the_other_slot_needs_no_download(device):
    device.get(1)
    device.get(2)
    device.repository.roll_out(stable=1)
    device.downloads()
    assert device.install() == InstallOutcome(Status.INSTALLED, 1)
    assert device.downloads() == []
    assert device.answer() == 1
    assert device.stands() == Standing(Phase.COMMITTED, 1)
    device.repository.roll_out(stable=2)
    assert device.install() == InstallOutcome(Status.INSTALLED, 2), "and forwards again"
    assert device.downloads() == []


def test_a_return_to_what_was_never_proven_is_an_installation(device):
    device.repository.release(1)
    device.install()  # on trial
    device.get(2)
    device.repository.roll_out(stable=1)
    device.downloads()
    outcome = device.install()
    assert (outcome.status, device.answer()) == (Status.INSTALLED, 1)
    assert outcome.finding is not None
    assert device.downloads() == ["model.onnx", "golden.npz"]


def test_a_return_far_back_is_downloaded_and_need_not_agree_with_what_is_withdrawn(device):
    device.repository.release(
        1,
        model=chooses(0, *[1] * 20),
        samples=npz(x=ZEROS, y=np.zeros((1, 3), np.float32)),
        fields={"min_agreement": 1.0},
    )
    device.install()
    device.slots.commit()
    device.get(2)
    device.get(3)
    device.repository.roll_out(stable=1)
    x = np.zeros((20, INPUTS), np.float32)
    x[:, 0] = range(1, 21)
    outcome = device.install(evidence=Evidence(recent=x))
    assert outcome.status is Status.INSTALLED
    assert outcome.finding.agreement == 0.0
    assert device.slots.active().release == 1


def test_a_return_to_what_failed_here_is_refused(device):
    device.get(1)
    device.get(2)
    device.slots.rollback("it failed later")
    device.get(3)
    device.repository.roll_out(stable=2)
    assert device.install() == InstallOutcome(Status.REJECTED, 2, "it failed later")
    assert device.stands() == Standing(Phase.REJECTED, 2, "it failed later")
    assert device.answer() == 3


# The serial of the rollout.


def older_rollout(device: Device) -> None:
    device.repository.serials["phone"] = 1
    device.repository.roll_out(stable=1)  # serial 2 once more, under newer metadata


@pytest.mark.parametrize("lost", ["nothing", "trust", "trust and journal"])
def test_an_older_rollout_is_refused_even_by_a_device_that_lost_its_trust_folder(device, lost):
    device.get(1)
    device.get(2)
    device.get(3)
    older_rollout(device)
    if "trust" in lost:
        shutil.rmtree(device.folder / "trust")
    if "journal" in lost:
        (device.slots.folder / "journal.json").unlink()
    device.restart()
    with pytest.raises(TrustError) as e:
        device.install()
    assert str(e.value) == "rollouts/phone.json is rollout 2, older than 3, which was followed"
    assert device.answer() == 3


def test_a_device_of_another_fleet_now_begins_with_its_serials(device, tmp_path):
    for release in (1, 2, 3):
        device.get(release)
    device.repository = Device(tmp_path / "elsewhere").repository
    device.restart()
    device.repository.release(1, model=gemm(7), samples=golden(7))
    device.install()
    assert device.answer() == 7


# What cannot run here.


def test_what_cannot_run_is_not_downloaded(device):
    device.get(1)
    device.repository.release(2, fields={"requires": {"opset": 99}})
    device.downloads()
    why = "the model requires opset 99, onnxruntime 1.32.0 takes up to 28"
    checks = Checks(machine=lambda: Machine("onnxruntime", "1.32.0", 28, 14, "1"))
    assert device.install(checks) == InstallOutcome(Status.REJECTED, 2, why)
    assert device.downloads() == []
    assert device.stands() == Standing(Phase.REJECTED, 2, why)
    updated = Checks(machine=lambda: Machine("onnxruntime", "2.0", 99, 14, "1"))
    assert device.install(updated).status is Status.INSTALLED, "a new runtime changes the answer"


def test_a_reason_not_to_fetch_now(device):
    device.get(1)
    device.repository.release(2)
    device.downloads()
    later = Checks(may_fetch=lambda _bytes: "quiet hours until 06:00")
    outcome = InstallOutcome(Status.POSTPONED, 2, "quiet hours until 06:00")
    assert device.install(later) == outcome
    assert device.downloads() == []
    assert device.stands() == Standing(Phase.WANTED, 2, "quiet hours until 06:00")
    assert device.install().status is Status.INSTALLED


def test_a_return_and_what_is_here_already_need_no_permission(device):
    later = Checks(may_fetch=lambda _bytes: "quiet hours until 06:00")

    def killed(*_args):
        raise KeyboardInterrupt

    device.get(1)
    device.repository.release(2)
    with pytest.raises(KeyboardInterrupt):
        device.install(Checks(trial=killed))
    assert device.stands().phase is Phase.CHECKING
    device.restart()
    assert device.install(later).status is Status.INSTALLED
    device.slots.commit()
    device.repository.roll_out(stable=1)
    assert device.install(later).status is Status.INSTALLED


# Smaller classes' models.


def with_smaller(device: Device, release: int, *, own: bytes, tiny: bytes, **fields) -> None:
    device.repository.release(release, "tiny", model=tiny, to_all=False, fields=fields)
    device.repository.release(release, model=own, fields={"smaller": "tiny"})


def test_a_smaller_model_runs_where_our_own_fails(device):
    device.get(1)
    with_smaller(device, 2, own=WRONG, tiny=gemm(2))
    assert device.install().status is Status.INSTALLED
    assert device.answer() == 2
    assert device.slots.active().manifest.device_class == "tiny"
    assert device.slots.rejected() == {2: TOO_FAR}
    assert device.stands() == Standing(Phase.TRIAL, 2, f"phone's model: {TOO_FAR}")
    device.slots.commit()
    device.downloads()
    assert device.install() == InstallOutcome(Status.CURRENT, 2)
    assert device.downloads() == []
    with_smaller(device, 3, own=gemm(3), tiny=gemm(3))
    assert device.install().status is Status.INSTALLED
    assert device.slots.active().manifest.device_class == "phone", "our own is tried first again"


def test_a_smaller_model_runs_where_our_own_fails_in_service(device):
    device.get(1)
    with_smaller(device, 2, own=gemm(2), tiny=gemm(2))
    device.install()
    assert device.slots.rollback("it raised").release == 1
    assert device.stands() == Standing(Phase.ROLLED_BACK, 2, "phone's model: it raised")
    assert device.install().status is Status.INSTALLED
    assert device.slots.active().manifest.device_class == "tiny"


def test_a_smaller_model_is_held_against_our_own_budget(device):
    """Ours allows no time at all; what the smaller class allows does not matter."""
    device.repository.release(1, "tiny", to_all=False, fields={"max_latency_ms": 1e9})
    device.repository.release(1, fields={"smaller": "tiny", "max_latency_ms": 1e-9})
    outcome = device.install()
    assert outcome.status is Status.REJECTED
    own, tiny = outcome.reason.split("; tiny's model: ")
    assert own.startswith("one sample takes ") and tiny.startswith("one sample takes ")
    assert device.slots.active() is None


def test_smaller_and_smaller_until_one_runs(device):
    repository = device.repository
    repository.release(1, "tinier", to_all=False)
    repository.release(1, "tiny", model=WRONG, to_all=False, fields={"smaller": "tinier"})
    repository.release(1, fields={"smaller": "tiny", "requires": {"runtime": "tflite"}})
    assert device.install().status is Status.INSTALLED
    assert device.slots.active().manifest.device_class == "tinier"
    assert device.install() == InstallOutcome(Status.CURRENT, 1)


def test_classes_that_name_each_other_end(device):
    repository = device.repository
    repository.release(1, "tiny", model=WRONG, to_all=False, fields={"smaller": "phone"})
    repository.release(1, model=WRONG, fields={"smaller": "tiny"})
    assert device.install() == InstallOutcome(
        Status.REJECTED,
        1,
        "golden samples: outputs differ by up to 98, allowed are 0.001; tiny's model: "
        "golden samples: outputs differ by up to 98, allowed are 0.001",
    )


def test_a_smaller_class_without_that_release_is_said(device):
    device.repository.release(1, model=WRONG, fields={"smaller": "tiny"})
    outcome = device.install()
    assert outcome.status is Status.REJECTED
    assert outcome.reason.endswith(
        "allowed are 0.001; tiny's model: the release repository has no target "
        "releases/tiny/1/manifest.json"
    )


# Deltas.


class Change:
    """Stands for `fleetprune.delta.apply`: a delta is the release that it makes, in digits."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, base: bytes, delta: bytes, *, max_bytes: int) -> bytes:
        self.calls += 1
        if not delta.isdigit():
            raise WireError(f"delta {delta!r}, expected digits")
        assert len(base) > 0
        return gemm(int(delta), padding=5000)[:max_bytes]


def with_delta(device: Device, release: int, delta: bytes | None = None) -> None:
    """The next release of 5 kB more, and a delta from the one that runs."""
    delta = b"%d" % release if delta is None else delta
    path = f"releases/phone/{release}/from-{release - 1}.delta"
    entry = {
        "base": device.slots.active().manifest.sha256,
        "target": path,
        "sha256": hashlib.sha256(delta).hexdigest(),
        "size": len(delta),
    }
    device.repository.add(path, delta)
    model = gemm(release, padding=5000)
    device.repository.release(release, model=model, fields={"deltas": (entry,)})


def test_a_delta_instead_of_the_whole(device):
    device.get(1)
    with_delta(device, 2)
    device.downloads()
    change = Change()
    assert device.install(Checks(apply_delta=change)).status is Status.INSTALLED
    assert device.downloads() == ["from-1.delta", "golden.npz"]
    assert device.answer() == 2
    assert sorted(p.name for p in device.slots.active().folder.iterdir()) == [
        "golden.npz",
        "model.onnx",
        "slot.json",
    ]


def test_a_delta_as_the_coordinator_makes_it(device):
    device.repository.release(1, model=gemm(1, padding=5000))
    device.install()
    with_delta(device, 2, make(gemm(1, padding=5000), gemm(2, padding=5000)))
    device.downloads()
    assert device.install().status is Status.INSTALLED
    assert device.downloads() == ["from-1.delta", "golden.npz"]
    assert device.answer() == 2


DAMAGED = {"another model": b"7", "not a delta": b"seven"}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_delta_that_makes_anything_else_leads_to_the_whole(device, case, caplog):
    device.get(1)
    with_delta(device, 2, DAMAGED[case])
    device.downloads()
    change = Change()
    assert device.install(Checks(apply_delta=change)).status is Status.INSTALLED
    assert device.downloads() == ["from-1.delta", "model.onnx", "golden.npz"]
    assert (device.answer(), change.calls) == (2, 1)
    assert "the delta from release 1 is of no use: " in caplog.text


def test_a_delta_for_another_base_is_not_asked_for(device):
    device.get(1)
    with_delta(device, 2)
    elsewhere = device.slots.active().model
    device.repository.roll_out(stable=1)
    device.get(5)
    assert elsewhere.exists()
    device.repository.roll_out(stable=2)
    device.downloads()
    assert device.install(Checks(apply_delta=Change())).status is Status.INSTALLED
    assert device.downloads() == ["model.onnx", "golden.npz"]


def test_a_delta_that_is_not_signed_as_the_manifest_says(device, caplog):
    device.get(1)
    with_delta(device, 2)
    device.repository.add("releases/phone/2/from-1.delta", b"another")
    device.repository.bump()
    assert device.install(Checks(apply_delta=Change())).status is Status.INSTALLED
    assert "the manifest names another delta than the one signed as releases/phone/2" in caplog.text


def test_a_delta_is_not_tried_again_after_a_kill(device):
    def killed(*_args, max_bytes):
        raise KeyboardInterrupt

    device.get(1)
    with_delta(device, 2)
    with pytest.raises(KeyboardInterrupt):
        device.install(Checks(apply_delta=killed))
    device.restart()
    device.downloads()
    assert device.install(Checks(apply_delta=killed)).status is Status.INSTALLED
    assert device.downloads() == ["model.onnx", "golden.npz"]


def test_half_a_delta_is_kept_while_nobody_answers(device, monkeypatch):
    device.get(1)
    with_delta(device, 2)

    def lost(name, size, sha256, into):
        into.write_bytes(b"some")
        raise TransportError("no answer in 30 s")

    with monkeypatch.context() as patch:
        patch.setattr(device.repository, "pull", lost)
        with pytest.raises(TransportError):
            device.install(Checks(apply_delta=Change()))
    idle = device.slots.folder / "b"
    assert len(list(idle.glob("model.delta.*"))) == 1
    device.restart()
    device.downloads()
    device.install(Checks(apply_delta=Change()))
    assert device.downloads() == ["from-1.delta", "golden.npz"]


# Trials.


def test_what_the_trial_found_is_remembered(device):
    device.get(1)
    device.repository.release(2)
    samples = np.zeros((12, INPUTS), np.float32)
    evidence = Evidence(recent=samples, x=samples, y=np.zeros(12, np.int64))
    finding = device.install(Checks(trial=InChild()), evidence).finding
    assert (finding.agreement, finding.accuracy, finding.accuracy_before) == (1.0, 1.0, 1.0)
    journal = device.slots.journal.read()
    assert (journal.model, journal.finding) == (device.slots.active().manifest.sha256, finding)


def test_no_verdict_no_count(device):
    def stopped(*_args):
        raise TrialStoppedError

    device.get(1)
    device.repository.release(2)
    for _ in range(10):
        assert device.install(Checks(trial=stopped)).status is Status.POSTPONED
    assert device.slots.rejected() == {}
    assert device.install().status is Status.INSTALLED


def test_a_full_disk_after_the_switch_undoes_nothing(device, monkeypatch):
    """The journal is behind; the slots and what is said of them are not."""

    def full(path: Path, _message) -> None:
        raise InstallError(f"disk full: cannot write {path}, 0 bytes free")

    device.get(1)
    device.repository.release(2)
    with monkeypatch.context() as patch:
        patch.setattr("fleetprune_agent.journal.replace_message", full)
        assert device.install().status is Status.INSTALLED
    assert device.answer() == 2
    assert device.slots.journal.read().release == 1
    device.install()
    assert device.stands() == Standing(Phase.TRIAL, 2)


# Damage.

FILES = ["active.json", "rejected.json", "starts.json", "journal.json", "a/slot.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [b"", b"{", b"\0" * 50], ids=["empty", "cut", "zeros"])
def test_the_agent_starts_from_its_last_good_slot(device, name, damage, caplog):
    device.get(1)  # in slot a
    device.get(2)
    device.slots.reject(device.slots.active().manifest.model_copy(update={"release": 9}), "bad")
    device.slots.start()
    (device.slots.folder / name).write_bytes(damage)
    device.restart()
    with caplog.at_level(logging.WARNING):
        assert device.slots.start().release == 2
    assert (device.slots.folder / f"{name}.bad").read_bytes() == damage
    assert f"{name} is damaged and set aside" in caplog.text
    assert device.answer() == 2
    device.get(3)
    assert device.answer() == 3


def test_a_damaged_record_of_the_active_slot_means_the_other_release(device):
    device.get(1)
    device.get(2)
    (device.slots.folder / "b" / "slot.json").write_bytes(b"{")
    device.restart()
    assert device.slots.start().release == 1
    assert device.install().status is Status.INSTALLED
    assert device.answer() == 2


def test_with_both_slots_damaged_the_release_is_fetched_anew(device):
    device.get(1)
    device.get(2)
    for name in "ab":
        (device.slots.folder / name / "slot.json").write_bytes(b"{")
    device.restart()
    assert device.slots.start() is None
    assert device.install().status is Status.INSTALLED
    assert device.answer() == 2


def test_what_a_newer_agent_wrote_is_not_destroyed(device):
    """Its slot is not used and not overwritten; what this agent can read, it runs."""
    device.get(1)
    device.get(2)
    newer = b'{"schema":2}'
    for name in ("active.json", "a/slot.json"):
        (device.slots.folder / name).write_bytes(newer)
    device.restart()
    assert device.slots.start().release == 2
    device.repository.release(3)
    with pytest.raises(InstallError, match=r"a/slot.json was written by a newer version"):
        device.install()
    for name in ("active.json", "a/slot.json"):
        assert (device.slots.folder / name).read_bytes() == newer
    assert device.answer() == 2
