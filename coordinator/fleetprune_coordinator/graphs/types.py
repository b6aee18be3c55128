"""What the exports take and return."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fleetprune.graphmeta import GraphMeta


@dataclass(frozen=True)
class GateMember:
    """A tensor whose elements scale or make the units of a group (for their scores).

    On `axis`, unit u owns the indices start + u*block .. start + (u+1)*block.
    """

    parameter: str
    """Name in `model.named_parameters()`."""
    axis: int
    start: int
    units: int
    block: int = 1


@dataclass(frozen=True)
class Student:
    """A narrower model whose tensors are slices of the trained model's own."""

    model: nn.Module
    """The resized module, with the same parameter names."""
    index: Mapping[str, tuple[slice | list[int], ...]]
    """Per parameter name, per axis: which part of the trained model's tensor it is."""
    weight: float = 1.0
    """Weight of KL(model || student) beside the task's loss: the student learns from the model."""
    task: float = 0.0
    """Weight of the task's loss of the student's own output."""
    mutual: float = 0.0
    """Weight of KL(student || model): the model learns from the student, whose tensors more
    devices have trained (deep mutual learning, Zhang et al. 2018)."""


@dataclass(frozen=True)
class Fixed:
    """BatchNorm statistics that are inputs of the training graph and do not change in it.

    The input `stats` holds the trained model's own, then those of each narrower model in turn,
    so that it is the same for all graphs of one shape.
    """

    narrower: Sequence[nn.Module] = ()
    """All narrower models that a device of this shape teaches."""
    student: int | None = None
    """Which of them is this graph's student; None: it has none."""


@dataclass(frozen=True)
class Graph:
    """An exported graph."""

    onnx: bytes
    """The ONNX file."""
    sha256: str
    """Hex digest of `onnx`."""
    meta: GraphMeta
    """Also in the file's metadata."""


def finished(onnx: bytes, meta: GraphMeta) -> Graph:
    """A graph with its digest."""
    return Graph(onnx, hashlib.sha256(onnx).hexdigest(), meta)
