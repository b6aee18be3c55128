import hashlib
import os
import threading
from pathlib import Path

import pytest
from models import INPUTS, gemm, golden

from fleetprune.errors import InstallError
from fleetprune.manifest import Manifest
from fleetprune_agent.slot_files import GOLDEN, MODEL, State
from fleetprune_agent.slots import MAX_REJECTED, MAX_STARTS, Slots
from fleetprune_agent.starts import MAX_EARLY


def manifest_of(release: int) -> Manifest:
    model = gemm(release)
    return Manifest(
        release=release,
        device_class="phone",
        model=f"releases/phone/{release}/model.onnx",
        sha256=hashlib.sha256(model).hexdigest(),
        size=len(model),
        golden=f"releases/phone/{release}/golden.npz",
        input_shape=(INPUTS,),
    )


def staged(slots: Slots, release: int) -> Path:
    folder = slots.stage(manifest_of(release))
    (folder / MODEL).write_bytes(gemm(release))
    (folder / GOLDEN).write_bytes(golden(release))
    return folder


def on_trial(slots: Slots, release: int) -> None:
    staged(slots, release)
    slots.switch(manifest_of(release))


def committed(slots: Slots, release: int) -> None:
    on_trial(slots, release)
    slots.commit()


def running(slots: Slots) -> tuple[int, str] | None:
    found = slots.active()
    return None if found is None else (found.release, found.state)


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    return Slots(tmp_path)


def test_empty(slots):
    assert slots.active() is None
    assert slots.version() is None
    assert slots.start() is None
    assert slots.rollback("no reason") is None
    slots.commit()
    assert slots.rejected() == {}


def test_switch_and_commit(slots):
    on_trial(slots, 1)
    assert running(slots) == (1, "trial")
    slots.commit()
    assert running(slots) == (1, "committed")
    assert slots.active().model.read_bytes() == gemm(1)


def test_slots_alternate_and_survive_a_restart(slots, tmp_path):
    places = []
    for release in (1, 2, 3):
        committed(slots, release)
        places.append(Slots(tmp_path).active().slot)
    assert places == ["a", "b", "a"]


def test_the_pointer_file(slots):
    committed(slots, 1)
    on_trial(slots, 2)
    assert (slots.folder / "active.json").read_text() == (
        '{"schema":1,"slot":"b","release":2,"state":"trial","attempts":0,"previous":"a"}'
    )


def test_staging_does_not_touch_the_active_release(slots):
    committed(slots, 1)
    staged(slots, 2)
    assert running(slots) == (1, "committed")


def test_staging_the_same_release_again_keeps_what_came(slots):
    folder = slots.stage(manifest_of(1))
    (folder / "model.onnx.part").write_bytes(b"some blocks")
    assert slots.stage(manifest_of(1)) == folder
    assert (folder / "model.onnx.part").read_bytes() == b"some blocks"
    assert slots.stage(manifest_of(2)) == folder
    assert [p.name for p in folder.iterdir()] == ["staging.json"]


def test_switch_refuses_other_bytes(slots):
    folder = staged(slots, 1)
    (folder / MODEL).write_bytes(gemm(2))
    with pytest.raises(InstallError) as e:
        slots.switch(manifest_of(1))
    assert str(e.value) == (
        f"{folder}/model.onnx has sha256 {manifest_of(2).sha256}, expected {manifest_of(1).sha256}"
    )
    assert slots.active() is None


def test_switch_refuses_missing_files(slots):
    folder = slots.stage(manifest_of(1))
    with pytest.raises(InstallError, match=f"^cannot seal {folder}: No such file or directory$"):
        slots.switch(manifest_of(1))


def test_switch_refuses_what_was_not_staged(slots):
    staged(slots, 1)
    with pytest.raises(InstallError) as e:
        slots.switch(manifest_of(2))
    assert str(e.value) == f"release 2 is not staged in {slots.folder}/a"


