"""Two slots and one pointer: a device always has the old model or the new one.

    slots/a/  slots/b/       model.onnx, golden.npz, slot.json (hashes of both, and the manifest)
    slots/active.json        which slot runs, and whether on trial; replacing it is the switch
    slots/rejected.json      releases that failed here, so that they are not installed again

A slot counts only while its files match the hashes in its slot.json, which is written last. If
the active slot does not count, the other one is used. Nothing here asks the time or the network,
so a device that was off for months starts like any other.

States of the active release: TRIAL after the switch, COMMITTED after its first real runs. A
trial that is started `MAX_STARTS` times without being committed is rolled back, which catches a
model that takes the whole process down.
"""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

from fleetprune.errors import InstallError
from fleetprune.files import make_folder, sha256_of, storage_errors, sync_file, write_atomic
from fleetprune.manifest import Manifest
from fleetprune_agent.slot_files import (
    GOLDEN,
    MODEL,
    RECORD,
    SLOTS,
    STAGING,
    Installed,
    Pointer,
    Record,
    Rejected,
    SlotName,
    Staging,
    State,
    read_message,
    read_whole,
    wipe,
)

MAX_STARTS = 3  # starts of a release on trial, and attempts at its health check
MAX_REJECTED = 32  # remembered; the oldest are forgotten first


