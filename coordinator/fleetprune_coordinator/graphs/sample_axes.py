"""Where the samples of a batch lie in the tensors of an inference file.

A model may turn its axes (sequences first, then samples), so that the samples' axis is not the
first one, or runs inside it. It is found by computing, from three samples together and each alone.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from fleetprune.errors import GraphError
from fleetprune_coordinator.graphs import verification as check

SAMPLES: Final = 3
CLOSE: Final = 1e-4
"""How far, in norms, a sample's numbers may differ with the samples beside it."""

Array = NDArray[np.float32]


def blocks_before(model: onnx.ModelProto, tensors: Sequence[str], x: Array) -> list[int]:
    """In how many blocks tensors have all samples, one behind the other.

    Args:
        model: Of an inference file, whose only input is x.
        tensors: Names of float32 values in it.
        x: (SAMPLES, *shape) samples that differ.

    Returns:
        For each tensor the A of its shape (A, samples, rest) in memory: 1 where the samples are the
        leading axis.

    Raises:
        GraphError: A tensor is not made of samples that lie so; names it and its operator.
    """
    source = model.graph.input[0].name
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    made = [name for name in dict.fromkeys(tensors) if name != source]
    probe.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in made
    )
    data = probe.SerializeToString()
    whole, *single = (
        check.run(data, {source: part}) | {source: part}
        for part in (x, *(x[i : i + 1] for i in range(len(x))))
    )
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    found = []
    for name in tensors:
        parts = [alone[name] for alone in single]
        at = next(
            (a for a in _candidates(whole[name], parts[0]) if _fits(a, whole[name], parts)), 0
        )
        if not at:
            raise GraphError(
                f"the output {name} of {makers[name]} mixes the samples of a batch: of shape "
                f"{parts[0].shape} for one sample and {whole[name].shape} for {len(x)}, expected "
                "each sample's numbers in it as they are for that sample alone"
            )
        found.append(at)
    return found


def _candidates(together: Array, alone: Array) -> Iterator[int]:
    """How many blocks there may be, by the shapes."""
    pairs = list(zip(together.shape, alone.shape, strict=False))
    grown = [axis for axis, (many, one) in enumerate(pairs) if many != one]
    if len(grown) != 1 or together.ndim != alone.ndim or not alone.size:
        return
    before, size = prod(alone.shape[: grown[0]]), alone.shape[grown[0]]
    yield from (before * inner for inner in range(1, size + 1) if size % inner == 0)


def _fits(blocks: int, together: Array, alone: Sequence[Array]) -> bool:
    """Whether a tensor is (blocks, samples, rest) in memory."""
    if together.size != len(alone) * alone[0].size:
        return False
    split = together.reshape(blocks, len(alone), -1)
    return all(
        float(np.linalg.norm(split[:, i] - part.reshape(blocks, -1)))
        <= CLOSE * (float(np.linalg.norm(part)) or 1.0)
        for i, part in enumerate(alone)
    )
