"""The release repository: signed graphs and models that devices pull and verify (TUF).

`timestamp.json` is the only file that is ever replaced; all others are named by version or by
hash and are written before it. So replacing it is the commit: a kill at any instant leaves the
repository as it was before or as it is after, and the next publication overwrites whatever
versioned files were written but never named.

The state is read from disk at each call, so a failed call leaves nothing stale in memory.
A quality rollback is a new release with old bytes: numbers only rise.
"""

import hashlib
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]  # tuf re-exports without saying so
    Metadata,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from fleetprune.errors import ConfigError, RegistryError
from fleetprune.files import make_folder, write_atomic
from fleetprune.manifest import Manifest
from fleetprune.messages import GraphRef
from fleetprune_coordinator.keys import Expiry, load_signers, meta_file, sign

MAX_TARGET_PATH = 256  # characters, as in `Manifest` and `GraphRef`
KEEP_RELEASES = 8  # per class; older ones leave the signed list and the disk
KEEP_METADATA = 8  # versions of targets and snapshot; a device may be reading an older one
S = TypeVar("S", bound=Signed)
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RELEASE = re.compile(r"releases/([^/]+)/(\d+)/[^/]+")


@dataclass(frozen=True, slots=True)
class ReleaseContent:
    """What one device class gets: the files, and the fields of its `Manifest`."""

    onnx: bytes
    golden: bytes
    """An .npz with `x` (n, *input_shape) float32 and `y` (n, classes) float32."""
    input_shape: tuple[int, ...]
    """Of one sample, without the batch axis."""
    tolerance: float = 1e-3
    max_latency_ms: float | None = None
    labels: tuple[str, ...] = ()
    macs: int = 0
    peak_activation_bytes: int = 0
    accuracy: float | None = None
    round: int = 0
    mask_version: int = 0

    def manifest(self, release: int, device_class: str) -> Manifest:
        """The manifest that devices of the class will verify and follow."""
        base = f"releases/{device_class}/{release}"
        return Manifest(
            release=release,
            device_class=device_class,
            model=f"{base}/model.onnx",
            sha256=hashlib.sha256(self.onnx).hexdigest(),
            size=len(self.onnx),
            golden=f"{base}/golden.npz",
            tolerance=self.tolerance,
            max_latency_ms=self.max_latency_ms,
            labels=self.labels,
            input_shape=self.input_shape,
            macs=self.macs,
            peak_activation_bytes=self.peak_activation_bytes,
            accuracy=self.accuracy,
            round=self.round,
            mask_version=self.mask_version,
        )


