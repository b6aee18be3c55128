"""The files of a slot, and which of them are believed.

A slot is whole while its files match the hashes in its slot.json, which is written last, after
the health check. A file that does not parse is the same as one that is not there.
"""

from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field

from fleetprune.errors import MessageError
from fleetprune.files import sha256_of, storage_errors, sync_folder
from fleetprune.manifest import Manifest
from fleetprune.messages import Message, Sha256

MODEL = "model.onnx"
GOLDEN = "golden.npz"
RECORD = "slot.json"
STAGING = "staging.json"

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
    """Starts while on trial."""
    previous: SlotName | None = None
    """The slot that ran before: for people; what is believed is what is in the slots."""


class Record(Message):
    """Content of slot.json."""

    manifest: Manifest
    files: dict[str, Sha256]
    proven: bool = False
    """Was committed once."""


class Staging(Message):
    """Content of staging.json: what is on its way into a slot."""

    manifest: Manifest
    checks: int = Field(default=0, ge=0)
    """Health checks begun."""


class Rejected(Message):
    """Content of rejected.json."""

    releases: dict[int, str] = Field(default_factory=dict)
    """Release to reason."""


@dataclass(frozen=True, slots=True)
class Installed:
    """A whole slot: its files were just compared with their recorded hashes."""

    slot: SlotName
    folder: Path
    manifest: Manifest
    state: State
    proven: bool

    @property
    def release(self) -> int:
        """Release number."""
        return self.manifest.release

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.folder / MODEL


M = TypeVar("M", bound=Message)


def read_message(path: Path, kind: type[M]) -> M | None:
    """A small file of ours; None where it is missing or damaged."""
    try:
        return kind.from_bytes(path.read_bytes())
    except (OSError, MessageError):
        return None


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
            return Installed(slot, folder, record.manifest, state, record.proven)
    return None


def wipe(folder: Path) -> None:
    """Empty a slot."""
    with storage_errors("clean", folder):
        for path in folder.iterdir():
            path.unlink()
        sync_folder(folder)
