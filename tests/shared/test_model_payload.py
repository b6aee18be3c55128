import json

import numpy as np
import pytest

from fleetprune.errors import HostileInputError, MessageError, WireError
from fleetprune.frame import decode_frame, encode_frame
from fleetprune.messages import Codec
from fleetprune.model_payload import ModelHeader, decode_model, encode_model

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


def test_non_finite_models_are_not_encoded():
    with pytest.raises(WireError, match=r"^values\[0\] is nan, expected finite numbers$"):
        encode_model(1, 1, PARAMS * np.float32(np.nan), STATS, Codec.FP16)
