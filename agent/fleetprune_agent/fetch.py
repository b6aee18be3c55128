"""Brings the files of a release into the idle slot: from a delta where one fits, else whole.

A delta is worth its bytes only while nothing can go wrong with it: whatever does (another base,
other bytes, no memory, a kill in the middle) leads to the full model, and the delta is not tried
again for this release.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from fleetprune.errors import HostileInputError, InstallError, TrustError
from fleetprune.files import free_bytes, sha256_of, storage_errors, write_atomic
from fleetprune.manifest import Delta, Manifest
from fleetprune_agent.memory import available_mb
from fleetprune_agent.slot_files import DELTA, GOLDEN, MODEL, Installed
from fleetprune_agent.slots import Slots
from fleetprune_agent.trust import TrustedRepository

log = logging.getLogger(__name__)

MAX_IN_MEMORY: Final = 256 * 1024 * 1024  # bytes of base, delta and result together


class ApplyDelta(Protocol):
    """`fleetprune.delta.apply`."""

    def __call__(self, base: bytes, delta: bytes, *, max_bytes: int) -> bytes:
        """Make the new file; HostileInputError if the delta does not fit or makes more."""
        ...


def apply_lazily(base: bytes, delta: bytes, *, max_bytes: int) -> bytes:
    """`fleetprune.delta.apply`, imported when there is a delta."""
    from fleetprune.delta import apply  # noqa: PLC0415

    return apply(base, delta, max_bytes=max_bytes)


def room_needed(repository: TrustedRepository, manifest: Manifest) -> int:
    """Bytes on the disk that a release takes; a delta is used only where there is room for more."""
    return manifest.size + repository.describe(manifest.golden).size


def bytes_to_fetch(
    repository: TrustedRepository, manifest: Manifest, active: Installed | None
) -> int:
    """Bytes that a release takes over the link, as far as can be told beforehand."""
    base = None if active is None else active.manifest.sha256
    deltas = [d.size for d in manifest.deltas if d.base == base]
    return min([manifest.size, *deltas]) + repository.describe(manifest.golden).size


@dataclass(frozen=True, slots=True)
class Fetch:
    """Puts `MODEL` and `GOLDEN` into a staged slot, complete and verified.

    Attributes:
        repository: Verified access to releases.
        slots: Knows the base of a delta.
        manifest: Of the staged release.
        folder: The staged slot.
        apply_delta: See `ApplyDelta`.
        spare: Bytes that stay free on the disk.
        verifying: Called when all has come and only hashes are left.
    """

    repository: TrustedRepository
    slots: Slots
    manifest: Manifest
    folder: Path
    apply_delta: ApplyDelta
    spare: int
    verifying: Callable[[], None]

    def run(self) -> None:
        """Fetch what is not there yet.

        Raises:
            TrustError: What came is not what was signed.
            TransportError: The source does not answer; what came is kept.
            InstallError: The disk is full or refuses.
        """
        manifest, model = self.manifest, self.folder / MODEL
        if not is_there(model, manifest):
            active = self.slots.active()
            delta = self._delta(active)
            if active is None or delta is None or not self._change(active, delta):
                self.repository.target(manifest.model, model)
        self.repository.target(manifest.golden, self.folder / GOLDEN)
        self.verifying()
        if not is_there(model, manifest):
            raise InstallError(f"{model} is not what was downloaded there: is the disk sound?")

    def _delta(self, active: Installed | None) -> Delta | None:
        """One that is worth trying: it fits the model that runs, the memory and the disk."""
        manifest = self.manifest
        if active is None or self.slots.delta_tried(manifest):
            return None
        most = min(MAX_IN_MEMORY, available_mb() / 2 * 1e6)
        for delta in manifest.deltas:
            in_memory = active.manifest.size + delta.size + manifest.size
            on_disk = delta.size + manifest.size + self.spare
            if (
                delta.base == active.manifest.sha256
                and delta.size < manifest.size
                and in_memory <= most
                and on_disk <= free_bytes(self.folder)
            ):
                return delta
        return None

    def _change(self, active: Installed, delta: Delta) -> bool:
        """Make the model from the one that runs; False: it could not be."""
        file, manifest = self.folder / DELTA, self.manifest
        try:
            _require_signed(self.repository, delta)
            self.repository.target(delta.target, file)
            self.verifying()
            self.slots.begin_delta(manifest)  # noted first: a kill from here on is a failure
            with storage_errors("read", file):
                base, change = active.model.read_bytes(), file.read_bytes()
            made = self.apply_delta(base, change, max_bytes=manifest.size)
            _require_model(made, manifest)
            write_atomic(self.folder / MODEL, made)
        except (HostileInputError, InstallError, MemoryError) as e:
            log.warning("the delta from release %d is of no use: %s", active.release, e)
            self.slots.begin_delta(manifest)
            return False
        finally:
            if self.slots.delta_tried(manifest):  # else it is still coming
                with storage_errors("clean", self.folder):
                    file.unlink(missing_ok=True)
        return True


def _require_signed(repository: TrustedRepository, delta: Delta) -> None:
    signed = repository.describe(delta.target)
    if (signed.size, signed.sha256) != (delta.size, delta.sha256):
        raise TrustError(f"the manifest names another delta than the one signed as {delta.target}")


def _require_model(made: bytes, manifest: Manifest) -> None:
    digest = hashlib.sha256(made).hexdigest()
    if (len(made), digest) != (manifest.size, manifest.sha256):
        raise TrustError(
            f"it makes {len(made)} bytes with sha256 {digest}, "
            f"expected {manifest.size} with {manifest.sha256}"
        )


def is_there(model: Path, manifest: Manifest) -> bool:
    """Whether a file is the model of a manifest."""
    with storage_errors("read", model):
        if not model.is_file() or model.stat().st_size != manifest.size:
            return False
        return sha256_of(model) == manifest.sha256