class Slots:
    """The slots below one folder. Processes and threads may share it: changes take a lock."""

    def __init__(self, folder: Path) -> None:
        """Open, or make, `folder/slots`."""
        self.folder = folder / "slots"
        self._pointer = self.folder / "active.json"
        self._thread_lock = threading.RLock()
        self._lock_file: int | None = None
        for name in SLOTS:
            make_folder(self.folder / name)

    def active(self) -> Installed | None:
        """The release to run; None: nothing is installed yet.

        This is the pointer's slot; the other one if that slot is damaged; and the better one if
        the pointer itself is. Every whole slot has passed verification and its health check.
        """
        while True:
            pointer = self._read_pointer()
            found = self._resolve(pointer)
            if self._read_pointer() == pointer:  # else a switch happened while files were hashed
                return found

    def version(self) -> tuple[int, int, int] | None:
        """Changes whenever the pointer is replaced; cheap enough to ask at each prediction."""
        try:
            stat = self._pointer.stat()
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def start(self) -> Installed | None:
        """To be called once when the agent starts: counts starts of a trial, ends hopeless ones.

        Returns:
            What to run, as `active`.
        """
        with self._locked():
            pointer, found = self._read_pointer(), self.active()
            if found is None:
                return None
            if pointer is None or found.slot != pointer.slot:  # damaged; no release's fault
                self._point(found, previous=None)
            elif self.fallback(found) is None:
                return found  # nothing to go back to: whatever this is, it is better than none
            elif found.release in self.rejected():  # killed in the middle of a rollback
                return self._step_back(found)
            elif found.state is State.TRIAL and pointer.attempts >= MAX_STARTS:
                return self.rollback(f"not committed in {MAX_STARTS} starts")
            elif found.state is State.TRIAL:
                self._write_pointer(pointer.model_copy(update={"attempts": pointer.attempts + 1}))
            return self.active()

    def stage(self, manifest: Manifest) -> Path:
        """Prepare the idle slot for a release; what is there of the same one is kept.

        A release still on trial gives way first, to the proven one: otherwise the only model
        that is known to work would be overwritten.

        Returns:
            The folder to put `MODEL` and `GOLDEN` into.
        """
        with self._locked():
            active = self.active()
            if active is not None and active.state is State.TRIAL:
                active = self._step_back(active) or active
            folder = self.folder / self._idle(active)
            staging = Staging(manifest=manifest)
            found = read_message(folder / STAGING, Staging)
            if found is None or found.manifest != manifest:
                wipe(folder)
                write_atomic(folder / STAGING, staging.to_bytes())
            return folder

    def unstage(self) -> None:
        """Empty the idle slot and give its space back; needs none itself."""
        with self._locked():
            wipe(self.folder / self._idle(self.active()))

    def begin_check(self, manifest: Manifest) -> int:
        """Count an attempt at the health check of the staged release, before it is made.

        Returns:
            Attempts including this one; more than `MAX_STARTS` says that the model kills the
            process that tries it.
        """
        with self._locked():
            path = self._staged(manifest) / STAGING
            staging = read_message(path, Staging)
            checks = 1 if staging is None else staging.checks + 1
            write_atomic(path, Staging(manifest=manifest, checks=checks).to_bytes())
            return checks

    def switch(self, manifest: Manifest) -> Installed:
        """Make the staged release active, on trial: durable files first, then the pointer.

        Raises:
            InstallError: The staged files are not those of the manifest, or the disk refuses.
        """
        with self._locked():
            before = self.active()
            folder = self._staged(manifest)
            with storage_errors("seal", folder):
                files = {name: sha256_of(folder / name) for name in (MODEL, GOLDEN)}
                if files[MODEL] != manifest.sha256:
                    raise InstallError(
                        f"{folder / MODEL} has sha256 {files[MODEL]}, expected {manifest.sha256}"
                    )
                for name in files:
                    sync_file(folder / name)
            write_atomic(folder / RECORD, Record(manifest=manifest, files=files).to_bytes())
            found = self._whole(cast(SlotName, folder.name))
            if found is None:
                raise InstallError(f"{folder} changed while it was sealed")
            self._point(found, previous=None if before is None else before.slot)
            with storage_errors("clean", folder):
                (folder / STAGING).unlink(missing_ok=True)
            return found

    def commit(self, release: int | None = None) -> None:
        """The active release works on real data; does nothing if that was known.

        Args:
            release: The release that worked; nothing is done if another one became active
                meanwhile. None: whichever is active.
        """
        with self._locked():
            pointer, found = self._read_pointer(), self.active()
            if pointer is None or found is None or found.slot != pointer.slot:
                return
            if release not in (None, found.release):
                return
            if not found.proven:
                record = read_message(found.folder / RECORD, Record)
                if record is None:
                    raise InstallError(f"{found.folder / RECORD} cannot be read")
                proven = record.model_copy(update={"proven": True})
                write_atomic(found.folder / RECORD, proven.to_bytes())
            if pointer.state is not State.COMMITTED:
                self._write_pointer(
                    pointer.model_copy(update={"state": State.COMMITTED, "attempts": 0})
                )
            self._write_rejected({k: v for k, v in self.rejected().items() if k != found.release})

    def rollback(self, reason: str, release: int | None = None) -> Installed | None:
        """The active release failed: remember that, and go back to the other slot.

        Args:
            reason: Why; shortened to one line.
            release: The release that failed; if another one became active meanwhile, that one
                stays and is returned. None: whichever is active.

        Returns:
            What runs now; None: there is nothing to go back to, the release stays.

        Raises:
            InstallError: The pointer cannot be written; `fallback` still says what to run.
        """
        with self._locked():
            active = self.active()
            if active is None or release not in (None, active.release):
                return active
            with suppress(InstallError):  # on a full disk, going back matters more than the note
                self.reject(active.release, reason)
            return self._step_back(active)

    def fallback(self, active: Installed) -> Installed | None:
        """The other slot, if it is whole and did not fail."""
        other = self._whole(_other(active.slot))
        return None if other is None or other.release in self.rejected() else other

    def reject(self, release: int, reason: str) -> None:
        """Remember that a release failed on this device."""
        with self._locked():
            known = self.rejected()
            if release not in known:
                self._write_rejected({**known, release: " ".join(reason.split())[:200]})

    def rejected(self) -> dict[int, str]:
        """Releases that failed here, and why."""
        found = read_message(self.folder / "rejected.json", Rejected)
        return {} if found is None else found.releases

    def reclaimable(self) -> int:
        """Bytes in the idle slot, which the next release may use."""
        folder = self.folder / self._idle(self.active())
        return sum(p.stat().st_blocks * 512 for p in folder.iterdir() if p.is_file())

    def _resolve(self, pointer: Pointer | None) -> Installed | None:
        if pointer is None:
            both = [found for name in SLOTS if (found := self._whole(name))]
            return max(both, key=self._preference, default=None)
        found = self._whole(pointer.slot)
        if found is not None and found.release == pointer.release:
            return replace(found, state=pointer.state)
        return self._whole(_other(pointer.slot))

    def _preference(self, found: Installed) -> tuple[bool, bool, int]:
        return found.release not in self.rejected(), found.proven, found.release

    def _whole(self, slot: SlotName) -> Installed | None:
        return read_whole(self.folder / slot, slot)

    def _step_back(self, active: Installed) -> Installed | None:
        other = self.fallback(active)
        if other is not None:
            self._point(other, previous=None)
        return other

    def _idle(self, active: Installed | None) -> SlotName:
        return "a" if active is None else _other(active.slot)

    def _staged(self, manifest: Manifest) -> Path:
        folder = self.folder / self._idle(self.active())
        staging = read_message(folder / STAGING, Staging)
        if staging is None or staging.manifest != manifest:
            raise InstallError(f"release {manifest.release} is not staged in {folder}")
        return folder

    def _point(self, to: Installed, previous: SlotName | None) -> None:
        self._write_pointer(
            Pointer(slot=to.slot, release=to.release, state=to.state, previous=previous)
        )

    def _write_pointer(self, pointer: Pointer) -> None:
        write_atomic(self._pointer, pointer.to_bytes())

    def _write_rejected(self, releases: dict[int, str]) -> None:
        newest = dict(sorted(releases.items())[-MAX_REJECTED:])
        if newest != self.rejected():
            write_atomic(self.folder / "rejected.json", Rejected(releases=newest).to_bytes())

    def _read_pointer(self) -> Pointer | None:
        return read_message(self._pointer, Pointer)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One change at a time, between threads and processes; a kill releases it."""
        with self._thread_lock:
            if self._lock_file is not None:  # this thread holds it further up
                yield
                return
            path = self.folder / ".lock"
            with storage_errors("lock", path):
                self._lock_file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX)
                yield
            finally:
                os.close(self._lock_file)
                self._lock_file = None


def _other(slot: SlotName) -> SlotName:
    return "b" if slot == "a" else "a"
