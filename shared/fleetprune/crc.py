"""CRC-32 of two texts in a row, from the CRC-32 of each.

A block goes to every device with another header. Its 64 KiB need not be read again for that: a CRC
is linear over GF(2), so the header's passes through so many zero bytes by a matrix, here four
tables of 256 entries, and the data's is added.
"""

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # CRC-32 (ISO 3309), bits reversed, as in zlib


def _after_zero_bit(crc: int) -> int:
    return crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)


def _apply(columns: list[int], crc: int) -> int:
    result, bit = 0, 0
    while crc:
        if crc & 1:
            result ^= columns[bit]
        crc, bit = crc >> 1, bit + 1
    return result


@lru_cache(maxsize=8)
def _through_zeros(length: int) -> tuple[tuple[int, ...], ...]:
    """What `length` zero bytes make of each byte of a CRC, at each of its four places."""
    columns = [1 << bit for bit in range(32)]
    step = [_after_zero_bit(column) for column in columns]
    bits = 8 * length
    while bits:
        if bits & 1:
            columns = [_apply(step, column) for column in columns]
        step = [_apply(step, column) for column in step]
        bits >>= 1
    return tuple(
        tuple(_apply(columns, byte << 8 * place) for byte in range(256)) for place in range(4)
    )


def join_crc32(first: int, second: int, second_length: int) -> int:
    """`zlib.crc32(a + b)` from `zlib.crc32(a)`, `zlib.crc32(b)` and the length of `b`."""
    t0, t1, t2, t3 = _through_zeros(second_length)
    moved = t0[first & 255] ^ t1[first >> 8 & 255] ^ t2[first >> 16 & 255] ^ t3[first >> 24]
    return moved ^ second
