import numpy as np
import onnx
import prunable_nets as nets
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fleetprune.costs import Costs, costs
from fleetprune.errors import GraphError
from fleetprune_coordinator.graphs import export_infer
from fleetprune_coordinator.onnx_costs import SLACK_BYTES, file_costs, overhead_bytes
from fleetprune_coordinator.resize import resize
from fleetprune_coordinator.tracing import trace


def onnx_file(nodes, shape, weights=None, batch="n", kind=TensorProto.FLOAT):
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", kind, [batch, *shape])],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (weights or {}).items()],
    )
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()


def node(kind, inputs, output, **attributes):
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def ones(*shape):
    return np.ones(shape, np.float32)


def tiny():
    """The same net as `prunable_nets.tiny`."""
    nodes = [
        node("Conv", "x w b", "c", pads=[1, 1, 1, 1]),
        node("Relu", "c", "r"),
        node("Flatten", "r", "f"),
        node("Gemm", "f v a", "y", transB=1),
    ]
    weights = {"w": ones(2, 1, 3, 3), "b": ones(2), "v": ones(3, 32), "a": ones(3)}
    return onnx_file(nodes, (1, 4, 4), weights)


def test_golden_numbers():
    model = tiny()
    assert file_costs(model) == Costs(len(model), 288 + 96, 64 + 128)


def test_it_is_the_analytic_figure():
    architecture = trace(*nets.make(nets.tiny))
    analytic, measured = costs(architecture, {"0": 2}), file_costs(tiny())
    assert (measured.macs, measured.peak_activation_bytes) == (
        analytic.macs,
        analytic.peak_activation_bytes,
    )


SHAPES = {nets.encoder: 256, nets.transformer: 256}
"""Bytes of shapes that widths have in common in one file, and each for itself in another."""


@pytest.mark.parametrize("net", nets.ALL, ids=lambda f: f.__name__)
def test_exported_files_cost_what_was_computed(net):
    model, example = nets.make(net)
    architecture = trace(model, example)
    # Exported as chains of operators whose memory is bounded, not counted.
    bounded = net in (nets.layer_norm_mlp, nets.scaled, *nets.OTHERS)
    rng = np.random.default_rng(0)

    def export(model, example):
        return export_infer(model, example).onnx

    overhead = overhead_bytes(model, architecture, example, export)
    architecture = architecture.model_copy(update={"overhead_bytes": overhead})
    for keep in (
        architecture.dense,
        dict.fromkeys(architecture.groups, 1),
        {g: int(rng.integers(1, n + 1)) for g, n in architecture.groups.items()},
    ):
        small = resize(model, architecture, keep)
        measured = file_costs(export(small, example))
        computed = costs(architecture, keep)
        assert measured.macs == computed.macs
        # A smaller tensor's sizes take up to two bytes less to write down.
        loose = 2 * SLACK_BYTES + 2 * len(architecture.tensors)
        loose += SHAPES.get(net, 0)
        assert 0 <= computed.artifact_bytes - measured.artifact_bytes < loose
        if bounded:
            assert measured.peak_activation_bytes <= computed.peak_activation_bytes
        else:
            assert measured.peak_activation_bytes == computed.peak_activation_bytes


@pytest.mark.parametrize("net", SHAPES, ids=lambda f: f.__name__)
def test_a_file_is_no_larger_where_shapes_differ_that_were_equal(net):
    """A dense encoder's layers are as wide as each other, so their shapes are stored once."""
    model, example = nets.make(net)
    architecture = trace(model, example)

    def export(model, example):
        return export_infer(model, example).onnx

    overhead = overhead_bytes(model, architecture, example, export)
    architecture = architecture.model_copy(update={"overhead_bytes": overhead})
    for widths in ((1, 12, 2, 7), (2, 12, 1, 5), (2, 7, 1, 12)):
        keep = dict(zip(architecture.groups, widths, strict=True))
        file = export(resize(model, architecture, keep), example)
        assert len(file) <= costs(architecture, keep).artifact_bytes


def test_overhead_does_not_rely_on_equal_weights():
    """Two zero biases that a file would store once are counted as the two that they become."""
    model, example = nets.make(nets.tiny)
    architecture = trace(model, example)
    seen = []

    def export(dense, _):
        weights = torch.cat([p.flatten() for p in dense.parameters()])
        seen.append(weights.unique().numel() == weights.numel())
        file = onnx.ModelProto(doc_string=" " * (4 * weights.numel() + 1000 - 3))
        return file.SerializeToString()

    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    assert overhead_bytes(model, architecture, example, export) == 1000 + SLACK_BYTES
    assert seen == [True]
    assert not any(p.any() for p in model.parameters())


