import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetprune.errors import BudgetError, UsageError, WireError
from fleetprune.layout import Architecture, FlatLayout, Role, Segment, TensorSpec, tensor_index
from fleetprune_coordinator.aggregate import Aggregate, MomentSums, StatisticsMean, moments


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def vector(units: int) -> Architecture:
    """One vector whose elements are the units of one group."""
    spec = TensorSpec(name="w", role=Role.PARAMETER, axes=((Segment(group="g", units=units),),))
    return Architecture(groups={"g": units}, tensors=(spec,))


def concat() -> Architecture:
    """A matrix whose inputs are two groups end to end, one with blocks, and a norm."""
    a, b = Segment(group="a", units=3), Segment(group="b", units=2, block=2)
    fixed = Segment(units=2)
    return Architecture(
        groups={"a": 3, "b": 2},
        tensors=(
            TensorSpec(name="w", role=Role.PARAMETER, axes=((fixed,), (a, b))),
            TensorSpec(name="v", role=Role.PARAMETER, axes=((b,), (a,))),
            TensorSpec(name="bias", role=Role.PARAMETER, axes=((fixed,),)),
            TensorSpec(name="n.running_mean", role=Role.STATISTIC, axes=((a,),)),
            TensorSpec(name="n.running_var", role=Role.STATISTIC, axes=((a,),)),
            TensorSpec(name="m.running_mean", role=Role.STATISTIC, axes=((b,),)),
            TensorSpec(name="m.running_var", role=Role.STATISTIC, axes=((b,),)),
        ),
    )


def test_weighted_mean_of_one_shape() -> None:
    aggregate = Aggregate(vector(3), {"all": {"g": 3}})
    for update, weight in ((f32(1, 2, 3), 2), (f32(2, 4, 6), 4), (f32(1, 3, 5), 2)):
        aggregate.add("all", update, weight)
    deltas, coverage = aggregate.result()
    assert deltas["w"].tolist() == [1.5, 3.25, 5.0]
    assert coverage["w"].tolist() == [8, 8, 8]
    assert aggregate.counts == {"all": 3}


def test_each_element_is_divided_by_the_weight_that_covers_it() -> None:
    aggregate = Aggregate(vector(4), {"phone": {"g": 3}, "watch": {"g": 1}})
    aggregate.add("phone", f32(1, 2, 3), 1)
    aggregate.add("watch", f32(5), 3)
    deltas, coverage = aggregate.result()
    # (1*1 + 3*5) / 4; then the phone alone; nobody has the last one, which stays as it is.
    assert deltas["w"].tolist() == [4, 2, 3, 0]
    assert coverage["w"].tolist() == [4, 1, 1, 0]


def test_what_a_class_has_pruned_is_averaged_over_the_others() -> None:
    supports = {"phone": np.array([True, False, True])}
    aggregate = Aggregate(vector(4), {"phone": {"g": 3}, "hub": {"g": 2}}, supports)
    assert (aggregate.size("phone"), aggregate.size("hub")) == (2, 2)
    aggregate.add("phone", f32(4, 6), 1)  # its first and third
    aggregate.add("hub", f32(8, 9), 3)
    deltas, coverage = aggregate.result()
    # (1*4 + 3*8) / 4; the hub alone; the phone alone; nobody.
    assert deltas["w"].tolist() == [7, 9, 6, 0]
    assert coverage["w"].tolist() == [4, 3, 1, 0]


def test_what_every_class_has_pruned_keeps_its_value() -> None:
    supports = {"phone": np.array([True, False]), "hub": np.array([True, False])}
    aggregate = Aggregate(vector(2), {"phone": {"g": 2}, "hub": {"g": 2}}, supports)
    aggregate.add("phone", f32(4), 1)
    aggregate.add("hub", f32(8), 1)
    deltas, coverage = aggregate.result()
    assert deltas["w"].tolist() == [6, 0]
    assert coverage["w"].tolist() == [2, 0]


def test_an_update_is_as_long_as_what_is_left() -> None:
    aggregate = Aggregate(vector(3), {"phone": {"g": 3}}, {"phone": np.array([True, False, True])})
    assert aggregate.full("phone", f32(4, 6)).tolist() == [4, 0, 6]
    for wrong in (f32(4), f32(4, 5, 6), f32(), np.ones((2, 1), np.float32)):
        for refused in (
            lambda update: aggregate.add("phone", update, 1),
            lambda update: aggregate.full("phone", update),
        ):
            with pytest.raises(WireError) as e:
                refused(wrong)
            assert str(e.value) == f"update of phone of shape {wrong.shape}, expected (2,)"
    with pytest.raises(WireError, match=r"^update of phone: element 1 is not finite$"):
        aggregate.add("phone", f32(1, np.nan), 1)
    assert aggregate.result()[1]["w"].tolist() == [0, 0, 0]  # and no trace of it


