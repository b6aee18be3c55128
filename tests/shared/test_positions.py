import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetprune.errors import UsageError, WireError
from fleetprune.positions import decode_positions, encode_positions


def at(*positions: int) -> np.ndarray:
    return np.array(positions, np.intp)


def entropy_bytes(p: float, n: int) -> float:
    return n * -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) / 8


def deflate(data: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-15)
    return deflater.compress(data) + deflater.flush()


@pytest.mark.parametrize(
    ("positions", "n", "golden"),
    [
        (at(), 5, ""),
        (at(0, 1, 2), 3, ""),
        (at(), 0, ""),
        (at(1, 4), 16, "00 1200"),  # bits 1 and 4; gaps would be as long, the bitmap wins
        (at(1, 4), 24, "01 0102"),  # 1 before the first, 2 more before the second
        (at(0, 2, 3), 4, "00 02"),  # more than half sent: the missing one is marked
        (at(300), 1000, "01 ff2d"),  # 300 = 255 + 45
        (at(254), 1000, "01 fe"),
        (at(255), 1000, "01 ff00"),
    ],
)
def test_golden_bytes(positions, n, golden):
    data = bytes.fromhex(golden)
    assert encode_positions(positions, n) == data
    assert decode_positions(data, n, positions.size).tolist() == positions.tolist()


def test_deflated_forms_are_read_from_golden_bytes():
    # Stored blocks, which any deflate writer may emit: 01, length, its complement, the bytes.
    assert decode_positions(bytes.fromhex("02 01 0200 fdff 1200"), 16, 2).tolist() == [1, 4]
    assert decode_positions(bytes.fromhex("03 01 0200 fdff 0102"), 24, 2).tolist() == [1, 4]


def test_each_form_is_taken_where_it_is_shortest():
    rng = np.random.default_rng(0)
    half = np.flatnonzero(rng.random(4000) < 0.45)
    units = np.flatnonzero(np.repeat(rng.random(100) < 0.3, 72))
    few = np.flatnonzero(rng.random(50_000) < 0.05)
    cases = [(half, 4000), (at(7, 90), 5000), (units, 7200), (few, 50_000)]
    encodings = [encode_positions(p, n) for p, n in cases]
    assert [e[0] for e in encodings] == [0, 1, 2, 3]
    for data, (positions, n) in zip(encodings, cases, strict=True):
        assert (decode_positions(data, n, positions.size) == positions).all()


@pytest.mark.parametrize(
    ("p", "slack"), [(0.01, 1.04), (0.03, 1.02), (0.1, 1.02), (0.3, 1.02), (0.5, 1.001)]
)
def test_length_is_near_the_entropy(p, slack):
    n = 200_000
    for share in (p, 1 - p):
        positions = np.sort(np.random.default_rng(7).permutation(n)[: int(share * n)])
        assert len(encode_positions(positions, n)) <= slack * entropy_bytes(p, n)


def test_clustered_positions_cost_less_than_the_entropy_of_their_share():
    whole_units = np.flatnonzero(np.repeat(np.random.default_rng(0).random(1000) < 0.3, 72))
    p = whole_units.size / 72_000
    assert len(encode_positions(whole_units, 72_000)) < 0.06 * entropy_bytes(p, 72_000)


@given(st.integers(0, 700).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n)))))
@settings(deadline=None)
def test_roundtrip(case):
    n, chosen = case
    positions = at(*sorted(chosen - {n}))
    data = encode_positions(positions, n)
    decoded = decode_positions(data, n, positions.size)
    assert decoded.dtype == np.intp
    assert decoded.tolist() == positions.tolist()
    assert len(data) <= 1 + (n + 7) // 8  # never longer than the plain bitmap


@pytest.mark.parametrize(
    ("data", "n", "k", "message"),
    [
        ("", 5, 6, "6 positions, expected 0..5"),
        ("", 5, -1, "-1 positions, expected 0..5"),
        ("00", 5, 5, "positions of 5 of 5 values in 1 bytes, expected 0"),
        ("00", 5, 0, "positions of 0 of 5 values in 1 bytes, expected 0"),
        ("", 5, 2, "positions of 2 of 5 values in 0 bytes, expected at least 1"),
        ("04 12", 8, 2, "positions in form 4, expected 0..3"),
        ("00", 8, 2, "bitmap of 0 bytes, expected 1"),
        ("00 1200", 8, 2, "positions of 2 bytes, expected at most 1"),
        ("00 16", 8, 2, "3 marked positions, expected 2"),
        ("00 24", 5, 2, "bitmap marks position 5, expected 0..4"),
        ("01 01", 24, 2, "1 marked positions, expected 2"),
        ("01 010203", 24, 2, "positions of 3 bytes, expected at most 2"),
        ("01 0116", 24, 2, "gaps reach position 24, expected 0..23"),
        ("01 01ff", 24, 2, "the last gap does not end"),
        ("02 ff", 24, 2, "positions are not a deflate stream"),
        ("02 01 0300 fcff 1200", 24, 2, "deflated positions are cut short"),
        ("02 01 0300 fcff 120000 00", 24, 2, "1 bytes after the deflated positions"),
        ("02 01 0200 fdff 1200", 24, 2, "bitmap of 2 bytes, expected 3"),
        ("02 01 0400 fbff 12000000", 24, 2, "positions inflate to more than 3 bytes"),
        ("03 01 0300 fcff 010203", 24, 2, "positions inflate to more than 2 bytes"),
    ],
)
def test_what_is_not_exact_is_refused(data, n, k, message):
    with pytest.raises(WireError) as e:
        decode_positions(bytes.fromhex(data), n, k)
    assert str(e.value) == message


def test_a_deflate_bomb_is_not_inflated():
    bomb = b"\x02" + deflate(bytes(50_000_000))
    assert len(bomb) < 50_000
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=r"^positions inflate to more than 125 bytes$"):
            decode_positions(bomb, 1000, 10)
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


def test_a_flood_of_plain_gaps_is_refused_before_it_is_read():
    with pytest.raises(WireError, match=r"^positions of 1000000 bytes, expected at most 13$"):
        decode_positions(b"\x01" + bytes(1_000_000), 1000, 10)


@pytest.mark.parametrize("step", [2, 3, 9, 40])
def test_truncated_at_every_byte(step):
    positions = np.flatnonzero(np.random.default_rng(0).random(3000) < 1 / step)
    data = encode_positions(positions, 3000)
    for end in range(len(data)):
        with pytest.raises(WireError):
            decode_positions(data[:end], 3000, positions.size)
    with pytest.raises(WireError):
        decode_positions(data + b"\0", 3000, positions.size)


@given(st.binary(max_size=60), st.integers(0, 300), st.integers(0, 300))
@settings(deadline=None)
def test_arbitrary_bytes_give_exact_positions_or_none(data, n, k):
    try:
        positions = decode_positions(data, n, k)
    except WireError:
        return
    assert positions.size == k
    assert positions.tolist() == sorted(set(positions.tolist()) & set(range(n)))


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (at(3, 2), "positions[1] is 2 after 3, expected strictly increasing"),
        (at(0, 2, 2), "positions[2] is 2 after 2, expected strictly increasing"),
        (at(-1, 2), "positions -1..2, expected 0..4"),
        (at(0, 5), "positions 0..5, expected 0..4"),
        (
            np.zeros(1, np.int32),
            "positions of shape (1,) and dtype int32, expected an intp vector",
        ),
    ],
)
def test_wrong_positions_are_not_encoded(positions, message):
    with pytest.raises(UsageError) as e:
        encode_positions(positions, 5)
    assert str(e.value) == message
