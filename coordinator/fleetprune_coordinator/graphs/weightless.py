"""An inference graph without its weights, for devices that only time it.

onnxruntime makes the constants when it loads the file and then rewrites the graph as it does with
the real ones; the same operators run, as fast, and a file of megabytes is a few kB.
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.numpy_helper import to_array

from fleetprune.graphmeta import METADATA_KEY, parse_graph_meta
from fleetprune_coordinator.integer_kernels import OUT_OF

FEW = 16
"""Numbers that are as short as what would make them."""


def weightless(graph: bytes) -> bytes:
    """Put constants of one value in the place of a file's weights.

    Of a float32 file these are the float tensors of two or more axes. Each number is one over the
    number of inputs that it sums over, so that activations stay of the size of the inputs:
    processors are slow with numbers near 0, and infinities would tell nothing. Of a quantised file
    also all that DequantizeLinear reads: weights in 8 bits, scales and biases, whose numbers matter
    to no integer kernel; the first one is taken for all. What the graph says about itself is kept
    but the outputs that it would be checked with.

    Args:
        graph: Made by `export_infer`, and by `quantise` of that.

    Returns:
        An ONNX file with the same operators, inputs and outputs.
    """
    model = onnx.load_from_string(graph)
    read = {name for node in model.graph.node if node.op_type == OUT_OF for name in node.input}
    nodes, kept = [], []
    for tensor in model.graph.initializer:
        values = to_array(tensor)
        if tensor.name in read and values.size > FEW:
            one = values.ravel()[:1]
        elif values.ndim >= 2 and values.dtype.kind == "f" and values.size:
            one = np.array([1.0 / values[0].size], values.dtype)
        else:
            kept.append(tensor)
            continue
        shape = f"{tensor.name}_shape"
        kept.append(numpy_helper.from_array(np.array(values.shape, np.int64), shape))
        value = numpy_helper.from_array(one, "value")
        nodes.append(helper.make_node("ConstantOfShape", [shape], [tensor.name], value=value))
    nodes.extend(model.graph.node)
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend(nodes)
    _forget_outputs(model)
    return bytes(model.SerializeToString(deterministic=True))


def _forget_outputs(model: onnx.ModelProto) -> None:
    """The expected outputs are those of the weights."""
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            meta = parse_graph_meta(entry.value)
            blank = meta.verification.model_copy(update={"expected": ()})
            entry.value = meta.model_copy(update={"verification": blank}).to_json()
