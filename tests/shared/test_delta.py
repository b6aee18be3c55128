import dataclasses
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetprune.delta import (
    HEAD,
    MAX_SPREAD,
    NO_UNIT,
    Hole,
    Kind,
    Side,
    Tensor,
    apply,
    sorted_apart,
)
from fleetprune.errors import HostileInputError, WireError
from fleetprune.packed_weights import Form
from tests.shared.delta_examples import (
    BASE,
    DELTA,
    MARKS_BASE,
    SKIPS_TARGET,
    SPARSE,
    TARGET,
    dense,
    encode,
)


def whole(base, target, tensor, about=b"", steps=(), **head):
    """A delta of one tensor that is all of both files."""
    return encode(base, target, [tensor], about, steps, **head)


INT4 = dense(0, 1, 4, 1)


def ints(*values):
    return np.array(values, np.int8).tobytes()


def test_units_change_places_and_numbers_move_by_steps():
    assert apply(BASE, DELTA, len(TARGET)) == TARGET


def test_a_sparse_tensor_changes_its_form_and_what_it_keeps():
    assert apply(MARKS_BASE, SPARSE, 100) == SKIPS_TARGET


def test_a_new_unit_starts_from_zero_and_the_others_keep_theirs():
    base, target = ints(1, 2, 3), ints(9, 3, 2)
    tensor = Tensor(Kind.INT8, dense(0, 1, 3, 1), dense(0, 1, 3, 1), False, True)
    jumps = np.array([NO_UNIT, 1, -1], "<i4").tobytes()
    assert apply(base, whole(base, target, tensor, jumps, [9, 0, 0]), 3) == target


def test_without_a_map_units_stay_and_further_ones_are_new():
    base, target = ints(1, 2), ints(1, 2, 7)
    tensor = Tensor(Kind.INT8, dense(0, 1, 2, 1), dense(0, 1, 3, 1), False, False)
    assert apply(base, whole(base, target, tensor, steps=[0, 0, 7]), 3) == target


def test_a_tensor_without_a_base_is_its_steps():
    target = np.array([70000, -3], "<i4").tobytes()
    tensor = Tensor(Kind.INT32, None, dense(0, 1, 2, 1), False, False)
    assert apply(b"", whole(b"", target, tensor, steps=[70000, -3]), 8) == target


def test_steps_reach_as_far_as_three_bytes_do():
    far = 2**23 - 1
    target = np.array([far, -far - 1], "<i4").tobytes()
    tensor = Tensor(Kind.INT32, None, dense(0, 1, 2, 1), False, False)
    assert apply(b"", whole(b"", target, tensor, steps=[far, -far - 1]), 8) == target


def test_files_without_tensors_have_a_delta():
    assert apply(b"abcdef", encode(b"abcdef", b"abcxyz", rest=b"abcxyz", before=b"abcdef"), 6) == (
        b"abcxyz"
    )


