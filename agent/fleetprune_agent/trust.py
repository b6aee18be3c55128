"""What a device believes: the release repository, verified by TUF over any road.

python-tuf does the verification (signatures, versions, expiry, mix-and-match); this module
gives it bytes from a `BlobSource`, the time, durable storage and our error families.

Three of python-tuf's habits are changed, each pinned by a test:
- it reads the system clock when an `Updater` is made; `reference_time` of the trusted set is
  where it keeps that time, and we put `now()` there before anything is judged by it;
- it stores verified metadata without fsync, and a truncated `timestamp.json` would silently
  switch rollback protection off; `_DurableUpdater` stores through `write_atomic`;
- it downloads whole targets into a temporary file; ours are pulled in blocks that survive a
  restart, then verified against the same signed length and hash.

A device whose clock runs behind cannot notice a freeze; one whose clock runs ahead refuses new
releases and keeps the model it has, since serving never asks the time.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol, TypeVar

from tuf.api import exceptions as tuf_errors
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import TargetFile, Updater  # type: ignore[attr-defined]

from fleetprune.blocks import NotFoundError
from fleetprune.errors import HostileInputError, MessageError, TransportError, TrustError
from fleetprune.files import (
    CHUNK,
    make_folder,
    sha256_of,
    storage_errors,
    sync_file,
    sync_folder,
    write_atomic,
)
from fleetprune.manifest import Manifest, manifest_path
from fleetprune.messages import MAX_MESSAGE
from fleetprune.rollout import Rollout, rollout_path

_OTHER_ROOT = " that this device's root of trust names: is it the root.json of this fleet?"
MAX_DOCUMENT = MAX_MESSAGE // 2  # bytes; a slot's record holds a manifest and must fit a message
_ROLLOUTS = "rollouts"
M = TypeVar("M", Manifest, Rollout)


class BlobSource(Protocol):
    """A road to the repository. Nothing that comes from it is verified.

    Names are `metadata/<file>` and `targets/<path>`.
    """

    def read(self, name: str, max_bytes: int) -> bytes:
        """A small blob, whole.

        Raises:
            NotFoundError: There is none of that name (`fleetprune.blocks`).
            HostileInputError: It is longer than `max_bytes`.
            TransportError: No answer.
        """
        ...

    def pull(self, name: str, size: int, sha256: str, into: Path) -> None:
        """Write a large blob to the file `into`, continuing what an earlier call began.

        Never writes more than `size` bytes. Whatever else must survive a restart lies in files
        named `<into>.*`. To start over, the caller deletes all of these and `into`, whose name is
        another one for other content. The caller verifies the result.

        Raises:
            NotFoundError: There is none of that name.
            HostileInputError: It is longer than `size`, or other bytes than `sha256` came.
            TransportError: No answer; what has come is kept for the next call.
            OSError: `into` cannot be written.
        """
        ...


class FolderSource:
    """Reads a repository's public folder on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str, max_bytes: int) -> bytes:
        """See `BlobSource`."""
        with self._open(name).open("rb") as f:
            data = f.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise TrustError(f"{name} is longer than {max_bytes} bytes")
        return data

    def pull(self, name: str, size: int, sha256: str, into: Path) -> None:
        """See `BlobSource`; what is in `into` already counts as progress."""
        with self._open(name).open("rb") as source, into.open("ab") as sink:
            sink.truncate(min(sink.tell(), size))
            source.seek(sink.seek(0, 2))
            while sink.tell() < size and (chunk := source.read(min(CHUNK, size - sink.tell()))):
                sink.write(chunk)
                self.progress(name, sink.tell())
            if source.read(1):
                raise TrustError(f"{name} is longer than {size} bytes")

    def progress(self, name: str, done: int) -> None:
        """Called after each chunk of a pull; a simulation may slow down or stop here."""

    def _open(self, name: str) -> Path:
        path = self._folder.joinpath(*name.split("/"))
        if ".." in path.parts or not path.is_file():
            raise NotFoundError(f"{name} not found in {self._folder}")
        return path


@dataclass(frozen=True, slots=True)
class SignedFile:
    """What the repository's signatures say about one target."""

    path: str
    size: int  # bytes
    sha256: str

    @property
    def blob(self) -> str:
        """Name at the source: the file name is prefixed with its hash (consistent snapshot)."""
        folder, slash, name = self.path.rpartition("/")
        return f"targets/{folder}{slash}{self.sha256}.{name}"


