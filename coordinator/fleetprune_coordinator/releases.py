"""The release repository: signed graphs and models that devices pull and verify (TUF).

A release is signed by role `targets` and then lies there; what devices run is said by a
`Rollout`, signed by role `rollouts`. Numbers of releases only rise; to go back, a rollout names an
older release that is still signed.
"""

import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from tuf.api.metadata import Targets  # type: ignore[attr-defined]  # tuf re-exports it silently

from fleetprune.errors import RegistryError
from fleetprune.files import write_atomic
from fleetprune.manifest import Delta, Manifest, Requirements, Training, manifest_path
from fleetprune.messages import GraphRef
from fleetprune.rollout import Rollout, rollout_path
from fleetprune_coordinator.roles import GRAPHS, ROLLOUTS, Expiry
from fleetprune_coordinator.signed_folder import SignedFolder, State

KEEP_RELEASES = 8  # per class; older ones that no rollout names leave the list and the disk
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
    deltas: tuple[tuple[str, bytes], ...] = ()
    """SHA-256 of a model that may be installed, and the file that makes this one from it."""
    tolerance: float = 1e-3
    requires: Requirements = field(default_factory=Requirements)
    smaller: str | None = None
    max_latency_ms: float | None = None
    max_rss_mb: float | None = None
    min_agreement: float | None = None
    labels: tuple[str, ...] = ()
    macs: int = 0
    peak_activation_bytes: int = 0
    accuracy: float | None = None
    samples: int = 0
    round: int = 0
    mask_version: int = 0
    training: Training = field(default_factory=Training)
    licence: str = ""

    def manifest(self, release: int, device_class: str) -> Manifest:
        """The manifest that devices of the class will verify and follow."""
        base = f"releases/{device_class}/{release}"
        return Manifest(
            release=release,
            device_class=device_class,
            model=f"{base}/model.onnx",
            sha256=_sha256(self.onnx),
            size=len(self.onnx),
            golden=f"{base}/golden.npz",
            tolerance=self.tolerance,
            requires=self.requires,
            deltas=tuple(
                Delta(
                    base=installed,
                    target=f"{base}/from-{installed}.delta",
                    sha256=_sha256(data),
                    size=len(data),
                )
                for installed, data in self.deltas
            ),
            smaller=self.smaller,
            max_latency_ms=self.max_latency_ms,
            max_rss_mb=self.max_rss_mb,
            min_agreement=self.min_agreement,
            labels=self.labels,
            input_shape=self.input_shape,
            macs=self.macs,
            peak_activation_bytes=self.peak_activation_bytes,
            accuracy=self.accuracy,
            samples=self.samples,
            round=self.round,
            mask_version=self.mask_version,
            training=self.training,
            licence=self.licence,
        )

    def files(self, manifest: Manifest) -> dict[str, bytes]:
        """Target path to content of everything that is signed for `manifest`."""
        path = manifest_path(manifest.device_class, manifest.release)
        deltas = {
            delta.target: data
            for delta, (_, data) in zip(manifest.deltas, self.deltas, strict=True)
        }
        return {
            manifest.model: self.onnx,
            manifest.golden: self.golden,
            **deltas,
            path: manifest.to_bytes(),
        }


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
            ConfigError: There is no readable repository, or a role that must sign has no key.
        """
        self._lock = threading.Lock()
        self._folder = SignedFolder(folder, now, expiry or Expiry(), write)
        self._public = self._folder.public

    def root(self) -> bytes:
        """The first root metadata: what a device is provisioned with."""
        return (self._folder.metadata / "1.root.json").read_bytes()

    def latest_release(self) -> int:
        """The highest release number ever published; 0: none."""
        return _latest(self._folder.load())

    def rollout(self, device_class: str) -> Rollout | None:
        """What devices of a class are told; None: nothing yet."""
        return self._rollout(self._folder.load(), device_class)

    def manifest(self, device_class: str, release: int | None = None) -> Manifest | None:
        """What is signed about a release for a class.

        Args:
            device_class: The class.
            release: Its number; None: the candidate of the class's rollout, or else the stable
                one.

        Returns:
            None where there is no such release.
        """
        state = self._folder.load()
        if release is None:
            rollout = self._rollout(state, device_class)
            release = 0 if rollout is None else rollout.candidate or rollout.stable
        return self._manifest(state, device_class, release)

    def publish_graph(self, onnx: bytes) -> GraphRef:
        """Publish a graph under its own hash; does nothing if it is already there."""
        digest = _sha256(onnx)
        path = f"graphs/{digest}.onnx"
        with self._lock:
            state = self._folder.load()
            if state.find(GRAPHS, path) is None:
                self._folder.put(state, GRAPHS, {path: onnx})
                self._folder.commit(state, [GRAPHS])
        return GraphRef(target=path, sha256=digest)

    def publish_release(
        self, release: int, models: Mapping[str, ReleaseContent], *, to_all: bool = False
    ) -> dict[str, Manifest]:
        """Publish models for some device classes, all in one step.

        No device runs them until a rollout names them.

        Args:
            release: Higher than every number published before.
            models: Device class to content.
            to_all: In the same step, tell all devices of these classes to run it.

        Returns:
            Device class to its manifest.

        Raises:
            RegistryError: `release` is not new, or there are no models.
            InstallError: The disk is full or refuses; nothing was published.
        """
        manifests = {name: content.manifest(release, name) for name, content in models.items()}
        if not manifests:
            raise RegistryError(f"release {release} has no models, expected at least one class")
        with self._lock:
            state = self._folder.load()
            latest = _latest(state)
            if release <= latest:
                raise RegistryError(
                    f"release {release} is not new, expected more than {latest}: "
                    "to go back, roll an older release out"
                )
            for name, manifest in manifests.items():
                self._folder.put(state, Targets.type, models[name].files(manifest))
            changed = [Targets.type]
            if to_all:
                self._put_rollouts(state, self._to_all(state, release, manifests))
                changed.append(ROLLOUTS)
            dropped = self._folder.drop(state, Targets.type, self._outdated(state, manifests))
            self._folder.commit(state, changed)
            self._folder.delete(dropped)
        return manifests

    def publish_rollout(self, *rollouts: Rollout) -> None:
        """Tell devices of some classes what to run, all in one step.

        Args:
            rollouts: One per class.

        Raises:
            RegistryError: A release that is named is not signed for that class, or a serial does
                not rise; nothing was published.
            InstallError: The disk is full or refuses; nothing was published.
        """
        with self._lock:
            state = self._folder.load()
            for rollout in rollouts:
                before = self._rollout(state, rollout.device_class)
                if before is not None and rollout.serial <= before.serial:
                    raise RegistryError(
                        f"rollout {rollout.serial} for {rollout.device_class} is not new, "
                        f"expected more than {before.serial}"
                    )
            self._put_rollouts(state, rollouts)
            self._folder.commit(state, [ROLLOUTS])

    def roll_out_to_all(self, release: int, classes: Iterable[str]) -> None:
        """Tell all devices of some classes to run one release."""
        self.publish_rollout(*self._to_all(self._folder.load(), release, classes))

    def refresh_timestamp(self) -> bool:
        """Re-sign whatever has less than half of its life left; call it every hour or so.

        Covers all roles: targets would expire after 90 days without a release, and root after a
        year. Roles whose keys were moved off the machine are left alone.

        Returns:
            Whether anything was written.
        """
        with self._lock:
            return self._folder.refresh()

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

    def _put_rollouts(self, state: State, rollouts: Iterable[Rollout]) -> None:
        for rollout in rollouts:
            for release in filter(None, (rollout.stable, rollout.candidate)):
                path = manifest_path(rollout.device_class, release)
                if state.find(Targets.type, path) is None:
                    raise RegistryError(
                        f"release {release} is not signed for class {rollout.device_class}: "
                        "publish it, or roll out one that is"
                    )
            files = {rollout_path(rollout.device_class): rollout.to_bytes()}
            self._folder.put(state, ROLLOUTS, files)

    def _to_all(self, state: State, release: int, classes: Iterable[str]) -> list[Rollout]:
        before = {name: self._rollout(state, name) for name in classes}
        return [
            Rollout(device_class=name, serial=1 if old is None else old.serial + 1, stable=release)
            for name, old in before.items()
        ]

    def _rollout(self, state: State, device_class: str) -> Rollout | None:
        info = state.find(ROLLOUTS, rollout_path(device_class))
        return None if info is None else Rollout.from_bytes(self._folder.file(info).read_bytes())

    def _manifest(self, state: State, device_class: str, release: int) -> Manifest | None:
        info = state.find(Targets.type, manifest_path(device_class, release))
        return None if info is None else Manifest.from_bytes(self._folder.file(info).read_bytes())

    def _outdated(self, state: State, classes: Iterable[str]) -> list[str]:
        """Paths of releases to drop, so that each class keeps `KEEP_RELEASES` and those in use."""
        files, used = _releases(state), self._in_use(state)
        old: set[tuple[str, int]] = set()
        for name in classes:
            numbers = sorted({number for owner, number in files.values() if owner == name})
            old |= {(name, number) for number in numbers[:-KEEP_RELEASES]} - used
        return [path for path, of in files.items() if of in old]

    def _in_use(self, state: State) -> set[tuple[str, int]]:
        """Class and number of what a rollout names, and of what devices take where that fails."""
        used: set[tuple[str, int]] = set()
        for path in state.content[ROLLOUTS].targets:
            owner = path.removeprefix("rollouts/").removesuffix(".json")
            rollout = self._rollout(state, owner)
            for number in () if rollout is None else (rollout.stable, rollout.candidate):
                name: str | None = owner
                while number and name is not None and (name, number) not in used:
                    used.add((name, number))
                    manifest = self._manifest(state, name, number)
                    name = None if manifest is None else manifest.smaller
        return used


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _releases(state: State) -> dict[str, tuple[str, int]]:
    """Target path to (device class, release) of every file of a release."""
    matches = {path: _RELEASE.fullmatch(path) for path in state.content[Targets.type].targets}
    return {path: (m[1], int(m[2])) for path, m in matches.items() if m}


def _latest(state: State) -> int:
    return max((release for _, release in _releases(state).values()), default=0)
