import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from fleetprune import delta as delta_format
from fleetprune.delta import apply
from fleetprune.errors import GraphError
from fleetprune.patterns import SINGLE, Pattern
from fleetprune_coordinator import delta_maker
from fleetprune_coordinator.delta_maker import make
from fleetprune_coordinator.graphs import export_infer
from fleetprune_coordinator.grid_values import on_grid
from fleetprune_coordinator.quantise import no_ranges, quantise
from fleetprune_coordinator.selfcheck import randomised
from fleetprune_coordinator.sparse_file import pack
from fleetprune_coordinator.tensor_places import places
from fleetprune_sim.models import digits_cnn


@pytest.fixture(scope="module")
def exact():
    """A trained-looking network's file, in float32."""
    torch.manual_seed(0)
    return export_infer(randomised(digits_cnn(), torch.float32), torch.zeros(1, 1, 8, 8)).onnx


def changed(file, by):
    """The file with every float tensor changed by `by(name, array)`."""
    proto = onnx.load_from_string(file)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = by(tensor.name, numpy_helper.to_array(tensor).copy())
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    return proto.SerializeToString(deterministic=True)


def one_more_round(file, share=0.01, seed=1):
    rng = np.random.default_rng(seed)
    return changed(
        file, lambda _, a: a + (share * a.std() * rng.normal(size=a.shape)).astype(np.float32)
    )


def reordered(file):
    """The two first convolutions' units in another order, as a new mask leaves them."""
    names = [t.name for t in onnx.load_from_string(file).graph.initializer]
    order = np.arange(16)
    order[[1, 5, 9]] = 5, 9, 1
    conv, bias, after = names[2], names[3], names[4]

    def by(name, array):
        size = array.shape[0] if name in (conv, bias) else None
        if size is not None:
            moved = np.arange(size)
            moved[:16] = order
            return array[moved]
        if name == after:
            moved = np.arange(array.shape[1])
            moved[:16] = order
            return array[:, moved]
        return array

    return changed(file, by)


def without_small_weights(file, share=0.6):
    def by(_, array):
        if array.ndim < 2:
            return array
        return np.where(np.abs(array) < np.quantile(np.abs(array), share), np.float32(0), array)

    return changed(file, by)


def share(base, target):
    delta = make(base, target)
    assert apply(base, delta, len(target)) == target
    return len(delta) / len(target)


def test_a_file_is_nothing_but_itself(exact):
    file = on_grid(exact)
    assert share(file, file) < 0.01


def test_one_more_round_is_less_than_a_third(exact):
    base = on_grid(exact)
    assert share(base, on_grid(one_more_round(exact))) < 0.15
    assert share(base, on_grid(one_more_round(exact, 0.1))) < 0.25


def test_weights_that_were_not_rounded_take_nearly_the_file(exact):
    assert share(exact, one_more_round(exact)) > 0.6


def test_units_in_another_order_take_hardly_more(exact):
    base, later = on_grid(exact), on_grid(one_more_round(exact))
    assert share(base, reordered(later)) < share(base, later) + 0.01


def test_a_delta_goes_from_any_release_to_any_other(exact):
    files = [on_grid(one_more_round(exact, seed=s)) for s in range(3)]
    assert share(files[0], files[2]) < 0.2
    assert share(files[2], files[1]) < 0.2


def test_int8(exact):
    base, target = (quantise(f, no_ranges(f)) for f in (exact, one_more_round(exact)))
    assert share(base, target) < 0.2


@pytest.mark.parametrize("pattern", [SINGLE, Pattern.parse("4x1")])
@pytest.mark.parametrize("share_cut", [0.6, 0.97])
@pytest.mark.parametrize("int8", [False, True])
def test_files_without_zeros(exact, pattern, share_cut, int8):
    def file(model):
        model = without_small_weights(model, share_cut)
        return pack(quantise(model, no_ranges(model)) if int8 else on_grid(model), pattern)

    base, target = file(exact), file(one_more_round(exact))
    forms = {place.side.form.name for place in places(target)[0]}
    assert forms > {"DENSE"}
    assert share(base, target) < 0.45


def test_a_weight_may_be_stored_otherwise_than_before(exact):
    base, target = on_grid(exact), pack(on_grid(without_small_weights(exact, 0.95)))
    assert share(base, target) < 0.45
    assert share(target, base) < 0.45


def test_files_of_two_precisions_have_a_delta_that_is_no_use(exact):
    base = quantise(exact, no_ranges(exact))
    assert share(base, on_grid(exact)) < 0.6
    assert share(on_grid(exact), base) > 0.6


def test_places_are_where_the_numbers_are(exact):
    file = on_grid(exact)
    found, followers = places(file)
    for place in found:
        assert place.side.read(file, place.kind).tobytes() == place.array.tobytes()
    names = [t.name for t in onnx.load_from_string(file).graph.initializer]
    assert followers[names[1]] == names[0]


def test_a_delta_that_makes_something_else_is_not_handed_out(exact, monkeypatch):
    base = on_grid(exact)
    monkeypatch.setattr(delta_maker, "apply", lambda base, delta, most: base)
    with pytest.raises(GraphError, match=r"^no delta between these two files: applying it makes"):
        make(base, on_grid(one_more_round(exact)))


def test_deltas_are_the_same_each_time(exact):
    base, target = on_grid(exact), on_grid(one_more_round(exact))
    assert make(base, target) == make(base, target)
    assert make(base, target)[:6] == delta_format.MAGIC + b"\1\0"
