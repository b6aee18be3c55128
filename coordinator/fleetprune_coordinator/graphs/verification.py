"""Proves a graph right before it is sent, and gives devices the means to do the same.

The reference numbers come from torch in float64, never from the graph itself. Where this machine
can run the graph, it is run here too, so a wrong lowering never leaves the coordinator.
"""

from collections.abc import Mapping
from functools import cache
from math import prod
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import load_model_from_string

from fleetprune.errors import GraphError
from fleetprune.graphmeta import (
    METADATA_KEY,
    GraphMeta,
    ReferenceInput,
    Run,
    check_outputs,
    expectation,
    parse_graph_meta,
    reference_feeds,
)
from fleetprune_coordinator.graphs.writer import NCHWC, GraphWriter

PROBE_CHANNELS = 16


def reference_input(example: torch.Tensor, shape: tuple[int, ...]) -> ReferenceInput:
    """The description of an input like `example`, with `shape`.

    Integers are drawn from 0..example.max(), since only such indices are known to be valid.
    """
    high = 0 if example.is_floating_point() else int(example.max()) + 1
    return ReferenceInput(shape=shape, high=high)


def parameter_runs(parameters: Mapping[str, torch.Tensor]) -> tuple[Run, ...]:
    """Sizes and ranges in which the reference parameters keep activations near one.

    Weights get He's variance 2 / fan_in, norm scales lie around 1, biases around 0.
    """
    runs = []
    for name, tensor in parameters.items():
        if tensor.dim() > 1:
            swing = (6.0 / prod(tensor.shape[1:])) ** 0.5
            runs.append(Run(tensor.numel(), 0.0, float(f"{swing:.5g}")))
        elif name.endswith("bias"):
            runs.append(Run(tensor.numel(), 0.0, 0.1))
        else:
            runs.append(Run(tensor.numel(), 1.0, 0.3))
    return tuple(runs)


def statistic_runs(statistics: Mapping[str, torch.Tensor]) -> tuple[Run, ...]:
    """Sizes and ranges of the reference BatchNorm statistics."""
    return tuple(
        Run(t.numel(), 0.0, 0.2) if name.endswith("running_mean") else Run(t.numel(), 1.0, 0.3)
        for name, t in statistics.items()
    )


def live_samples(batch: int) -> int:
    """Samples of the reference batch that count; the rest plays a short batch's padding."""
    return max(1, batch - batch // 4)


def graph_meta(onnx: bytes) -> GraphMeta:
    """What an exported graph says about itself; GraphError if it says nothing."""
    entries = {e.key: e.value for e in load_model_from_string(onnx).metadata_props}
    if METADATA_KEY not in entries:
        raise GraphError(f"graph without the metadata entry {METADATA_KEY!r}")
    return parse_graph_meta(entries[METADATA_KEY])


def doubles(meta: GraphMeta) -> dict[str, torch.Tensor]:
    """`reference_feeds` as torch tensors, floats in float64."""
    tensors = {name: torch.from_numpy(np.asarray(a)) for name, a in reference_feeds(meta).items()}
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


def split_like(flat: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """A flat vector cut into tensors of the given shapes (copies)."""
    parts = torch.split(flat, [t.numel() for t in tensors.values()]) if tensors else ()
    return [p.reshape(t.shape).clone() for p, t in zip(parts, tensors.values(), strict=True)]


def flatten(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One vector of all tensors, row-major."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def with_expected(
    meta: GraphMeta,
    outputs: Mapping[str, torch.Tensor],
    scales: Mapping[str, torch.Tensor] | None = None,
) -> GraphMeta:
    """The metadata with the right outputs for its reference inputs.

    Args:
        meta: Without expectations.
        outputs: By output name, float64.
        scales: Tensors whose norm is the unit of error, for outputs that cancel to about zero.
    """
    expected = tuple(
        expectation(n, t.detach().numpy(), (scales or {}).get(n, t).detach().numpy())
        for n, t in outputs.items()
    )
    for want in expected:
        if not np.isfinite(want.values).all():
            raise GraphError(f"torch computes no finite {want.output} for the reference batch")
    verification = meta.verification.model_copy(update={"expected": expected})
    return meta.model_copy(update={"verification": verification})


def check_here(onnx: bytes, meta: GraphMeta) -> None:
    """Run a graph on its reference inputs, if this processor has its memory layout.

    Raises:
        GraphError: The graph does not load, or computes something else than torch.
    """
    if meta.block in (0, native_block()):
        check_outputs(meta, run(onnx, reference_feeds(meta)))


def run(
    onnx: bytes, feeds: Mapping[str, NDArray[Any]], *, optimise: bool = False
) -> dict[str, NDArray[Any]]:
    """A graph's outputs by name.

    Args:
        onnx: The graph.
        feeds: Its inputs.
        optimise: Let onnxruntime rewrite the graph, as a device does for inference only.

    Raises:
        GraphError: onnxruntime cannot load or run the graph.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except Exception as e:  # onnxruntime's errors have no common base
        raise GraphError(f"onnxruntime refuses the exported graph: {e}") from e


def probe_model() -> bytes:
    """A graph that shows the memory layout: `ReorderInput` of (1, 16, 1, 2), as it lies there.

    Fed with 0, 1, 2, ... (channel c, column v holds 2c + v), the result holds 1, which is
    channel 0 in column 1, after one block of column 0: at index B.
    """
    w = GraphWriter()
    x = w.input("x", (1, PROBE_CHANNELS, 1, 2), "float32")
    y = w.op("ReorderInput", x, domain=NCHWC)
    w.output(y, "y", (1, PROBE_CHANNELS, 1, 2))
    return w.serialize({})


@cache
def native_block() -> int:
    """Channels per block of this machine's blocked layout; 0: it has none."""
    x = np.arange(2 * PROBE_CHANNELS, dtype=np.float32).reshape(1, PROBE_CHANNELS, 1, 2)
    try:
        y = run(probe_model(), {"x": x})["y"]
    except GraphError:
        return 0
    return int(y.ravel().tolist().index(1.0))
