import json
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetprune.errors import HostileInputError, MessageError, UsageError, WireError
from fleetprune.frame import decode_frame, encode_frame
from fleetprune.messages import Codec
from fleetprune.model_payload import ModelHeader, decode_model, encode_model
from fleetprune.positions import encode_positions

PARAMS = np.array([889, -889, 0], np.float32)  # 7 * 127: on the grid of every codec
STATS = np.array([0.1, 1e-30], np.float32)
HEADER = {
    "schema": 1,
    "mask_version": 3,
    "round": 9,
    "codec": "fp32",
    "params": 3,
    "stats": 2,
}


@pytest.mark.parametrize("codec", Codec)
def test_roundtrip(codec):
    got = decode_model(encode_model(3, 9, PARAMS, STATS, codec), parameters=3, statistics=2)
    assert (got.mask_version, got.round) == (3, 9)
    assert got.params.tolist() == [889, -889, 0]
    assert got.stats.tolist() == STATS.tolist()  # exact in every codec


def test_golden_frame():
    data = encode_model(3, 9, PARAMS, STATS[:0], Codec.FP16)
    header, sections = decode_frame(data, "MODL")
    assert header == (
        b'{"schema":1,"mask_version":3,"round":9,"codec":"fp16","params":3,"stats":0}'
    )
    assert {name: body.hex() for name, body in sections.items()} == {
        "params": "f262f2e20000",
        "stats": "",
    }


def test_bytes_of_a_model_are_its_values_and_a_small_head():
    params = np.zeros(100_000, np.float32)
    sizes = [len(encode_model(1, 1, params, STATS, c)) for c in Codec]
    heads = [s - n for s, n in zip(sizes, [400_000, 200_000, 103_126, 53_126], strict=True)]
    assert heads == [148] * 4


def test_truncated_at_every_byte():
    data = encode_model(3, 9, PARAMS, STATS, Codec.INT4)
    for end in range(len(data)):
        with pytest.raises(WireError):
            decode_model(data[:end], parameters=3, statistics=2)


def test_every_single_bit_flip_is_refused():
    data = encode_model(3, 9, PARAMS, STATS, Codec.INT4)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            decode_model(bytes(flipped), parameters=3, statistics=2)


def test_unknown_fields_and_sections_are_ignored():
    header = json.dumps(HEADER | {"newer": 1}).encode()
    sections = {"params": PARAMS.tobytes(), "stats": STATS.tobytes(), "newer": b"?"}
    got = decode_model(encode_frame("MODL", header, sections), parameters=3, statistics=2)
    assert got.params.tolist() == [889, -889, 0]


@pytest.mark.parametrize(
    ("fields", "sections", "error", "message"),
    [
        (
            {"schema": 2},
            {},
            MessageError,
            "ModelHeader: schema: Input should be 1",
        ),
        (
            {"codec": "fp8"},
            {},
            MessageError,
            "ModelHeader: codec: Input should be 'fp32', 'fp16', 'int8' or 'int4'",
        ),
        ({"params": 4}, {}, WireError, "model of 4 parameters, expected 3"),
        ({"stats": 4}, {}, WireError, "model of 4 statistics, expected 2"),
        ({}, {"params": None}, WireError, "model without sections ['params']"),
        (
            {},
            {"params": None, "stats": None},
            WireError,
            "model without sections ['params', 'stats']",
        ),
        ({}, {"params": bytes(8)}, WireError, "3 fp32 values in 8 bytes, expected 12"),
        ({}, {"stats": bytes(12)}, WireError, "2 fp32 values in 12 bytes, expected 8"),
        (
            {},
            {"stats": bytes.fromhex("000000000000c07f")},
            WireError,
            "values[1] is nan, expected finite numbers",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fields, sections, error, message):
    good = {"params": PARAMS.tobytes(), "stats": STATS.tobytes()}
    bodies = {name: body for name, body in (good | sections).items() if body is not None}
    data = encode_frame("MODL", json.dumps(HEADER | fields).encode(), bodies)
    with pytest.raises(error) as e:
        decode_model(data, parameters=3, statistics=2)
    assert str(e.value) == message


def test_another_kind_of_frame_is_refused():
    with pytest.raises(WireError) as e:
        decode_model(encode_frame("RSLT", b"{}", {}), parameters=3, statistics=2)
    assert str(e.value) == "frame of kind b'RSLT', expected b'MODL'"


def test_a_truncated_header_is_refused_even_in_a_sound_frame():
    header = ModelHeader(mask_version=3, round=9, codec=Codec.FP32, params=3, stats=2).to_bytes()
    sections = {"params": PARAMS.tobytes(), "stats": STATS.tobytes()}
    for end in range(len(header)):
        with pytest.raises(HostileInputError):
            decode_model(encode_frame("MODL", header[:end], sections), parameters=3, statistics=2)


# ---- pruned weights

SOME = np.array([True, False, True])
PRUNED = {**HEADER, "kept": 2}
PLACES = encode_positions(np.array([0, 2]), 3)


@pytest.mark.parametrize("codec", Codec)
def test_pruned_weights_do_not_travel_and_arrive_as_zeros(codec):
    data = encode_model(3, 9, PARAMS, STATS, codec, support=SOME)
    got = decode_model(data, parameters=3, statistics=2)
    assert got.params.tolist() == [889, 0, 0]
    assert got.stats.tolist() == STATS.tolist()
    assert got.support is not None
    assert got.support.tolist() == SOME.tolist()  # the last one is 0, and not pruned


def test_golden_frame_of_a_pruned_model():
    data = encode_model(3, 9, PARAMS, STATS[:0], Codec.FP16, support=SOME)
    header, sections = decode_frame(data, "MODL")
    assert header == (
        b'{"schema":1,"mask_version":3,"round":9,"codec":"fp16","params":3,"stats":0,"kept":2}'
    )
    assert {name: body.hex() for name, body in sections.items()} == {
        "params": "f2620000",
        "stats": "",
        "support": "0002",  # a bitmap of the one that is pruned
    }


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=600), st.sampled_from([Codec.FP32, Codec.FP16]))
def test_any_support_travels(kept, codec):
    support = np.array(kept, np.bool_)
    params = np.arange(1, support.size + 1, dtype=np.float32)
    data = encode_model(1, 1, params, STATS[:0], codec, support=support)
    got = decode_model(data, parameters=support.size, statistics=0)
    assert got.support is not None
    assert np.array_equal(got.support, support)
    assert np.array_equal(got.params, np.where(support, params, 0))


