"""A class's latency from the coordinator's question to keep counts: everything but the network."""

import hashlib
import time
from pathlib import Path

import numpy as np
import torch

from fleetprune.budgets import Budget, Grid
from fleetprune.latency import LatencyModel, Precision
from fleetprune.messages import GraphRef
from fleetprune.result import decode_result
from fleetprune.schedule import Schedule
from fleetprune_agent.data import checked
from fleetprune_agent.feedback import InMemory
from fleetprune_agent.sessions import Graphs
from fleetprune_agent.worker import Worker, WorkerSettings, as_loop_device
from fleetprune_coordinator.graphs import export_infer
from fleetprune_coordinator.graphs.weightless import weightless
from fleetprune_coordinator.plan import Planner
from fleetprune_coordinator.registry import Registry
from fleetprune_coordinator.resize import resize
from fleetprune_coordinator.timing import digest, read_times, shapes_to_time, tables, timing_task
from fleetprune_coordinator.tracing import trace
from fleetprune_sim.models import mlp


class Shelf:
    """Graphs by the name under which a device asks for them."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def publish_graph(self, onnx: bytes) -> GraphRef:
        sha256 = hashlib.sha256(onnx).hexdigest()
        self.files[f"targets/graphs/{sha256}.{sha256}.onnx"] = onnx
        return GraphRef(target=f"graphs/{sha256}.onnx", sha256=sha256)


def device(name: str):
    samples = checked(np.zeros((3, 64)), None, lambda i: f"row {i}", "memory")
    settings = WorkerSettings(name, trains=False)
    return as_loop_device(Worker(settings, samples, Graphs(), InMemory()))


def test_from_question_to_keep_counts(tmp_path: Path) -> None:
    model, example, shelf = mlp(64, 256), torch.zeros(1, 64), Shelf()
    architecture = trace(model, example)
    shapes = shapes_to_time(architecture, Grid.of(architecture.groups, 32))
    graphs = [
        shelf.publish_graph(weightless(export_infer(resize(model, architecture, k), example).onnx))
        for k in shapes
    ]
    answers = []
    for name in ("m1", "m2"):
        task = timing_task(f"t.{name}", name, "meter", graphs, sweeps=2, runs=5)
        frame = device(name)(task.to_bytes(), shelf.files.__getitem__)
        answers.append(read_times(decode_result(frame), len(shapes)))
    (table,) = tables("meter", Precision.FLOAT32, shapes, answers)
    with Registry.open(tmp_path, time.time) as registry:
        registry.set_classes({"meter": False})
        registry.set_latency(table, digest(architecture))
        known = registry.latency("meter", digest(architecture), Precision.FLOAT32)
    assert known == table
    assert known.devices == 2
    fitted = LatencyModel.fit(architecture, known)
    limit = 1.001 * fitted.at_most({"0": 128})
    planner = Planner(
        architecture, {"meter": Budget(latency_ms=limit)}, schedule=Schedule(), multiple=32
    )
    flat = {"0": np.ones(256, np.float32)}
    assert planner.shapes(1, flat) == {"meter": {"0": 256}}
    planner.learn_latency({"meter": fitted})
    keep = planner.shapes(1, flat)["meter"]
    assert keep["0"] >= 128
    assert fitted.at_most(keep) <= limit
