import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetprune.costs import (
    CostModel,
    Costs,
    artifact_bytes,
    costs,
    macs,
    parameters,
    peak_activation_bytes,
)
from fleetprune.errors import BudgetError
from fleetprune.layout import Activation, Architecture, Role, Segment, TensorSpec
from fleetprune.products import Product


def fixed(units):
    return (Segment(units=units),)


A = (Segment(group="a", units=2),)
B = (Segment(group="b", units=3),)
BOTH = (Segment(group="a", units=2), Segment(group="b", units=3))
FLAT = (Segment(group="a", units=2, block=4), Segment(units=1), Segment(group="b", units=3))

NET = Architecture(
    groups={"a": 2, "b": 3},
    tensors=(
        TensorSpec(name="conv", role=Role.PARAMETER, axes=(A, fixed(1), fixed(3)), positions=10),
        TensorSpec(name="gamma", role=Role.PARAMETER, axes=(A,), artifact_bytes=0),
        TensorSpec(name="mix", role=Role.PARAMETER, axes=(B, BOTH), positions=2, artifact_bytes=1),
        TensorSpec(name="flat", role=Role.PARAMETER, axes=(fixed(2), FLAT), positions=1),
        TensorSpec(name="scale", role=Role.PARAMETER, axes=()),
        TensorSpec(name="mean", role=Role.STATISTIC, axes=(A,), artifact_bytes=4),
    ),
    activations=(
        Activation(fixed=100),
        Activation(per_unit={"a": 40}),
        Activation(fixed=8, per_unit={"a": 10, "b": 50}),
    ),
    live=((0, 1), (1,), (1, 2), (2,), (0,)),
    overhead_bytes=1000,
)


def test_golden_numbers():
    # a=2, b=3: sizes are conv 2*3, gamma 2, mix 3*5, flat 2*(8+1+3), scale 1, mean 2.
    weights = 4 * 6 + 0 * 2 + 1 * 15 + 4 * 24 + 4 * 1 + 4 * 2
    assert costs(NET, {"a": 2, "b": 3}) == Costs(
        artifact_bytes=1000 + weights,
        macs=10 * 6 + 2 * 15 + 24,
        peak_activation_bytes=80 + 8 + 20 + 150,
    )
    # a=1, b=1: sizes are conv 3, gamma 1, mix 1*2, flat 2*(4+1+1), scale 1, mean 1.
    assert costs(NET, {"a": 1, "b": 1}) == Costs(
        artifact_bytes=1000 + 4 * 3 + 2 + 4 * 12 + 4 + 4,
        macs=10 * 3 + 2 * 2 + 12,
        peak_activation_bytes=100 + 40,
    )


def test_each_cost_by_itself():
    keep = {"a": 1, "b": 2}
    assert macs(NET, keep) == costs(NET, keep).macs == 30 + 12 + 14
    assert artifact_bytes(NET, keep) == costs(NET, keep).artifact_bytes
    assert peak_activation_bytes(NET, keep) == costs(NET, keep).peak_activation_bytes == 158
    assert parameters(NET, keep) == 3 + 1 + 2 * 3 + 2 * (4 + 1 + 2) + 1


def test_statistics_are_no_parameters():
    assert parameters(NET, NET.dense) == 6 + 2 + 15 + 24 + 1


def test_figures_are_plain_integers():
    for figure in (parameters(NET, NET.dense), *vars_of(costs(NET, NET.dense))):
        assert type(figure) is int


def vars_of(found):
    return (found.artifact_bytes, found.macs, found.peak_activation_bytes)


def test_a_model_without_anything():
    assert costs(Architecture(groups={}, tensors=()), {}) == Costs(0, 0, 0)


