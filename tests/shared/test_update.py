import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fleetprune.deflate import deflate
from fleetprune.errors import UsageError, WireError
from fleetprune.messages import Codec
from fleetprune.update import SparseUpdate, decode_update, top_k
from fleetprune.values import decode_values, encode_values, value_bytes


def vector(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


def at(*positions: int) -> np.ndarray:
    return np.array(positions, np.intp)


FULL = SparseUpdate(3, 4, vector(7, -7, 1, 0), None)
CHOSEN = SparseUpdate(3, 24, vector(7, -7), at(1, 4))


ON_EVERY_GRID = [  # 889 = 7 * 127
    SparseUpdate(3, 4, vector(889, -889, 0, 889), None),
    SparseUpdate(3, 24, vector(889, -889), at(1, 4)),
    SparseUpdate(3, 5, vector(), at()),
]


def test_golden_bytes_of_a_full_update():
    assert FULL.encode(Codec.INT4) == bytes.fromhex(
        "46505550 0100 03 00 03000000 04000000 04000000 00000000 04000000"
        "003c 97 01"  # scale 1; codes 7, -7, 1, 0
        "037aed40"
    )


def test_golden_bytes_of_a_chosen_update():
    assert CHOSEN.encode(Codec.INT4) == bytes.fromhex(
        "46505550 0100 03 01 03000000 18000000 02000000 03000000 03000000"
        "01 01 02"  # gaps: one skipped, then two
        "003c 97"
        "ff54556c"
    )


@pytest.mark.parametrize(("update", "overhead"), [(FULL, 32), (CHOSEN, 35)])
def test_overhead_is_counted(update, overhead):
    assert len(update.encode(Codec.FP32)) == overhead + 4 * update.values.size


def test_dense():
    assert FULL.dense().tolist() == [7, -7, 1, 0]
    assert FULL.dense() is not FULL.values
    assert CHOSEN.dense().tolist() == [0, 7, 0, 0, -7] + [0] * 19
    assert SparseUpdate(0, 2, vector(), at()).dense().tolist() == [0, 0]


@pytest.mark.parametrize(("codec", "most"), [(Codec.INT8, 0.92), (Codec.INT4, 0.81)])
def test_values_that_crowd_around_zero_are_deflated(codec, most):
    rng = np.random.default_rng(0)
    values = rng.laplace(size=50_000).astype(np.float32)
    data = SparseUpdate(3, values.size, values, None).encode(codec, np.random.default_rng(1))
    assert len(data) < most * value_bytes(values.size, codec)
    got = decode_update(data, mask_version=3, size=values.size)
    plain = encode_values(values, codec, np.random.default_rng(1))
    assert got.values.tolist() == decode_values(plain, values.size, codec).tolist()


def test_values_that_do_not_deflate_travel_plain():
    codes = np.random.default_rng(0).integers(-127, 128, 4096)  # every code alike
    codes[::64] = 127  # and a scale of 1
    data = SparseUpdate(3, 4096, codes.astype(np.float32), None).encode(Codec.INT8)
    assert data[7] == 0
    assert len(data) == 32 + value_bytes(4096, Codec.INT8)


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("update", ON_EVERY_GRID)
def test_roundtrip(codec, update):
    got = decode_update(update.encode(codec), mask_version=3, size=update.size)
    assert (got.mask_version, got.size) == (3, update.size)
    assert got.values.tolist() == update.values.tolist()
    assert (got.positions is None) == (update.positions is None)
    assert got.dense().tolist() == update.dense().tolist()


@given(
    st.integers(0, 150).flatmap(
        lambda n: st.tuples(
            arrays(np.float32, n, elements=st.floats(-100, 100, width=32)),
            arrays(np.bool_, n),
        )
    ),
    st.sampled_from(Codec),
)
@settings(deadline=None)
def test_positions_survive_every_codec(case, codec):
    values, chosen = case
    positions = np.flatnonzero(chosen)
    update = SparseUpdate(1, values.size, values[positions], positions)
    got = decode_update(update.encode(codec), mask_version=1, size=values.size)
    assert got.positions is not None
    assert got.positions.tolist() == positions.tolist()
    if codec is Codec.FP32:
        assert got.dense().tolist() == np.where(chosen, values, np.float32(0)).tolist()


def pack(data: bytes) -> bytes:
    return deflate(data, match=True)


def sealed(content: bytes) -> bytes:
    return content + struct.pack("<I", zlib.crc32(content))


def update_bytes(
    *,
    magic=b"FPUP",
    version=1,
    codec=0,
    flags=0,
    mask=3,
    size=2,
    count=2,
    where=b"",
    values="0000803f 00000040",
    body=None,
) -> bytes:
    sent = bytes.fromhex(values)
    numbers = (mask, size, count, len(where), len(sent) if body is None else body)
    return sealed(struct.pack("<4sHBBIIIII", magic, version, codec, flags, *numbers) + where + sent)


def test_the_builder_of_hostile_updates_builds_a_good_one():
    assert decode_update(update_bytes(), mask_version=3, size=2).values.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "update of 0 bytes, expected at least 32"),
        (update_bytes(magic=b"FPFR"), "update starts with b'FPFR', expected b'FPUP'"),
        (update_bytes(version=2), "update version 2, expected 1"),
        (update_bytes(codec=4), "update codec 4, expected 0..3"),
        (update_bytes()[:-1], "update of 39 bytes, expected 40"),
        (update_bytes() + b"\0", "update of 41 bytes, expected 40"),
        (update_bytes(body=12), "update of 40 bytes, expected 44"),
        (update_bytes(body=2**32 - 1), "update of 40 bytes, expected 4294967327"),
        (
            update_bytes()[:-4] + b"\1\2\3\4",
            f"update checksum {zlib.crc32(update_bytes()[:-4]):08x}, expected 04030201",
        ),
        (update_bytes(mask=4), "update for mask version 4, expected 3"),
        (update_bytes(size=3), "update of a support of 3 values, expected 2"),
        (update_bytes(flags=4), "update flags 4, expected 0..3"),
        (update_bytes(values="0000803f"), "2 fp32 values in 4 bytes, expected 8"),
        (update_bytes(values="0000803f" * 3), "2 fp32 values in 12 bytes, expected 8"),
        (update_bytes(flags=2), "deflated values of 8 bytes, expected fewer than 8"),
        (update_bytes(flags=2, values="ff"), "values are not a deflate stream"),
        (update_bytes(flags=2, values="01 0100 feff"), "deflated values are cut short"),
        (
            update_bytes(flags=2, values=pack(bytes(9)).hex()),
            "values inflate to more than 8 bytes",
        ),
        (
            update_bytes(flags=2, values=pack(bytes(7)).hex()),
            "2 fp32 values in 7 bytes, expected 8",
        ),
        (
            update_bytes(flags=2, values=pack(bytes(8)).hex() + "00"),
            "1 bytes after the deflated values",
        ),
        (
            update_bytes(flags=2, count=2**32 - 1, values=pack(bytes(8)).hex()),
            "full update of 4294967295 values and 0 bytes of positions, expected 2 values and none",
        ),
        (
            update_bytes(count=1, values="0000803f"),
            "full update of 1 values and 0 bytes of positions, expected 2 values and none",
        ),
        (
            update_bytes(where=b"\0\3"),
            "full update of 2 values and 2 bytes of positions, expected 2 values and none",
        ),
        (update_bytes(values="0000803f 0000c07f"), "values[1] is nan, expected finite numbers"),
        (update_bytes(values="000080ff 0000803f"), "values[0] is -inf, expected finite numbers"),
        (
            update_bytes(flags=1, count=3, values="00000000" * 3),
            "3 positions, expected 0..2",
        ),
        (
            update_bytes(flags=1, count=1, where=b"\0\4", values="00000000"),
            "bitmap marks position 2, expected 0..1",
        ),
        (
            update_bytes(flags=1, count=1, where=b"\1\2", values="00000000"),
            "gaps reach position 2, expected 0..1",
        ),
        (
            update_bytes(flags=1, count=1, where=b"\0\3", values="00000000"),
            "2 marked positions, expected 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(data, message):
    with pytest.raises(WireError) as e:
        decode_update(data, mask_version=3, size=2)
    assert str(e.value) == message


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("update", [FULL, CHOSEN])
def test_truncated_at_every_byte(codec, update):
    data = update.encode(codec)
    for end in range(len(data)):
        with pytest.raises(WireError):
            decode_update(data[:end], mask_version=3, size=update.size)


@pytest.mark.parametrize("update", [FULL, CHOSEN])
def test_every_single_bit_flip_is_refused(update):
    data = update.encode(Codec.INT4)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            decode_update(bytes(flipped), mask_version=3, size=update.size)


@given(st.binary(max_size=40))
def test_arbitrary_bytes_are_refused(data):
    with pytest.raises(WireError):
        decode_update(b"FPUP\1\0" + data, mask_version=3, size=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((-1, 1, vector(1), None), "mask version -1, expected 0..4294967295"),
        ((2**32, 1, vector(1), None), "mask version 4294967296, expected 0..4294967295"),
        ((0, -1, vector(), None), "size -1, expected 0..4294967295"),
        (
            (0, 2, vector(1), None),
            "values of shape (1,) and dtype float32, expected (2,) float32",
        ),
        (
            (0, 2, vector(1), at(0, 1)),
            "values of shape (1,) and dtype float32, expected (2,) float32",
        ),
        ((0, 1, np.ones(1), None), "values of shape (1,) and dtype float64, expected (1,) float32"),
        (
            (0, 4, vector(1, 2), at(2, 1)),
            "positions[1] is 1 after 2, expected strictly increasing",
        ),
        (
            (0, 4, vector(1, 2), at(1, 1)),
            "positions[1] is 1 after 1, expected strictly increasing",
        ),
        ((0, 4, vector(1, 2), at(1, 4)), "positions 1..4, expected 0..3"),
    ],
)
def test_fields_that_do_not_fit_each_other_are_refused(fields, message):
    with pytest.raises(UsageError) as e:
        SparseUpdate(*fields)
    assert str(e.value) == message


