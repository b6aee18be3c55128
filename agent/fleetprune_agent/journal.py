"""Where an installation stands: one small file, so that a killed agent and a person can tell.

    idle -> wanted -> downloading -> verifying -> checking -> trial -> committed
                                                     |          |         |
                                                  rejected   rolled_back <+

What runs is decided by the slots alone, in one rename. The journal follows them: where the two
disagree, the process was killed in between and the slots are right (`standing`). Two things are
known nowhere else: the highest serial of a rollout, and what the trial found. So every write is
synced: a phase that is noted without would take the serial with it when power fails.
"""

import logging
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pydantic import Field

from fleetprune.errors import InstallError
from fleetprune.messages import MAX_REASON, Count, Line, Message, Name
from fleetprune_agent.slot_files import Installed, Refusal
from fleetprune_agent.statefile import read_message, replace_message
from fleetprune_agent.trial import Finding

log = logging.getLogger(__name__)

JOURNAL = "journal.json"


class Phase(StrEnum):
    """How far the installation of the wanted release has got."""

    IDLE = "idle"
    """Nothing is installed and nothing is wanted."""
    WANTED = "wanted"
    """Not begun, or not to be fetched now: the reason says why."""
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"
    """Hashes; a model is made from a delta."""
    CHECKING = "checking"
    """The health check runs."""
    TRIAL = "trial"
    """It runs, and has yet to prove itself."""
    COMMITTED = "committed"
    REJECTED = "rejected"
    """It cannot run here, or failed its check: it never ran."""
    ROLLED_BACK = "rolled_back"
    """It ran, failed, and gave way."""


UNDER_WAY = frozenset({Phase.WANTED, Phase.DOWNLOADING, Phase.VERIFYING, Phase.CHECKING})


class Journal(Message):
    """Content of journal.json."""

    phase: Phase = Phase.IDLE
    release: Count = 0
    """That the rollout wants here; 0: none."""
    device_class: Name | None = None
    """Whose model is being installed."""
    reason: Line = Field(default="", max_length=MAX_REASON)
    origin: str = Field(default="", max_length=64)
    """Root of trust that `serial` was verified under."""
    serial: Count = 0
    """Of the newest rollout that was verified."""
    model: str = Field(default="", max_length=64)
    """SHA-256 of the model that `finding` is about."""
    finding: Finding = Finding()


class JournalFile:
    """The journal of some slots. One writer: the job that installs."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds the slots; nothing is read yet."""
        self.path = folder / JOURNAL

    def read(self) -> Journal:
        """What was noted last; an empty journal where there is none."""
        return read_message(self.path, Journal) or Journal()

    def note(self, **changes: object) -> None:
        """Change some fields; writes only what differs.

        A disk that refuses costs the note and no more: going back to a proven release must be
        possible on a full one.

        Args:
            changes: Fields of `Journal`.
        """
        before = self.read()
        after = Journal.model_validate({**dict(before), **changes})
        if after == before:
            return
        try:
            replace_message(self.path, after)
        except InstallError as e:
            log.warning("the journal is behind: %s", e)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a device stands, in words."""

    phase: Phase
    release: int
    """That the phase is about; 0: none."""
    reason: str = ""


def standing(journal: Journal, active: Installed | None, refused: tuple[Refusal, ...]) -> Standing:
    """What is to be said about the wanted release, or about the running one if that is wanted.

    Args:
        journal: As read; one that was lost knows of no release, the newest failure is told then.
        active: What runs.
        refused: What failed here.
    """
    running = 0 if active is None else active.release
    newest = max((r.release for r in refused), default=0)
    release = journal.release or (newest if newest > running else running)
    why = "; ".join(str(r) for r in refused if r.release == release)
    if active is not None and running == release:
        return Standing(Phase(active.state.value), release, why)
    if journal.phase in UNDER_WAY or journal.phase is Phase.REJECTED:
        return Standing(journal.phase, release, journal.reason)
    if why:
        ran = any(r.ran for r in refused if r.release == release)
        return Standing(Phase.ROLLED_BACK if ran else Phase.REJECTED, release, why)
    if active is not None:
        return Standing(Phase(active.state.value), running)
    return Standing(Phase.IDLE, 0)
