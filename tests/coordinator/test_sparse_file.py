import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from fleetprune.errors import GraphError
from fleetprune.patterns import SINGLE, Pattern
from fleetprune.weight_masks import decoder_bytes, packed_bytes
from fleetprune_coordinator import artifacts
from fleetprune_coordinator.artifacts import Artifact, golden, predict, without_zeros
from fleetprune_coordinator.graphs import export_infer
from fleetprune_coordinator.onnx_costs import file_costs
from fleetprune_coordinator.quantise import no_ranges, quantise
from fleetprune_coordinator.sparse_file import pack
from fleetprune_coordinator.weight_pruning import SHARED_BYTES
from fleetprune_sim.models import ds_cnn, mobilenet_v2, resnet8, transformer

FOUR = Pattern.parse("4x1")


def file(*arrays, name="w"):
    """A file that gives back its constants."""
    nodes = [helper.make_node("Identity", [f"{name}{i}"], [f"y{i}"]) for i in range(len(arrays))]
    outputs = [
        helper.make_tensor_value_info(
            f"y{i}", helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        for i, array in enumerate(arrays)
    ]
    held = [numpy_helper.from_array(array, f"{name}{i}") for i, array in enumerate(arrays)]
    graph = helper.make_graph(nodes, "g", [], outputs, held)
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()


def run(data, optimised, feed=None):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(
        None, feed or {}
    )


def unpacked(data, *arrays):
    """Both ways of running a file give exactly these arrays."""
    for optimised in (True, False):
        for got, wanted in zip(run(data, optimised), arrays, strict=True):
            assert got.dtype == wanted.dtype
            assert got.shape == wanted.shape
            assert got.tobytes() == wanted.tobytes()


def operators(data):
    return [node.op_type for node in onnx.load_from_string(data).graph.node]


def stored(data):
    """Bytes of a file's constants."""
    return sum(
        numpy_helper.to_array(t).nbytes for t in onnx.load_from_string(data).graph.initializer
    )


def thin(shape, share, dtype=np.float32, pattern=SINGLE, seed=0):
    """Whole numbers 1..99 of which a share is left, and the marks of their blocks."""
    rng = np.random.default_rng(seed)
    if pattern.m:
        marks = pattern.best_of_each(rng.random(shape), pattern.n)
    else:
        marks = (
            rng.random(pattern.grid(shape)) < share if len(shape) > 1 else rng.random(shape) < share
        )
    mask = marks if len(shape) == 1 else pattern.spread(marks)
    return np.where(mask, rng.integers(1, 100, shape), 0).astype(dtype), marks


# ---- by hand


def test_half_of_a_weight_is_marked_bit_by_bit():
    array, marks = thin((64, 64), 0.5)
    packed = pack(file(array))
    kept = int(marks.sum())
    # 512 bytes of marks, a row of zeros and those that are left.
    assert 512 + 4 * (kept + 1) <= stored(packed) <= 512 + 4 * (kept + 1) + 100
    assert operators(packed)[:2] == ["Cast", "Div"]
    unpacked(packed, array)


def test_few_of_a_weight_are_reached_by_steps():
    array = np.zeros((64, 64), np.float32)
    array[0, 3], array[1, 1], array[63, 63] = 5, -6, 7
    packed = pack(file(array))
    # 3 and 62 steps; 4030 are 15 steps of 255, each with a zero, and one of 205.
    assert 18 * 5 <= stored(packed) <= 18 * 5 + 60
    assert "ScatterND" in operators(packed)
    unpacked(packed, array)


@pytest.mark.parametrize("gap", [0, 1, 2, 254, 255, 256, 257, 509, 510, 511, 4095])
def test_gaps_of_any_length(gap):
    array = np.zeros(8000, np.float32)
    array[gap], array[min(2 * gap + 1, 7999)], array[7999] = 1, 2, 3
    packed = pack(file(array))
    assert "ScatterND" in operators(packed)
    unpacked(packed, array)


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.int32])
@pytest.mark.parametrize("shape", [(4001,), (67, 60), (16, 40, 7), (9, 8, 8, 8), (8, 8, 4, 4, 4)])
def test_nothing_at_all_is_left(shape, dtype):
    array = np.zeros(shape, dtype)
    packed = pack(file(array), FOUR)
    assert stored(packed) < 120
    unpacked(packed, array)


