import zlib

from hypothesis import given
from hypothesis import strategies as st

from fleetprune.crc import join_crc32


@given(st.binary(max_size=40), st.binary(max_size=300))
def test_joined_crcs_are_the_crc_of_the_whole(first, second):
    joined = join_crc32(zlib.crc32(first), zlib.crc32(second), len(second))
    assert joined == zlib.crc32(first + second)


def test_a_whole_block():
    first, second = b"FB\x01\x02", bytes(range(256)) * 256
    assert join_crc32(zlib.crc32(first), zlib.crc32(second), 65536) == zlib.crc32(first + second)
    assert join_crc32(zlib.crc32(b""), zlib.crc32(second), 65536) == zlib.crc32(second)
