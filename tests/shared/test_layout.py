import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fleetprune.errors import BudgetError, WireError
from fleetprune.layout import (
    Activation,
    Architecture,
    FlatLayout,
    Gate,
    Role,
    Segment,
    TensorSpec,
    axis_indices,
    cut,
    reorder,
    tensor_index,
    unit_slices,
)


def tensor(name, *axes, role=Role.PARAMETER):
    return TensorSpec(name=name, role=role, axes=axes)


A = Segment(group="a", units=3)
A_BLOCKS = Segment(group="a", units=3, block=2)
B = Segment(group="b", units=2)
FIXED = Segment(units=2)

NET = Architecture(
    groups={"a": 3, "b": 2},
    tensors=(
        tensor("w", (A,), (FIXED,)),
        tensor("mix", (B,), (A_BLOCKS, FIXED, B)),
        tensor("scale"),
        tensor("mean", (A,), role=Role.STATISTIC),
    ),
)


def numbered(spec, keep):
    return np.arange(spec.size(keep), dtype=np.float32).reshape(spec.shape(keep))


def test_shapes():
    assert [t.shape({"a": 3, "b": 2}) for t in NET.tensors] == [(3, 2), (2, 10), (), (3,)]
    assert [t.shape({"a": 1, "b": 2}) for t in NET.tensors] == [(1, 2), (2, 6), (), (1,)]
    assert [t.size({"a": 1, "b": 2}) for t in NET.tensors] == [2, 12, 1, 1]
    assert [t.groups() for t in NET.tensors] == [{"a"}, {"a", "b"}, set(), {"a"}]


def test_dense_and_roles():
    assert NET.dense == {"a": 3, "b": 2}
    assert [t.name for t in NET.role(Role.PARAMETER)] == ["w", "mix", "scale"]
    assert [t.name for t in NET.role(Role.STATISTIC)] == ["mean"]
    assert NET.tensor("mix").name == "mix"
    with pytest.raises(KeyError, match=r"^'nothing'$"):
        NET.tensor("nothing")


def test_axis_indices():
    axis = (A_BLOCKS, FIXED, B)  # a0 a0 a1 a1 a2 a2 - - b0 b1
    wide = {"a": 3, "b": 2}
    assert axis_indices(axis, wide, wide).tolist() == list(range(10))
    assert axis_indices(axis, wide, {"a": 2, "b": 1}).tolist() == [0, 1, 2, 3, 6, 7, 8]
    order = {"a": np.array([2, 0, 1]), "b": np.array([1, 0])}
    assert axis_indices(axis, wide, {"a": 2, "b": 1}, order).tolist() == [4, 5, 0, 1, 6, 7, 9]
    # From a model that is narrower already: a0 a0 a1 a1 - - b0
    narrow = {"a": 2, "b": 1}
    assert axis_indices(axis, narrow, {"a": 1, "b": 1}).tolist() == [0, 1, 4, 5, 6]


def test_a_single_segment_is_cut_by_slices():
    index = tensor_index(NET.tensor("w"), NET.groups, {"a": 2, "b": 1})
    assert index == (slice(0, 2), slice(0, 2))
    dense = numbered(NET.tensor("w"), NET.dense)
    assert np.shares_memory(dense, dense[index])


def test_cut():
    tensors = {t.name: numbered(t, NET.dense) for t in NET.tensors}
    small = cut(NET, tensors, {"a": 1, "b": 1}, Role.PARAMETER)
    assert list(small) == ["w", "mix", "scale"]
    assert small["w"].tolist() == [[0, 1]]
    assert small["mix"].tolist() == [[0, 1, 6, 7, 8]]
    assert small["scale"].shape == ()
    small["w"][:] = -1
    assert tensors["w"][0, 0] == 0
    assert cut(NET, tensors, {"a": 2, "b": 1}, Role.STATISTIC)["mean"].tolist() == [0, 1]


def test_reorder():
    order = {"a": np.array([2, 0, 1]), "b": np.array([1, 0])}
    w = numbered(NET.tensor("w"), NET.dense)  # [[0, 1], [2, 3], [4, 5]]
    assert reorder(NET.tensor("w"), w, NET.dense, order).tolist() == [[4, 5], [0, 1], [2, 3]]
    mix = numbered(NET.tensor("mix"), NET.dense)
    moved = reorder(NET.tensor("mix"), mix, NET.dense, order)
    assert moved[0].tolist() == [14, 15, 10, 11, 12, 13, 16, 17, 19, 18]
    scale = np.array(3, np.float32)
    copy = reorder(NET.tensor("scale"), scale, NET.dense, order)
    assert copy == 3
    assert not np.shares_memory(copy, scale)


def test_flat_layout():
    layout = FlatLayout(NET, {"a": 1, "b": 1}, Role.PARAMETER)
    assert layout.shapes == ((1, 2), (1, 5), ())
    assert layout.offsets == (0, 2, 7, 8)
    assert layout.size == 8
    flat = np.arange(8, dtype=np.float32)
    parts = layout.split(flat)
    assert parts["w"].tolist() == [[0, 1]]
    assert parts["mix"].tolist() == [[2, 3, 4, 5, 6]]
    assert parts["scale"] == 7
    parts["w"][0, 0] = 9
    assert flat[0] == 9  # a view
    assert layout.join(parts).tolist() == flat.tolist()


def test_flat_layout_of_nothing():
    empty = FlatLayout(Architecture(groups={}, tensors=()), {}, Role.STATISTIC)
    assert (empty.size, empty.split(np.zeros(0, np.float32))) == (0, {})
    assert empty.join({}).shape == (0,)