def test_non_finite_values_are_not_encoded():
    with pytest.raises(WireError, match=r"^values\[1\] is nan, expected finite numbers$"):
        SparseUpdate(0, 2, vector(0, np.nan), None).encode(Codec.INT4)


@pytest.mark.parametrize(
    ("values", "share", "positions"),
    [
        ([1, -5, 3, 2], 0.5, [1, 2]),
        ([1, -5, 3, 2], 0.26, [1, 2]),  # ceil(1.04) = 2
        ([1, -5, 3, 2], 0.25, [1]),
        ([1, -5, 3, 2], 1e-9, [1]),
        ([1, -5, 3, 2], 1.0, [0, 1, 2, 3]),
        ([2, 2, -2, 2], 0.5, [0, 1]),  # ties: the lower positions
        ([2, 3, -2, 2], 0.5, [0, 1]),
        ([0] * 10, 0.5, [0, 1, 2, 3, 4]),  # exact even when all are equal
        ([], 0.5, []),
    ],
)
def test_top_k(values, share, positions):
    got = top_k(vector(*values), share)
    assert got.dtype == np.intp
    assert got.tolist() == positions


@pytest.mark.parametrize("percent", range(1, 101))
def test_top_k_counts_are_exact_in_decimals(percent):
    """`ceil(0.07 * 100)` in binary floating point is 8."""
    assert top_k(np.zeros(100, np.float32), percent / 100).size == percent


@given(
    arrays(np.float32, st.integers(1, 80), elements=st.sampled_from([-2, -1, 0, 1, 2])),
    st.integers(1, 100),
)
@settings(deadline=None)
def test_top_k_is_a_stable_sort(values, percent):
    keep = -(-percent * values.size // 100)
    stable = np.argsort(-np.abs(values), kind="stable")[:keep]
    assert top_k(values, percent / 100).tolist() == sorted(stable.tolist())


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_top_k_refuses_shares_out_of_range(share):
    with pytest.raises(UsageError) as e:
        top_k(vector(1), share)
    assert str(e.value) == f"share {share}, expected 0 < share <= 1"


def test_top_k_refuses_non_finite_values():
    with pytest.raises(WireError, match=r"^values\[0\] is inf, expected finite numbers$"):
        top_k(vector(np.inf), 0.5)