def test_another_base_is_refused_in_one_line():
    with pytest.raises(
        WireError,
        match=r"^delta is of a base file 88d4266fd4e6, this one is 03ac674216f3: "
        r"take the full artifact$",
    ):
        apply(b"1234", encode(b"abcd", b"x", rest=b"x"), 9)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (DELTA[:50], "delta of 50 bytes, expected at least 96"),
        (b"FPUP" + DELTA[4:], "delta starts with b'FPUP', expected b'FPDL'"),
        (DELTA[:4] + b"\2" + DELTA[5:], "delta version 2, expected 1"),
        (DELTA + b"x", f"delta of {len(DELTA) + 1} bytes, expected {len(DELTA)}"),
        (
            encode(BASE, b"y", rest=b"x", target_bytes=19),
            "delta makes 19 bytes, expected at most 18",
        ),
        (
            encode(BASE, b"y", rest=b"x"),
            "delta makes another file than it says: take the full artifact",
        ),
        (
            encode(BASE, b"xy", rest=b"x"),
            "1 bytes between tensors, expected those that none has",
        ),
        (encode(BASE, b"x", rest=b"xy"), "bytes between tensors inflate to more than 1 bytes"),
        (
            encode(BASE, b"x", about=b"a", rest=b"x"),
            "maps and positions inflate to more than 0 bytes",
        ),
        (
            encode(BASE, b"x", steps=[1], rest=b"x"),
            "0 bytes of steps expected, the stream has others",
        ),
    ],
)
def test_what_is_broken_is_said(broken, message):
    with pytest.raises(WireError) as caught:
        apply(BASE, broken, len(TARGET))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Tensor(Kind.INT8, dense(1, 1, 4, 1), INT4, False, False), "tensor up to byte 5 of 4"),
        (Tensor(Kind.INT8, INT4, dense(1, 1, 4, 1), False, False), "tensor up to byte 5 of 4"),
        (
            Tensor(Kind.INT8, INT4, dense(0, 0, 4, 1), False, False),
            f"tensor of 0 numbers, expected 1..{8 * MAX_SPREAD}",
        ),
        (
            Tensor(Kind.INT8, INT4, dense(0, 2**32 - 1, 2**32 - 1, 2**32 - 1), False, False),
            f"tensor of {(2**32 - 1) ** 3} numbers, expected 1..{8 * MAX_SPREAD}",
        ),
        (
            Tensor(Kind.INT8, INT4, dense(0, 1, 2, 2), False, False),
            "tensor with 2 places, its base has 1",
        ),
        (
            Tensor(Kind.INT8, None, INT4, True, False),
            "tensor without a base and flags 2, expected 0",
        ),
        (
            Tensor(
                Kind.INT8,
                INT4,
                Side(Form.MARKS, (1, 3), 0, 0, 1, (1, 4, 1)),
                False,
                False,
            ),
            "tensor in form 1 and blocks of 1x3 for 1x4",
        ),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(tensor, message):
    base, target = ints(1, 2, 3, 4), ints(1, 2, 3, 5)
    with pytest.raises(WireError) as caught:
        apply(base, whole(base, target, tensor, steps=[0, 0, 0, 1]), 4)
    assert str(caught.value) == message


def test_tensors_that_overlap_are_refused():
    with pytest.raises(WireError, match=r"^two tensors have byte 3$"):
        sorted_apart([Hole(3, 2), Hole(0, 4)])
    assert sorted_apart([Hole(4, 2), Hole(0, 4)]) == [Hole(0, 4), Hole(4, 2)]


@pytest.mark.parametrize("jump", [2, -1, 2**31 - 1, -(2**31) + 1])
def test_a_map_that_leads_out_of_the_base_is_refused(jump):
    base = target = ints(1, 2)
    tensor = Tensor(Kind.INT8, dense(0, 1, 2, 1), dense(0, 1, 2, 1), False, True)
    jumps = np.array([jump, 0], "<i4").tobytes()
    with pytest.raises(WireError, match=r"^a map leads out of the base's 2 units$"):
        apply(base, whole(base, target, tensor, jumps, [0, 0]), 2)


def test_positions_that_do_not_fit_the_values_are_refused():
    base = bytes([0b11110000]) + ints(0, 5, 7)
    side = Side(Form.MARKS, (1, 1), 1, 0, 3, (1, 4, 1))
    tensor = Tensor(Kind.INT8, side, INT4, False, False)
    with pytest.raises(WireError, match=r"^a tensor's positions do not fit its values$"):
        apply(base, whole(base, ints(1, 2, 3, 4), tensor, steps=[0] * 4), 4)


def test_a_sparse_tensor_of_another_length_is_refused():
    (tensor,) = [
        Tensor(Kind.INT8, None, Side(Form.SKIPS, (1, 1), 0, 2, 2, (1, 4, 1)), False, False)
    ]
    delta = whole(b"", SKIPS_TARGET, tensor, bytes([0b01110000]), [1, 1, 1])
    with pytest.raises(WireError, match=r"^a tensor takes 3 bytes, expected 2$"):
        apply(b"", delta, 4)


