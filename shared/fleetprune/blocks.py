"""Block messages: how bytes of any size cross a broker that limits messages and loses some.

Every message is little-endian and carries its own length and CRC, because a broker, a proxy or a
disk may cut it; nothing is allocated before the sizes have been checked.

    magic "FB" | version u8 | type u8 | length u32 (of all, CRC included) | body | CRC-32 u32

    1 Request  transfer u32, block size u32, name, runs u16, runs * (first u32, count u16)
    2 Block    transfer u32, index u32, edition u32, block size u32, size u64, data
    3 NotFound transfer u32
    4 Put      transfer u32, index u32, block size u32, size u64, SHA-256, name, data
    5 Stored   transfer u32, state u8, edition u32, SHA-256, blocks u32, bitmap, reason (u8, UTF-8)

A name is u16 + ASCII. `transfer` is drawn by the device and comes back in the answer, so that
what is left of an earlier transfer is not mistaken for this one. The CRC finds accidents; against
forgery stand the SHA-256 that a signed message names and, for results, the broker's access list.
"""

import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Self

from fleetprune.crc import join_crc32
from fleetprune.errors import TransportError, WireError

MAGIC = b"FB"
VERSION = 1
BLOCK_SIZE = 64 * 1024  # bytes of data; with header, name and topic well below 128 KiB
MAX_BLOCK = 96 * 1024  # bytes of data; the most that is safe below a broker's limit of 128 KiB
MAX_BLOCKS = 1 << 16  # of one transfer: 4 GiB in 64 KiB blocks, a bitmap of 8 KiB
MAX_REQUESTED = 64  # blocks per request: bounds what one small message makes the peer send
MAX_NAME = 300  # characters; a target path has up to 256
MAX_REASON = 200  # bytes

_HEAD = struct.Struct("<2sBBI")
_CRC = struct.Struct("<I")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


class NotFoundError(TransportError):
    """The coordinator has nothing of that name."""


class RefusedError(TransportError):
    """The coordinator does not want what was pushed, now or later."""


class StoreState(IntEnum):
    """How far the receiver of `Put` blocks is."""

    RECEIVING = 0
    COMPLETE = 1
    """Stored for good; may be forgotten by the sender."""
    REFUSED = 2


def check_name(name: str) -> str:
    """Return `name` if it is a relative path without special components (else WireError)."""
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise WireError(f"name {name[:80]!r} is not a plain relative path")
    return name