def test_unit_slices():
    assert dict(unit_slices(NET, {"a": 3, "b": 2})) == {"a": slice(0, 3), "b": slice(3, 5)}
    assert dict(unit_slices(NET, {"a": 1, "b": 2})) == {"a": slice(0, 1), "b": slice(1, 3)}


def test_identity():
    assert {g: o.tolist() for g, o in NET.identity().items()} == {"a": [0, 1, 2], "b": [0, 1]}


def test_activation():
    buffer = Activation(fixed=5, per_unit={"a": 10})
    assert buffer.size({"a": 2, "b": 1}) == 25


def test_plain_data_survives_json():
    net = NET.model_copy(
        update={
            "gates": {"a": (Gate(tensor="w", axis=0),)},
            "activations": (Activation(fixed=1),),
            "live": ((0,),),
        }
    )
    assert Architecture.model_validate_json(net.model_dump_json()) == net


def message(kind, call):
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_keep_count_errors():
    for keep, expected in (
        ({"a": 1}, "keep counts for ['a'], expected ['a', 'b']"),
        ({"a": 1, "b": 1, "c": 1}, "keep counts for ['a', 'b', 'c'], expected ['a', 'b']"),
        ({"a": 0, "b": 1}, "group a: keep 0, expected 1..3"),
        ({"a": 1, "b": 3}, "group b: keep 3, expected 1..2"),
    ):
        assert message(BudgetError, lambda keep=keep: NET.check_keep(keep)) == expected
        assert (
            message(BudgetError, lambda keep=keep: cut(NET, {}, keep, Role.PARAMETER)) == expected
        )
        assert (
            message(BudgetError, lambda keep=keep: FlatLayout(NET, keep, Role.PARAMETER))
            == expected
        )


def test_vector_errors():
    layout = FlatLayout(NET, {"a": 1, "b": 1}, Role.PARAMETER)
    assert (
        message(WireError, lambda: layout.split(np.zeros(9, np.float32)))
        == "vector of shape (9,), expected (8,)"
    )
    assert (
        message(WireError, lambda: layout.split(np.zeros((1, 8), np.float32)))
        == "vector of shape (1, 8), expected (8,)"
    )
    parts = layout.split(np.zeros(8, np.float32))
    assert (
        message(WireError, lambda: layout.join({**parts, "w": np.zeros((1, 1), np.float32)}))
        == "w: shape (1, 1), expected (1, 2)"
    )


def test_description_errors():
    def reason(**fields):
        with pytest.raises(ValidationError) as caught:
            Architecture(**fields)
        return caught.value.errors()[0]["msg"]

    assert (
        reason(groups={"b": 2}, tensors=(tensor("w", (A,)),))
        == "Value error, tensors refer to unknown groups ['a']"
    )
    assert (
        reason(groups={}, tensors=(), activations=(Activation(per_unit={"c": 1}),))
        == "Value error, tensors refer to unknown groups ['c']"
    )
    assert (
        reason(groups={"a": 4}, tensors=(tensor("w", (A,)),))
        == "Value error, w: segment of 3 units, but group a has 4"
    )
    with pytest.raises(ValidationError):
        Segment(units=0)
    with pytest.raises(ValidationError):
        Segment(units=1, colour="red")


@st.composite
def nets(draw):
    groups = {g: draw(st.integers(1, 5)) for g in ("a", "b")}

    def segment():
        name = draw(st.sampled_from([None, "a", "b"]))
        units = draw(st.integers(1, 3)) if name is None else groups[name]
        return Segment(group=name, units=units, block=draw(st.integers(1, 3)))

    tensors = tuple(
        tensor(
            f"t{i}",
            *(
                tuple(segment() for _ in range(draw(st.integers(1, 2))))
                for _ in range(draw(st.integers(0, 3)))
            ),
            role=draw(st.sampled_from(Role)),
        )
        for i in range(draw(st.integers(1, 3)))
    )
    keep = {g: draw(st.integers(1, n)) for g, n in groups.items()}
    order = {g: np.array(draw(st.permutations(range(n)))) for g, n in groups.items()}
    return Architecture(groups=groups, tensors=tensors), keep, order


@settings(deadline=None)
@given(nets())
def test_permute_then_prefix_selects(case):
    net, keep, order = case
    for spec in net.tensors:
        dense = numbered(spec, net.dense)
        prefix = reorder(spec, dense, net.dense, order)[tensor_index(spec, net.dense, keep)]
        chosen = dense
        for i, axis in enumerate(spec.axes):
            chosen = chosen.take(axis_indices(axis, net.dense, keep, order), axis=i)
        np.testing.assert_array_equal(prefix, chosen)
        assert prefix.shape == spec.shape(keep)


@settings(deadline=None)
@given(nets())
def test_cutting_twice_is_cutting_once(case):
    net, keep, _ = case
    wider = {g: max(keep[g], n - 1) for g, n in net.groups.items()}
    for spec in net.tensors:
        dense = numbered(spec, net.dense)
        twice = dense[tensor_index(spec, net.dense, wider)][tensor_index(spec, wider, keep)]
        np.testing.assert_array_equal(twice, dense[tensor_index(spec, net.dense, keep)])


@settings(deadline=None)
@given(nets())
def test_split_and_join_are_inverse(case):
    net, keep, _ = case
    for role in Role:
        layout = FlatLayout(net, keep, role)
        flat = np.arange(layout.size, dtype=np.float32)
        parts = layout.split(flat)
        assert [p.shape for p in parts.values()] == list(layout.shapes)
        np.testing.assert_array_equal(layout.join(parts), flat)
