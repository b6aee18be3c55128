"""Two slots and one pointer: a device always has the old model or the new one.

    slots/a/  slots/b/       model.onnx, golden.npz, slot.json (hashes of both, and the manifest)
    slots/active.json        which slot runs, and whether on trial; replacing it is the switch
    slots/rejected.json      models that failed here, so that they are not installed again
    slots/starts.json        whether the agent ended unasked, and how often (`starts`)
    slots/journal.json       how far an installation has got (`journal`)

A slot counts only while its files match the hashes in its slot.json, which is written last. If
the active slot does not count, the other one is used. Nothing here asks the time or the network,
so a device that was off for months starts like any other.

States of the active release: TRIAL after the switch, COMMITTED after its first real runs. A
trial during which the agent ends unasked `MAX_STARTS` times is rolled back, which catches a
model that takes the whole process down; a committed release that is not settled is rolled back
after more than `MAX_EARLY` early ends.
"""

import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

from fleetprune.errors import InstallError
from fleetprune.files import make_folder, sha256_of, storage_errors, sync_file
from fleetprune.manifest import Manifest
from fleetprune_agent.journal import JOURNAL, Journal, JournalFile
from fleetprune_agent.slot_files import (
    GOLDEN,
    MODEL,
    RECORD,
    SLOTS,
    STAGING,
    Installed,
    Pointer,
    Record,
    Refusal,
    Rejected,
    SlotName,
    Staging,
    State,
    read_whole,
    wipe,
)
from fleetprune_agent.starts import MAX_EARLY, STEADY_S, Starts, begun
from fleetprune_agent.statefile import read_message, replace_message, tidy

log = logging.getLogger(__name__)

MAX_STARTS = 3  # unasked ends of a release on trial, and attempts at its health check
MAX_REJECTED = 32  # remembered; the oldest are forgotten first