def test_large_models_do_not_overflow():
    wide = (Segment(group="a", units=100_000),)
    net = Architecture(
        groups={"a": 100_000},
        tensors=(TensorSpec(name="w", role=Role.PARAMETER, axes=(wide, wide), positions=10_000),),
    )
    assert macs(net, {"a": 100_000}) == 10**14


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"a": 3, "b": 1}, "group a: keep 3, expected 1..2"),
        ({"a": 1, "b": 0}, "group b: keep 0, expected 1..3"),
        ({"a": 1}, "keep counts for ['a'], expected ['a', 'b']"),
    ],
)
@pytest.mark.parametrize("ask", [costs, macs, parameters, artifact_bytes, peak_activation_bytes])
def test_errors(ask, keep, message):
    with pytest.raises(BudgetError) as caught:
        ask(NET, keep)
    assert str(caught.value) == message


GROUPS = ("a", "b", "c")


@st.composite
def architectures(draw):
    groups = {g: draw(st.integers(1, 6)) for g in GROUPS}

    def segment():
        name = draw(st.sampled_from([None, *GROUPS]))
        units = draw(st.integers(1, 4)) if name is None else groups[name]
        return Segment(group=name, units=units, block=draw(st.integers(1, 3)))

    def axis():
        return tuple(segment() for _ in range(draw(st.integers(1, 3))))

    tensors = tuple(
        TensorSpec(
            name=f"t{i}",
            role=draw(st.sampled_from(Role)),
            axes=tuple(axis() for _ in range(draw(st.integers(0, 3)))),
            positions=draw(st.integers(0, 9)),
            artifact_bytes=draw(st.sampled_from([0, 1, 4])),
        )
        for i in range(draw(st.integers(0, 5)))
    )
    buffers = tuple(
        Activation(
            fixed=draw(st.integers(0, 50)),
            per_unit=draw(st.dictionaries(st.sampled_from(GROUPS), st.integers(0, 20))),
        )
        for _ in range(draw(st.integers(1, 5)))
    )
    ids = st.sets(st.integers(0, len(buffers) - 1)).map(sorted).map(tuple)
    live = tuple(draw(st.lists(ids, max_size=6)))
    net = Architecture(groups=groups, tensors=tensors, activations=buffers, live=live)
    return net, {g: draw(st.integers(1, n)) for g, n in groups.items()}


@settings(deadline=None)
@given(architectures())
def test_matrices_agree_with_the_description(case):
    net, keep = case
    model = CostModel(net)
    assert model.costs(keep) == Costs(
        artifact_bytes=sum(t.artifact_bytes * t.size(keep) for t in net.tensors),
        macs=sum(t.positions * t.size(keep) for t in net.tensors),
        peak_activation_bytes=max(
            (sum(net.activations[b].size(keep) for b in ids) for ids in net.live), default=0
        ),
    )
    assert model.parameters(keep) == sum(t.size(keep) for t in net.role(Role.PARAMETER))


@settings(deadline=None)
@given(architectures(), st.sampled_from([1, -1]), st.lists(st.integers(0, 2), max_size=4))
def test_a_walk_knows_what_each_step_adds(case, direction, moves):
    net, keep = case
    model, keep = CostModel(net), dict(keep)

    def ahead(group):
        return direction if 1 <= keep[group] + direction <= net.groups[group] else 0

    def figures(counts):
        found = model.costs(counts)
        return [found.artifact_bytes, found.peak_activation_bytes, found.macs, 0]

    walk = model.walk(model.vector(keep), np.array([ahead(g) for g in GROUPS]))
    for move in [*moves, 0]:
        now = figures(keep)
        assert walk.figures() == now
        assert model.figures(model.vector(keep)) == now
        for i, g in enumerate(GROUPS):
            after = figures({**keep, g: keep[g] + ahead(g)})
            assert [int(walk.added(figure)[i]) for figure in range(4)] == [
                b - a for a, b in zip(now, after, strict=True)
            ]
        keep[GROUPS[move]] += ahead(GROUPS[move])
        walk.move(move, ahead(GROUPS[move]))


def test_a_latency_is_one_more_figure():
    model = CostModel(NET).with_latency([Product(((1, 0, 0),), (100,)), Product((), (7,))])
    assert model.figures(model.vector({"a": 2, "b": 3}))[-1] == 207
    assert model.costs(NET.dense) == costs(NET, NET.dense)
