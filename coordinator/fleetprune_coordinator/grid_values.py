"""Weights of a release as multiples of powers of two: so the next one is a few steps away.

After one more round nearly every bit of a float32 weight is another, and a delta
(`fleetprune.delta`) would hold them all. No weight needs 24 bits: those of each output are rounded
to multiples of one power of two, about a 2000th of the largest of them, and the file that is
judged, signed and shipped holds these. Since steps are powers of two, the difference between any
two releases is a whole number of steps, whichever of them a device has; and a release's file
follows from the model alone, not from what was released before.
"""

from dataclasses import replace
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from fleetprune_coordinator.artifacts import Artifact, golden, golden_inputs, predict

BITS: Final = 11
"""Of the largest weight of an output, beside its sign; as many as a 16-bit float has."""
FINER: Final = 3
"""More bits for tensors with one axis: they are few, and nothing averages a bias's error away."""
MOST_MOVED: Final = 1 / 256
"""Largest change of an output, as a share of the outputs' spread; float weights stay otherwise."""
COMPARED: Final = 512
"""Samples at most on which that is held."""


def rounded_artifact(made: Artifact, x: NDArray[np.float32]) -> Artifact:
    """The artifact with its weights on grids; as it is where outputs would change too much.

    Args:
        made: In float32, nothing packed yet.
        x: (n, ...) samples.

    Returns:
        A file of the same length, with golden outputs of its own.
    """
    onnx_file = on_grid(made.onnx)
    x = x[:COMPARED]
    before, after = predict(made.onnx, x), predict(onnx_file, x)
    if not np.abs(after - before).max() <= MOST_MOVED * np.ptp(before):
        return made
    inputs = golden_inputs(made.golden)
    return replace(made, onnx=onnx_file, golden=golden(inputs, predict(onnx_file, inputs)))


def on_grid(file: bytes) -> bytes:
    """An ONNX file whose float32 initializers are `rounded`; its length stays the same."""
    proto = onnx.load_from_string(file)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.raw_data:
            near = rounded(numpy_helper.to_array(tensor))
            tensor.raw_data = near.astype("<f4").tobytes()
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def rounded(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Numbers at most half a step from the given ones.

    The largest of an output's numbers is 2^(BITS - 1) to 2^BITS steps; of a vector, 2^FINER as
    many. Zeros stay, and are positive.

    Args:
        array: (outputs, ...) or (n,), finite.
    """
    bits = BITS if array.ndim > 1 else BITS + FINER
    rows: NDArray[Any] = array.reshape(len(array) if array.ndim > 1 else 1, -1)
    exponents = np.frexp(np.abs(rows).max(axis=1, initial=0.0))[1] - bits
    steps = np.rint(np.ldexp(rows.astype(np.float64), -exponents[:, None]))
    near: NDArray[Any] = np.ldexp(steps, exponents[:, None]) + 0.0
    return near.reshape(array.shape).astype(np.float32)
