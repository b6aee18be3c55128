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
