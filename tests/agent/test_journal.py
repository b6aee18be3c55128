from pathlib import Path

import pytest
from models import INPUTS

from fleetprune.manifest import Manifest
from fleetprune_agent.journal import Journal, JournalFile, Phase, Standing, standing
from fleetprune_agent.slot_files import Installed, Refusal, State
from fleetprune_agent.trial import Finding


def runs(release: int, state: State = State.COMMITTED, device_class: str = "phone") -> Installed:
    manifest = Manifest(
        release=release,
        device_class=device_class,
        model="m",
        sha256="0" * 64,
        size=1,
        golden="g",
        input_shape=(INPUTS,),
    )
    return Installed("a", Path("a"), manifest, state, proven=state is State.COMMITTED)


def failed(release: int, *, ran: bool = False, device_class: str = "phone") -> Refusal:
    return Refusal(release=release, device_class=device_class, reason="too slow", ran=ran)


def at(phase: Phase, release: int, reason: str = "") -> Journal:
    return Journal(phase=phase, release=release, reason=reason)


CASES = {
    "a new device": (Journal(), None, (), Standing(Phase.IDLE, 0)),
    "first download": (at(Phase.DOWNLOADING, 1), None, (), Standing(Phase.DOWNLOADING, 1)),
    "postponed": (
        at(Phase.WANTED, 2, "quiet hours"),
        runs(1),
        (),
        Standing(Phase.WANTED, 2, "quiet hours"),
    ),
    "killed between switch and journal": (
        at(Phase.CHECKING, 2),
        runs(2, State.TRIAL),
        (),
        Standing(Phase.TRIAL, 2),
    ),
    "committed since": (at(Phase.TRIAL, 2), runs(2), (), Standing(Phase.COMMITTED, 2)),
    "refused": (
        at(Phase.REJECTED, 2, "too slow"),
        runs(1),
        (failed(2),),
        Standing(Phase.REJECTED, 2, "too slow"),
    ),
    "killed between refusal and journal": (
        at(Phase.CHECKING, 2),
        runs(1),
        (failed(2),),
        Standing(Phase.CHECKING, 2),
    ),
    "rolled back since": (
        at(Phase.TRIAL, 2),
        runs(1),
        (failed(2, ran=True),),
        Standing(Phase.ROLLED_BACK, 2, "phone's model: too slow"),
    ),
    "a smaller class's model runs": (
        at(Phase.COMMITTED, 2),
        runs(2, device_class="tiny"),
        (failed(2),),
        Standing(Phase.COMMITTED, 2, "phone's model: too slow"),
    ),
    "an older release is wanted again": (
        at(Phase.COMMITTED, 1),
        runs(1),
        (failed(2, ran=True),),
        Standing(Phase.COMMITTED, 1),
    ),
    "the journal was lost after a rollback": (
        Journal(),
        runs(1),
        (failed(2, ran=True),),
        Standing(Phase.ROLLED_BACK, 2, "phone's model: too slow"),
    ),
    "the journal was lost": (Journal(), runs(2), (failed(1),), Standing(Phase.COMMITTED, 2)),
    "the release that ran is gone": (at(Phase.TRIAL, 2), runs(1), (), Standing(Phase.COMMITTED, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_slots_are_right_where_the_journal_is_behind(case):
    journal, active, refused, expected = CASES[case]
    assert standing(journal, active, refused) == expected


def test_notes_change_what_they_name_and_are_written_when_they_differ(tmp_path):
    file = JournalFile(tmp_path)
    assert file.read() == Journal()
    file.note(phase=Phase.CHECKING, release=3, finding=Finding(agreement=0.5))
    file.note(serial=7, origin="abc")
    assert file.read() == Journal(
        phase=Phase.CHECKING, release=3, finding=Finding(agreement=0.5), serial=7, origin="abc"
    )
    before = file.path.stat().st_ino
    file.note(serial=7)
    assert file.path.stat().st_ino == before


def test_a_disk_that_refuses_costs_the_note_and_no_more(tmp_path, caplog):
    file = JournalFile(tmp_path / "missing")
    file.note(serial=7)
    assert file.read() == Journal()
    assert "the journal is behind: cannot write" in caplog.text