class Slots:
    """The slots below one folder. Processes and threads may share it: changes take a lock."""

    def __init__(self, folder: Path) -> None:
        """Open, or make, `folder/slots`."""
        self.folder = folder / "slots"
        self.journal = JournalFile(self.folder)
        self._pointer = self.folder / "active.json"
        self._starts = self.folder / "starts.json"
        self._rejected = self.folder / "rejected.json"
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
        """To be called once when the agent starts: sets aside what is damaged, breaks boot loops.

        Returns:
            What to run, as `active`. A disk that refuses is no reason not to run.
        """
        try:
            with self._locked():
                self._tidy()
                self._begin()
        except InstallError as e:
            log.warning("the start is not noted: %s", e)
        return self.active()

    def stop(self) -> None:
        """To be called when the agent was told to end: this end is no crash."""
        self._note_starts(running=False, early=0)

    def steady(self) -> None:
        """To be called when one model has been active for `STEADY_S` of uptime."""
        self._note_starts(settled=True, early=0)

    def crashes(self) -> int:
        """Ends of the agent that nobody asked for, while the release that runs was active."""
        starts = read_message(self._starts, Starts)
        return 0 if starts is None or starts.sha256 != _model(self.active()) else starts.crashes

    def stage(self, manifest: Manifest) -> Path:
        """Prepare the idle slot for a release; what is there of the same one is kept.

        A release still on trial gives way first, to the proven one: otherwise the only model
        that is known to work would be overwritten.

        Returns:
            The folder to put `MODEL` and `GOLDEN` into.

        Raises:
            InstallError: The disk is full or refuses, or the slot is a newer version's.
        """
        with self._locked():
            active = self.active()
            if active is not None and active.state is State.TRIAL:
                active = self._step_back(active) or active
            folder = self.folder / self._idle(active)
            found = read_message(folder / STAGING, Staging)
            if found is None or found.manifest != manifest:
                wipe(folder)
                replace_message(folder / STAGING, Staging(manifest=manifest))
            return folder

    def staged(self, manifest: Manifest) -> Path | None:
        """The folder that `stage` has prepared for a release; None: it has not."""
        with suppress(InstallError):
            return self._staged(manifest)
        return None

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
        return self._note_staging(manifest, checks=1).checks

    def forget_check(self, manifest: Manifest) -> None:
        """The agent was told to end during the check: that attempt does not count."""
        self._note_staging(manifest, checks=-1)

    def begin_delta(self, manifest: Manifest) -> None:
        """Note that a delta is about to be applied for the staged release."""
        self._note_staging(manifest, whole=True)

    def delta_tried(self, manifest: Manifest) -> bool:
        """Whether one was applied, or failed: the whole model is what is left."""
        staging = read_message(self._staged(manifest) / STAGING, Staging)
        return staging is not None and staging.whole

    def switch(self, manifest: Manifest, origin: str = "", serial: int = 0) -> Installed:
        """Make the staged release active, on trial: durable files first, then the pointer.

        Args:
            manifest: Of the staged release.
            origin: Root of trust of the rollout that wants it.
            serial: Of that rollout.

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
            record = Record(manifest=manifest, files=files, origin=origin, serial=serial)
            replace_message(folder / RECORD, record)
            found = self._whole(cast(SlotName, folder.name))
            if found is None:
                raise InstallError(f"{folder} changed while it was sealed")
            self._point(found, previous=None if before is None else before.slot)
            with storage_errors("clean", folder):
                (folder / STAGING).unlink(missing_ok=True)
            return found

    def resume(self, manifest: Manifest) -> Installed | None:
        """Make the other slot active if it holds just this release, proven: nothing is fetched.

        Returns:
            What runs now; None: the other slot holds something else, and nothing has changed.
        """
        with self._locked():
            active = self.active()
            if active is None:
                return None
            other = self.fallback(active)
            if other is None or not other.proven or other.manifest != manifest:
                return None
            self._point(other, previous=active.slot)
            return other

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
                replace_message(found.folder / RECORD, proven)
            if pointer.state is not State.COMMITTED:
                self._write_pointer(
                    pointer.model_copy(update={"state": State.COMMITTED, "attempts": 0})
                )
            self._write_refusals(
                tuple(r for r in self.refusals() if not r.concerns(found.manifest))
            )

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
                self.reject(active.manifest, reason, ran=True)
            return self._step_back(active)

    def fallback(self, active: Installed) -> Installed | None:
        """The other slot, if it is whole and did not fail."""
        other = self._whole(_other(active.slot))
        return None if other is None or self.refusal(other.manifest) else other

    def reject(self, manifest: Manifest, reason: str, *, ran: bool = False) -> None:
        """Remember that a model failed on this device.

        Args:
            manifest: Of the model.
            reason: Why; shortened to one line.
            ran: It was active then.
        """
        with self._locked():
            if self.refusal(manifest) is None:
                refusal = Refusal(
                    release=manifest.release,
                    device_class=manifest.device_class,
                    reason=" ".join(reason.split())[:200],
                    ran=ran,
                )
                self._write_refusals((*self.refusals(), refusal))

    def refusal(self, manifest: Manifest) -> Refusal | None:
        """That a model failed here, and why; None: it did not."""
        return next((r for r in self.refusals() if r.concerns(manifest)), None)

    def refusals(self) -> tuple[Refusal, ...]:
        """Models that failed here, the oldest first."""
        found = read_message(self._rejected, Rejected)
        return () if found is None else found.models

    def rejected(self) -> dict[int, str]:
        """Releases of which a model failed here, and why the first of each did."""
        return {r.release: r.reason for r in reversed(self.refusals())}

    def heard(self, origin: str) -> int:
        """The highest serial of a rollout that was verified under a root of trust; 0: none.

        It is in the journal, and with each release in the slots: losing one is not forgetting.
        """
        journal = self.journal.read()
        records = [read_message(self.folder / name / RECORD, Record) for name in SLOTS]
        noted = [(r.origin, r.serial) for r in (journal, *records) if r is not None]
        return max((serial for at, serial in noted if at == origin), default=0)

    def reclaimable(self) -> int:
        """Bytes in the idle slot, which the next release may use."""
        folder = self.folder / self._idle(self.active())
        return sum(p.stat().st_blocks * 512 for p in folder.iterdir() if p.is_file())

    def _tidy(self) -> None:
        """Set aside what does not parse: what is left is what the agent starts from."""
        tidy(self._pointer, Pointer)
        tidy(self._starts, Starts)
        tidy(self._rejected, Rejected)
        tidy(self.folder / JOURNAL, Journal)
        for name in SLOTS:
            tidy(self.folder / name / RECORD, Record)
            tidy(self.folder / name / STAGING, Staging)

    def _begin(self) -> None:
        """Count this start, and end a release that the agent does not survive."""
        pointer, found = self._read_pointer(), self.active()
        last = read_message(self._starts, Starts)
        crashed = last is not None and last.running
        starts = begun(last, _model(found))
        if found is None:
            pass
        elif pointer is None or found.slot != pointer.slot:  # damaged; no release's fault
            self._point(found, previous=None)
        elif (other := self.fallback(found)) is None:
            pass  # nothing to go back to: whatever this is, it is better than none
        elif self.refusal(found.manifest) is not None:  # killed in the middle of a rollback
            self._step_back(found)
        elif found.state is State.TRIAL and crashed:
            if pointer.attempts + 1 >= MAX_STARTS:
                self.rollback(f"not committed in {MAX_STARTS} starts")
            else:
                self._write_pointer(pointer.model_copy(update={"attempts": pointer.attempts + 1}))
        elif other.proven and starts.early > MAX_EARLY:
            self.rollback(
                f"the agent ended unasked {starts.early} times in succession, each within "
                f"{STEADY_S:g} s of its start"
            )
        runs = _model(self.active())
        replace_message(self._starts, starts if starts.sha256 == runs else Starts(sha256=runs))

    def _note_starts(self, **changes: object) -> None:
        """Change starts.json for the release that runs; a disk that refuses costs no more."""
        try:
            with self._locked():
                runs, starts = _model(self.active()), read_message(self._starts, Starts)
                if starts is None or starts.sha256 != runs:
                    starts = Starts(sha256=runs)
                replace_message(self._starts, starts.model_copy(update=changes))
        except InstallError as e:
            log.warning("%s", e)

    def _note_staging(self, manifest: Manifest, *, checks: int = 0, whole: bool = False) -> Staging:
        with self._locked():
            path = self._staged(manifest) / STAGING
            known = read_message(path, Staging) or Staging(manifest=manifest)
            staging = Staging(
                manifest=manifest,
                checks=max(0, known.checks + checks),
                whole=known.whole or whole,
            )
            replace_message(path, staging)
            return staging

    def _resolve(self, pointer: Pointer | None) -> Installed | None:
        if pointer is None:
            both = [found for name in SLOTS if (found := self._whole(name))]
            return max(both, key=self._preference, default=None)
        found = self._whole(pointer.slot)
        if found is not None and found.release == pointer.release:
            return replace(found, state=pointer.state)
        return self._whole(_other(pointer.slot))

    def _preference(self, found: Installed) -> tuple[bool, bool, int]:
        return self.refusal(found.manifest) is None, found.proven, found.release

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
        replace_message(self._pointer, pointer)

    def _write_refusals(self, models: tuple[Refusal, ...]) -> None:
        newest = models[-MAX_REJECTED:]
        if newest != self.refusals():
            replace_message(self._rejected, Rejected(models=newest))

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


def _model(found: Installed | None) -> str:
    return "" if found is None else found.manifest.sha256


def _other(slot: SlotName) -> SlotName:
    return "b" if slot == "a" else "a"
