"""Runs the coordinator's graphs: sessions, the processor's memory layout, and a check before use.

A graph made for another memory layout computes wrong numbers and raises nothing. So a device
reports its layout (`probe_block`), gets the matching graph and a portable one, and runs `verify`
before it trusts either; when the fast one is refused it falls back to the portable one.
"""

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort

from fleetprune.errors import GraphError
from fleetprune.graphmeta import (
    METADATA_KEY,
    GraphMeta,
    check_outputs,
    parse_graph_meta,
    reference_feeds,
)

_PROBE_GRAPH = (
    "CAk6hQEKKgoBeBICdDEiDFJlb3JkZXJJbnB1dDoTY29tLm1pY3Jvc29mdC5uY2h3YwoRCgJ0MRIBeSII"
    "SWRlbnRpdHkSCmZsZWV0cHJ1bmVaGwoBeBIWChQIARIQCgIIAQoCCBAKAggBCgIIAmIbCgF5EhYKFAgB"
    "EhAKAggBCgIIEAoCCAEKAggCQgQKABASQhcKE2NvbS5taWNyb3NvZnQubmNod2MQAQ=="
)
"""One node, ReorderInput of x (1, 16, 1, 2) float32, as ONNX in base64.

Made by `fleetprune_coordinator.graphs.verification.probe_model`; a test compares the two.
"""


def training_session(onnx: bytes, threads: int = 1) -> ort.InferenceSession:
    """A session for a train_step or observe graph.

    Such a graph is final: onnxruntime's rewriting would cost time and memory and gain nothing.
    The memory planner keeps far more alive than the arena needs (587 against 255 MB for
    MobileNetV2), a buffer set aside for reuse is not free in between (6 MB for ResNet-8 with
    portable operators), and running nodes in the order of the file is the cheapest order.

    Args:
        onnx: The graph.
        threads: Processor cores to use.

    Raises:
        GraphError: onnxruntime cannot load it.
    """
    options = _options(threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False
    return _session(onnx, options)


def inference_session(onnx: bytes, threads: int = 1) -> ort.InferenceSession:
    """A session for an infer graph, which onnxruntime rewrites to its fastest form.

    Args:
        onnx: The graph.
        threads: Processor cores to use.

    Raises:
        GraphError: onnxruntime cannot load it.
    """
    return _session(onnx, _options(threads))


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    return options


def _session(onnx: bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's errors have no common base
        raise GraphError(f"onnxruntime cannot load the graph: {e}") from e


def session_meta(session: ort.InferenceSession) -> GraphMeta:
    """What the session's graph says about itself; GraphError if it says nothing."""
    entries: dict[str, str] = session.get_modelmeta().custom_metadata_map
    if METADATA_KEY not in entries:
        raise GraphError(f"graph without the metadata entry {METADATA_KEY!r}")
    return parse_graph_meta(entries[METADATA_KEY])


def probe_block() -> int:
    """Channels per block of this processor's memory layout: 16, 8, or 0 where there is none.

    Fed with 0, 1, 2, ... the probe holds 1 (channel 0, column 1) behind one block of column 0.
    """
    x = np.arange(32, dtype=np.float32).reshape(1, 16, 1, 2)
    try:
        session = training_session(base64.b64decode(_PROBE_GRAPH))
        y: list[float] = session.run(None, {"x": x})[0].ravel().tolist()
    except Exception:
        return 0
    return y.index(1.0) if y.index(1.0) in (8, 16) else 0


def verify(session: ort.InferenceSession, meta: GraphMeta) -> None:
    """Run the graph once on its reference inputs and compare with the coordinator's numbers.

    Args:
        session: Of the graph.
        meta: The graph's metadata, see `session_meta`.

    Raises:
        GraphError: The graph cannot run here, or computes wrong numbers.
    """
    names = [output.name for output in session.get_outputs()]
    feeds: dict[str, Any] = reference_feeds(meta)
    try:
        values = session.run(names, feeds)
    except Exception as e:  # onnxruntime's errors have no common base
        raise GraphError(f"{meta.kind} graph does not run on this machine: {e}") from e
    check_outputs(meta, dict(zip(names, values, strict=True)))


def tiny_model(opset: int, ir_version: int) -> bytes:
    """An identity of shape (1,), as ONNX of these versions, both in 1..127."""
    node = b':7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01g'
    ports = b"Z\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01" + (
        b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"
    )
    return bytes([0x08, ir_version]) + node + ports + b"B\x04\n\x00\x10" + bytes([opset])


def survey() -> str:
    """What this runtime can load, as JSON: the fields of `compatibility.Machine`."""
    ir_version = _newest(lambda n: tiny_model(13, n))
    return json.dumps(
        {
            "runtime": "onnxruntime",
            "runtime_version": ort.__version__,
            "ir_version": ir_version,
            "opset": _newest(lambda n: tiny_model(n, min(ir_version, 8))),
        }
    )


def _newest(model: Callable[[int], bytes]) -> int:
    """The last of the versions 1, 2, ... that loads."""
    for number in range(1, 128):
        try:
            inference_session(model(number))
        except GraphError:
            return number - 1
    return 127
