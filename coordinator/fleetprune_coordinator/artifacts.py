"""From the fleet's shared weights to the file that one class runs."""

import io
from dataclasses import dataclass, replace

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn

from fleetprune.costs import Costs
from fleetprune.errors import GraphError
from fleetprune.layout import Architecture
from fleetprune.patterns import Pattern
from fleetprune_coordinator.fleet_model import FleetModel
from fleetprune_coordinator.graphs import export_infer
from fleetprune_coordinator.onnx_costs import file_costs
from fleetprune_coordinator.resize import extract
from fleetprune_coordinator.sparse_file import pack

GOLDEN_TOLERANCE = 1e-3
"""Largest difference of logits between this machine and a device: float32 sums in other orders."""

UNPACKED_TOLERANCE = 1e-5
"""Largest difference that storing weights otherwise may make: kernels may be chosen otherwise."""


@dataclass(frozen=True)
class Artifact:
    """A class's model as it is shipped."""

    onnx: bytes
    golden: bytes
    """An .npz with `x` (n, ...) inputs and `y` (n, classes) the outputs that are expected."""
    costs: Costs
    """Measured on the file."""
    parameters: int
    tolerance: float = GOLDEN_TOLERANCE
    """How far a device's outputs may be from the golden ones."""
    int8: bool = False
    """Whether the file is quantised."""


def small_model(
    model: nn.Module, architecture: Architecture, state: FleetModel, name: str
) -> nn.Module:
    """The network of a class, physically small, in evaluation mode; pruned weights are 0."""
    params = state.dense(architecture, name)
    return extract(model, architecture, params, state.stats[name], state.shapes[name])


def build(
    model: nn.Module,
    architecture: Architecture,
    state: FleetModel,
    name: str,
    samples: NDArray[np.float32],
) -> Artifact:
    """Extract a class's network, export it and measure the file.

    Args:
        model: The user's model, any weights.
        architecture: Its description.
        state: The fleet's weights.
        name: The device class.
        samples: (n, ...) inputs whose outputs, those of float64 torch, the device must reproduce
            before it switches.

    Returns:
        The artifact in float32; its budget is not checked here.

    Raises:
        GraphError: The exported file does not compute what torch does.
    """
    small = small_model(model, architecture, state, name)
    onnx = export_infer(small, torch.zeros(1, *architecture.input_shape)).onnx
    with torch.no_grad():
        expected = small.double()(torch.from_numpy(samples).double()).numpy()
    outputs = predict(onnx, samples)
    worst = float(np.abs(outputs - expected).max())
    if not worst <= GOLDEN_TOLERANCE:
        raise GraphError(
            f"class {name}: the exported file differs from torch by {worst:.2g}, "
            f"expected at most {GOLDEN_TOLERANCE:.2g}"
        )
    parameters = sum(p.numel() for p in small.parameters())
    return Artifact(onnx, golden(samples, expected), file_costs(onnx), parameters)


def without_zeros(made: Artifact, pattern: Pattern) -> Artifact:
    """The same model in a file that stores pruned weights without their zeros.

    Args:
        made: What `build` or `quantised_artifact` made.
        pattern: What of its weights was pruned together.

    Raises:
        GraphError: The file computes something else.
    """
    onnx = pack(made.onnx, pattern)
    x = golden_inputs(made.golden)
    apart = float(np.abs(predict(onnx, x) - predict(made.onnx, x)).max())
    if not apart <= UNPACKED_TOLERANCE:
        raise GraphError(f"the file without zeros differs by {apart:.2g} from the one with them")
    return replace(made, onnx=onnx, costs=replace(made.costs, artifact_bytes=len(onnx)))


def golden(x: NDArray[np.float32], y: NDArray[np.floating]) -> bytes:
    """The file of golden samples: inputs (n, ...) and outputs (n, classes)."""
    out = io.BytesIO()
    np.savez(out, x=x, y=y.astype(np.float32))
    return out.getvalue()


def golden_inputs(file: bytes) -> NDArray[np.float32]:
    """The inputs (n, ...) in a file of golden samples."""
    with np.load(io.BytesIO(file)) as samples:
        x: NDArray[np.float32] = samples["x"]
    return x


def predict(
    onnx: bytes, x: NDArray[np.float32], *, as_written: bool = False
) -> NDArray[np.float32]:
    """Outputs (n, classes) of an inference file for (n, ...) inputs, on this machine.

    Args:
        onnx: The file.
        x: Its inputs.
        as_written: Run the file's operators one by one, in float32, instead of what onnxruntime
            makes of them.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    return np.asarray(session.run(None, feed)[0], np.float32)


def accuracy(onnx: bytes, x: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    """Share of (n, ...) inputs whose largest output is their label (n,)."""
    return float((predict(onnx, x).argmax(axis=1) == y).mean())