def test_no_truncation_is_read():
    for end in range(len(DELTA)):
        with pytest.raises(HostileInputError):
            apply(BASE, DELTA[:end], len(TARGET))


def test_no_flipped_bit_makes_another_file():
    for at in range(len(DELTA)):
        for bit in range(8):
            hostile = bytearray(DELTA)
            hostile[at] ^= 1 << bit
            try:
                made = apply(BASE, bytes(hostile), len(TARGET))
            except HostileInputError:
                continue
            assert made == TARGET  # of an unused field or the end of a stream


@given(st.binary(max_size=400))
def test_bytes_at_random_are_refused(data):
    with pytest.raises(HostileInputError):
        apply(BASE, data, 100)
    with pytest.raises(HostileInputError):
        apply(BASE, DELTA[: HEAD.size] + data, 100)


@given(st.data())
def test_records_at_random_are_refused_or_right(data):
    small = st.integers(0, 5)
    sides = st.builds(
        Side,
        st.sampled_from(Form),
        st.tuples(small, small),
        small,
        small,
        small,
        st.tuples(small, small, small),
    )
    tensors = data.draw(
        st.lists(
            st.builds(
                Tensor,
                st.sampled_from(Kind),
                st.none() | sides,
                sides,
                st.booleans(),
                st.booleans(),
            ),
            max_size=3,
        )
    )
    about, rest = data.draw(st.binary(max_size=30)), data.draw(st.binary(max_size=8))
    steps = data.draw(st.lists(st.integers(-4, 4), max_size=12))
    base = data.draw(st.binary(max_size=12))
    delta = encode(base, bytes(data.draw(st.integers(0, 12))), tensors, about, steps, rest)
    try:
        made = apply(base, delta, 12)
    except HostileInputError:
        return
    assert not any(made)


def test_bombs_of_every_stream_take_little_memory():
    zeros = bytes(50_000_000)
    bombs = [
        encode(BASE, b"x", rest=zeros),
        encode(BASE, b"x", about=zeros, rest=b"x"),
        encode(BASE, b"x", steps=[0] * 1_000_000, rest=b"x"),
    ]
    tracemalloc.start()
    for bomb in bombs:
        with pytest.raises(WireError):
            apply(BASE, bomb, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_numbers_of_both_files_add_up():
    side = Side(Form.SKIPS, (1, 1), 0, 0, 0, (1, 60, 1))
    one = Tensor(Kind.INT8, None, side, False, False)
    delta = encode(bytes(2), bytes(2), [one, one])
    with pytest.raises(WireError, match=r"^tensor of 60 numbers, expected 1\.\.4$"):
        apply(bytes(2), delta, 4)
    both = dataclasses.replace(one, base=side)
    with pytest.raises(WireError, match=r"^tensors have more numbers than the files can hold$"):
        apply(bytes(2), encode(bytes(2), bytes(2), [both]), 4)


def test_nothing_that_is_not_a_number_is_an_error_of_its_own():
    base = np.array([np.nan, np.inf, 3e38], np.float32).tobytes()
    tensor = Tensor(Kind.FLOAT32, dense(0, 1, 3, 1), dense(0, 1, 3, 1), False, False)
    delta = whole(base, bytes(12), tensor, struct.pack("b", 127), [1, 1, 2**22])
    with pytest.raises(WireError, match=r"^delta makes another file"):
        apply(base, delta, 12)


def test_a_side_is_read_as_it_is_packed():
    side = Side(Form.MARKS, (2, 4), 7, 8, 9, (4, 8, 2))
    assert Side.unpack(side.pack(), 10_000, Kind.FLOAT32, 64) == side
    assert side.holes(Kind.FLOAT32) == (Hole(7, 9 * 8 * 4), Hole(8, 1))
    assert dataclasses.replace(side, form=Form.SKIPS).holes(Kind.INT8) == (Hole(7, 72), Hole(8, 9))
