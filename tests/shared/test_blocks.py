import hashlib
import struct
import zlib

import pytest

from fleetprune.blocks import (
    BLOCK_SIZE,
    MAX_BLOCK,
    MAX_BLOCKS,
    MAX_MESSAGE,
    MAX_NAME,
    MAX_REQUESTED,
    Block,
    NotFound,
    Put,
    Request,
    Stored,
    StoreState,
    block_length,
    check_name,
    count_blocks,
    decode,
)
from fleetprune.errors import WireError

SHA = hashlib.sha256(b"abcdef").digest()
MESSAGES = [
    Request("blobs/" + "0" * 64, 7, (0, 1, 2, 5, 9, 10), 4),
    Block(7, 1, 99, 4, 6, b"ef"),
    NotFound(7),
    Put("results/t1", 7, 0, 4, 6, SHA, b"abcd"),
    Stored(7, StoreState.RECEIVING, SHA, frozenset({0, 8}), 9, "", 77),
    Stored(7, StoreState.REFUSED, SHA, reason="round is closed"),
]


def seal(body: bytes, kind: int) -> bytes:
    """A message with correct frame around any body."""
    framed = struct.pack("<2sBBI", b"FB", 1, kind, 8 + len(body) + 4) + body
    return framed + struct.pack("<I", zlib.crc32(framed))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
class TestEveryMessage:
    def test_comes_back_as_it_was(self, message):
        assert decode(message.encode()) == message

    def test_truncated_at_any_byte_is_refused(self, message):
        data = message.encode()
        for length in range(len(data)):
            with pytest.raises(WireError):
                decode(data[:length])

    def test_body_truncated_at_any_byte_under_a_correct_frame_is_refused(self, message):
        body = message.encode()[8:-4]
        assert decode(seal(body, message.TYPE)) == message
        for length in range(len(body)):
            with pytest.raises(WireError):
                decode(seal(body[:length], message.TYPE))

    def test_any_flipped_bit_is_refused(self, message):
        data = bytearray(message.encode())
        for i in range(len(data) * 8):
            data[i // 8] ^= 1 << i % 8
            with pytest.raises(WireError):
                decode(bytes(data))
            data[i // 8] ^= 1 << i % 8

    def test_trailing_bytes_are_refused(self, message):
        with pytest.raises(WireError):
            decode(seal(message.encode()[8:-4] + b"\0", message.TYPE))


def test_golden_bytes_of_a_request():
    body = (
        bytes.fromhex("07000000040000000300")
        + b"a/b"
        + bytes.fromhex("0200000000000300050000000100")
    )
    assert Request("a/b", 7, (0, 1, 2, 5), 4).encode() == seal(body, 1)


def test_golden_bytes_of_a_block():
    fields = bytes.fromhex("070000000100000063000000040000000600000000000000")
    assert Block(7, 1, 99, 4, 6, b"ef").encode() == seal(fields + b"ef", 2)


def test_a_full_block_with_the_longest_name_fits_brokers_limited_to_128_kib():
    name = "n" * MAX_NAME
    put = Put(name, 1, 0, BLOCK_SIZE, BLOCK_SIZE, SHA, bytes(BLOCK_SIZE)).encode()
    largest = Put(name, 1, 0, MAX_BLOCK, MAX_BLOCK, SHA, bytes(MAX_BLOCK)).encode()
    assert len(put) < len(largest) == MAX_MESSAGE
    assert MAX_MESSAGE + 256 < 128 * 1024


@pytest.mark.parametrize(
    ("size", "block", "count"), [(0, 4, 1), (1, 4, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2), (9, 4, 3)]
)
def test_count_blocks(size, block, count):
    assert count_blocks(size, block) == count
    assert sum(block_length(i, size, block) for i in range(count)) == size
    with pytest.raises(WireError):
        block_length(count, size, block)


@pytest.mark.parametrize(
    ("size", "block"), [(-1, 4), (4, 0), (4, MAX_BLOCK + 1), (MAX_BLOCKS + 1, 1), (1 << 62, 65536)]
)
def test_sizes_out_of_bounds_are_refused_before_anything_is_allocated(size, block):
    with pytest.raises(WireError):
        count_blocks(size, block)


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "../a", "a/../b", ".a", "a\nb", "a b", "ä", "a" * 301, "a/+/b"]
)
def test_names_that_are_no_plain_relative_path_are_refused(name):
    with pytest.raises(WireError):
        check_name(name)


def request_body(runs: list[tuple[int, int]], name: bytes = b"a") -> bytes:
    head = struct.pack("<IIH", 1, 4, len(name)) + name + struct.pack("<H", len(runs))
    return head + b"".join(struct.pack("<IH", *r) for r in runs)


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [(0, 0)],
        [(0, MAX_REQUESTED + 1)],
        [(0, MAX_REQUESTED), (100, 1)],
        [(5, 2), (6, 1)],
        [(5, 1), (4, 1)],
        [(MAX_BLOCKS, 1)],
        [(2**32 - 1, 1)],
    ],
)
def test_requests_that_ask_for_nothing_too_much_or_out_of_order_are_refused(runs):
    with pytest.raises(WireError):
        decode(seal(request_body(runs), 1))


def test_names_in_messages_are_checked():
    assert decode(seal(request_body([(0, 1)]), 1)) == Request("a", 1, (0,), 4)
    for name in (b"../a", b"\xff", b""):
        with pytest.raises(WireError):
            decode(seal(request_body([(0, 1)], name), 1))


@pytest.mark.parametrize("count", [0, MAX_BLOCKS + 1, 2**32 - 1])
def test_bitmaps_of_absurd_length_are_refused(count):
    body = struct.pack("<IBI", 1, 0, 0) + SHA + struct.pack("<I", count) + b"\0" * 8 + b"\0"
    with pytest.raises(WireError, match=f"bitmap of {count} blocks, expected 1..65536"):
        decode(seal(body, 5))


def test_unknown_versions_and_types_are_refused():
    data = bytearray(NotFound(1).encode())
    data[2] = 2
    with pytest.raises(WireError, match=r"^block message b'FB' version 2 type 3 is not known$"):
        decode(bytes(data))
    with pytest.raises(WireError, match=r"^block message b'FB' version 1 type 6 is not known$"):
        decode(seal(b"", 6))


def test_a_long_reason_is_cut_at_a_character():
    stored = decode(Stored(1, StoreState.REFUSED, SHA, reason="ä" * 150).encode())
    assert stored.reason == "ä" * 100