def peak(nodes, shape, weights=None):
    return file_costs(onnx_file(nodes, shape, weights)).peak_activation_bytes


def test_elementwise_chains_stay_in_place():
    nodes = [
        node("Relu", "x", "a"),
        node("Add", "a k", "b"),  # a constant operand does not need a buffer
        node("Clip", "b", "c"),
        node("Identity", "c", "y"),
    ]
    assert peak(nodes, (8,), {"k": ones(8)}) == 32


def test_an_input_that_is_needed_later_is_not_overwritten():
    nodes = [node("Relu", "x", "a"), node("Add", "a x", "y")]
    assert peak(nodes, (8,)) == 3 * 32


def test_a_view_shares_its_buffer_even_if_that_is_needed_later():
    nodes = [
        node("Flatten", "x", "a"),
        node("Relu", "a", "b"),
        node("Flatten", "x", "c"),
        node("Add", "b c", "y"),
    ]
    assert peak(nodes, (8,)) == 3 * 32


def test_a_broadcast_that_grows_needs_a_buffer():
    nodes = [node("Add", "x k", "y")]
    assert peak(nodes, (1,), {"k": ones(1, 8)}) == 4 + 32


def test_constants_are_no_activations():
    nodes = [
        node("Mul", "k k", "kk"),
        node("Shape", "x", "s"),
        node("Reshape", "x s", "v"),
        node("Mul", "v kk", "y"),
    ]
    assert peak(nodes, (8,), {"k": ones(8)}) == 32


def test_matrix_products_count_every_factor():
    assert file_costs(onnx_file([node("MatMul", "x w", "y")], (5, 4), {"w": ones(4, 3)})).macs == 60
    transposed = [node("Flatten", "x", "f", axis=2), node("Gemm", "f w", "y", transA=1)]
    assert file_costs(onnx_file(transposed, (4, 3), {"w": ones(4, 2)})).macs == 3 * 4 * 2


def test_grouped_convolutions_count_their_own_inputs_only():
    model = onnx_file([node("Conv", "x w", "y", group=4)], (4, 5), {"w": ones(4, 1, 3)})
    assert file_costs(model).macs == 4 * 3 * 3


def quantised_convolution(*middle, last):
    """40 bytes come in, 10 quantised; a convolution makes 2 channels of 10 values."""
    nodes = [
        node("QuantizeLinear", "x s z", "xq"),
        node("DequantizeLinear", "xq s z", "xd"),
        node("DequantizeLinear", "w s z", "wd"),
        node("Conv", "xd wd", "c"),
        *middle,
        node("QuantizeLinear", f"{last} s z", "rq"),
        node("DequantizeLinear", "rq s z", "y"),
    ]
    weights = {"s": np.float32(0.1), "z": np.int8(0), "w": np.ones((2, 1, 1), np.int8)}
    return file_costs(onnx_file(nodes, (1, 10), weights))


def test_quantised_tensors_take_a_byte():
    measured = quantised_convolution(node("Relu", "c", "r"), last="r")
    # The convolution's 20 bytes at the end, and the 80 of the output.
    assert measured.peak_activation_bytes == 20 + 80
    assert measured.macs == 20


def test_tensors_of_float_operators_take_four_bytes():
    measured = quantised_convolution(node("Exp", "c", "e"), node("Add", "c e", "r"), last="r")
    # The convolution is no integer kernel then: its 80 bytes, and those of Exp and Add.
    assert measured.peak_activation_bytes == 3 * 80


def fails(model, message):
    with pytest.raises(GraphError) as caught:
        file_costs(model)
    assert str(caught.value) == message


def test_errors():
    expected = "Conv, ConvInteger, QLinearConv, Gemm, MatMul, MatMulInteger, QLinearMatMul"
    einsum = node("Einsum", "x w", "y", name="sum", equation="nc,oc->no")
    fails(
        onnx_file([einsum], (4,), {"w": ones(3, 4)}),
        f"onnx file: Einsum 'sum' is not counted, expected {expected}",
    )
    fails(
        onnx_file([node("Relu", "x", "y")], ("length",)),
        "onnx file: the shape of 'x' is not known at batch 1",
    )
    fails(
        onnx_file([node("Mul", "k k", "y")], (4,), {"k": ones(4)}),
        "onnx file: the output does not depend on the input",
    )
    model = onnx.load_from_string(tiny())
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]))
    fails(
        model.SerializeToString(),
        "onnx file: 2 inputs and 1 outputs, expected one of each",
    )


def test_no_part_of_a_file_passes():
    model = tiny()
    for length in range(len(model)):
        with pytest.raises(GraphError):
            file_costs(model[:length])
