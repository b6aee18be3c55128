import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetprune import frame
from fleetprune.errors import UsageError, WireError
from fleetprune.frame import decode_frame, encode_frame

SMALL = encode_frame("TEST", b"{}", {"b": b"xy", "a": b"z"})
names = st.from_regex(r"[a-z][a-z0-9_]{0,15}", fullmatch=True)


def sealed(content: bytes) -> bytes:
    return content + struct.pack("<I", zlib.crc32(content))


def entry(name: bytes, size: int) -> bytes:
    return struct.pack("<16sI", name, size)


def test_golden_bytes():
    content = (
        b"FPFR" + b"\x01\x00" + b"\x02\x00" + b"TEST" + b"\x02\x00\x00\x00"
        b"a" + bytes(15) + b"\x01\x00\x00\x00"
        b"b" + bytes(15) + b"\x02\x00\x00\x00"
        b"{}"
        b"z"
        b"xy"
    )
    assert sealed(content) == SMALL
    assert SMALL[-4:].hex() == "469103b0"


def test_equal_content_gives_equal_bytes():
    assert encode_frame("TEST", b"{}", {"a": b"z", "b": b"xy"}) == SMALL


@given(st.binary(max_size=20), st.dictionaries(names, st.binary(max_size=20), max_size=5))
def test_roundtrip(header, sections):
    got_header, got = decode_frame(encode_frame("ABCD", header, sections), "ABCD")
    assert got_header == header
    assert got == sections
    assert list(got) == sorted(sections)


def test_truncated_at_every_byte():
    for end in range(len(SMALL)):
        with pytest.raises(WireError):
            decode_frame(SMALL[:end], "TEST")


def test_every_single_bit_flip_is_refused():
    for bit in range(8 * len(SMALL)):
        flipped = bytearray(SMALL)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            decode_frame(bytes(flipped), "TEST")


HEAD = b"FPFR\x01\x00"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "frame of 0 bytes, expected at least 20"),
        (b"PK\x03\x04" + SMALL[4:], r"frame starts with b'PK\x03\x04', expected b'FPFR'"),
        (b"FPFR\x02\x00" + SMALL[6:], "frame version 2, expected 1"),
        (SMALL.replace(b"TEST", b"MODL"), "frame of kind b'MODL', expected b'TEST'"),
        (SMALL + b"\0", f"frame of {len(SMALL) + 1} bytes, expected {len(SMALL)}"),
        (SMALL[:-1], f"frame of {len(SMALL) - 1} bytes, expected {len(SMALL)}"),
        (
            HEAD + b"\xff\xffTEST" + bytes(4) + bytes(4),
            "frame of 20 bytes, expected at least 1310720",
        ),
        (
            HEAD + b"\x00\x00TEST" + b"\xff\xff\xff\xff" + bytes(4),
            "frame of 20 bytes, expected at least 4294967315",
        ),
        (SMALL[:-1] + b"\0", "frame checksum b0039146, expected 00039146"),
        (
            sealed(HEAD + b"\x02\x00TEST" + bytes(4) + entry(b"b", 0) + entry(b"a", 0)),
            "section 'a' after 'b', expected sorted and unique",
        ),
        (
            sealed(HEAD + b"\x02\x00TEST" + bytes(4) + entry(b"a", 0) * 2),
            "section 'a' after 'a', expected sorted and unique",
        ),
        (
            sealed(HEAD + b"\x01\x00TEST" + bytes(4) + entry(b"A", 0)),
            "section name 'A', expected [a-z][a-z0-9_]{0,15}",
        ),
        (
            sealed(HEAD + b"\x01\x00TEST" + bytes(4) + entry(b"a\0b", 0)),
            r"section name 'a\x00b', expected [a-z][a-z0-9_]{0,15}",
        ),
        (
            sealed(HEAD + b"\x01\x00TEST" + bytes(4) + entry(b"", 0)),
            "section name '', expected [a-z][a-z0-9_]{0,15}",
        ),
        (
            sealed(HEAD + b"\x01\x00TEST" + bytes(4) + entry(b"\xe9", 0)),
            "section name 'é', expected [a-z][a-z0-9_]{0,15}",
        ),
        (
            sealed(HEAD + b"\x01\x00TEST" + bytes(4) + entry(b"a\n", 0)),
            r"section name 'a\n', expected [a-z][a-z0-9_]{0,15}",
        ),
    ],
)
def test_what_is_not_canonical_is_refused(data, message):
    with pytest.raises(WireError) as e:
        decode_frame(data, "TEST")
    assert str(e.value) == message


def test_too_long_is_refused_before_it_is_read():
    with pytest.raises(WireError) as e:
        decode_frame(SMALL, "TEST", max_bytes=len(SMALL) - 1)
    assert str(e.value) == f"frame of {len(SMALL)} bytes, expected at most {len(SMALL) - 1}"
    assert decode_frame(SMALL, "TEST", max_bytes=len(SMALL))[0] == b"{}"


@given(st.binary(max_size=80))
def test_arbitrary_bytes_are_refused(data):
    with pytest.raises(WireError):
        decode_frame(HEAD + data, "TEST")


@pytest.mark.parametrize("kind", ["ABC", "ABCDE", "abcd", "ABC\n", ""])
def test_wrong_kinds_are_not_encoded(kind):
    with pytest.raises(UsageError) as e:
        encode_frame(kind, b"", {})
    assert str(e.value) == f"frame kind {kind!r}, expected four of A..Z"


@pytest.mark.parametrize("name", ["", "A", "1a", "a" * 17, "a\n", "a b", "ä"])
def test_wrong_names_are_not_encoded(name):
    with pytest.raises(UsageError) as e:
        encode_frame("TEST", b"", {name: b""})
    assert str(e.value) == f"section name {name!r}, expected [a-z][a-z0-9_]{{0,15}}"


def test_too_long_frames_are_not_encoded(monkeypatch):
    monkeypatch.setattr(frame, "MAX_FRAME", 64)
    with pytest.raises(UsageError) as e:
        encode_frame("TEST", b"", {"a": bytes(25)})
    assert str(e.value) == "frame of 65 bytes, expected at most 64"
    assert len(encode_frame("TEST", b"", {"a": bytes(24)})) == 64
