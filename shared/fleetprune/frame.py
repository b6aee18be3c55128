"""A container of named byte sections (docs/wire-format.md, "Frame").

Equal content gives equal bytes: sections are sorted by name, nothing is optional and nothing is
padded, so a frame can be named by its hash.
"""

import re
import struct
import zlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Final

from fleetprune.errors import UsageError, WireError

MAGIC: Final = b"FPFR"
VERSION: Final = 1
MAX_FRAME: Final = 256 * 2**20  # bytes; far above any model that fits the devices meant here

_HEAD: Final = struct.Struct("<4sHH4sI")  # magic, version, sections, kind, bytes of header
_ENTRY: Final = struct.Struct("<16sI")  # name, padded with NUL; bytes of the section
_CRC: Final = struct.Struct("<I")
_KIND: Final = re.compile(r"[A-Z]{4}")
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,15}")


def encode_frame(kind: str, header: bytes, sections: Mapping[str, bytes]) -> bytes:
    """Put a header and sections into one frame.

    Args:
        kind: What the frame is: four of A..Z.
        header: Small, for the reader of this kind to interpret.
        sections: By name: a lower-case letter, then at most 15 of a..z, 0..9 and _.

    Returns:
        The frame; the order of `sections` does not matter.

    Raises:
        UsageError: The kind or a name is not as described, or the frame exceeds `MAX_FRAME`.
    """
    if not _KIND.fullmatch(kind):
        raise UsageError(f"frame kind {kind!r}, expected four of A..Z")
    for name in sections:
        if not _NAME.fullmatch(name):
            raise UsageError(f"section name {name!r}, expected {_NAME.pattern}")
    names = sorted(sections)
    size = _HEAD.size + len(header) + _CRC.size
    size += sum(_ENTRY.size + len(body) for body in sections.values())
    if size > MAX_FRAME:
        raise UsageError(f"frame of {size} bytes, expected at most {MAX_FRAME}")
    parts = [_HEAD.pack(MAGIC, VERSION, len(names), kind.encode(), len(header))]
    parts += [_ENTRY.pack(name.encode(), len(sections[name])) for name in names]
    parts.append(header)
    parts += [sections[name] for name in names]
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return b"".join([*parts, _CRC.pack(crc)])


def decode_frame(
    data: bytes, kind: str, *, max_bytes: int = MAX_FRAME
) -> tuple[bytes, dict[str, bytes]]:
    """Take an unverified frame apart.

    The checksum finds accidents, not attackers: what is in the frame is still unverified.

    Args:
        data: What `encode_frame` made.
        kind: The kind expected.
        max_bytes: Longest frame accepted.

    Returns:
        The header, and the sections by name, sorted.

    Raises:
        WireError: `data` is not exactly one such frame.
    """
    if len(data) > max_bytes:
        raise WireError(f"frame of {len(data)} bytes, expected at most {max_bytes}")
    if len(data) < _HEAD.size + _CRC.size:
        raise WireError(f"frame of {len(data)} bytes, expected at least {_HEAD.size + _CRC.size}")
    magic, version, count, got_kind, header_bytes = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise WireError(f"frame starts with {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise WireError(f"frame version {version}, expected {VERSION}")
    if got_kind != kind.encode():
        raise WireError(f"frame of kind {got_kind!r}, expected {kind.encode()!r}")
    table_end = _HEAD.size + count * _ENTRY.size
    if len(data) < table_end + header_bytes + _CRC.size:
        raise WireError(
            f"frame of {len(data)} bytes, expected at least {table_end + header_bytes + _CRC.size}"
        )
    entries = list(_ENTRY.iter_unpack(memoryview(data)[_HEAD.size : table_end]))
    expected = table_end + header_bytes + sum(size for _, size in entries) + _CRC.size
    if len(data) != expected:
        raise WireError(f"frame of {len(data)} bytes, expected {expected}")
    got, expected = zlib.crc32(memoryview(data)[: -_CRC.size]), *_CRC.unpack(data[-_CRC.size :])
    if got != expected:
        raise WireError(f"frame checksum {got:08x}, expected {expected:08x}")
    names = [_name(raw) for raw, _ in entries]
    for before, after in pairwise(names):
        if before >= after:
            raise WireError(f"section {after!r} after {before!r}, expected sorted and unique")
    start = table_end + header_bytes
    sections: dict[str, bytes] = {}
    for name, (_, size) in zip(names, entries, strict=True):
        sections[name] = data[start : start + size]
        start += size
    return data[table_end : table_end + header_bytes], sections


def _name(raw: bytes) -> str:
    name = raw.rstrip(b"\0").decode("latin-1")
    if not _NAME.fullmatch(name):
        raise WireError(f"section name {name!r}, expected {_NAME.pattern}")
    return name
