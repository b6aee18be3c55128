"""What a person sees of a release repository: verified as a device would, from a root they hold.

Reads the public folder alone, so it also checks a mirror or a copy; no key is needed.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import (  # type: ignore[attr-defined]  # tuf re-exports without saying so
    Metadata,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from fleetprune.errors import MessageError, TrustError
from fleetprune.manifest import Manifest, manifest_path
from fleetprune.rollout import Rollout
from fleetprune_coordinator.roles import DELEGATED, ROLLOUTS, TOP, paths_of

VERIFIED = "verified"


@dataclass(frozen=True)
class RoleState:
    """Metadata of one role, as it was verified."""

    role: str
    version: int
    expires: datetime
    threshold: int
    key_ids: tuple[str, ...]
    """Keys that count."""
    signed_by: tuple[str, ...]
    """Those of them that have signed."""


@dataclass(frozen=True)
class FileState:
    """One signed file."""

    path: str
    role: str
    bytes: int
    sha256: str
    state: str
    """`verified`, or what is wrong."""


@dataclass
class Checked:
    """What `check` found."""

    root_sha256: str
    roles: list[RoleState] = field(default_factory=list)
    files: list[FileState] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """In the order in which they were found; empty: all is well."""


def check(public: Path, root: bytes, now: datetime, device_class: str | None = None) -> Checked:
    """Verify a repository from a root that is trusted.

    Args:
        public: Holds `metadata/` and `targets/`.
        root: The root that devices were given.
        now: UTC.
        device_class: Look at the files of this class alone.

    Raises:
        TrustError: The metadata cannot be verified: the chain is broken.
    """
    found = Checked(hashlib.sha256(root).hexdigest())
    documents = _verified(public, root, now)
    found.roles = list(_roles(documents))
    for role in (Targets.type, *DELEGATED):
        for path, info in sorted(documents[role].signed.targets.items()):
            parts = path.split("/")
            owner = parts[1].removesuffix(".json") if len(parts) > 1 else ""
            if device_class is None or owner == device_class:
                found.files.append(_file(public, role, path, info))
    found.problems += [f"{f.path} is {f.state}" for f in found.files if f.state != VERIFIED]
    intact = {f.path: public / "targets" / _stored(f) for f in found.files if f.state == VERIFIED}
    found.rollouts = list(_rollouts(intact, found.problems))
    for path in intact:
        if path.endswith("/manifest.json"):
            _check_manifest(path, intact, found)
    for rollout in found.rollouts:
        for release in filter(None, (rollout.stable, rollout.candidate)):
            path = manifest_path(rollout.device_class, release)
            if path not in documents[Targets.type].signed.targets:
                found.problems.append(
                    f"the rollout for {rollout.device_class} names release {release}, "
                    "which is not signed for that class"
                )
    if device_class is not None and not found.files:
        found.problems.append(f"nothing is signed for class {device_class}")
    return found


class _Folder(FetcherInterface):
    """Bounded reads from the public folder."""

    def __init__(self, public: Path) -> None:
        self._public = public

    def download_bytes(self, url: str, max_length: int) -> bytes:
        try:
            with (self._public / url).open("rb") as f:
                data = f.read(max_length + 1)
        except OSError as e:
            raise tuf_errors.DownloadHTTPError(f"{url} is missing", 404) from e
        if len(data) > max_length:
            raise tuf_errors.DownloadLengthMismatchError(f"{url} is longer than {max_length} bytes")
        return data

    def _fetch(self, url: str) -> Iterator[bytes]:
        raise tuf_errors.DownloadError(f"unbounded read of {url}")


def _verified(public: Path, root: bytes, now: datetime) -> dict[str, Metadata[Any]]:
    """Metadata of every role, after a device's own checks in the same order."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            updater = Updater(folder, "metadata", fetcher=_Folder(public), bootstrap=root)
            updater._trusted_set.reference_time = now
            updater.refresh()
            for role in DELEGATED:  # asked for any of its paths, it is fetched and verified
                updater.get_targetinfo(paths_of(role)[0].replace("*", "none"))
            return {
                role: Metadata.from_bytes((Path(folder) / f"{role}.json").read_bytes())
                for role in (*TOP, *DELEGATED)
            }
        except (tuf_errors.RepositoryError, tuf_errors.DownloadError) as e:
            line = " ".join(str(e).split())
            hint = ""
            if isinstance(e, tuf_errors.UnsignedMetadataError):
                hint = " that the root given names: is it the root of this fleet?"
            raise TrustError(f"the repository does not hold: {line}{hint}") from e


def _roles(documents: dict[str, Metadata[Any]]) -> Iterator[RoleState]:
    root, targets = documents[Root.type].signed, documents[Targets.type].signed
    for role in (Root.type, Timestamp.type, Snapshot.type, Targets.type, *DELEGATED):
        document = documents[role]
        of = root if role in TOP else targets
        result = of.get_verification_result(role, document.signed_bytes, document.signatures)
        yield RoleState(
            role,
            document.signed.version,
            document.signed.expires,
            result.threshold,
            tuple(sorted([*result.signed, *result.unsigned])),
            tuple(sorted(result.signed)),
        )


def _stored(file: FileState) -> str:
    folder, slash, name = file.path.rpartition("/")
    return f"{folder}{slash}{file.sha256}.{name}"


def _file(public: Path, role: str, path: str, info: TargetFile) -> FileState:
    found = FileState(path, role, info.length, info.hashes.get("sha256", ""), VERIFIED)
    if ".." in path.split("/") or path.startswith("/"):
        return _wrong(found, "named outside of the folder")
    file = public / "targets" / _stored(found)
    if not file.is_file():
        return _wrong(found, "missing")
    size = file.stat().st_size
    if size != info.length:
        return _wrong(found, f"{size} bytes, its signed length is {info.length}")
    with file.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != found.sha256:
        return _wrong(found, f"another file: its sha256 is {digest}, signed is {found.sha256}")
    return found


def _wrong(file: FileState, state: str) -> FileState:
    return FileState(file.path, file.role, file.bytes, file.sha256, state)


def _rollouts(intact: dict[str, Path], problems: list[str]) -> Iterator[Rollout]:
    for path, file in intact.items():
        if not path.startswith(f"{ROLLOUTS}/"):
            continue
        try:
            rollout = Rollout.from_bytes(file.read_bytes())
        except MessageError as e:
            problems.append(f"{path}: {e}")
            continue
        if path != f"{ROLLOUTS}/{rollout.device_class}.json":
            problems.append(f"{path} is for class {rollout.device_class}")
        yield rollout


def _check_manifest(path: str, intact: dict[str, Path], found: Checked) -> None:
    """Note what a device would find wrong with a manifest."""
    try:
        manifest = Manifest.from_bytes(intact[path].read_bytes())
    except MessageError as e:
        found.problems.append(f"{path}: {e}")
        return
    if manifest_path(manifest.device_class, manifest.release) != path:
        found.problems.append(
            f"{path} is of release {manifest.release} for {manifest.device_class}"
        )
    signed = {file.path: (file.bytes, file.sha256) for file in found.files}
    named = {manifest.model: (manifest.size, manifest.sha256)}
    named |= {delta.target: (delta.size, delta.sha256) for delta in manifest.deltas}
    for target, of in named.items():
        if signed.get(target) != of:
            found.problems.append(f"{path} names another file than the one signed as {target}")
    if manifest.golden not in signed:
        found.problems.append(f"{path} names {manifest.golden}, which is not signed")
