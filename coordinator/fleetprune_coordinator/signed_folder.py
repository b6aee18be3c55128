"""The folder of signed files, changed in one step.

`timestamp.json` is the only file that is ever replaced; all others are named by version or by
hash and are written before the file that names them. So replacing it is the commit: a kill at any
instant leaves the repository as it was before or as it is after, and the next change overwrites
whatever versioned files were written but never named.

A new root is the exception: devices look for it by its number, so it counts as soon as it is
there, a moment before the timestamp that its keys have signed. A kill in between is made good by
`refresh`, which signs anew whatever the keys of today have not signed.
"""

import fcntl
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]  # tuf re-exports without saying so
    Metadata,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from fleetprune.errors import ConfigError
from fleetprune.files import make_folder, storage_errors
from fleetprune_coordinator.key_files import (
    Passphrase,
    load_keys,
    passphrase_from_environment,
)
from fleetprune_coordinator.keys import sign
from fleetprune_coordinator.roles import (
    DELEGATED,
    OFFLINE,
    ONLINE,
    TOP,
    Expiry,
    Payload,
    meta_file,
)

KEEP_METADATA = 8  # versions of each role; a device may be reading an older one
CONTENT = (Targets.type, *DELEGATED)
"""Roles that sign files, in the order in which devices ask them."""


@dataclass
class State:
    """What is signed now; edited, then given to `SignedFolder.commit`."""

    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    content: dict[str, Targets]
    """By role: `targets`, `rollouts` and `graphs`."""
    documents: dict[str, Metadata[Any]] = field(default_factory=dict)
    """By role, as they were read: with their signatures."""

    def find(self, role: str, path: str) -> TargetFile | None:
        """What a role says of a target path; None: nothing."""
        info: TargetFile | None = self.content[role].targets.get(path)
        return info

    def key_ids(self, role: str) -> list[str]:
        """Ids of the keys that count for a role."""
        return self.authority(role).keyids

    def authority(self, role: str) -> Role:
        """What names the keys that count for a role."""
        if role in TOP:
            return self.root.roles[role]
        delegations = self.content[Targets.type].delegations
        if delegations is None or delegations.roles is None:
            raise ConfigError(f"targets.json delegates nothing, expected role {role}")
        return delegations.roles[role]

    def verified(self, role: str) -> bool:
        """Whether what was read is signed by enough of the keys that count today."""
        document = self.documents[role]
        of = self.root if role in TOP else self.content[Targets.type]
        found = of.get_verification_result(role, document.signed_bytes, document.signatures)
        return bool(found)


