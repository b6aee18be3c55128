"""The release repository: signed graphs and models that devices pull and verify (TUF).

A release is signed by role `targets` and then lies there; what devices run is said by a
`Rollout`, signed by role `rollouts`. Numbers of releases only rise; to go back, a rollout names an
older release that is still signed.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from tuf.api.metadata import (  # type: ignore[attr-defined]  # tuf re-exports without saying so
    Metadata,
    Root,
    TargetFile,
    Targets,
)

from fleetprune.errors import RegistryError
from fleetprune.files import write_atomic
from fleetprune.manifest import Manifest, manifest_path
from fleetprune.messages import GraphRef
from fleetprune.rollout import Rollout, rollout_path
from fleetprune_coordinator.key_files import (
    Passphrase,
    passphrase_from_environment,
    remove_keys,
)
from fleetprune_coordinator.proposals import (
    About,
    PendingError,
    Proposal,
    proposals,
    waiting,
    write_proposal,
)
from fleetprune_coordinator.release_content import ReleaseContent
from fleetprune_coordinator.roles import GRAPHS, ROLLOUTS, Expiry
from fleetprune_coordinator.signed_folder import SignedFolder, State, read_metadata

KEEP_RELEASES = 8  # per class; older ones that no rollout names leave the list and the disk
__all__ = ["ReleaseContent", "ReleaseRepository"]
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RELEASE = re.compile(r"releases/([^/]+)/(\d+)/[^/]+")


class ReleaseRepository:
    """Publishes signed files. One process writes; its threads may share the object."""

    def __init__(
        self,
        folder: Path,
        now: Callable[[], datetime],
        expiry: Expiry | None = None,
        write: Callable[[Path, bytes], None] = write_atomic,
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
        self.signed = SignedFolder(folder, now, expiry or Expiry(), write, passphrase)
        self._public = self.signed.public

    def root(self) -> bytes:
        """The first root metadata: what a device is provisioned with."""
        return (self.signed.metadata / "1.root.json").read_bytes()

    def latest_release(self) -> int:
        """The highest release number ever published; 0: none."""
        return _latest(self.signed.load())

    def rollout(self, device_class: str) -> Rollout | None:
        """What devices of a class are told; None: nothing yet."""
        return self._rollout(self.signed.load(), device_class)

    def manifest(self, device_class: str, release: int | None = None) -> Manifest | None:
        """What is signed about a release for a class.

        Args:
            device_class: The class.
            release: Its number; None: the candidate of the class's rollout, or else the stable
                one.

        Returns:
            None where there is no such release.
        """
        state = self.signed.load()
        if release is None:
            rollout = self._rollout(state, device_class)
            release = 0 if rollout is None else rollout.candidate or rollout.stable
        return self._manifest(state, device_class, release)

    def manifests(self) -> list[Manifest]:
        """Of all signed releases, by class and number."""
        state = self.signed.load()
        found = (self._manifest(state, *of) for of in sorted(set(_releases(state).values())))
        return [manifest for manifest in found if manifest is not None]

    def publish_graph(self, onnx: bytes) -> GraphRef:
        """Publish a graph under its own hash; does nothing if it is already there."""
        digest = hashlib.sha256(onnx).hexdigest()
        path = f"graphs/{digest}.onnx"
        with self.signed.change() as state:
            if state.find(GRAPHS, path) is None:
                self.signed.put(state, GRAPHS, {path: onnx})
                self.signed.commit(state, [GRAPHS])
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
            PendingError: It waits in `pending/` for signatures: keys of `targets` are not here.
            InstallError: The disk is full or refuses; nothing was published.
        """
        manifests = {name: content.manifest(release, name) for name, content in models.items()}
        if not manifests:
            raise RegistryError(f"release {release} has no models, expected at least one class")
        with self.signed.change() as state:
            latest = _latest(state)
            if release <= latest:
                raise RegistryError(
                    f"release {release} is not new, expected more than {latest}: "
                    "to go back, roll an older release out"
                )
            files = {
                path: data
                for name, manifest in manifests.items()
                for path, data in models[name].files(manifest).items()
            }
            if not self.signed.can_sign(state, Targets.type):
                self._propose(state, release, manifests, files, to_all=to_all)
            self.signed.put(state, Targets.type, files)
            changed = [Targets.type]
            if to_all:
                self._put_rollouts(state, self._to_all(state, release, manifests))
                changed.append(ROLLOUTS)
            dropped = self.signed.drop(state, Targets.type, self._outdated(state, manifests))
            self.signed.commit(state, changed)
            self.signed.delete(dropped)
        return manifests

    def publish_pending(self, folder: Path) -> About:
        """Publish what was signed elsewhere, all in one step; after a kill, call it again.

        Args:
            folder: In `pending/`, or a copy that was carried about.

        Returns:
            What it was.

        Raises:
            PendingError: Signatures are missing.
            RegistryError: What it replaces is no longer what is signed here, or a rollout names a
                release that would no longer be signed.
            TrustError, ConfigError: It is no proposal, or not whole.
        """
        with self.signed.change() as state:
            proposal = Proposal(folder)
            self._require_current(state, proposal)
            lacks = proposal.lacks()
            if lacks:
                raise PendingError(waiting(proposal))
            changed = list(proposal.about.resign)
            if proposal.targets is not None:
                for path in proposal.new():
                    data = proposal.file(path).read_bytes()
                    self.signed.put(state, Targets.type, {path: data})
                state.content[Targets.type] = proposal.targets
                changed.insert(0, Targets.type)
            state.root = proposal.root
            if proposal.about.to_all:
                self._put_rollouts(
                    state, self._to_all(state, proposal.about.release, proposal.about.to_all)
                )
                changed.append(ROLLOUTS)
            self._require_in_use(state)
            before = proposal.targets_before.signed.targets
            dropped = [self.signed.file(before[path]) for path in proposal.dropped()]
            signed = {role: d.to_bytes() for role, d in proposal.documents.items()}
            self.signed.commit(state, changed, signed)
            self.signed.delete(dropped)
            remove_keys(self.signed.folder, proposal.about.retired, self.signed.passphrase)
            shutil.rmtree(proposal.folder)
        return proposal.about

    def pending(self) -> list[Proposal]:
        """What waits for signatures."""
        return proposals(self.signed.folder)

    def publish_rollout(self, *rollouts: Rollout) -> None:
        """Tell devices of some classes what to run, all in one step.

        Args:
            rollouts: One per class.

        Raises:
            RegistryError: A release that is named is not signed for that class, or a serial does
                not rise; nothing was published.
            InstallError: The disk is full or refuses; nothing was published.
        """
        with self.signed.change() as state:
            for rollout in rollouts:
                before = self._rollout(state, rollout.device_class)
                if before is not None and rollout.serial <= before.serial:
                    raise RegistryError(
                        f"rollout {rollout.serial} for {rollout.device_class} is not new, "
                        f"expected more than {before.serial}"
                    )
            self._put_rollouts(state, rollouts)
            self.signed.commit(state, [ROLLOUTS])

    def roll_out_to_all(self, release: int, classes: Iterable[str]) -> None:
        """Tell all devices of some classes to run one release."""
        with self.signed.change() as state:
            self._put_rollouts(state, self._to_all(state, release, classes))
            self.signed.commit(state, [ROLLOUTS])

    def refresh_timestamp(self) -> bool:
        """Re-sign whatever has less than half of its life left; call it every hour or so.

        Covers all roles: targets would expire after 90 days without a release, and root after a
        year. Roles whose keys were moved off the machine are left alone.

        Returns:
            Whether anything was written.
        """
        return self.signed.refresh()

    def expiring(self) -> list[str]:
        """A line for each role whose metadata runs out and whose keys are not here."""
        return self.signed.expiring()

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

    def _propose(
        self,
        state: State,
        release: int,
        manifests: Mapping[str, Manifest],
        files: Mapping[str, bytes],
        *,
        to_all: bool,
    ) -> NoReturn:
        """Leave a release in `pending/`; PendingError says where."""
        before = self.signed.load().documents[Targets.type]
        targets = state.content[Targets.type]
        for path, data in files.items():
            targets.targets[path] = TargetFile.from_data(path, data, ["sha256"])
        for path in self._outdated(state, manifests):
            del targets.targets[path]
        document = self.signed.draft(targets, state.key_ids(Targets.type))
        about = About(
            reason=f"release {release}",
            release=release,
            to_all=tuple(manifests) if to_all else (),
        )
        proposal = write_proposal(
            self.signed.folder, about, {Targets.type: document}, before, files
        )
        raise PendingError(waiting(proposal))

    def _require_current(self, state: State, proposal: Proposal) -> None:
        """RegistryError unless a proposal replaces what is signed now, or is half published."""
        root = proposal.roots[-1]
        here = self.signed.metadata / f"{root.signed.version}.root.json"
        if not here.is_file() or read_metadata(here, Root).signed_bytes != root.signed_bytes:
            raise RegistryError(f"{proposal.folder} was made for another fleet's repository")
        now: dict[str, Metadata[Any]] = {Root.type: root, Targets.type: proposal.targets_before}
        for role, before in now.items():
            signed = state.documents[role].signed_bytes
            after = proposal.documents.get(role)
            if signed != before.signed_bytes and (after is None or signed != after.signed_bytes):
                raise RegistryError(
                    f"{proposal.folder} was made from version {before.signed.version} of "
                    f"{role}.json, but this is version {state.documents[role].signed.version} now: "
                    "delete it, and make it anew"
                )

    def _require_in_use(self, state: State) -> None:
        for name, release in self._named(state):
            _require_signed(state, name, release)

    def _put_rollouts(self, state: State, rollouts: Iterable[Rollout]) -> None:
        for rollout in rollouts:
            for release in filter(None, (rollout.stable, rollout.candidate)):
                _require_signed(state, rollout.device_class, release)
            files = {rollout_path(rollout.device_class): rollout.to_bytes()}
            self.signed.put(state, ROLLOUTS, files)

    def _to_all(self, state: State, release: int, classes: Iterable[str]) -> list[Rollout]:
        before = {name: self._rollout(state, name) for name in classes}
        return [
            Rollout(device_class=name, serial=1 if old is None else old.serial + 1, stable=release)
            for name, old in before.items()
        ]

    def _rollout(self, state: State, device_class: str) -> Rollout | None:
        info = state.find(ROLLOUTS, rollout_path(device_class))
        return None if info is None else Rollout.from_bytes(self.signed.file(info).read_bytes())

    def _manifest(self, state: State, device_class: str, release: int) -> Manifest | None:
        info = state.find(Targets.type, manifest_path(device_class, release))
        return None if info is None else Manifest.from_bytes(self.signed.file(info).read_bytes())

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
        for owner, number in self._named(state):
            name: str | None = owner
            while name is not None and (name, number) not in used:
                used.add((name, number))
                manifest = self._manifest(state, name, number)
                name = None if manifest is None else manifest.smaller
        return used

    def _named(self, state: State) -> Iterator[tuple[str, int]]:
        """Class and number of the releases that rollouts name."""
        for path in state.content[ROLLOUTS].targets:
            owner = path.removeprefix("rollouts/").removesuffix(".json")
            rollout = self._rollout(state, owner)
            for number in () if rollout is None else (rollout.stable, rollout.candidate):
                if number:
                    yield owner, number


def _require_signed(state: State, device_class: str, release: int) -> None:
    if state.find(Targets.type, manifest_path(device_class, release)) is None:
        raise RegistryError(
            f"release {release} is not signed for class {device_class}: "
            "publish it, or roll out one that is"
        )


def _releases(state: State) -> dict[str, tuple[str, int]]:
    """Target path to (device class, release) of every file of a release."""
    matches = {path: _RELEASE.fullmatch(path) for path in state.content[Targets.type].targets}
    return {path: (m[1], int(m[2])) for path, m in matches.items() if m}


def _latest(state: State) -> int:
    return max((release for _, release in _releases(state).values()), default=0)
