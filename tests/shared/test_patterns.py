import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fleetprune.errors import UsageError
from fleetprune.patterns import SINGLE, Granularity, Pattern


@pytest.mark.parametrize("text", ["1x1", "4x1", "1x4", "16x2", "999x1", "2:4", "1:2", "4:8"])
def test_what_is_read_is_written_the_same(text):
    assert str(Pattern.parse(text)) == text


def test_what_the_texts_mean():
    assert Pattern.parse("1x1") == SINGLE == Pattern(rows=1, columns=1)
    assert Pattern.parse("4x2") == Pattern(rows=4, columns=2)
    assert Pattern.parse("2:4") == Pattern(n=2, m=4)
    assert [Pattern.parse(t).block for t in ("1x1", "4x2", "2:4")] == [1, 8, 1]


@pytest.mark.parametrize(
    "text",
    ["", "x", "0x1", "1x0", "01x1", "1000x1", "1x1x1", " 1x1", "4", "-1x1", "0:4", "3:2", "2:2",
     "2:", "1:100", "2:4\n", "٢:4", "2 : 4"],
)  # fmt: skip
def test_anything_else_is_refused_in_one_line(text):
    with pytest.raises(UsageError) as e:
        Pattern.parse(text)
    assert str(e.value) == (
        f'pattern "{text}", expected outputs x inputs of a block, as "1x1" or "4x1", '
        'or N:M with N < M, as "2:4"'
    )


def test_only_channels_leave_weights_alone():
    assert [g.weights for g in Granularity] == [False, True, True]


@pytest.mark.parametrize(
    ("pattern", "shape", "concerned"),
    [
        ("1x1", (3,), False),  # a bias, a scale
        ("1x1", (), False),
        ("1x1", (1, 1), True),
        ("1x1", (8, 1, 3, 3), True),  # depthwise
        ("1x2", (8, 1, 3, 3), False),
        ("2:4", (8, 3, 3, 3), False),  # a stem of three colours
        ("2:4", (8, 4), True),
        ("2:4", (8, 5), True),  # and then it does not fit
        ("4x1", (3, 8), False),
        ("4x1", (4, 8), True),
    ],
)
def test_what_is_smaller_than_the_pattern_stays_whole(pattern, shape, concerned):
    assert Pattern.parse(pattern).concerns(shape) is concerned


@pytest.mark.parametrize(
    ("pattern", "shape", "why"),
    [
        ("1x1", (3, 5), None),
        ("2x1", (4, 5), None),
        ("2x1", (3, 5), "3 outputs, which 2 does not divide"),
        ("1x4", (3, 6, 3), "6 inputs, which 4 does not divide"),
        ("2:4", (3, 8), None),
        ("2:4", (3, 6), "6 inputs, which 4 does not divide"),
    ],
)
def test_why_a_shape_cannot_be_divided(pattern, shape, why):
    assert Pattern.parse(pattern).misfit(shape) == why


def test_blocks_by_hand():
    pattern = Pattern.parse("2x1")
    weight = np.float32([[1, 2], [3, 4], [5, 6], [7, 8]])
    assert pattern.grid((4, 2)) == (2, 2)
    assert pattern.blocks((4, 2)) == 4
    assert pattern.pooled(weight).tolist() == [[4, 6], [12, 14]]
    kept = np.array([[True, False], [False, True]])
    assert pattern.spread(kept).tolist() == [
        [True, False],
        [True, False],
        [False, True],
        [False, True],
    ]


def test_positions_of_a_kernel_are_not_mixed():
    """Two inputs, kernel of two: blocks of two inputs add the same position of both."""
    weight = np.float32([[[1, 10], [2, 20]]])
    assert Pattern.parse("1x2").pooled(weight).tolist() == [[[3, 30]]]
    best = Pattern.parse("1:2").best_of_each(weight, 1)
    assert best.tolist() == [[[False, False], [True, True]]]


def test_two_of_four_by_hand():
    best = Pattern.parse("2:4").best_of_each(np.float32([[3, 1, 2, 4, 0, 0, 0, 9]]), 2)
    # Of equal ones, the first.
    assert best.tolist() == [[True, False, False, True, True, False, False, True]]


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), SHAPES, st.data())
def test_blocks_are_whole_and_marks_undo_spread(rows, columns, sizes, data):
    pattern = Pattern(rows, columns)
    shape = (sizes[0] * rows, sizes[1] * columns, sizes[2])
    blocks = data.draw(arrays.arrays(np.bool_, pattern.grid(shape)))
    mask = pattern.spread(blocks)
    assert mask.shape == shape
    assert np.array_equal(pattern.marks(mask), blocks)
    full = pattern.pooled(mask)
    assert np.array_equal(full, blocks * pattern.block)  # all of a block, or nothing of it


@settings(deadline=None)
@given(st.integers(2, 6), SHAPES, st.data())
def test_exactly_n_of_each_m_and_the_best(m, sizes, data):
    n = data.draw(st.integers(1, m - 1))
    o, groups, k = sizes
    values = data.draw(
        arrays.arrays(np.float32, (o, groups * m, k), elements=st.floats(0, 9, width=16))
    )
    mask = Pattern(n=n, m=m).best_of_each(values, n)
    parts, marks = (a.reshape(o, groups, m, k) for a in (values, mask))
    assert (marks.sum(axis=2) == n).all()
    worst = np.where(marks, parts, np.inf).min(axis=2)
    best_left = np.where(marks, -np.inf, parts).max(axis=2)
    assert (worst >= best_left).all()
