import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fleetprune.errors import UsageError, WireError
from fleetprune.messages import Codec
from fleetprune.values import BLOCK, TOP, decode_values, encode_values, value_bytes

QUANTISED = [Codec.INT8, Codec.INT4]


def vector(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


def finite_vectors(bound: float = 1e6, longest: int = 200) -> st.SearchStrategy[np.ndarray]:
    numbers = st.floats(-bound, bound, width=32)
    return st.integers(0, longest).flatmap(lambda n: arrays(np.float32, n, elements=numbers))


def scales_of(values: np.ndarray, codec: Codec) -> np.ndarray:
    """The scale of each value, read from the encoding."""
    blocks = -(-values.size // BLOCK)
    scales = np.frombuffer(encode_values(values, codec), "<f2", count=blocks)
    return np.repeat(scales.astype(np.float64), BLOCK)[: values.size]


@pytest.mark.parametrize(
    ("codec", "values", "golden"),
    [
        (Codec.FP32, vector(1, -2), "0000803f 000000c0"),
        (Codec.FP16, vector(1, -2, 65504), "003c 00c0 ff7b"),
        (Codec.INT8, vector(127, -127, 1, 0), "003c 7f 81 01 00"),
        (Codec.INT8, vector(254, -127, 2), "0040 7f c0 01"),  # scale 2: -63.5 goes to even, -64
        (Codec.INT4, vector(7, -7), "003c 97"),
        (Codec.INT4, vector(3.5, -1, 0.5), "0038 e7 01"),  # scale 0.5, odd n
        (Codec.INT4, vector(0, 0, 0), "0000 00 00"),
        (Codec.INT8, vector(-0.0), "0000 00"),
        (Codec.FP32, vector(), ""),
        (Codec.FP16, vector(), ""),
        (Codec.INT8, vector(), ""),
        (Codec.INT4, vector(), ""),
    ],
)
def test_golden_bytes(codec, values, golden):
    assert encode_values(values, codec).hex() == golden.replace(" ", "")


def test_scales_of_all_blocks_come_before_the_codes():
    values = np.concatenate([np.full(BLOCK, 127), [254]]).astype(np.float32)
    assert encode_values(values, Codec.INT8) == b"\x00\x3c\x00\x40" + b"\x7f" * 65
    assert (decode_values(encode_values(values, Codec.INT8), 65, Codec.INT8) == values).all()


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("n", [0, 1, 2, 63, 64, 65, 127, 128, 1025])
def test_lengths_are_as_told(codec, n):
    values = np.linspace(-1, 1, n, dtype=np.float32)
    data = encode_values(values, codec, np.random.default_rng(0))
    assert len(data) == value_bytes(n, codec)
    decoded = decode_values(data, n, codec)
    assert decoded.shape == (n,)
    assert decoded.dtype == np.float32
    assert decoded.flags.writeable


def test_bytes_per_million_values():
    assert [value_bytes(10**6, c) for c in Codec] == [4_000_000, 2_000_000, 1_031_250, 531_250]


@given(finite_vectors(bound=2.0**127))
@settings(deadline=None)
def test_fp32_is_exact(values):
    decoded = decode_values(encode_values(values, Codec.FP32), values.size, Codec.FP32)
    assert decoded.tobytes() == values.tobytes()


@given(finite_vectors(bound=60000))
@settings(deadline=None)
def test_fp16_is_numpys_half(values):
    decoded = decode_values(encode_values(values, Codec.FP16), values.size, Codec.FP16)
    assert (decoded == values.astype(np.float16)).all()


@pytest.mark.parametrize("codec", QUANTISED)
@given(values=finite_vectors(bound=400_000))
@settings(deadline=None)
def test_nearest_rounding_errs_by_half_a_scale(codec, values):
    decoded = decode_values(encode_values(values, codec), values.size, codec)
    # v / scale is rounded to float32 before it is rounded to a code: 2**-24 of at most 127 steps
    bound = scales_of(values, codec) * (0.5 + TOP[codec] * 2.0**-24)
    assert (np.abs(decoded.astype(np.float64) - values) <= bound).all()


@pytest.mark.parametrize("codec", QUANTISED)
@given(values=finite_vectors(bound=400_000), seed=st.integers(0, 99))
@settings(deadline=None)
def test_stochastic_rounding_errs_by_less_than_a_scale(codec, values, seed):
    data = encode_values(values, codec, np.random.default_rng(seed))
    error = np.abs(decode_values(data, values.size, codec).astype(np.float64) - values)
    assert (error <= scales_of(values, codec)).all()


@pytest.mark.parametrize("codec", QUANTISED)
@given(values=finite_vectors())
@settings(deadline=None)
def test_the_scale_is_the_least_that_reaches_the_largest_value(codec, values):
    peak = np.zeros(-(-values.size // BLOCK))
    np.maximum.at(peak, np.arange(values.size) // BLOCK, np.abs(values.astype(np.float64)))
    scales = scales_of(values, codec)[::BLOCK].astype(np.float16)
    below = np.nextafter(scales, np.float16(-1)).astype(np.float64)
    reached = np.minimum(peak, 65504.0 * TOP[codec])
    assert (scales.astype(np.float64) * TOP[codec] >= reached).all()
    assert ((below * TOP[codec] < peak) | (peak == 0)).all()
    assert (scales[peak == 0] == 0).all()


@pytest.mark.parametrize("codec", QUANTISED)
def test_stochastic_rounding_is_unbiased(codec):
    values = np.random.default_rng(1).normal(size=2 * BLOCK).astype(np.float32)
    rng = np.random.default_rng(2)
    draws = 4000
    total = np.zeros(values.size)
    for _ in range(draws):
        total += decode_values(encode_values(values, codec, rng), values.size, codec)
    # A rounded value's standard deviation is at most half a scale; 5 sigma of the mean.
    bound = 5 * 0.5 * scales_of(values, codec) / np.sqrt(draws)
    assert (np.abs(total / draws - values) <= bound).all()


def test_nearest_rounding_is_biased_where_stochastic_is_not():
    values = vector(7, *[0.25] * 63)
    nearest = decode_values(encode_values(values, Codec.INT4), 64, Codec.INT4)
    assert nearest[1:].sum() == 0
    rng = np.random.default_rng(0)
    sums = [
        decode_values(encode_values(values, Codec.INT4, rng), 64, Codec.INT4)[1:].sum()
        for _ in range(400)
    ]
    assert np.mean(sums) == pytest.approx(63 / 4, rel=0.03)


@pytest.mark.parametrize("codec", QUANTISED)
def test_values_on_the_grid_are_exact_under_stochastic_rounding(codec):
    values = np.arange(-TOP[codec], TOP[codec] + 1, dtype=np.float32)
    values = np.concatenate([values, np.zeros(-values.size % BLOCK, np.float32)])
    values[::BLOCK] = TOP[codec]
    data = encode_values(values, codec, np.random.default_rng(0))
    assert (decode_values(data, values.size, codec) == values).all()


def test_the_same_seed_gives_the_same_bytes():
    values = np.random.default_rng(1).normal(size=70_000).astype(np.float32)  # two chunks
    first, second, other = (
        encode_values(values, Codec.INT4, np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    assert first == second
    assert first != other


def test_chunks_do_not_show():
    values = np.random.default_rng(1).normal(size=2 * 65_536 + 65).astype(np.float32)
    whole = decode_values(encode_values(values, Codec.INT8), values.size, Codec.INT8)
    for start in range(0, values.size, 640):
        part = values[start : start + 640]
        decoded = decode_values(encode_values(part, Codec.INT8), part.size, Codec.INT8)
        assert (whole[start : start + 640] == decoded).all()


@pytest.mark.parametrize(
    ("codec", "largest"),
    [(Codec.FP16, 65504.0), (Codec.INT8, 65504.0 * 127), (Codec.INT4, 65504.0 * 7)],
)
def test_what_does_not_fit_saturates(codec, largest):
    values = vector(3e38, -3e38, 0, 1)
    decoded = decode_values(encode_values(values, codec, np.random.default_rng(0)), 4, codec)
    assert decoded[:3].tolist() == [largest, -largest, 0]


@pytest.mark.parametrize("codec", QUANTISED)
def test_tiny_values_keep_their_expectation(codec):
    smallest = 2.0**-24  # the least fp16 above zero
    values = np.full(BLOCK * 400, smallest / 4, np.float32)
    nearest = decode_values(encode_values(values, codec), values.size, codec)
    assert not nearest.any()
    drawn = decode_values(
        encode_values(values, codec, np.random.default_rng(0)), values.size, codec
    )
    assert set(drawn.tolist()) == {0.0, smallest}
    assert drawn.astype(np.float64).mean() == pytest.approx(smallest / 4, rel=0.05)
    assert encode_values(vector(1e-45), codec)[:2] == b"\x01\x00"  # even the least float32


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_not_encoded(codec, bad):
    with pytest.raises(WireError) as e:
        encode_values(vector(0, 1, bad), codec)
    assert str(e.value) == f"values[2] is {bad}, expected finite numbers"


@pytest.mark.parametrize("values", [np.zeros((2, 2), np.float32), np.zeros(2)])
def test_only_float32_vectors_are_encoded(values):
    with pytest.raises(UsageError, match=r"^values of shape .*, expected a float32 vector$"):
        encode_values(values, Codec.FP32)


@pytest.mark.parametrize(
    ("data", "n", "codec", "message"),
    [
        ("0000c07f", 1, Codec.FP32, "values[0] is nan, expected finite numbers"),
        ("00000000 000080ff", 2, Codec.FP32, "values[1] is -inf, expected finite numbers"),
        ("007c", 1, Codec.FP16, "values[0] is inf, expected finite numbers"),
        ("007c 01", 1, Codec.INT8, "scale of block 0 is inf, expected finite and not negative"),
        ("007e 01", 1, Codec.INT4, "scale of block 0 is nan, expected finite and not negative"),
        ("00bc 01", 1, Codec.INT8, "scale of block 0 is -1.0, expected finite and not negative"),
        ("0080 00", 1, Codec.INT8, "scale of block 0 is -0.0, expected finite and not negative"),
        ("003c 01 80", 2, Codec.INT8, "int8 code [1] is -128, which is reserved"),
        ("003c 81", 2, Codec.INT4, "int4 code [1] is -8, which is reserved"),
        ("003c 18", 2, Codec.INT4, "int4 code [0] is -8, which is reserved"),
        ("003c 11", 1, Codec.INT4, "padding after 1 int4 values is 1, expected 0"),
        ("0000 01", 1, Codec.INT8, "codes under a zero scale are not zero"),
        ("0000 10", 2, Codec.INT4, "codes under a zero scale are not zero"),
        ("", 1, Codec.FP32, "1 fp32 values in 0 bytes, expected 4"),
        ("003c 01 01", 1, Codec.INT8, "1 int8 values in 4 bytes, expected 3"),
        ("003c 01 01", 1, Codec.INT4, "1 int4 values in 4 bytes, expected 3"),
    ],
)
def test_what_is_not_canonical_is_refused(data, n, codec, message):
    with pytest.raises(WireError) as e:
        decode_values(bytes.fromhex(data), n, codec)
    assert str(e.value) == message


@pytest.mark.parametrize("codec", Codec)
def test_truncated_at_every_byte(codec):
    data = encode_values(np.linspace(-1, 1, 67, dtype=np.float32), codec)
    for end in range(len(data)):
        with pytest.raises(WireError):
            decode_values(data[:end], 67, codec)


@pytest.mark.parametrize("codec", Codec)
@given(data=st.data(), n=st.integers(0, 130))
@settings(deadline=None)
def test_arbitrary_bytes_decode_to_finite_values_or_not_at_all(codec, data, n):
    size = value_bytes(n, codec)
    body = data.draw(st.binary(min_size=size, max_size=size))
    try:
        values = decode_values(body, n, codec)
    except WireError:
        return
    assert values.shape == (n,)
    assert np.isfinite(values).all()
