"""Which operators run on integers: what is chosen, and what a quantised file really gives."""

import pytest
from onnx import helper

from fleetprune_coordinator.integer_kernels import choose, depends, integers, left_in_float

STORED = {"w", "b", "k"}


def node(kind, inputs, outputs):
    return helper.make_node(kind, inputs.split(), outputs.split())


def chosen(*nodes, outputs=("y",)):
    choice = choose(nodes, "x", outputs, STORED)
    return [nodes[i].op_type for i in choice.nodes], list(choice.tensors)


def test_a_clamp_lends_its_range_to_what_it_reads():
    assert chosen(node("Conv", "x w b", "c"), node("Relu", "c", "y")) == (
        ["Conv", "Relu"],
        ["x", "y"],
    )


def test_a_clamp_of_what_others_read_too_stays_a_float_operator():
    nodes = [node("Conv", "x w", "c"), node("Relu", "c", "r"), node("Add", "c r", "y")]
    assert chosen(*nodes) == (["Conv"], ["x", "c"])


def test_what_joins_integers_is_chosen_and_what_joins_floats_is_not():
    nodes = [
        node("Conv", "x w", "c"),
        node("Add", "c x", "a"),
        node("Exp", "a", "e"),
        node("Add", "e e", "f"),
        node("Add", "a k", "g"),  # with a constant
        node("Add", "f g", "y"),
    ]
    assert chosen(*nodes) == (["Conv", "Add"], ["x", "c", "a"])


def test_a_view_needs_no_range_of_its_own():
    nodes = [node("MaxPool", "x", "m"), node("Flatten", "m", "f"), node("Gemm", "f w b", "y")]
    assert chosen(*nodes) == (["MaxPool", "Flatten", "Gemm"], ["x", "m", "f", "y"])


def test_a_product_of_two_activations_stays_a_float_operator():
    nodes = [node("MatMul", "x w", "a"), node("MatMul", "a x", "y")]
    assert chosen(*nodes) == (["MatMul"], ["x", "a"])


COMPUTED = [
    ([node("MatMul", "v w", "p"), node("Gemm", "x p b", "y")], "Gemm (its weight is computed)"),
    ([node("Split", "b", "p q"), node("Gemm", "x w q", "y")], "Gemm (its bias is computed)"),
    ([node("MatMul", "w x", "y")], "MatMul (its weight is on the left)"),
    ([node("ConvTranspose", "x w b", "y")], "ConvTranspose (onnxruntime has no integer kernel)"),
]


@pytest.mark.parametrize(("nodes", "what"), COMPUTED)
def test_what_no_kernel_can_run_stays_float_and_is_said(nodes, what):
    nodes = [*nodes, node("Gemm", "y w b", "z"), node("MatMul", "z z", "s")]
    assert chosen(*nodes, outputs=["s"]) == (["Gemm"], ["x", "y", "z"])
    assert left_in_float(nodes, "x", STORED) == f"1 of 2 layers stay in float32: 1 {what}"
    assert left_in_float([*nodes, *nodes[:-2]], "x", STORED) == (
        f"2 of 3 layers stay in float32: 2 {what}"
    )


def test_nothing_is_said_where_all_run_on_integers():
    nodes = [node("Conv", "x w", "c"), node("Gemm", "c w b", "y")]
    assert left_in_float(nodes, "x", STORED) == ""


def test_shapes_do_not_depend_on_the_sample():
    nodes = [node("Shape", "x", "s"), node("Reshape", "x s", "r"), node("Add", "s s", "t")]
    assert depends(nodes, "x") == {"x", "r"}


def quantised(*middle, last="q"):
    """A convolution from bytes to bytes, with something behind it."""
    return [
        node("QuantizeLinear", "x s z", "xq"),
        node("DequantizeLinear", "xq s z", "xd"),
        node("DequantizeLinear", "wq s", "wd"),
        node("Conv", "xd wd", "c"),
        *middle,
        node("QuantizeLinear", f"{last} s z", "yq"),
        node("DequantizeLinear", "yq s z", "y"),
    ]


def found(nodes):
    what = integers(nodes, ["y"])
    return [nodes[i].op_type for i in sorted(what.nodes)], sorted(what.values)


def test_a_kernel_lies_between_bytes():
    assert found(quantised(last="c")) == (["Conv"], ["c", "wd", "xd"])
    assert found(quantised(node("Relu", "c", "r"), last="r")) == (["Conv"], ["c", "r", "wd", "xd"])


def test_a_float_operator_behind_it_makes_a_convolution_float():
    assert found(quantised(node("Exp", "c", "e"), last="e")) == ([], [])
    both = quantised(node("Exp", "c", "e"), last="c")  # read by QuantizeLinear, and by Exp
    assert found(both) == ([], [])


def test_a_linear_layers_kernel_also_writes_floats():
    nodes = [
        node("QuantizeLinear", "x s z", "xq"),
        node("DequantizeLinear", "xq s z", "xd"),
        node("DequantizeLinear", "wq s", "wd"),
        node("Gemm", "xd wd", "g"),
        node("Exp", "g", "y"),
    ]
    assert found(nodes) == (["Gemm"], ["wd", "xd"])