class SignedFolder:
    """Reads, signs and writes. The state is read from disk at each call: nothing goes stale."""

    def __init__(
        self,
        folder: Path,
        now: Callable[[], datetime],
        expiry: Expiry,
        write: Callable[[Path, bytes], None],
        passphrase: Passphrase = passphrase_from_environment,
    ) -> None:
        """Open a repository made by `init_repository`.

        Args:
            folder: The repository.
            now: The time, UTC.
            expiry: Lives of newly signed metadata.
            write: Durable, atomic replacement of a file.
            passphrase: Of encrypted keys.

        Raises:
            ConfigError: There is no readable repository, or a role that must sign has no key.
        """
        self.folder, self.public = folder, folder / "public"
        self.metadata = self.public / "metadata"
        self.passphrase = passphrase
        self._now, self._expiry, self._write = now, expiry, write
        self._thread = threading.Lock()
        self.keys = load_keys(folder, passphrase)
        state = self.load()
        for role in ONLINE:
            self.keys.require(role, state.key_ids(role))

    @contextmanager
    def change(self) -> Iterator[State]:
        """One change at a time, between threads and processes; a kill ends it.

        The keys are read anew: another process may have replaced one.
        """
        with self._thread:
            with storage_errors("lock", self.folder):
                lock = (self.folder / ".lock").open("ab")
            with lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self.keys = load_keys(self.folder, self.passphrase)
                yield self.load()

    def can_sign(self, state: State, role: str) -> bool:
        """Whether enough keys of a role are here."""
        of = state.authority(role)
        return len(self.keys.of(of.keyids)) >= of.threshold

    def load(self) -> State:
        """What is signed now; ConfigError if it cannot be read."""
        root, timestamp = self._root(), self._parse("timestamp.json", Timestamp)
        version = timestamp.signed.snapshot_meta.version
        snapshot = self._parse(f"{version}.snapshot.json", Snapshot)
        if not all(f"{role}.json" in snapshot.signed.meta for role in CONTENT):
            raise ConfigError(
                f"{self.public} is a release repository of an older form, without the roles "
                f"{' and '.join(DELEGATED)}: make a new one with `fleetprune coordinator init` "
                "in another `state`, and give devices its root"
            )
        documents: dict[str, Metadata[Any]] = {
            role: self._parse(
                f"{snapshot.signed.meta[f'{role}.json'].version}.{role}.json", Targets
            )
            for role in CONTENT
        }
        content = {role: document.signed for role, document in documents.items()}
        documents |= {Root.type: root, Snapshot.type: snapshot, Timestamp.type: timestamp}
        return State(root.signed, timestamp.signed, snapshot.signed, content, documents)

    def file(self, info: TargetFile) -> Path:
        """Where a signed file lies."""
        folder, _, name = info.path.rpartition("/")
        return self.public / "targets" / folder / f"{info.hashes['sha256']}.{name}"

    def put(self, state: State, role: str, files: Mapping[str, bytes]) -> None:
        """Write files and name them in a role; nobody sees them before `commit`."""
        for path, data in files.items():
            info = TargetFile.from_data(path, data, ["sha256"])
            file = self.file(info)
            if not file.is_file():  # its name is its hash, and it was written in one step
                make_folder(file.parent)
                self._write(file, data)
            state.content[role].targets[path] = info

    def drop(self, state: State, role: str, paths: Collection[str]) -> list[Path]:
        """Take paths out of a role; the files are for `delete`, after `commit`."""
        return [self.file(state.content[role].targets.pop(path)) for path in paths]

    def delete(self, files: Collection[Path]) -> None:
        """Remove files that are no longer named; a leftover only takes space."""
        for file in files:
            with suppress(OSError):
                file.unlink(missing_ok=True)
                file.parent.rmdir()  # once it is empty

    def commit(
        self,
        state: State,
        changed: Collection[str] = (),
        signed: Mapping[str, bytes] | None = None,
    ) -> None:
        """Sign and write, the file that is named before the file that names it.

        Args:
            state: What is to be signed.
            changed: Those of its roles in `CONTENT` that are to be signed anew.
            signed: Metadata of `state` that was signed elsewhere, of `targets` or `root`.
        """
        signed = signed or {}
        for role in changed:
            targets = state.content[role]
            data = signed[role] if role in signed else self._signed(state, role, targets)
            self._write(self.metadata / f"{targets.version}.{role}.json", data)
            state.snapshot.meta[f"{role}.json"] = meta_file(targets.version, data)
        snapshot, timestamp = state.snapshot, state.timestamp
        data = self._signed(state, Snapshot.type, snapshot)
        self._write(self.metadata / f"{snapshot.version}.snapshot.json", data)
        if Root.type in signed:
            self._write(self.metadata / f"{state.root.version}.root.json", signed[Root.type])
        timestamp.snapshot_meta = meta_file(snapshot.version, data)
        data = self._signed(state, Timestamp.type, timestamp)
        self._write(self.metadata / "timestamp.json", data)
        self._forget(state)

    def refresh(self) -> bool:
        """Re-sign what has less than half of its life left and whose keys are here.

        Also what the keys of today have not signed: a kill came between a new root and the rest.

        Returns:
            Whether anything was written.
        """
        with self.change() as state:
            renewed = self._stale(state, Root.type) and self.can_sign(state, Root.type)
            if renewed:
                data = self._signed(state, Root.type, state.root)
                self._write(self.metadata / f"{state.root.version}.root.json", data)
            changed = [
                role for role in CONTENT if self._stale(state, role) and self.can_sign(state, role)
            ]
            stale = any(self._stale(state, role) for role in (Snapshot.type, Timestamp.type))
            if not changed and not stale:
                return renewed
            self.commit(state, changed)
            return True

    def draft(self, signed: Payload, key_ids: Iterable[str]) -> Metadata[Payload]:
        """The next version of some metadata, with the signatures of those keys that are here."""
        signed.version += 1
        signed.expires = self._now() + self._expiry.of(signed.type)
        document = Metadata(signed)
        for signer in self.keys.of(key_ids):
            document.sign(signer, append=True)
        return document

    def expiring(self) -> list[str]:
        """A line for each role whose metadata runs out and that cannot be signed here."""
        self.keys = load_keys(self.folder, self.passphrase)
        state, lines = self.load(), []
        for role in OFFLINE:
            signed = state.documents[role].signed
            if not self._stale(state, role) or self.can_sign(state, role):
                continue
            if not state.verified(role):
                lines.append(
                    f"{role}.json is not signed by the keys of today: publish its proposal"
                )
                continue
            days = (signed.expires - self._now()).days
            when = f"expires in {days} days, on" if days >= 0 else "expired on"
            lines.append(
                f"{role}.json {when} {signed.expires:%Y-%m-%d}, and its keys are not here: "
                f"`fleetprune release renew {role}`, and sign what that makes"
            )
        return lines

    def _signed(self, state: State, role: str, signed: Payload) -> bytes:
        signed.version += 1
        signed.expires = self._now() + self._expiry.of(role)
        return sign(signed, self.keys.require(role, state.key_ids(role)))

    def _stale(self, state: State, role: str) -> bool:
        left = state.documents[role].signed.expires - self._now()
        return left < self._expiry.of(role) / 2 or not state.verified(role)

    def _forget(self, state: State) -> None:
        newest = {role: targets.version for role, targets in state.content.items()}
        for role, version in (newest | {Snapshot.type: state.snapshot.version}).items():
            for old in self.metadata.glob(f"*.{role}.json"):
                number = old.name.split(".")[0]
                if number.isdecimal() and int(number) <= version - KEEP_METADATA:
                    old.unlink(missing_ok=True)

    def _root(self) -> Metadata[Root]:
        names = [path.name.split(".")[0] for path in self.metadata.glob("*.root.json")]
        newest = max((int(name) for name in names if name.isdecimal()), default=1)
        return self._parse(f"{newest}.root.json", Root)

    def _parse(self, name: str, kind: type[Payload]) -> Metadata[Payload]:
        return read_metadata(self.metadata / name, kind)


def read_metadata(path: Path, kind: type[Payload]) -> Metadata[Payload]:
    """One file of metadata, unverified; ConfigError if it is unreadable or of another role."""
    try:
        document = Metadata.from_bytes(path.read_bytes())
    except (OSError, RepositoryError) as e:
        raise ConfigError(f"cannot read the release metadata {path}: {e}") from e
    if not isinstance(document.signed, kind):
        raise ConfigError(f"{path} holds {document.signed.type} metadata, expected {kind.type}")
    return document
