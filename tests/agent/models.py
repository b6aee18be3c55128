"""Tiny ONNX models whose answers can be checked in the head, and their golden samples."""

import io

import numpy as np
from onnx import TensorProto, helper, numpy_helper

INPUTS, CLASSES = 4, 3
ZEROS = np.zeros((1, INPUTS), dtype=np.float32)


def gemm(bias: float, *, padding: int = 0, batch: int | str = "n") -> bytes:
    """y = x @ ones(4, 3) + bias: zeros give `bias`. `padding` bytes make the file longer."""
    weights = numpy_helper.from_array(np.ones((INPUTS, CLASSES), dtype=np.float32), "w")
    biases = numpy_helper.from_array(np.full(CLASSES, bias, dtype=np.float32), "b")
    noise = np.random.default_rng(int(padding)).integers(0, 256, padding).astype(np.uint8)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"])
    extra = [numpy_helper.from_array(noise, "padding")] if padding else []
    return _model([node], [weights, biases, *extra], batch)


def raises_on_large_input(bias: float) -> bytes:
    """Like `gemm` while max(x) < 1; a larger input gathers outside of the table and raises."""
    weights = numpy_helper.from_array(np.ones((INPUTS, CLASSES), dtype=np.float32), "w")
    table = numpy_helper.from_array(np.full((1, CLASSES), bias, dtype=np.float32), "table")
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Cast", ["top"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["b"], axis=0),
        helper.make_node("Gemm", ["x", "w", "b"], ["y"]),
    ]
    return _model(nodes, [weights, table], "n")


def not_finite_on_large_input(bias: float) -> bytes:
    """Like `gemm` while the exponential of the sums is finite."""
    weights = numpy_helper.from_array(np.ones((INPUTS, CLASSES), dtype=np.float32), "w")
    biases = numpy_helper.from_array(np.full(CLASSES, np.log(bias), dtype=np.float32), "b")
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["z"]),
        helper.make_node("Exp", ["z"], ["y"]),
    ]
    return _model(nodes, [weights, biases], "n")


def hungry(bias: float, megabytes: int) -> bytes:
    """Like `gemm` for inputs of at most 0; takes so much memory while it runs."""
    weights = numpy_helper.from_array(np.ones((INPUTS, CLASSES), dtype=np.float32), "w")
    biases = numpy_helper.from_array(np.full(CLASSES, bias, dtype=np.float32), "b")
    shape = numpy_helper.from_array(np.array([megabytes * 250_000], dtype=np.int64), "shape")
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Relu", ["top"], ["nothing"]),
        helper.make_node("Expand", ["nothing", "shape"], ["much"]),
        helper.make_node("Softplus", ["much"], ["more"]),
        helper.make_node("ReduceMin", ["more"], ["log2"], keepdims=0),
        helper.make_node("Sub", ["log2", "log2"], ["zero"]),
        helper.make_node("Add", ["b", "zero"], ["c"]),
        helper.make_node("Gemm", ["x", "w", "c"], ["y"]),
    ]
    return _model(nodes, [weights, biases, shape], "n")


def endless(bias: float) -> bytes:
    """Like `gemm`, but not before it has counted to 2**62."""
    weights = numpy_helper.from_array(np.ones((INPUTS, CLASSES), dtype=np.float32), "w")
    biases = numpy_helper.from_array(np.full(CLASSES, bias, dtype=np.float32), "b")
    times = numpy_helper.from_array(np.array(2**62, dtype=np.int64), "times")
    true = numpy_helper.from_array(np.array(True), "true")
    scalar = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Neg", ["value"], ["next"]),
        ],
        "body",
        [
            scalar("i", TensorProto.INT64, []),
            scalar("go", TensorProto.BOOL, []),
            scalar("value", TensorProto.FLOAT, []),
        ],
        [scalar("go_on", TensorProto.BOOL, []), scalar("next", TensorProto.FLOAT, [])],
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Loop", ["times", "true", "top"], ["last"], body=body),
        helper.make_node("Sub", ["last", "last"], ["zero"]),
        helper.make_node("Add", ["b", "zero"], ["c"]),
        helper.make_node("Gemm", ["x", "w", "c"], ["y"]),
    ]
    return _model(nodes, [weights, biases, times, true], "n")


def chooses(*classes: int) -> bytes:
    """Says class `classes[i]` of a sample whose first value is i, and zeros for all zeros."""
    table = np.eye(CLASSES, dtype=np.float32)[list(classes)]
    table[0] = 0
    start = numpy_helper.from_array(np.array([0], dtype=np.int64), "start")
    table_ = numpy_helper.from_array(table, "table")
    nodes = [
        helper.make_node("Gather", ["x", "start"], ["column"], axis=1),
        helper.make_node("Cast", ["column"], ["index"], to=TensorProto.INT64),
        helper.make_node("GatherND", ["table", "index"], ["y"]),
    ]
    return _model(nodes, [table_, start], "n")


def _model(nodes: list, tensors: list, batch: int | str) -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, INPUTS])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, CLASSES])
    graph = helper.make_graph(nodes, "tiny", [x], [y], tensors)
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def golden(bias: float) -> bytes:
    """Two samples, zeros and halves: outputs `bias` and `2 + bias`."""
    x = np.stack([np.zeros(INPUTS), np.full(INPUTS, 0.5)]).astype(np.float32)
    y = np.stack([np.full(CLASSES, bias), np.full(CLASSES, bias + 2)]).astype(np.float32)
    return npz(x=x, y=y)


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()