def test_one_that_is_whole_stays_as_it_is():
    array = np.arange(1, 4097, dtype=np.float32).reshape(64, 64)
    given_file = file(array)
    assert pack(given_file) is given_file


def test_a_weight_shorter_than_what_unpacks_it_stays_as_it_is():
    given_file = file(np.zeros(decoder_bytes(1) // 4, np.float32))
    assert pack(given_file) is given_file


def test_blocks_are_stored_whole():
    array, marks = thin((64, 64), 0.25, pattern=FOUR)
    packed = pack(file(array), FOUR)
    assert 16 * int(marks.sum()) < stored(packed) < 16 * int(marks.sum()) + 128 + 16 + 160
    assert "Transpose" in operators(packed)
    unpacked(packed, array)


def test_a_transposed_weight_is_packed_in_its_blocks_too():
    """As files hold what multiplies from the right."""
    array, _ = thin((64, 64), 0.25, pattern=FOUR)
    as_it_was, turned = pack(file(array), FOUR), pack(file(np.ascontiguousarray(array.T)), FOUR)
    assert abs(len(as_it_was) - len(turned)) < 10
    unpacked(turned, array.T)


def test_a_weight_pruned_otherwise_goes_weight_by_weight():
    array, _ = thin((66, 66), 0.1)  # 4 divides neither side
    packed = pack(file(array), FOUR)
    assert len(packed) == len(pack(file(array)))
    unpacked(packed, array)


def test_only_what_is_shorter_packed_is_packed():
    thinned, _ = thin((64, 64), 0.1)
    whole = np.arange(1, 4097, dtype=np.float32)
    packed = pack(file(thinned, whole))
    unpacked(packed, thinned, whole)
    names = {t.name for t in onnx.load_from_string(packed).graph.initializer}
    assert "w1" in names
    assert "w0" not in names


def test_the_same_file_every_time():
    array, _ = thin((64, 64), 0.3)
    assert pack(file(array)) == pack(file(array))
    onnx.checker.check_model(onnx.load_from_string(pack(file(array))), full_check=True)


# ---- any array

SIZES = {
    1: st.tuples(st.integers(1, 6000)),
    2: st.tuples(st.integers(1, 80), st.integers(1, 80)),
    3: st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9)),
    4: st.tuples(st.integers(1, 16), st.integers(1, 16), st.integers(1, 5), st.integers(1, 5)),
}
TEXTS = ["1x1", "4x1", "1x4", "2x3", "2:4", "1:8"]