def count_blocks(size: int, block_size: int) -> int:
    """Blocks that `size` bytes take; no bytes take one empty block, so that they can be sent.

    Raises:
        WireError: Sizes out of range, or more than `MAX_BLOCKS`.
    """
    if size < 0 or not 1 <= block_size <= MAX_BLOCK:
        raise WireError(f"{size} bytes in blocks of {block_size}, expected 1..{MAX_BLOCK}")
    count = max(1, -(-size // block_size))
    if count > MAX_BLOCKS:
        raise WireError(f"{size} bytes in blocks of {block_size} are more than {MAX_BLOCKS} blocks")
    return count


def block_length(index: int, size: int, block_size: int) -> int:
    """Bytes in block `index`; WireError if there is no such block."""
    count = count_blocks(size, block_size)
    if not 0 <= index < count:
        raise WireError(f"block {index} of {count}")
    return min(block_size, size - index * block_size)


def _runs(indices: Iterable[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and index == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs


class _Reader:
    """Takes fields off a body; WireError where they are not there."""

    def __init__(self, body: memoryview) -> None:
        self.rest = body

    def take(self, length: int) -> bytes:
        if length > len(self.rest):
            raise WireError(f"field of {length} bytes, only {len(self.rest)} are left")
        field, self.rest = bytes(self.rest[:length]), self.rest[length:]
        return field

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size))

    def name(self) -> str:
        (length,) = self.unpack(_U16)
        if length > MAX_NAME:
            raise WireError(f"name of {length} characters, expected at most {MAX_NAME}")
        try:
            return check_name(self.take(length).decode("ascii"))
        except UnicodeDecodeError as e:
            raise WireError("name is not ASCII") from e

    def end(self) -> None:
        if len(self.rest):
            raise WireError(f"{len(self.rest)} bytes after the last field")


_U8, _U16 = struct.Struct("<B"), struct.Struct("<H")
_REQUEST, _RUN = struct.Struct("<II"), struct.Struct("<IH")
_BLOCK, _PUT = struct.Struct("<IIIIQ"), struct.Struct("<IIIQ")
BLOCK_OVERHEAD = _HEAD.size + _BLOCK.size + _CRC.size  # bytes of a `Block` beside its data
_STORED, _U32 = struct.Struct("<IBI"), struct.Struct("<I")


def _pack_name(name: str) -> bytes:
    return _U16.pack(len(name)) + check_name(name).encode("ascii")


class _Message:
    TYPE: ClassVar[int]

    def _body(self) -> bytes:
        raise NotImplementedError

    def encode(self) -> bytes:
        """The message as bytes."""
        body = self._body()
        length = _HEAD.size + len(body) + _CRC.size
        framed = _HEAD.pack(MAGIC, VERSION, self.TYPE, length) + body
        return framed + _CRC.pack(zlib.crc32(framed))


@dataclass(frozen=True, slots=True)
class Request(_Message):
    """Device to coordinator: send me these blocks."""

    TYPE: ClassVar[int] = 1
    name: str
    transfer: int
    indices: tuple[int, ...]
    """Strictly rising; neighbours travel as one run."""
    block_size: int = BLOCK_SIZE

    def _body(self) -> bytes:
        runs = _runs(self.indices)
        return b"".join(
            (
                _REQUEST.pack(self.transfer, self.block_size),
                _pack_name(self.name),
                _U16.pack(len(runs)),
                *(_RUN.pack(*run) for run in runs),
            )
        )

    @classmethod
    def _read(cls, body: _Reader) -> Self:
        transfer, block_size = body.unpack(_REQUEST)
        name = body.name()
        (runs,) = body.unpack(_U16)
        if not 1 <= runs <= MAX_REQUESTED:
            raise WireError(f"request of {runs} runs, expected 1..{MAX_REQUESTED}")
        indices: list[int] = []
        for _ in range(runs):
            first, count = body.unpack(_RUN)
            if not 1 <= count <= MAX_REQUESTED - len(indices):
                raise WireError(f"request of more than {MAX_REQUESTED} blocks, or of none")
            if first + count > MAX_BLOCKS or (indices and first <= indices[-1]):
                raise WireError(f"blocks {first}..{first + count - 1} out of order or range")
            indices.extend(range(first, first + count))
        body.end()
        if not 1 <= block_size <= MAX_BLOCK:
            raise WireError(f"blocks of {block_size} bytes, expected 1..{MAX_BLOCK}")
        return cls(name, transfer, tuple(indices), block_size)


@dataclass(frozen=True, slots=True)
class Block(_Message):
    """Coordinator to device: one block that was asked for."""

    TYPE: ClassVar[int] = 2
    transfer: int
    index: int
    edition: int
    """Changes when the file behind the name is replaced: blocks of two editions do not mix."""
    block_size: int
    size: int
    """Bytes of the whole."""
    data: bytes

    def _body(self) -> bytes:
        fields = (self.transfer, self.index, self.edition, self.block_size, self.size)
        return _BLOCK.pack(*fields) + self.data

    @classmethod
    def _read(cls, body: _Reader) -> Self:
        transfer, index, edition, block_size, size = body.unpack(_BLOCK)
        data = body.take(block_length(index, size, block_size))
        body.end()
        return cls(transfer, index, edition, block_size, size, data)


class PreparedBlock:
    """A block that goes to many devices: all but `transfer` is the same, and worked out once."""

    __slots__ = ("_crc", "_data", "_fields")

    def __init__(self, index: int, edition: int, block_size: int, size: int, data: bytes) -> None:
        """See `Block`."""
        self._fields, self._data = (index, edition, block_size, size), data
        self._crc = zlib.crc32(data)

    def __len__(self) -> int:
        return BLOCK_OVERHEAD + len(self._data)

    def encode(self, transfer: int) -> bytes:
        """What `Block(transfer, ...)` encodes to."""
        head = _HEAD.pack(MAGIC, VERSION, Block.TYPE, len(self))
        head += _BLOCK.pack(transfer, *self._fields)
        crc = join_crc32(zlib.crc32(head), self._crc, len(self._data))
        return b"".join((head, self._data, _CRC.pack(crc)))


@dataclass(frozen=True, slots=True)
class NotFound(_Message):
    """Coordinator to device: there is nothing of that name."""

    TYPE: ClassVar[int] = 3
    transfer: int

    def _body(self) -> bytes:
        return _U32.pack(self.transfer)

    @classmethod
    def _read(cls, body: _Reader) -> Self:
        (transfer,) = body.unpack(_U32)
        body.end()
        return cls(transfer)


@dataclass(frozen=True, slots=True)
class Put(_Message):
    """Device to coordinator: one block of a result.

    Each block says all that is needed to place it, so either side may restart at any time.
    """

    TYPE: ClassVar[int] = 4
    name: str
    transfer: int
    index: int
    block_size: int
    size: int
    sha256: bytes
    """(32,) of the whole."""
    data: bytes

    def _body(self) -> bytes:
        fields = _PUT.pack(self.transfer, self.index, self.block_size, self.size)
        return fields + self.sha256 + _pack_name(self.name) + self.data

    @classmethod
    def _read(cls, body: _Reader) -> Self:
        transfer, index, block_size, size = body.unpack(_PUT)
        sha256, name = body.take(32), body.name()
        data = body.take(block_length(index, size, block_size))
        body.end()
        return cls(name, transfer, index, block_size, size, sha256, data)


@dataclass(frozen=True, slots=True)
class Stored(_Message):
    """Coordinator to device: what has come of a result."""

    TYPE: ClassVar[int] = 5
    transfer: int
    state: StoreState
    sha256: bytes
    """(32,) of the whole that this is about."""
    blocks: frozenset[int] = frozenset()
    """Indices that have come."""
    count: int = 1
    """Blocks of the whole."""
    reason: str = ""
    edition: int = 0
    """Of what has come: a smaller bitmap of the same edition is a late one, of another a loss."""

    def _body(self) -> bytes:
        bitmap = bytearray(-(-self.count // 8))
        for index in self.blocks:
            bitmap[index // 8] |= 1 << index % 8
        reason = self.reason.encode()[:MAX_REASON].decode(errors="ignore").encode()
        return b"".join(
            (
                _STORED.pack(self.transfer, self.state, self.edition),
                self.sha256,
                _U32.pack(self.count),
                bytes(bitmap),
                _U8.pack(len(reason)),
                reason,
            )
        )

    @classmethod
    def _read(cls, body: _Reader) -> Self:
        transfer, state, edition = body.unpack(_STORED)
        sha256 = body.take(32)
        (count,) = body.unpack(_U32)
        if not 1 <= count <= MAX_BLOCKS:
            raise WireError(f"bitmap of {count} blocks, expected 1..{MAX_BLOCKS}")
        bitmap = body.take(-(-count // 8))
        (length,) = body.unpack(_U8)
        raw = body.take(length)
        body.end()
        try:
            known, reason = StoreState(state), raw.decode()
        except ValueError as e:
            raise WireError(f"stored message: {e}") from e
        blocks = frozenset(i for i in range(count) if bitmap[i // 8] >> i % 8 & 1)
        return cls(transfer, known, sha256, blocks, count, reason, edition)


AnyMessage = Request | Block | NotFound | Put | Stored
_TYPES: dict[int, type[AnyMessage]] = {t.TYPE: t for t in (Request, Block, NotFound, Put, Stored)}
MAX_MESSAGE = (  # bytes: the largest message that can be valid
    _HEAD.size + _PUT.size + 32 + _U16.size + MAX_NAME + MAX_BLOCK + _CRC.size
)


def decode(data: bytes) -> AnyMessage:
    """Read one unverified message.

    Raises:
        WireError: Truncated, altered, of another version, or with sizes out of bounds.
    """
    if not _HEAD.size + _CRC.size <= len(data) <= MAX_MESSAGE:
        raise WireError(f"block message of {len(data)} bytes, expected 12..{MAX_MESSAGE}")
    magic, version, kind, length = _HEAD.unpack_from(data)
    if magic != MAGIC or version != VERSION or kind not in _TYPES:
        raise WireError(f"block message {magic!r} version {version} type {kind} is not known")
    if length != len(data):
        raise WireError(f"block message of {len(data)} bytes says it has {length}")
    (crc,) = _CRC.unpack_from(data, len(data) - _CRC.size)
    view = memoryview(data)
    if crc != zlib.crc32(view[: -_CRC.size]):
        raise WireError("block message's CRC does not match its content")
    return _TYPES[kind]._read(_Reader(view[_HEAD.size : -_CRC.size]))
