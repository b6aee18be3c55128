"""An inference graph without its weights, for devices that only time it.

onnxruntime makes the constants when it loads the file and then rewrites the graph as it does with
the real ones; the same operators run, as fast, and a file of megabytes is a few kB.
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.numpy_helper import to_array

from fleetprune.graphmeta import METADATA_KEY, parse_graph_meta


def weightless(graph: bytes) -> bytes:
    """Put constants of one value in the place of float weights of two or more axes.

    Each is one over the number of inputs that it sums over, so that activations stay of the size of
    the inputs: processors are slow with numbers near 0, and infinities would tell nothing. What
    the graph says about itself is kept but the outputs that it would be checked with.

    Args:
        graph: Made by `export_infer`.

    Returns:
        An ONNX file with the same operators, inputs and outputs.
    """
    model = onnx.load_from_string(graph)
    nodes, kept = [], []
    for tensor in model.graph.initializer:
        values = to_array(tensor)
        if values.ndim < 2 or values.dtype.kind != "f" or not values.size:
            kept.append(tensor)
            continue
        shape = f"{tensor.name}_shape"
        kept.append(numpy_helper.from_array(np.array(values.shape, np.int64), shape))
        value = helper.make_tensor("value", tensor.data_type, [1], [1.0 / values[0].size])
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