@settings(deadline=None, max_examples=60)
@given(
    rank=st.integers(1, 4),
    text=st.sampled_from(TEXTS),
    dtype=st.sampled_from([np.float32, np.int8, np.int32]),
    share=st.sampled_from([0.0, 0.0005, 0.01, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_any_array_comes_back_bit_for_bit_within_what_was_counted(
    rank, text, dtype, share, seed, data
):
    pattern = Pattern.parse(text) if rank > 1 else SINGLE
    shape = data.draw(SIZES[rank])
    if rank > 1:  # stretched so that the pattern divides it
        shape = (shape[0] * pattern.rows, shape[1] * max(pattern.columns, pattern.m), *shape[2:])
    array, marks = thin(shape, share, dtype, pattern, seed)
    given_file = file(array)
    packed = pack(given_file, pattern)
    assert len(packed) <= len(given_file)
    unpacked(packed, array)
    if rank > 1:
        others = len(given_file) - array.nbytes
        counted = packed_bytes(pattern, marks, array.itemsize)
        assert len(packed) <= others + counted + SHARED_BYTES


@pytest.mark.parametrize("count", [1, 11, 120])
@pytest.mark.parametrize("text", ["1x1", "4x1"])
def test_many_weights_in_one_file_stay_within_what_was_counted(text, count):
    """Names grow with their number."""
    rng = np.random.default_rng(count)
    pattern, arrays, counted = Pattern.parse(text), [], 0
    for i in range(count):
        shape = (4 * int(rng.integers(1, 12)), int(rng.integers(1, 40)), *rng.integers(1, 4, i % 3))
        array, marks = thin(shape, rng.choice([0.01, 0.3, 0.6]), np.float32, pattern, i)
        arrays.append(array)
        counted += packed_bytes(pattern, marks, 4)
    given_file = file(*arrays, name="encoder.layers.12.self_attention.output_projection.weight")
    packed = pack(given_file, pattern)
    most = len(given_file) - sum(a.nbytes for a in arrays) + counted + SHARED_BYTES
    # The bound is no waste either.
    assert most - 100 * count * (1 + (text != "1x1")) - SHARED_BYTES <= len(packed) <= most
    unpacked(packed, *arrays)


# ---- files of networks

ZOO = {
    "resnet": (lambda: resnet8(classes=4), (3, 8, 8)),
    "depthwise": (lambda: ds_cnn(classes=4, channels=1), (1, 8, 8)),
    "mobilenet": (lambda: mobilenet_v2(classes=4, width=0.35), (3, 32, 32)),
    "attention": (transformer, (6, 128)),
}


def exported(name, share, seed=0):
    """A network's file with pruned weights, and those weights' marks."""
    make, shape = ZOO[name]
    torch.manual_seed(seed)
    network = make().eval()
    rng = np.random.default_rng(seed)
    marks = {}
    with torch.no_grad():
        for key, weight in network.named_parameters():
            if weight.ndim > 1:
                marks[key] = rng.random(tuple(weight.shape)) < share
                weight.mul_(torch.from_numpy(marks[key]))
            else:
                weight.uniform_(0.5, 1.5)
    example = torch.zeros(1, *shape)
    x = rng.normal(size=(8, *shape)).astype(np.float32)
    return export_infer(network, example).onnx, marks, x


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("name", "share"),
    [("resnet", 0.05), ("depthwise", 0.5), ("mobilenet", 0.5), ("attention", 0.2)],
)
def test_a_networks_file_computes_the_same_within_what_was_counted(name, int8, share):
    data, marks, x = exported(name, share)
    if int8:
        data = quantise(data, no_ranges(data))
    packed = pack(data)
    item = 1 if int8 else 4
    weights = sum(item * m.size for m in marks.values())
    counted = sum(packed_bytes(SINGLE, m, item) for m in marks.values())
    assert len(packed) <= len(data) - weights + counted + SHARED_BYTES
    assert len(packed) < len(data)
    feed = {ort.InferenceSession(data).get_inputs()[0].name: x}
    (got,), (wanted,) = (run(d, True, feed) for d in (packed, data))
    assert got.tobytes() == wanted.tobytes()
    (got,), (wanted,) = (run(d, False, feed) for d in (packed, data))
    # As it is written, onnxruntime has other kernels for weights that are constants from the start:
    # sums of floats then differ in their last bit.
    np.testing.assert_allclose(got, wanted, rtol=0 if int8 else 1e-5)
    before, after = file_costs(data), file_costs(packed)
    assert after.artifact_bytes == len(packed)
    assert after.macs == before.macs
    assert after.peak_activation_bytes == before.peak_activation_bytes


def test_a_file_that_computes_something_else_is_refused(monkeypatch):
    array = np.zeros((40, 40), np.float32)
    array[3] = 1
    x = np.ones((2, 40), np.float32)

    def network(weight):
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
        ends = [helper.make_tensor_value_info(n, 1, ["n", 40]) for n in ("x", "y")]
        held = [numpy_helper.from_array(weight, "w")]
        graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], held)
        opset = [helper.make_opsetid("", 17)]
        return helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()

    data = network(array)
    made = Artifact(data, golden(x, predict(data, x)), file_costs(data), 1)
    assert len(without_zeros(made, SINGLE).onnx) < len(data)
    monkeypatch.setattr(artifacts, "pack", lambda onnx, pattern: network(array * 2))
    with pytest.raises(GraphError) as e:
        without_zeros(made, SINGLE)
    assert str(e.value) == "the file without zeros differs by 1 from the one with them"
