"""Blocks of files, as devices ask for them; keeps no state per device.

Devices may vanish and come back as they like, and so may a process that has only this. Requests
for one file come in flocks: what was found out for one device is kept for the next.
"""

import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fleetprune.blocks import (
    BLOCK_OVERHEAD,
    NotFound,
    PreparedBlock,
    Request,
    block_length,
    decode,
)
from fleetprune.errors import WireError
from fleetprune.files import storage_errors

OPEN_FILES = 32  # files kept open between requests: the current models, graphs and releases
FRESH_S = 1.0  # so long a lasting name is not looked up again: three system calls a block otherwise
LASTING = ("targets/", "blobs/")  # named by their hash: never replaced by another content
CACHE = 32 * 1024 * 1024  # bytes of blocks kept; the release that everybody wants now


@dataclass(frozen=True, slots=True)
class _OpenFile:
    identity: tuple[int, int, int]
    """Inode, modification time in ns, bytes: another file under the same name differs in one."""
    descriptor: int

    @property
    def edition(self) -> int:
        return zlib.crc32(repr(self.identity).encode())


@dataclass(frozen=True, slots=True)
class _Source:
    """Something that is there: a file that is open, or bytes."""

    content: int | bytes
    """Descriptor, or the bytes."""
    size: int
    edition: int
    found_at: float


class BlockReader:
    """Answers `Request` messages; used by one thread, but for `lengths`."""

    def __init__(
        self,
        read: Callable[[str], Path | bytes | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open nothing yet.

        Args:
            read: File or bytes behind a name (a plain relative path); None: there is none.
            clock: Monotonic seconds.
        """
        self._read, self._clock = read, clock
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._recent: OrderedDict[str, _Source] = OrderedDict()
        self._blocks: OrderedDict[tuple[str, int, int, int], PreparedBlock] = OrderedDict()
        self._cached = 0  # bytes

    def close(self) -> None:
        """Release all files."""
        for file in self._files.values():
            os.close(file.descriptor)
        self._files.clear()
        self._recent.clear()
        self._blocks.clear()
        self._cached = 0

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
        source = self._find(request.name)
        if source is None:
            return NotFound(request.transfer).encode()
        key = (request.name, source.edition, request.block_size, index)
        block = self._blocks.get(key)
        if block is None:
            block = self._prepare(source, request, index)
            self._keep(key, block)
        else:
            self._blocks.move_to_end(key)
        return block.encode(request.transfer)

    def _prepare(self, source: _Source, request: Request, index: int) -> PreparedBlock:
        length = block_length(index, source.size, request.block_size)
        start = index * request.block_size
        if isinstance(source.content, bytes):
            data = source.content[start : start + length]
        else:
            with storage_errors("read", Path(request.name)):
                data = os.pread(source.content, length, start)
        return PreparedBlock(index, source.edition, request.block_size, source.size, data)

    def _keep(self, key: tuple[str, int, int, int], block: PreparedBlock) -> None:
        self._blocks[key] = block
        self._cached += len(block)
        while self._cached > CACHE:
            self._cached -= len(self._blocks.popitem(last=False)[1])

    def _find(self, name: str) -> _Source | None:
        now = self._clock()
        known = self._recent.get(name)
        if known is not None:
            if now - known.found_at < FRESH_S:
                return known
            del self._recent[name]
        found = self._read(name)
        if isinstance(found, Path):
            file = self._open(found)
            if file is None:
                return None
            source = _Source(file.descriptor, file.identity[2], file.edition, now)
        elif found is None:
            return None
        else:
            source = _Source(found, len(found), zlib.crc32(found), now)
        if name.startswith(LASTING):
            self._recent[name] = source
            if len(self._recent) > OPEN_FILES:
                self._recent.popitem(last=False)
        return source

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
            self._recent.clear()  # one of these may have had that descriptor


def read_request(payload: bytes) -> Request:
    """An unverified request (else WireError)."""
    request = decode(payload)
    if not isinstance(request, Request):
        raise WireError(f"{type(request).__name__} where a request was expected")
    return request