def test_bytes_follow_density():
    params = np.ones(100_000, np.float32)
    support = np.zeros(params.size, np.bool_)
    support[::20] = True  # 5 %: 5000 values of two bytes, and one byte at most for each place
    size = len(encode_model(1, 1, params, STATS[:0], Codec.FP16, support=support))
    assert 10_000 < size < 15_300


def test_a_pruned_model_truncated_or_flipped_is_refused():
    data = encode_model(3, 9, PARAMS, STATS, Codec.INT4, support=SOME)
    for end in range(len(data)):
        with pytest.raises(WireError):
            decode_model(data[:end], parameters=3, statistics=2)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            decode_model(bytes(flipped), parameters=3, statistics=2)


def pruned(fields=None, **sections):
    two = PARAMS[SOME].tobytes()
    bodies = {"params": two, "stats": STATS.tobytes(), "support": PLACES, **sections}
    bodies = {name: body for name, body in bodies.items() if body is not None}
    return encode_frame("MODL", json.dumps(PRUNED | (fields or {})).encode(), bodies)


@pytest.mark.parametrize(
    ("fields", "sections", "message"),
    [
        ({}, {"support": None}, "model without sections ['support']"),
        ({"kept": 4}, {}, "4 positions, expected 0..3"),
        ({"kept": 1}, {}, "1 fp32 values in 8 bytes, expected 4"),
        ({"kept": 3}, {}, "positions of 3 of 3 values in 2 bytes, expected 0"),
        ({"kept": 0}, {}, "positions of 0 of 3 values in 2 bytes, expected 0"),
        ({}, {"support": b""}, "positions of 2 of 3 values in 0 bytes, expected at least 1"),
        ({}, {"support": b"\x00\x06"}, "2 marked positions, expected 1"),
        ({}, {"support": b"\x00\x08"}, "bitmap marks position 3, expected 0..2"),
        ({}, {"support": b"\x01\x03"}, "gaps reach position 3, expected 0..2"),
        ({}, {"support": b"\x07\x06"}, "positions in form 7, expected 0..3"),
        ({}, {"params": PARAMS.tobytes()}, "2 fp32 values in 12 bytes, expected 8"),
        ({}, {"params": bytes(4)}, "2 fp32 values in 4 bytes, expected 8"),
    ],
)
def test_a_support_that_does_not_fit_is_refused(fields, sections, message):
    with pytest.raises(WireError) as e:
        decode_model(pruned(fields, **sections), parameters=3, statistics=2)
    assert str(e.value) == message


@pytest.mark.parametrize("kept", [-1, 1.5, "two", []])
def test_a_count_that_is_none_is_refused(kept):
    with pytest.raises(MessageError, match=r"^ModelHeader: kept: "):
        decode_model(pruned({"kept": kept}), parameters=3, statistics=2)


def test_a_bomb_in_the_support_is_not_inflated():
    bomb = zlib.compress(bytes(10**7), 9, wbits=-15)
    with pytest.raises(WireError, match=r"^positions "):
        decode_model(pruned(support=b"\x02" + bomb), parameters=3, statistics=2)


def test_without_a_count_a_model_is_whole_whatever_else_comes_with_it():
    """What an older coordinator sends, and nothing that a section alone can change."""
    header = json.dumps(HEADER).encode()
    sections = {"params": PARAMS.tobytes(), "stats": STATS.tobytes(), "support": PLACES}
    got = decode_model(encode_frame("MODL", header, sections), parameters=3, statistics=2)
    assert got.params.tolist() == [889, -889, 0]
    assert got.support is None


@pytest.mark.parametrize("support", [np.ones(2, np.bool_), np.ones((3, 1), np.bool_)])
def test_a_support_of_another_shape_is_not_encoded(support):
    with pytest.raises(UsageError) as e:
        encode_model(1, 1, PARAMS, STATS, Codec.FP16, support=support)
    assert str(e.value) == f"support of shape {support.shape}, expected (3,)"


def test_non_finite_models_are_not_encoded():
    with pytest.raises(WireError, match=r"^values\[0\] is nan, expected finite numbers$"):
        encode_model(1, 1, PARAMS * np.float32(np.nan), STATS, Codec.FP16)