def test_everything_is_on_disk_before_the_pointer_is_replaced(slots, monkeypatch):
    committed(slots, 1)
    staged(slots, 2)
    steps = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        steps.append(f"sync {path.relative_to(slots.folder)}")
        fsync(descriptor)

    def spy_replace(source, target):
        steps.append(f"rename {Path(target).relative_to(slots.folder)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    slots.switch(manifest_of(2))
    assert steps == [
        "sync b/model.onnx",
        "sync b/golden.npz",
        "sync b/.slot.json.tmp",
        "rename b/slot.json",
        "sync b",
        "sync .active.json.tmp",
        "rename active.json",
        "sync .",
    ]


def test_rollback(slots):
    committed(slots, 1)
    on_trial(slots, 2)
    assert slots.rollback("it failed").release == 1
    assert running(slots) == (1, "committed")
    assert slots.rejected() == {2: "it failed"}


def test_a_committed_release_can_be_rolled_back_too(slots):
    committed(slots, 1)
    committed(slots, 2)
    slots.rollback("it failed later")
    assert running(slots) == (1, "committed")


def test_no_rollback_to_a_release_that_failed(slots):
    committed(slots, 1)
    committed(slots, 2)
    slots.rollback("2 failed")
    assert slots.rollback("1 failed too") is None
    assert running(slots) == (1, "committed")


def test_no_rollback_to_a_release_that_is_still_coming(slots):
    committed(slots, 1)
    committed(slots, 2)
    staged(slots, 3)
    assert slots.rollback("2 failed while 3 was coming") is None
    assert running(slots) == (2, "committed")


def test_the_only_release_stays_and_may_still_prove_itself(slots):
    on_trial(slots, 1)
    assert slots.rollback("odd input") is None
    assert running(slots) == (1, "trial")
    slots.commit()
    assert slots.rejected() == {}


def test_a_trial_gives_way_to_a_newer_release_without_losing_the_proven_one(slots):
    committed(slots, 1)
    on_trial(slots, 2)
    staged(slots, 3)
    assert running(slots) == (1, "committed")
    assert slots.rejected() == {}
    slots.switch(manifest_of(3))
    assert slots.rollback("3 failed").release == 1


def test_a_first_trial_without_an_alternative_goes_on_while_the_next_is_staged(slots):
    on_trial(slots, 1)
    staged(slots, 2)
    assert running(slots) == (1, "trial")
    slots.switch(manifest_of(2))
    assert slots.rollback("2 failed").release == 1
    assert running(slots) == (1, "trial")


def test_too_many_starts_on_trial(slots, tmp_path):
    committed(slots, 1)
    on_trial(slots, 2)
    for _ in range(MAX_STARTS):
        assert Slots(tmp_path).start().release == 2
    assert Slots(tmp_path).start().release == 1
    assert slots.rejected() == {2: "not committed in 3 starts"}


def test_clean_stops_are_no_crashes(slots):
    committed(slots, 1)
    on_trial(slots, 2)
    for _ in range(10):
        assert slots.start().release == 2
        slots.stop()
    assert slots.crashes() == 0


def test_a_committed_release_that_the_agent_does_not_survive_is_rolled_back(slots):
    committed(slots, 1)
    committed(slots, 2)
    assert slots.start().release == 2
    for ends in range(1, MAX_EARLY + 1):
        assert slots.start().release == 2
        assert slots.crashes() == ends
    assert slots.start().release == 1
    assert slots.rejected() == {
        2: "the agent ended unasked 6 times in succession, each within 600 s of its start"
    }
    assert slots.crashes() == 0, "another model"
    for _ in range(10):
        assert slots.start().release == 1, "there is nothing else"
    assert slots.crashes() == 10


def test_a_settled_release_is_no_longer_blamed(slots):
    committed(slots, 1)
    committed(slots, 2)
    slots.start()
    slots.steady()
    for ends in range(1, 3 * MAX_EARLY):
        assert slots.start().release == 2
        assert slots.crashes() == ends


def test_early_ends_in_succession_are_those_without_a_clean_one_between(slots):
    committed(slots, 1)
    committed(slots, 2)
    for _ in range(3):
        for _ in range(MAX_EARLY):
            assert slots.start().release == 2
        slots.stop()
    assert slots.crashes() == 3 * (MAX_EARLY - 1)


def test_a_crash_is_that_of_the_release_that_ran_last(slots):
    committed(slots, 1)
    slots.start()
    slots.steady()
    committed(slots, 2)  # while the agent ran
    slots.start()
    assert slots.crashes() == 1


def test_no_rollback_of_a_boot_loop_to_what_was_never_proven(slots):
    on_trial(slots, 1)
    committed(slots, 2)
    for _ in range(3 * MAX_EARLY):
        assert slots.start().release == 2


def test_many_starts_without_an_alternative_change_nothing(slots):
    on_trial(slots, 1)
    for _ in range(10):
        assert slots.start().release == 1
    assert slots.rejected() == {}


def test_a_rollback_that_was_killed_half_way_ends_at_the_next_start(slots):
    committed(slots, 1)
    on_trial(slots, 2)
    slots.reject(manifest_of(2), "it failed", ran=True)  # killed here: noted, not yet switched
    assert slots.start().release == 1


@pytest.mark.parametrize("name", [MODEL, GOLDEN, "slot.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_active_slot_means_the_other_one(slots, name, damage):
    committed(slots, 1)
    committed(slots, 2)
    path = slots.active().folder / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert running(slots) == (1, "committed")
    assert slots.start().release == 1
    assert slots.rejected() == {}, "bit rot is not the release's fault"
    committed(slots, 2)
    assert running(slots) == (2, "committed")


@pytest.mark.parametrize("content", [b"", b"{", b'{"slot":"c"}', b"\0" * 100, None])
def test_a_damaged_pointer_means_the_newest_proven_release(slots, content):
    committed(slots, 1)
    committed(slots, 2)
    pointer = slots.folder / "active.json"
    pointer.unlink() if content is None else pointer.write_bytes(content)
    assert running(slots) == (2, "committed")
    staged(slots, 3)
    assert running(slots) == (2, "committed")
    slots.switch(manifest_of(3))
    assert running(slots) == (3, "trial")


def test_a_damaged_pointer_does_not_choose_a_release_that_failed(slots):
    committed(slots, 1)
    committed(slots, 2)
    slots.rollback("2 failed")
    (slots.folder / "active.json").unlink()
    assert running(slots) == (1, "committed")


def test_both_slots_damaged_is_none(slots):
    committed(slots, 1)
    committed(slots, 2)
    for name in "ab":
        (slots.folder / name / MODEL).write_bytes(b"")
    assert slots.active() is None
    assert slots.start() is None


def test_killed_between_seal_and_switch(slots, monkeypatch):
    """The new release is whole and healthy but not active: used only where nothing else is."""
    committed(slots, 1)
    committed(slots, 2)
    staged(slots, 3)

    class KilledError(BaseException):
        pass

    def kill(*args: object, **kwargs: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(slots, "_point", kill)
        with pytest.raises(KilledError):
            slots.switch(manifest_of(3))
    assert running(slots) == (2, "committed")
    (slots.folder / "active.json").unlink()
    assert running(slots) == (2, "committed")
    (slots.folder / "b" / MODEL).write_bytes(b"")
    assert running(slots) == (3, "trial")
    assert slots.start().release == 3
    slots.commit()
    assert running(slots) == (3, "committed")


def test_damaged_notes_are_forgotten(slots):
    slots.reject(manifest_of(1), "it failed")
    (slots.folder / "rejected.json").write_bytes(b"{")
    assert slots.rejected() == {}


def test_notes_are_few_short_and_on_one_line(slots):
    for release in range(1, 100):
        slots.reject(manifest_of(release), "one\ntwo " + "é" * 1000)
    assert len(slots.rejected()) == MAX_REJECTED
    assert max(slots.rejected()) == 99
    assert {len(reason) for reason in slots.rejected().values()} == {200}
    assert slots.rejected()[99].startswith("one two é")


def test_health_checks_are_counted(slots, tmp_path):
    staged(slots, 1)
    assert [Slots(tmp_path).begin_check(manifest_of(1)) for _ in range(4)] == [1, 2, 3, 4]
    slots.stage(manifest_of(1))
    assert slots.begin_check(manifest_of(1)) == 5
    staged(slots, 2)
    assert slots.begin_check(manifest_of(2)) == 1


def test_reclaimable_is_the_idle_slot(slots):
    committed(slots, 1)
    assert slots.reclaimable() == 0
    committed(slots, 2)
    assert slots.reclaimable() >= len(gemm(1)) + len(golden(1))


def test_the_version_changes_with_every_change_of_the_pointer(slots):
    seen = [slots.version()]
    for change in (lambda: on_trial(slots, 1), slots.commit, lambda: on_trial(slots, 2)):
        change()
        seen.append(slots.version())
    assert len(set(seen)) == 4


def test_threads_that_change_at_once_take_turns(slots):
    committed(slots, 1)

    def reject(first: int) -> None:
        for release in range(first, first + 3):
            slots.reject(manifest_of(release), "x")

    threads = [threading.Thread(target=reject, args=(n * 10,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(slots.rejected()) == 12


def test_a_switch_on_trial_reports_its_state_to_readers(slots):
    on_trial(slots, 1)
    assert slots.active().state is State.TRIAL
    assert slots.active().proven is False


def test_only_the_release_that_was_meant_is_committed_or_rolled_back(slots):
    """A switch may come between a prediction and its verdict."""
    committed(slots, 1)
    on_trial(slots, 2)
    slots.commit(release=1)
    assert running(slots) == (2, "trial")
    assert slots.rollback("1 failed", release=1).release == 2
    assert running(slots) == (2, "trial")
    assert slots.rejected() == {}
    slots.commit(release=2)
    assert running(slots) == (2, "committed")
    assert slots.rollback("2 failed", release=2).release == 1


def test_unstaging_gives_the_space_back(slots):
    committed(slots, 1)
    staged(slots, 2)
    slots.unstage()
    assert slots.reclaimable() == 0
    assert running(slots) == (1, "committed")