class _Fetcher(FetcherInterface):
    """Gives python-tuf bounded reads from a `BlobSource`."""

    def __init__(self, source: BlobSource) -> None:
        self._source = source

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Overrides the base class, whose `_fetch` is not told the bound."""
        try:
            data = self._source.read(url, max_length)
        except NotFoundError as e:
            # 404 is how python-tuf learns that there is no newer root
            raise tuf_errors.DownloadHTTPError(f"{url} not found", 404) from e
        if len(data) > max_length:
            raise TrustError(f"{url} is {len(data)} bytes, expected at most {max_length}")
        return data

    def _fetch(self, url: str) -> Iterator[bytes]:
        raise tuf_errors.DownloadError(f"unbounded read of {url}")


class _DurableUpdater(Updater):
    """Stores verified metadata so that it survives a power cut; spares the flash the rest."""

    def _persist_file(self, filename: str, data: bytes) -> None:
        path = Path(filename)
        if not (path.is_file() and path.read_bytes() == data):  # root comes at every refresh
            write_atomic(path, data)


class TrustedRepository:
    """Verified access to releases and graphs. One instance per trust folder."""

    def __init__(
        self, trust_dir: Path, root: bytes, source: BlobSource, now: Callable[[], datetime]
    ) -> None:
        """Nothing is read yet.

        Args:
            trust_dir: Where verified metadata is remembered; rollback protection lives here.
            root: The root metadata that the device was provisioned with.
            source: Road to the repository.
            now: The time, timezone-aware UTC.
        """
        self._dir, self._root, self._source, self._now = trust_dir, root, source, now
        self._updater: Updater | None = None

    @property
    def origin(self) -> str:
        """Digest of the pinned root and of the keys that count for rollouts.

        Serials of rollouts are counted for each: those of another fleet say nothing here, nor do
        those of a key that was taken out of service, which may have used them up.
        """
        if self._updater is None:
            self.refresh()
        delegations = None
        if self._updater is not None:
            delegations = self._updater._trusted_set.targets.delegations
        roles = {} if delegations is None else delegations.roles or {}
        keys = sorted(roles[_ROLLOUTS].keyids) if _ROLLOUTS in roles else []
        return hashlib.sha256(b"\n".join([self._root, *(k.encode() for k in keys)])).hexdigest()

    def refresh(self) -> None:
        """Fetch and verify the newest metadata.

        Raises:
            TrustError: Bad signature, expired, rolled back, mixed or oversized metadata.
            TransportError: The source does not answer, or a file is missing.
            InstallError: Verified metadata cannot be stored.
        """
        self._updater = None
        moment = self._now()
        with storage_errors("store metadata in", self._dir), _tuf_errors(moment):
            make_folder(self._dir)
            updater = _DurableUpdater(
                str(self._dir), "metadata", fetcher=_Fetcher(self._source), bootstrap=self._root
            )
            updater._trusted_set.reference_time = moment
            updater.refresh()
        self._updater = updater

    def describe(self, path: str) -> SignedFile:
        """Signed size and hash of a target, by the last `refresh` (made now if there was none).

        Raises:
            TrustError: No such target is signed. And whatever `refresh` raises.
        """
        info = self._info(path)
        digest = info.hashes.get("sha256")
        if digest is None:
            raise TrustError(f"target {path} is signed with {list(info.hashes)}, expected sha256")
        return SignedFile(path, info.length, digest)

    def rollout(self, device_class: str, serial: int = 0) -> Rollout | None:
        """What devices of a class are told to run.

        Args:
            device_class: Ours.
            serial: Of the last one that was followed; 0: none yet.

        Returns:
            None if none is signed: a young fleet.

        Raises:
            TrustError: It is malformed, too long, for another class, or older than `serial`.
            TransportError: The source does not answer.
        """
        path = rollout_path(device_class)
        if self._find(path) is None:
            return None
        rollout = self._message(path, Rollout)
        _require_class(path, rollout.device_class, device_class)
        if rollout.serial < serial:
            raise TrustError(
                f"{path} is rollout {rollout.serial}, older than {serial}, which was followed"
            )
        return rollout

    def manifest(self, device_class: str, release: int) -> Manifest:
        """What is signed about a release.

        Args:
            device_class: Ours, or that of the smaller variant.
            release: Its number, as a rollout names it.

        Raises:
            TrustError: None is signed, or it is malformed, too long, for another class, of
                another number, or at odds with the signed size and hash of its model.
            TransportError: The source does not answer.
        """
        path = manifest_path(device_class, release)
        manifest = self._message(path, Manifest)
        _require_class(path, manifest.device_class, device_class)
        if manifest.release != release:
            raise TrustError(f"{path} is of release {manifest.release}")
        model = self.describe(manifest.model)
        if (model.size, model.sha256) != (manifest.size, manifest.sha256):
            raise TrustError(f"{path} names another model than the one signed as {manifest.model}")
        return manifest

    def target(self, path: str, into: Path) -> Path:
        """Download a target, resuming, and verify it by its signed size and hash.

        Args:
            path: Target path, as in `Manifest.model` or `GraphRef.target`.
            into: File to make or replace. If it already is the target, nothing is downloaded.

        Returns:
            `into`, complete, verified and on disk. It is replaced in one step at the end; until
            then what comes lies in files named `<into>.*`.

        Raises:
            TrustError: No such target is signed.
            HostileInputError: Other bytes came; they are deleted.
            TransportError: The source does not answer; what came is kept for the next call.
            InstallError: The disk is full or refuses.
        """
        signed = self.describe(path)
        part = into.with_name(f"{into.name}.{signed.sha256[:16]}")
        with storage_errors("download", into):
            if _mismatch(signed, into) is None:
                return into
            try:
                if _mismatch(signed, part) is not None:
                    self._source.pull(signed.blob, signed.size, signed.sha256, part)
                _verify(signed, part)
            except HostileInputError:
                _discard_progress(into)
                raise
            sync_file(part)
            part.replace(into)
            sync_folder(into.parent)
            _discard_progress(into)
        return into

    def _message(self, path: str, kind: type[M]) -> M:
        """A small signed target, verified and parsed."""
        signed = self.describe(path)
        if signed.size > MAX_DOCUMENT:
            raise TrustError(f"{path} is {signed.size} bytes, expected at most {MAX_DOCUMENT}")
        with _tuf_errors(self._now()):
            data = self._source.read(signed.blob, signed.size)
            self._info(path).verify_length_and_hashes(data)
        try:
            return kind.from_bytes(data)
        except MessageError as e:
            raise TrustError(f"{path}: {e}") from e

    def _info(self, path: str) -> TargetFile:
        info = self._find(path)
        if info is None:
            raise TrustError(f"the release repository has no target {path}")
        return info

    def _find(self, path: str) -> TargetFile | None:
        """What is signed about a target by the role that may; asks a delegated one if need be."""
        if self._updater is None:
            self.refresh()
        if self._updater is None:
            raise TrustError("the release repository could not be verified")
        with storage_errors("store metadata in", self._dir), _tuf_errors(self._now()):
            try:
                return self._updater.get_targetinfo(path)
            except tuf_errors.DownloadHTTPError:  # a delegated role was signed anew meanwhile
                self.refresh()
                return self._updater.get_targetinfo(path)


def _require_class(path: str, got: str, ours: str) -> None:
    if got != ours:
        raise TrustError(f"{path} is for class {got}, expected {ours}")


def _mismatch(signed: SignedFile, file: Path) -> str | None:
    """Why `file` is not the signed target; None: it is. Reads no more than needed."""
    size = file.stat().st_size if file.is_file() else -1
    if size != signed.size:
        return f"target {signed.path} is {size} bytes, its signed length is {signed.size}"
    digest = sha256_of(file)
    if digest != signed.sha256:
        return f"target {signed.path} has sha256 {digest}, its signed hash is {signed.sha256}"
    return None


def _verify(signed: SignedFile, file: Path) -> None:
    wrong = _mismatch(signed, file)
    if wrong is not None:
        raise TrustError(wrong)


def _discard_progress(file: Path) -> None:
    for leftover in file.parent.glob(f"{file.name}.*"):
        leftover.unlink(missing_ok=True)


@contextmanager
def _tuf_errors(now: datetime) -> Iterator[None]:
    """Map python-tuf's exceptions to ours, one line each."""
    try:
        yield
    except tuf_errors.ExpiredMetadataError as e:
        clock = now.strftime("%Y-%m-%d %H:%M:%S")
        raise TrustError(f"release repository: {e}, this device's clock says {clock} UTC") from e
    except (tuf_errors.RepositoryError, tuf_errors.DownloadLengthMismatchError) as e:
        # The commonest cause is harmless: a device that was given another fleet's root.
        hint = _OTHER_ROOT if isinstance(e, tuf_errors.UnsignedMetadataError) else ""
        raise TrustError(f"release repository: {' '.join(str(e).split())}{hint}") from e
    except tuf_errors.DownloadError as e:
        raise TransportError(f"release repository: {e}") from e
