import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetprune.products import Product, Sums, Walk

# of groups a and b: 2 a + 1, b, and 5
A, B, FIVE = (2, 0, 1), (0, 1, 0), (0, 0, 5)


def at(sums, *counts):
    return sums.at(np.array(counts, np.int64)).tolist()


def test_a_sum_of_products():
    sums = Sums(2, 2, [Product((A, B), (1, 10)), Product((B,), (100, 0)), Product((), (7, 7))])
    # a=3, b=4: (2*3+1) * 4 = 28, 4, 1
    assert at(sums, 3, 4) == [28 + 400 + 7, 280 + 7]


def test_lengths_are_rounded_up_to_their_block_but_not_padding():
    sums = Sums(2, 1, [Product((A, B), (1,), block=4), Product((B,), (1,), block=8)])
    # 7 -> 8 and 5 -> 8; 5 -> 8
    assert at(sums, 3, 5) == [64 + 8]
    assert at(sums, 4, 9) == [12 * 12 + 16]


def test_equal_products_are_added_up():
    sums = Sums(2, 1, [Product((A, B), (1,)), Product((B, A), (2,)), Product((B, A), (1,), 4)])
    assert sums.weights.tolist() == [[3, 1]]


def test_nothing_at_all():
    assert at(Sums(0, 2, [])) == [0, 0]
    assert at(Sums(1, 1, [Product((), (5,))]), 3) == [5]


def test_what_a_step_adds():
    sums = Sums(2, 1, [Product((A, B), (1,)), Product((FIVE,), (1,))])
    walk = Walk(sums, np.array([3, 4]), np.array([1, -2]))
    assert walk.figures.tolist() == [28 + 5]
    assert walk.added.tolist() == [[2 * 4, -7 * 2]]
    walk.move(0, 2)
    assert walk.figures.tolist() == [9 * 4 + 5]
    assert walk.added.tolist() == [[4 * 4, -9 * 2]]


rows = st.tuples(*[st.integers(0, 3)] * 3, st.integers(0, 4))
products = st.builds(
    Product,
    st.lists(rows, max_size=3).map(tuple),
    st.tuples(st.integers(-5, 5), st.integers(0, 9)),
    st.sampled_from([1, 1, 4, 16]),
)


@settings(deadline=None)
@given(
    st.lists(products, max_size=6),
    st.lists(st.tuples(st.integers(0, 2), st.integers(-2, 3)), max_size=6),
)
def test_a_walk_is_where_it_says(parts, moves):
    sums = Sums(3, 2, parts)
    counts, steps = np.array([9, 7, 8], np.int64), np.array([1, -1, 2], np.int64)
    walk = Walk(sums, counts, steps)
    for group, then in [*moves, (0, 0)]:
        assert walk.figures.tolist() == sums.at(counts).tolist()
        for g in range(3):
            after = counts.copy()
            after[g] += steps[g]
            assert walk.added[:, g].tolist() == (sums.at(after) - sums.at(counts)).tolist()
        counts[group] += steps[group]
        steps[group] = then
        walk.move(group, then)