def test_result_is_a_look_and_more_can_follow() -> None:
    aggregate = Aggregate(vector(1), {"all": {"g": 1}})
    assert aggregate.result()[0]["w"].tolist() == [0]
    aggregate.add("all", f32(2), 1)
    assert aggregate.result()[0]["w"].tolist() == [2]
    aggregate.add("all", f32(4), 1)
    assert aggregate.result()[0]["w"].tolist() == [3]


def test_wrong_updates_are_refused_and_leave_no_trace() -> None:
    aggregate = Aggregate(vector(3), {"all": {"g": 3}})
    cases = [
        (f32(1), "update of all of shape (1,), expected (3,)"),
        (np.ones((1, 3), np.float32), "update of all of shape (1, 3), expected (3,)"),
        (np.float32(1), "update of all of shape (), expected (3,)"),
        (f32(1, np.nan, 1), "update of all: element 1 is not finite"),
        (f32(1, 1, np.inf), "update of all: element 2 is not finite"),
    ]
    for update, message in cases:
        with pytest.raises(WireError) as caught:
            aggregate.add("all", update, 1)
        assert str(caught.value) == message
    assert aggregate.size("all") == 3
    with pytest.raises(UsageError, match=r"^update of shape 'tv', expected one of \['all'\]$"):
        aggregate.add("tv", f32(1, 1, 1), 1)
    for weight in (0, -1, np.nan, np.inf):
        with pytest.raises(UsageError, match=r"^weight .*, expected a positive finite number$"):
            aggregate.add("all", f32(1, 1, 1), weight)
    assert aggregate.result()[1]["w"].tolist() == [0, 0, 0]
    with pytest.raises(BudgetError, match=r"^group g: keep 4, expected 1\.\.3$"):
        Aggregate(vector(3), {"all": {"g": 4}})


SHAPES = {"big": {"a": 3, "b": 2}, "mid": {"a": 2, "b": 2}, "small": {"a": 1, "b": 1}}
REPORTS = st.lists(
    st.tuples(st.sampled_from(sorted(SHAPES)), st.integers(0, 2**32 - 1), st.floats(0.1, 1000)),
    max_size=8,
)


def updates(reports: list[tuple[str, int, float]]) -> list[tuple[str, np.ndarray, float]]:
    made = []
    for shape, seed, weight in reports:
        size = FlatLayout(concat(), SHAPES[shape], Role.PARAMETER).size
        made.append(
            (shape, np.random.default_rng(seed).normal(size=size).astype(np.float32), weight)
        )
    return made


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_any_supports_equal_brute_force(supports, seed) -> None:
    rng = np.random.default_rng(seed)
    marks = {f"c{i}": np.array(s) for i, s in enumerate(supports)}
    aggregate = Aggregate(vector(5), {name: {"g": 5} for name in marks}, marks)
    total, weights = np.zeros(5), np.zeros(5)
    for name, kept in marks.items():
        weight = float(rng.integers(1, 9))
        change = rng.integers(-9, 9, int(kept.sum())).astype(np.float32)
        aggregate.add(name, change, weight)
        total[kept] += weight * change
        weights[kept] += weight
    deltas, coverage = aggregate.result()
    mean = np.divide(total, weights, out=np.zeros(5), where=weights > 0)
    assert deltas["w"].tolist() == mean.astype(np.float32).tolist()
    assert coverage["w"].tolist() == weights.tolist()


