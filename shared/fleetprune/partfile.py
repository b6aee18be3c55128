"""A file that arrives in blocks and outlives the process that receives it.

Beside the part file lies a map: a header that says which content it is about, and one CRC-32 per
block. A block's CRC is written after its data, which is enough when a process is killed; after a
power cut the disk may hold the one without the other, so every claim of the map is checked against
the data when the file is opened again, and blocks that do not match are fetched again. That costs
one reading of the file instead of an fsync per block.
"""

import hashlib
import os
import secrets
import struct
import zlib
from pathlib import Path
from typing import Self

from fleetprune.blocks import BLOCK_SIZE, block_length, count_blocks
from fleetprune.errors import WireError
from fleetprune.files import sha256_of, storage_errors, sync_folder

_HEAD = struct.Struct("<4sIQ32s")
_MAGIC = b"FPM1"
_ENTRY = struct.Struct("<I")
_ABSENT = 0


def _entry(data: bytes) -> int:
    """CRC-32 of a block; the one value that means "absent" is moved aside."""
    return zlib.crc32(data) or 1


class PartFile:
    """Blocks of one content of known size and SHA-256, at `path` and `path` + `.map`."""

    def __init__(self, path: Path, size: int, sha256: bytes, block_size: int = BLOCK_SIZE) -> None:
        """Open or resume; a part file of another content is started anew.

        Args:
            path: Where the part file lies, in an existing folder.
            size: Bytes of the whole.
            sha256: (32,) digest of the whole.
            block_size: Bytes per block.

        Raises:
            WireError: Sizes out of bounds.
            InstallError: The disk refuses.
        """
        self.path, self.size, self.sha256, self.block_size = path, size, sha256, block_size
        self.map_path = path.with_name(f"{path.name}.map")
        self.count = count_blocks(size, block_size)
        self._head = _HEAD.pack(_MAGIC, block_size, size, sha256)
        with storage_errors("open", path):
            self._data = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._map = os.open(self.map_path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError:
                os.close(self._data)
                raise
        self.have = self._believable()
        self.edition = secrets.randbits(32)
        """Drawn at each opening: `have` only grows while it stays the same."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _believable(self) -> set[int]:
        with storage_errors("read", self.path):
            length = _HEAD.size + self.count * _ENTRY.size
            known = os.pread(self._map, length, 0)
            if len(known) != length or known[: _HEAD.size] != self._head:
                os.ftruncate(self._data, 0)
                os.ftruncate(self._map, 0)
                os.pwrite(self._map, self._head, 0)
                os.ftruncate(self._map, length)
                return set()
            entries = [e for (e,) in _ENTRY.iter_unpack(known[_HEAD.size :])]
            return {i for i, e in enumerate(entries) if e != _ABSENT and e == _entry(self._read(i))}

    def _read(self, index: int) -> bytes:
        length = block_length(index, self.size, self.block_size)
        return os.pread(self._data, length, index * self.block_size)

    @property
    def complete(self) -> bool:
        """Whether every block has come (their hash is checked by `finish` only)."""
        return len(self.have) == self.count

    def missing(self) -> list[int]:
        """Blocks that have not come, rising."""
        return [i for i in range(self.count) if i not in self.have]

    def write(self, index: int, data: bytes) -> None:
        """Keep one block; a block that is there already is left alone.

        Raises:
            WireError: `data` is not of that block's length.
            InstallError: The disk refuses.
        """
        expected = block_length(index, self.size, self.block_size)
        if len(data) != expected:
            raise WireError(f"block {index} has {len(data)} bytes, expected {expected}")
        if index in self.have:
            return
        with storage_errors("write", self.path):
            _write_all(self._data, data, index * self.block_size)
            _write_all(self._map, _ENTRY.pack(_entry(data)), _HEAD.size + index * _ENTRY.size)
        self.have.add(index)

    def finish(self, into: Path) -> None:
        """Check the SHA-256 and move the content to `into`, on the same file system, durably.

        Raises:
            WireError: Not all blocks are there, or the content is not the expected one; then
                part file and map are removed.
            InstallError: The disk refuses.
        """
        if not self.complete:
            raise WireError(f"{self.path.name}: {len(self.have)} of {self.count} blocks are there")
        with storage_errors("read", self.path):
            found = sha256_of(self.path)
        if found != self.sha256.hex():
            self.discard()
            raise WireError(f"{into.name} has SHA-256 {found}, expected {self.sha256.hex()}")
        with storage_errors("write", into):
            os.fsync(self._data)
            self.path.replace(into)
            sync_folder(into.parent)
            self.map_path.unlink(missing_ok=True)
        self.close()

    def content(self) -> bytes | None:
        """The whole content; None (and nothing is left) if it does not have its SHA-256."""
        with storage_errors("read", self.path):
            data = os.pread(self._data, self.size, 0)
        if hashlib.sha256(data).digest() != self.sha256:
            self.discard()
            return None
        return data

    def discard(self) -> None:
        """Remove part file and map."""
        self.close()
        with storage_errors("remove", self.path):
            self.map_path.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the files; what has come stays on disk."""
        for descriptor in (self._data, self._map):
            if descriptor >= 0:
                os.close(descriptor)
        self._data = self._map = -1


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
