"""Turns a torch model into ONNX graphs that a device runs with numpy and onnxruntime alone.

Four graphs per model: one training step, one pass that observes activations, one that counts values
by their size so that the model can be quantised, and inference.
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
from fleetprune_coordinator.graphs.export_ranges import check_countable, export_ranges
from fleetprune_coordinator.graphs.export_train import export_train_step
from fleetprune_coordinator.graphs.types import Fixed, GateMember, Graph, Student, finished
from fleetprune_coordinator.graphs.verification import graph_meta

__all__ = [
    "Fixed",
    "GateMember",
    "Graph",
    "Student",
    "check_countable",
    "export_infer",
    "export_observe",
    "export_ranges",
    "export_train_step",
    "finished",
    "graph_meta",
]
