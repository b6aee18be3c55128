import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fleetprune.packed_weights import (
    LONGEST_SKIP,
    blocks,
    from_marks,
    from_skips,
    marked,
    skipping,
    unblocked,
)


def test_blocks_go_by_outputs_then_inputs_then_places():
    weight = np.arange(16).reshape(2, 4, 2)  # 8 o + 2 i + k
    assert blocks(weight, 2, 2).tolist() == [
        [0, 2, 8, 10],
        [1, 3, 9, 11],
        [4, 6, 12, 14],
        [5, 7, 13, 15],
    ]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 1), (1, 3), (4, 6)])
def test_blocks_are_put_back(rows, columns):
    weight = np.arange(4 * 6 * 5).reshape(4, 6, 5)
    assert np.array_equal(
        unblocked(blocks(weight, rows, columns), weight.shape, rows, columns), weight
    )


def test_marks_are_bits_and_the_first_stored_block_is_zero():
    bits, values = marked(np.array([[5], [0], [0], [7]], np.int8))
    assert bits.tolist() == [0b10010000]
    assert values.tolist() == [[0], [5], [7]]


def test_a_long_way_is_skipped_with_blocks_of_zeros():
    parts = np.zeros((600, 1), np.int8)
    parts[[0, 1, 599]] = 1
    skips, values = skipping(parts)
    assert skips.tolist() == [0, 1, LONGEST_SKIP, LONGEST_SKIP, 598 - 2 * LONGEST_SKIP]
    assert values.ravel().tolist() == [1, 1, 0, 0, 1]


FEW = st.integers(0, 40).map(lambda n: n if n < 3 else 0)
SHAPES = st.tuples(st.integers(1, 900), st.integers(1, 3))


@given(arrays(np.int8, SHAPES, elements=FEW))
def test_both_forms_are_read_as_they_are_written(parts):
    assert np.array_equal(from_marks(*marked(parts), len(parts)), parts)
    assert np.array_equal(from_skips(*skipping(parts), len(parts)), parts)


def test_what_does_not_fit_is_nothing():
    values = np.ones((2, 1), np.int8)
    assert from_marks(np.array([0b11000000], np.uint8), values, 8) is None
    assert from_skips(np.array([3, 1], np.uint8), values, 4) is None
    assert from_skips(np.array([3, 1], np.uint8), values, 5) is not None