@settings(max_examples=60, deadline=None)
@given(REPORTS, st.randoms(use_true_random=False))
def test_it_equals_brute_force_in_any_order(reports, random) -> None:
    architecture = concat()
    made = updates(reports)
    shuffled = list(made)
    random.shuffle(shuffled)
    first, second = Aggregate(architecture, SHAPES), Aggregate(architecture, SHAPES)
    for shape, update, weight in made:
        first.add(shape, update, weight)
    for shape, update, weight in shuffled:
        second.add(shape, update, weight)
    deltas, coverage = first.result()
    for name, delta in second.result()[0].items():
        np.testing.assert_allclose(delta, deltas[name], rtol=1e-6, atol=1e-7)
    for spec in architecture.role(Role.PARAMETER):
        # Every report as a dense tensor with a mask of what it covers.
        total = np.zeros(spec.shape(architecture.groups))
        weights = np.zeros_like(total)
        for shape, update, weight in made:
            part = FlatLayout(architecture, SHAPES[shape], Role.PARAMETER).split(update)[spec.name]
            dense, mask = np.zeros_like(total), np.zeros_like(total)
            index = tensor_index(spec, architecture.groups, SHAPES[shape])
            dense[index], mask[index] = part, 1
            total += weight * dense
            weights += weight * mask
        expected = np.where(weights > 0, total / np.where(weights > 0, weights, 1), 0)
        np.testing.assert_allclose(deltas[spec.name], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(coverage[spec.name], weights, rtol=1e-6)


def test_float64_keeps_what_float32_would_lose() -> None:
    aggregate = Aggregate(vector(1), {"all": {"g": 1}})
    aggregate.add("all", f32(2**25), 1)
    for _ in range(3):
        aggregate.add("all", f32(1), 1)  # 2**25 + 1 is 2**25 in float32
    assert aggregate.result()[0]["w"][0] == (2**25 + 3) / 4 != 2**25 / 4


def test_statistics_are_averaged_per_class() -> None:
    mean = StatisticsMean(concat(), {"a": 1, "b": 1})
    assert mean.result() is None
    mean.add(f32(1, 2, 3, 4, 5, 6), 1)
    mean.add(f32(5, 6, 7, 8, 9, 10), 3)
    result = mean.result()
    assert result is not None
    assert {n: v.tolist() for n, v in result.items()} == {
        "n.running_mean": [4],
        "n.running_var": [5],
        "m.running_mean": [6, 7],
        "m.running_var": [8, 9],
    }
    with pytest.raises(WireError, match=r"^statistics of shape \(1,\), expected \(6,\)$"):
        mean.add(f32(1), 1)
    with pytest.raises(
        WireError, match=r"^statistics: n\.running_var has a negative variance -1\.0$"
    ):
        mean.add(f32(0, -1, 0, 0, 0, 0), 1)
    assert mean.result()["n.running_mean"].tolist() == [4]  # type: ignore[index]


def test_moments_in_the_head() -> None:
    # 1, 2, 3: mean 2, variance 2/3, unbiased 1. 5, 5: no variance. 7 alone: none either.
    mean, unbiased, biased = moments(f32(6, 10, 7), f32(14, 50, 49), f32(3, 2, 1))
    assert mean.tolist() == [2, 5, 7]
    assert unbiased.tolist() == [1, 0, 0]
    np.testing.assert_allclose(biased, [2 / 3, 0, 0], rtol=1e-6)


def test_moments_never_give_a_negative_variance() -> None:
    _, unbiased, biased = moments(f32(3), f32(8.999999), f32(1))
    assert (unbiased[0], biased[0]) == (0, 0)


def test_moments_refuse_impossible_sums() -> None:
    for args, message in [
        ((f32(1), f32(1, 1), f32(1)), "square sums of shape (2,), expected (1,)"),
        ((f32(1), f32(1), f32(0)), "counts: 0.0, expected at least 1"),
        ((f32(1), f32(-1), f32(1)), "square sums: -1.0, expected at least 0"),
        ((f32(np.nan), f32(1), f32(1)), "sums: element 0 is not finite"),
    ]:
        with pytest.raises(WireError) as caught:
            moments(*args)
        assert str(caught.value) == message


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_summed_moments_are_those_of_the_pooled_samples(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    keep = {"a": 2, "b": 1}
    sums = MomentSums(concat(), keep)
    pool_n, pool_m = [], []
    for size in sizes:
        n, m = rng.normal(3, 2, (size, 2)), rng.normal(-1, 1, (4 * size, 2))  # 4 positions
        pool_n.append(n)
        pool_m.append(m)
        sums.add(
            np.concatenate([n.sum(0), m.sum(0)]).astype(np.float32),
            np.concatenate([(n**2).sum(0), (m**2).sum(0)]).astype(np.float32),
            f32(len(n), len(m)),
        )
    result = sums.result()
    assert result is not None
    for name, pool in (("n", np.concatenate(pool_n)), ("m", np.concatenate(pool_m))):
        np.testing.assert_allclose(result[f"{name}.running_mean"], pool.mean(0), atol=1e-4)
        if len(pool) > 1:
            variance = pool.var(0, ddof=1)
            np.testing.assert_allclose(result[f"{name}.running_var"], variance, atol=1e-3)


def test_moment_sums_refuse_what_does_not_fit() -> None:
    sums = MomentSums(concat(), {"a": 1, "b": 1})
    assert sums.result() is None
    good = f32(1, 1, 1)
    for args, message in [
        ((f32(1), good, f32(1, 1)), "bn_sum of shape (1,), expected (3,)"),
        ((good, f32(1), f32(1, 1)), "bn_sumsq of shape (1,), expected (3,)"),
        ((good, good, f32(1)), "bn_count of shape (1,), expected (2,)"),
        ((good, good, f32(1, 0)), "bn_count: 0.0, expected at least 1"),
        ((good, f32(1, -1, 1), f32(1, 1)), "bn_sumsq: -1.0, expected at least 0"),
    ]:
        with pytest.raises(WireError) as caught:
            sums.add(*args)
        assert str(caught.value) == message
    assert sums.result() is None
