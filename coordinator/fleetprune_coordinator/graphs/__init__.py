"""Turns a torch model into ONNX graphs that a device runs with numpy and onnxruntime alone.

Three graphs per model: one training step, one pass that observes activations, and inference.
"""

from fleetprune_coordinator.graphs import (  # noqa: F401  (registers the lowering rules)
    ops_conv,
    ops_matmul,
    ops_norm,
    ops_pointwise,
    ops_pool,
    ops_reduce,
    ops_shape,
)
from fleetprune_coordinator.graphs.export_infer import export_infer
from fleetprune_coordinator.graphs.export_observe import export_observe
from fleetprune_coordinator.graphs.export_train import export_train_step
from fleetprune_coordinator.graphs.types import Fixed, GateMember, Graph, Student

__all__ = [
    "Fixed",
    "GateMember",
    "Graph",
    "Student",
    "export_infer",
    "export_observe",
    "export_train_step",
]
