"""Blocks of files, as devices ask for them; keeps no state per device.

Devices may vanish and come back as they like, and so may a process that has only this.
"""

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fleetprune.blocks import (
    BLOCK_OVERHEAD,
    Block,
    NotFound,
    Request,
    block_length,
    decode,
)
from fleetprune.errors import WireError
from fleetprune.files import storage_errors

OPEN_FILES = 32  # files kept open between requests: the current models, graphs and releases


@dataclass(frozen=True, slots=True)
class _OpenFile:
    identity: tuple[int, int, int]
    """Inode, modification time in ns, bytes: another file under the same name differs in one."""
    descriptor: int

    @property
    def edition(self) -> int:
        return zlib.crc32(repr(self.identity).encode())


class BlockReader:
    """Answers `Request` messages; used by one thread, but for `lengths`."""

    def __init__(self, read: Callable[[str], Path | bytes | None]) -> None:
        """Open nothing yet.

        Args:
            read: File or bytes behind a name (a plain relative path); None: there is none.
        """
        self._read = read
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()

    def close(self) -> None:
        """Release all files."""
        for file in self._files.values():
            os.close(file.descriptor)
        self._files.clear()

    def get(self, payload: bytes) -> Iterator[bytes]:
        """The answers to an unverified `Request`, one block at a time.

        Raises:
            WireError: It is not a request, or asks for blocks that do not exist.
        """
        request = read_request(payload)
        for index in request.indices:
            yield self.answer(request, index)

    def answer(self, request: Request, index: int) -> bytes:
        """One block of a request, or that there is nothing of that name.

        Raises:
            WireError: There is no such block.
            InstallError: The disk refuses.
        """
        found = self._read(request.name)
        source = self._open(found) if isinstance(found, Path) else found
        if source is None:
            return NotFound(request.transfer).encode()
        if isinstance(source, bytes):
            size, edition = len(source), zlib.crc32(source)
        else:
            size, edition = source.identity[2], source.edition
        length = block_length(index, size, request.block_size)
        start = index * request.block_size
        if isinstance(source, bytes):
            data = source[start : start + length]
        else:
            data = os.pread(source.descriptor, length, start)
        return Block(request.transfer, index, edition, request.block_size, size, data).encode()

    def lengths(self, request: Request) -> list[int]:
        """Bytes of the answers to a request, without reading them; for any thread.

        Raises:
            WireError: It asks for blocks that do not exist.
        """
        found = self._read(request.name)
        if isinstance(found, Path):
            size = found.stat().st_size if found.is_file() else None
        else:
            size = None if found is None else len(found)
        if size is None:
            return [len(NotFound(request.transfer).encode())] * len(request.indices)
        return [
            BLOCK_OVERHEAD + block_length(index, size, request.block_size)
            for index in request.indices
        ]

    def _open(self, path: Path) -> _OpenFile | None:
        """The file as it is now; kept open, since requests for one file come in flocks."""
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            self._forget(path)
            return None
        identity = (status.st_ino, status.st_mtime_ns, status.st_size)
        known = self._files.get(path)
        if known is not None and known.identity == identity:
            self._files.move_to_end(path)
            return known
        self._forget(path)
        with storage_errors("open", path):
            descriptor = os.open(path, os.O_RDONLY)
            status = os.fstat(descriptor)
        identity = (status.st_ino, status.st_mtime_ns, status.st_size)
        opened = self._files[path] = _OpenFile(identity, descriptor)
        if len(self._files) > OPEN_FILES:
            self._forget(next(iter(self._files)))
        return opened

    def _forget(self, path: Path) -> None:
        known = self._files.pop(path, None)
        if known is not None:
            os.close(known.descriptor)


def read_request(payload: bytes) -> Request:
    """An unverified request (else WireError)."""
    request = decode(payload)
    if not isinstance(request, Request):
        raise WireError(f"{type(request).__name__} where a request was expected")
    return request
