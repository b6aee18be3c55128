"""The files of a slot, and which of them are believed.

A slot is whole while its files match the hashes in its slot.json, which is written last, after
the health check. A record that does not parse is the same as one that is not there.
"""

from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import Field

from fleetprune.files import sha256_of, storage_errors, sync_folder
from fleetprune.manifest import Manifest
from fleetprune.messages import Count, Message, Name, Sha256
from fleetprune_agent.statefile import read_message, refuse_newer

MODEL = "model.onnx"
GOLDEN = "golden.npz"
RECORD = "slot.json"
STAGING = "staging.json"
DELTA = "model.delta"

SlotName = Literal["a", "b"]
SLOTS: tuple[SlotName, ...] = ("a", "b")


class State(StrEnum):
    """How far the active release has got."""

    TRIAL = "trial"
    COMMITTED = "committed"


class Pointer(Message):
    """Content of active.json."""

    slot: SlotName
    release: int = Field(ge=1)
    state: State
    attempts: int = Field(default=0, ge=0)
    """Ends of the agent that nobody asked for, while on trial."""
    previous: SlotName | None = None
    """The slot that ran before: for people; what is believed is what is in the slots."""


class Record(Message):
    """Content of slot.json."""

    manifest: Manifest
    files: dict[str, Sha256]
    proven: bool = False
    """Was committed once."""
    origin: str = Field(default="", max_length=64)
    """Root of trust of the rollout that wanted it."""
    serial: Count = 0
    """Of that rollout."""


class Staging(Message):
    """Content of staging.json: what is on its way into a slot."""

    manifest: Manifest
    checks: int = Field(default=0, ge=0)
    """Health checks begun."""
    whole: bool = False
    """No delta is to be used: one was tried."""


class Refusal(Message):
    """A model that failed here."""

    release: int = Field(ge=1)
    device_class: Name
    """Whose model it is: a smaller class's may run where our own failed."""
    reason: str
    ran: bool = False
    """It was active when it failed."""

    def __str__(self) -> str:
        """For people."""
        return f"{self.device_class}'s model: {self.reason}"

    def concerns(self, manifest: Manifest) -> bool:
        """Whether this is the model of a manifest."""
        return (self.release, self.device_class) == (manifest.release, manifest.device_class)


class Rejected(Message):
    """Content of rejected.json."""

    models: tuple[Refusal, ...] = ()
    """In the order in which they failed."""


@dataclass(frozen=True, slots=True)
class Installed:
    """A whole slot: its files were just compared with their recorded hashes."""

    slot: SlotName
    folder: Path
    manifest: Manifest
    state: State
    proven: bool
    origin: str = ""
    serial: int = 0

    @property
    def release(self) -> int:
        """Release number."""
        return self.manifest.release

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.folder / MODEL


def read_whole(folder: Path, slot: SlotName) -> Installed | None:
    """The release in a slot; None unless every file has its recorded hash.

    Its state is what the slot alone says: committed if it ever was.
    """
    record = read_message(folder / RECORD, Record)
    if record is None or set(record.files) != {MODEL, GOLDEN}:
        return None
    with suppress(OSError):
        if all(sha256_of(folder / name) == sha for name, sha in record.files.items()):
            state = State.COMMITTED if record.proven else State.TRIAL
            heard = record.origin, record.serial
            return Installed(slot, folder, record.manifest, state, record.proven, *heard)
    return None


def wipe(folder: Path) -> None:
    """Empty a slot.

    Raises:
        InstallError: The disk refuses, or a newer version of the agent has put a release there.
    """
    refuse_newer(folder / RECORD)
    with storage_errors("clean", folder):
        for path in folder.iterdir():
            path.unlink()
        sync_folder(folder)
