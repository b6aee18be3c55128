"""Float weights of a release as multiples of powers of two, so that the next one is a few steps away.

After one more round nearly every bit of a float32 weight is another. A weight needs no 24 bits: each
output's weights are rounded to multiples of one power of two, 2^-11 to 2^-12 of the largest of them,
and the file that is judged, signed and shipped holds these. Since steps are powers of two, the
difference between any two releases is a whole number of steps, whichever of them a device has; a
release's file follows from the model alone, not from what was released before.
"""

from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

BITS: Final = 11
"""Of a weight beside its sign, for the largest of an output; as many as a 16-bit float has."""
FINER: Final = 3
"""More bits for tensors with one axis: they are few, and biases add up over nothing."""


def on_grid(file: bytes) -> bytes:
    """An ONNX file whose float32 initializers lie on such grids; its length stays the same."""
    proto = onnx.load_from_string(file)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.raw_data:
            array = numpy_helper.to_array(tensor)
            tensor.raw_data = rounded(array).astype("<f4").tobytes()
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def rounded(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Numbers at most half a step from the given ones.

    Args:
        array: (outputs, ...) or (n,), finite.
    """
    bits = BITS if array.ndim > 1 else BITS + FINER
    rows: NDArray[Any] = array.reshape(len(array) if array.ndim > 1 else 1, -1)
    exponents = np.frexp(np.abs(rows).max(axis=1, initial=0.0))[1] - bits
    scaled = np.ldexp(rows.astype(np.float64), -exponents[:, None])
    near = np.ldexp(np.rint(scaled), exponents[:, None]) + 0.0  # no negative zeros
    return near.astype(np.float32).reshape(array.shape)
