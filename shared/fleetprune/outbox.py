"""What a device still has to tell the coordinator, on disk, so that a power cut loses none of it.

One file per entry, named by its place in the queue, written atomically: after a kill at any
instant the queue holds the entry or does not, and never half of it. An entry leaves only when the
coordinator has confirmed it, since neither a broker's acknowledgement nor a broken connection
says that anything was delivered.
"""

import logging
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from fleetprune.errors import InstallError, TransportError, WireError
from fleetprune.files import make_folder, storage_errors, sync_folder, write_atomic

log = logging.getLogger(__name__)

_HEAD = struct.Struct("<4sBHI")  # magic, kind's length, name's length, CRC-32 of all after the head
_MAGIC = b"FPO1"
_SUFFIX = ".entry"
MAX_NAME = 300  # characters


class Kind(StrEnum):
    """What an entry is; decides what is given up when the outbox is full."""

    RESULT = "result"
    """Never given up: it is the work of minutes."""
    TELEMETRY = "telemetry"
    """The oldest is dropped first: newer telemetry says more."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing to deliver."""

    kind: Kind
    name: str
    payload: bytes

    def _encode(self) -> bytes:
        kind, name = self.kind.encode(), self.name.encode()
        rest = kind + name + self.payload
        return _HEAD.pack(_MAGIC, len(kind), len(name), zlib.crc32(rest)) + rest

    @classmethod
    def _decode(cls, data: bytes) -> Self:
        if len(data) < _HEAD.size:
            raise WireError(f"outbox entry of {len(data)} bytes")
        magic, kind, name, crc = _HEAD.unpack_from(data)
        rest = data[_HEAD.size :]
        if magic != _MAGIC or kind + name > len(rest) or crc != zlib.crc32(rest):
            raise WireError("outbox entry is damaged")
        return cls(
            Kind(rest[:kind].decode()), rest[kind : kind + name].decode(), rest[kind + name :]
        )


@dataclass(frozen=True, slots=True)
class _Stub:
    """What is kept in memory of an entry."""

    path: Path
    kind: Kind
    size: int


class Outbox:
    """A bounded queue of entries in a folder of its own; safe to share between threads."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Open or create.

        Args:
            folder: Used for nothing else; created if missing.
            max_bytes: Most bytes of all entry files together.
        """
        self._folder, self._max = folder, max_bytes
        self._lock = threading.RLock()
        self._stubs: dict[str, _Stub] = {}  # by name, oldest first
        self._next = 0
        make_folder(folder)
        with storage_errors("open", folder):
            paths = sorted(p for p in folder.glob(f"*{_SUFFIX}") if p.stem.isdecimal())
        for path in paths:
            self._next = int(path.stem) + 1
            entry = self._load(path)
            if entry is None:
                continue
            earlier = self._stubs.pop(entry.name, None)
            if earlier is not None:  # killed between writing the new one and removing the old one
                self._remove(earlier.path)
            self._stubs[entry.name] = _Stub(path, entry.kind, path.stat().st_size)

    def __len__(self) -> int:
        return len(self._stubs)

    @property
    def size(self) -> int:
        """Bytes of all entry files."""
        with self._lock:
            return sum(s.size for s in self._stubs.values())

    def put(self, kind: Kind, name: str, payload: bytes) -> bool:
        """Keep an entry durably; one of the same name is replaced and goes to the end.

        Returns:
            False if telemetry did not fit and was dropped.

        Raises:
            TransportError: A result does not fit even with all telemetry dropped.
            WireError: The name is empty or too long.
            InstallError: The disk is full or refuses.
        """
        if not 1 <= len(name.encode()) <= MAX_NAME:
            raise WireError(f"outbox name of {len(name)} characters, expected 1..{MAX_NAME}")
        with self._lock:
            return self._put(kind, name, Entry(kind, name, payload)._encode())

    def _put(self, kind: Kind, name: str, data: bytes) -> bool:
        if not self._make_room(len(data), name):
            if kind is Kind.TELEMETRY:
                log.warning("outbox is full: %s dropped", name)
                return False
            raise TransportError(
                f"outbox is full: {name} has {len(data)} bytes, {self.size} of {self._max} are "
                "taken by results that the coordinator has not confirmed"
            )
        path = self._folder / f"{self._next:012d}{_SUFFIX}"
        self._next += 1
        write_atomic(path, data)
        earlier = self._stubs.pop(name, None)
        self._stubs[name] = _Stub(path, kind, len(data))
        if earlier is not None:
            self._remove(earlier.path)
        return True

    def _make_room(self, size: int, name: str) -> bool:
        taken = self.size - (self._stubs[name].size if name in self._stubs else 0)
        telemetry = [n for n, s in self._stubs.items() if s.kind is Kind.TELEMETRY and n != name]
        droppable = sum(self._stubs[n].size for n in telemetry)
        if taken - droppable + size > self._max:
            return False
        for oldest in telemetry:
            if taken + size <= self._max:
                break
            log.warning("outbox is full: %s dropped", oldest)
            taken -= self._stubs[oldest].size
            self.done(oldest)
        return True

    def pending(self) -> Iterator[Entry]:
        """All entries, oldest first, read from disk one at a time.

        Entries may be put and done while this runs.
        """
        with self._lock:
            stubs = list(self._stubs.items())
        for name, stub in stubs:
            with self._lock:
                if self._stubs.get(name) is not stub:
                    continue
                entry = self._load(stub.path)
                if entry is None:
                    del self._stubs[name]
            if entry is not None:
                yield entry

    def done(self, name: str) -> None:
        """Remove an entry that was confirmed; nothing happens if there is none."""
        with self._lock:
            stub = self._stubs.pop(name, None)
            if stub is not None:
                self._remove(stub.path)

    def _remove(self, path: Path) -> None:
        with storage_errors("remove", path):
            path.unlink(missing_ok=True)
            sync_folder(self._folder)

    def _load(self, path: Path) -> Entry | None:
        """The entry at `path`; None, and the file is put aside as `.bad`, if it is damaged."""
        try:
            with storage_errors("read", path):
                return Entry._decode(path.read_bytes())
        except (WireError, InstallError, ValueError):
            log.exception("%s cannot be delivered and is put aside as .bad", path.name)
            with storage_errors("rename", path):
                path.replace(path.with_suffix(".bad"))
            return None