class ReleaseRepository:
    """Publishes signed files. One process writes; its threads may share the object."""

    def __init__(
        self,
        folder: Path,
        now: Callable[[], datetime],
        expiry: Expiry | None = None,
        write: Callable[[Path, bytes], None] = write_atomic,
    ) -> None:
        """Open a repository made by `init_repository`.

        Args:
            folder: The repository.
            now: The time, UTC.
            expiry: Lives of newly signed metadata.
            write: Durable, atomic replacement of a file.

        Raises:
            ConfigError: There is no readable repository, or a key is not the one that root names.
        """
        self._public = folder / "public"
        self._metadata = self._public / "metadata"
        self._now, self._expiry, self._write = now, expiry or Expiry(), write
        self._lock = threading.Lock()
        self._signers = load_signers(folder)
        root = self._root()
        for role, signer in self._signers.items():
            if signer.public_key.keyid not in root.roles[role].keyids:
                raise ConfigError(f"keys/{role}.pem is not the {role} key that root.json names")
        self._load()

    def root(self) -> bytes:
        """The first root metadata: what a device is provisioned with."""
        return (self._metadata / "1.root.json").read_bytes()

    def latest_release(self) -> int:
        """The highest release number ever published; 0: none."""
        return _latest(self._load()[2])

    def manifest(self, device_class: str) -> Manifest | None:
        """What devices of a class are told to run; None: nothing yet."""
        info = self._load()[2].targets.get(f"classes/{device_class}.json")
        return None if info is None else Manifest.from_bytes(self._target_file(info).read_bytes())

    def publish(self, targets: Mapping[str, bytes]) -> None:
        """Add or replace signed files, all in one step.

        Args:
            targets: Target path to content; parts of a path match `[A-Za-z0-9][A-Za-z0-9._-]*`.

        Raises:
            RegistryError: A path is not acceptable; nothing was published.
            InstallError: The disk is full or refuses; nothing was published.
        """
        with self._lock:
            self._publish(targets, drop=())

    def publish_graph(self, onnx: bytes) -> GraphRef:
        """Publish a graph under its own hash; does nothing if it is already there."""
        digest = hashlib.sha256(onnx).hexdigest()
        path = f"graphs/{digest}.onnx"
        with self._lock:
            if path not in self._load()[2].targets:
                self._publish({path: onnx}, drop=())
        return GraphRef(target=path, sha256=digest)

    def publish_release(
        self, release: int, models: Mapping[str, ReleaseContent]
    ) -> dict[str, Manifest]:
        """Publish models for some device classes, all in one step.

        Classes that are not in `models` keep what they have.

        Args:
            release: Higher than every number published before.
            models: Device class to content.

        Returns:
            Device class to its manifest.

        Raises:
            RegistryError: `release` is not new, or there are no models.
            InstallError: The disk is full or refuses; nothing was published.
        """
        manifests = {name: content.manifest(release, name) for name, content in models.items()}
        if not manifests:
            raise RegistryError(f"release {release} has no models, expected at least one class")
        files: dict[str, bytes] = {}
        for name, manifest in manifests.items():
            files[manifest.model] = models[name].onnx
            files[manifest.golden] = models[name].golden
            files[f"classes/{name}.json"] = manifest.to_bytes()
        with self._lock:
            current = self._load()[2]
            latest = _latest(current)
            if release <= latest:
                raise RegistryError(
                    f"release {release} is not new, expected more than {latest}: "
                    "to go back, publish the old model under a new number"
                )
            self._publish(files, drop=_outdated(current, manifests))
        return manifests

    def refresh_timestamp(self) -> bool:
        """Re-sign whatever has less than half of its life left; call it every hour or so.

        Covers all roles: targets would expire after 90 days without a release, and root after a
        year (it is left alone where its key was moved off the machine).

        Returns:
            Whether anything was written.
        """
        with self._lock:
            root = self._root()
            if Root.type in self._signers and self._stale(root):
                self._renew(root)
                self._write(
                    self._metadata / f"{root.version}.root.json",
                    sign(root, self._signers[Root.type]),
                )
            timestamp, snapshot, targets = self._load()
            if self._stale(targets):
                self._commit(targets, snapshot, timestamp)
            elif self._stale(snapshot) or self._stale(timestamp):
                self._commit(None, snapshot, timestamp)
            else:
                return False
            return True

    def path(self, name: str) -> Path | None:
        """The public file behind a name that a device asks for.

        Args:
            name: Unverified: `metadata/<file>` or `targets/<path>`.

        Returns:
            An existing regular file below the public folder; None for every other name.
        """
        parts = name.split("/")
        if parts[0] not in ("metadata", "targets") or not all(map(_PART.fullmatch, parts)):
            return None
        path = self._public.joinpath(*parts)
        inside = path.resolve().is_relative_to(self._public.resolve())
        return path if inside and path.is_file() else None

    def read(self, name: str) -> bytes | None:
        """Content of `path(name)`; None where there is no such public file."""
        path = self.path(name)
        try:
            return None if path is None else path.read_bytes()
        except FileNotFoundError:  # dropped by a publication just now
            return None

    def _publish(self, files: Mapping[str, bytes], drop: tuple[str, ...]) -> None:
        for path in files:
            if len(path) > MAX_TARGET_PATH or not all(map(_PART.fullmatch, path.split("/"))):
                raise RegistryError(
                    f"target path {path!r} is not acceptable, expected at most {MAX_TARGET_PATH} "
                    "characters in parts of letters, digits, '.', '_' and '-'"
                )
        timestamp, snapshot, targets = self._load()
        dropped = [self._target_file(targets.targets.pop(path)) for path in drop]
        for path, data in files.items():
            info = TargetFile.from_data(path, data, ["sha256"])
            file = self._target_file(info)
            if not file.is_file():  # its name is its hash, and it was written in one step
                make_folder(file.parent)
                self._write(file, data)
            targets.targets[path] = info
        self._commit(targets, snapshot, timestamp)
        for file in dropped:
            with suppress(OSError):  # published already: a leftover only takes space
                file.unlink(missing_ok=True)
                file.parent.rmdir()  # once it is empty

    def _commit(self, targets: Targets | None, snapshot: Snapshot, timestamp: Timestamp) -> None:
        """Sign and write, the file that is named before the file that names it."""
        if targets is not None:
            self._renew(targets)
            data = sign(targets, self._signers[Targets.type])
            self._write(self._metadata / f"{targets.version}.targets.json", data)
            snapshot.meta["targets.json"] = meta_file(targets.version, data)
        self._renew(snapshot)
        data = sign(snapshot, self._signers[Snapshot.type])
        self._write(self._metadata / f"{snapshot.version}.snapshot.json", data)
        timestamp.snapshot_meta = meta_file(snapshot.version, data)
        self._renew(timestamp)
        data = sign(timestamp, self._signers[Timestamp.type])
        self._write(self._metadata / "timestamp.json", data)
        newest = {"targets": snapshot.meta["targets.json"].version, "snapshot": snapshot.version}
        for role, version in newest.items():
            for old in self._metadata.glob(f"*.{role}.json"):
                number = old.name.split(".")[0]
                if number.isdecimal() and int(number) <= version - KEEP_METADATA:
                    old.unlink(missing_ok=True)

    def _renew(self, signed: Signed) -> None:
        signed.version += 1
        signed.expires = self._now() + self._expiry.of(signed.type)

    def _stale(self, signed: Signed) -> bool:
        return signed.expires - self._now() < self._expiry.of(signed.type) / 2

    def _target_file(self, info: TargetFile) -> Path:
        folder, _, name = info.path.rpartition("/")
        return self._public / "targets" / folder / f"{info.hashes['sha256']}.{name}"

    def _load(self) -> tuple[Timestamp, Snapshot, Targets]:
        timestamp = self._parse("timestamp.json", Timestamp)
        version = timestamp.snapshot_meta.version
        snapshot = self._parse(f"{version}.snapshot.json", Snapshot)
        version = snapshot.meta["targets.json"].version
        return timestamp, snapshot, self._parse(f"{version}.targets.json", Targets)

    def _root(self) -> Root:
        names = [path.name.split(".")[0] for path in self._metadata.glob("*.root.json")]
        newest = max((int(name) for name in names if name.isdecimal()), default=1)
        return self._parse(f"{newest}.root.json", Root)

    def _parse(self, name: str, kind: type[S]) -> S:
        path = self._metadata / name
        try:
            signed: Signed = Metadata.from_bytes(path.read_bytes()).signed
        except (OSError, RepositoryError) as e:
            raise ConfigError(f"cannot read the release metadata {path}: {e}") from e
        if not isinstance(signed, kind):
            raise ConfigError(f"{path} holds {signed.type} metadata, expected {kind.type}")
        return signed


def _releases(targets: Targets) -> dict[str, tuple[str, int]]:
    """Target path to (device class, release) of every file of a release."""
    matches = {path: _RELEASE.fullmatch(path) for path in targets.targets}
    return {path: (m[1], int(m[2])) for path, m in matches.items() if m}


def _latest(targets: Targets) -> int:
    return max((release for _, release in _releases(targets).values()), default=0)


def _outdated(targets: Targets, new: Mapping[str, Manifest]) -> tuple[str, ...]:
    """Paths to drop so that with one more each class of `new` has `KEEP_RELEASES`."""
    files = _releases(targets)
    drop: list[str] = []
    for name in new:
        numbers = sorted({release for owner, release in files.values() if owner == name})
        old = set(numbers[: max(0, len(numbers) + 1 - KEEP_RELEASES)])
        drop += [path for path, (owner, number) in files.items() if owner == name and number in old]
    return tuple(drop)
