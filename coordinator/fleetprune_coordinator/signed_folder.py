"""The folder of signed files, changed in one step.

`timestamp.json` and a new root are the only files that are ever read by a fixed name; all others
are named by version or by hash and are written before the file that names them. So replacing
`timestamp.json` is the commit: a kill at any instant leaves the repository as it was before or as
it is after, and the next change overwrites whatever versioned files were written but never named.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]  # tuf re-exports without saying so
    Metadata,
    Role,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from fleetprune.errors import ConfigError
from fleetprune.files import make_folder
from fleetprune_coordinator.key_files import load_keys, signers_of
from fleetprune_coordinator.keys import sign
from fleetprune_coordinator.roles import DELEGATED, ONLINE, TOP, Expiry, Payload, meta_file

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


class SignedFolder:
    """Reads, signs and writes. The state is read from disk at each call: nothing goes stale."""

    def __init__(
        self,
        folder: Path,
        now: Callable[[], datetime],
        expiry: Expiry,
        write: Callable[[Path, bytes], None],
    ) -> None:
        """Open a repository made by `init_repository`.

        Args:
            folder: The repository.
            now: The time, UTC.
            expiry: Lives of newly signed metadata.
            write: Durable, atomic replacement of a file.

        Raises:
            ConfigError: There is no readable repository, or a role that must sign has no key.
        """
        self.public = folder / "public"
        self.metadata = self.public / "metadata"
        self._now, self._expiry, self._write = now, expiry, write
        self._keys = load_keys(folder)
        state = self.load()
        for role in ONLINE:
            self._signers(state, role)

    def load(self) -> State:
        """What is signed now; ConfigError if it cannot be read."""
        timestamp = self._parse("timestamp.json", Timestamp)
        snapshot = self._parse(f"{timestamp.snapshot_meta.version}.snapshot.json", Snapshot)
        if not all(f"{role}.json" in snapshot.meta for role in CONTENT):
            raise ConfigError(
                f"{self.public} is a release repository of an older form, without the roles "
                f"{' and '.join(DELEGATED)}: make a new one with `fleetprune coordinator init` "
                "in another `state`, and give devices its root"
            )
        content = {
            role: self._parse(f"{snapshot.meta[f'{role}.json'].version}.{role}.json", Targets)
            for role in CONTENT
        }
        return State(self._root(), timestamp, snapshot, content)

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

    def commit(self, state: State, changed: Collection[str] = ()) -> None:
        """Sign and write, the file that is named before the file that names it.

        Args:
            state: What is to be signed.
            changed: Those of its roles in `CONTENT` that are to be signed anew.
        """
        for role in changed:
            targets = state.content[role]
            data = self._signed(state, role, targets)
            self._write(self.metadata / f"{targets.version}.{role}.json", data)
            state.snapshot.meta[f"{role}.json"] = meta_file(targets.version, data)
        snapshot, timestamp = state.snapshot, state.timestamp
        data = self._signed(state, Snapshot.type, snapshot)
        self._write(self.metadata / f"{snapshot.version}.snapshot.json", data)
        timestamp.snapshot_meta = meta_file(snapshot.version, data)
        data = self._signed(state, Timestamp.type, timestamp)
        self._write(self.metadata / "timestamp.json", data)
        self._forget(state)

    def refresh(self) -> bool:
        """Re-sign whatever has less than half of its life left and whose keys are here.

        Returns:
            Whether anything was written.
        """
        state = self.load()
        if self._stale(Root.type, state.root) and self._has_keys(state, Root.type):
            data = self._signed(state, Root.type, state.root)
            self._write(self.metadata / f"{state.root.version}.root.json", data)
        changed = [
            role
            for role, targets in state.content.items()
            if self._stale(role, targets) and self._has_keys(state, role)
        ]
        top = {Snapshot.type: state.snapshot, Timestamp.type: state.timestamp}
        if not changed and not any(self._stale(role, signed) for role, signed in top.items()):
            return False
        self.commit(state, changed)
        return True

    def _signed(self, state: State, role: str, signed: Payload) -> bytes:
        signed.version += 1
        signed.expires = self._now() + self._expiry.of(role)
        return sign(signed, self._signers(state, role))

    def _signers(self, state: State, role: str) -> list[CryptoSigner]:
        return signers_of(role, state.key_ids(role), self._keys)

    def _has_keys(self, state: State, role: str) -> bool:
        return any(key_id in self._keys for key_id in state.key_ids(role))

    def _stale(self, role: str, signed: Signed) -> bool:
        return signed.expires - self._now() < self._expiry.of(role) / 2

    def _forget(self, state: State) -> None:
        newest = {role: targets.version for role, targets in state.content.items()}
        for role, version in (newest | {Snapshot.type: state.snapshot.version}).items():
            for old in self.metadata.glob(f"*.{role}.json"):
                number = old.name.split(".")[0]
                if number.isdecimal() and int(number) <= version - KEEP_METADATA:
                    old.unlink(missing_ok=True)

    def _root(self) -> Root:
        names = [path.name.split(".")[0] for path in self.metadata.glob("*.root.json")]
        newest = max((int(name) for name in names if name.isdecimal()), default=1)
        return self._parse(f"{newest}.root.json", Root)

    def _parse(self, name: str, kind: type[Payload]) -> Payload:
        path = self.metadata / name
        try:
            signed: Signed = Metadata.from_bytes(path.read_bytes()).signed
        except (OSError, RepositoryError) as e:
            raise ConfigError(f"cannot read the release metadata {path}: {e}") from e
        if not isinstance(signed, kind):
            raise ConfigError(f"{path} holds {signed.type} metadata, expected {kind.type}")
        return signed
