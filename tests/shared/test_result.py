import numpy as np
import pytest

from fleetprune.errors import HostileInputError, MessageError, UsageError, WireError
from fleetprune.frame import decode_frame, encode_frame
from fleetprune.messages import Codec, ResultHeader, TaskKind
from fleetprune.result import VECTORS, decode_result, encode_result
from fleetprune.update import SparseUpdate, decode_update

HEADER = ResultHeader(
    task="t1", device="d1", kind=TaskKind.TRAIN, round=9, mask_version=3, samples=32
)
STATS = np.array([1, 2], np.float32)
UPDATE = SparseUpdate(3, 2, STATS, None).encode(Codec.FP32)


def test_roundtrip():
    vectors = {name: np.full(i, i, np.float32) for i, name in enumerate(sorted(VECTORS))}
    got = decode_result(encode_result(HEADER, vectors, UPDATE))
    assert got.header == HEADER
    assert got.update == UPDATE
    assert {n: v.tolist() for n, v in got.vectors.items()} == {
        n: v.tolist() for n, v in vectors.items()
    }
    assert all(v.dtype == np.float32 and v.flags.writeable for v in got.vectors.values())
    assert decode_update(got.update, mask_version=3, size=2).values.tolist() == [1, 2]


def test_nothing_but_a_header():
    got = decode_result(encode_result(HEADER, {}, None))
    assert (got.update, got.vectors) == (None, {})


def test_golden_frame():
    header, sections = decode_frame(encode_result(HEADER, {"stats": STATS}, b"up"), "RSLT")
    assert header == HEADER.to_bytes()
    assert {n: b.hex() for n, b in sections.items()} == {
        "stats": "0000803f00000040",
        "update": "7570",
    }


def test_the_sections_are_those_that_the_header_documents():
    assert ResultHeader.__doc__ is not None
    documented = {w for i, w in enumerate(ResultHeader.__doc__.split("`")) if i % 2}
    assert documented >= VECTORS | {"update"}


def test_unknown_sections_are_ignored():
    sections = {"stats": STATS.tobytes(), "newer": b"odd"}
    got = decode_result(encode_frame("RSLT", HEADER.to_bytes(), sections))
    assert list(got.vectors) == ["stats"]


def test_truncated_at_every_byte():
    data = encode_result(HEADER, {"stats": STATS}, UPDATE)
    for end in range(len(data)):
        with pytest.raises(WireError):
            decode_result(data[:end])


def test_every_single_bit_flip_is_refused():
    data = encode_result(HEADER, {"stats": STATS}, UPDATE)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            decode_result(bytes(flipped))


def test_a_truncated_header_is_refused_even_in_a_sound_frame():
    header = HEADER.to_bytes()
    for end in range(len(header)):
        with pytest.raises(HostileInputError):
            decode_result(encode_frame("RSLT", header[:end], {}))


@pytest.mark.parametrize(
    ("header", "sections", "error", "message"),
    [
        (
            HEADER.to_bytes(),
            {"sumsq": bytes(6)},
            WireError,
            "section sumsq of 6 bytes, expected whole float32s",
        ),
        (
            HEADER.to_bytes(),
            {"scores": bytes.fromhex("00000000 0000807f")},
            WireError,
            "scores[1] is inf, expected finite numbers",
        ),
        (
            HEADER.to_bytes().replace(b'"samples":32', b'"samples":0'),
            {},
            MessageError,
            "ResultHeader: samples: Input should be greater than or equal to 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(header, sections, error, message):
    with pytest.raises(error) as e:
        decode_result(encode_frame("RSLT", header, sections))
    assert str(e.value) == message


@pytest.mark.parametrize("name", ["update", "weights"])
def test_unknown_sections_are_not_encoded(name):
    with pytest.raises(UsageError) as e:
        encode_result(HEADER, {name: STATS}, None)
    assert str(e.value) == f"result sections ['{name}'], expected some of {sorted(VECTORS)}"


@pytest.mark.parametrize(
    ("vector", "error"),
    [(np.array([np.nan], np.float32), WireError), (np.zeros(1), UsageError)],
)
def test_wrong_vectors_are_not_encoded(vector, error):
    with pytest.raises(error, match=r"^values"):
        encode_result(HEADER, {"stats": vector}, None)
