import hashlib

import numpy as np
import pytest
import torch
from onnx import load_model_from_string
from torch import nn

from fleetprune.criteria import Criterion
from fleetprune.graphmeta import parse_graph_meta
from fleetprune.messages import GraphRef
from fleetprune_coordinator.graph_library import GraphLibrary, StepOptions, fingerprint
from fleetprune_coordinator.resize import read
from fleetprune_coordinator.tracing import trace


class Scaled(nn.Module):
    """With a constant and BatchNorm statistics."""

    def __init__(self, scale=2.0):
        super().__init__()
        self.hidden, self.norm, self.out = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.tensor([scale]))

    def forward(self, x):
        return self.out(torch.relu(self.norm(self.hidden(x * self.scale))))


class Store:
    """Keeps what is published."""

    def __init__(self):
        self.graphs = []

    def publish_graph(self, onnx):
        self.graphs.append(onnx)
        digest = hashlib.sha256(onnx).hexdigest()
        return GraphRef(target=f"graphs/{digest}.onnx", sha256=digest, size=len(onnx))


def identity(model, **described):
    return fingerprint(model, trace(model, torch.zeros(1, 4)), described)


def library(exported, model, seen, **options):
    architecture = trace(model, torch.zeros(1, 4))
    store = Store()
    made = GraphLibrary(
        model,
        architecture,
        torch.zeros(1, 4),
        store,
        StepOptions(batch=4, **options),
        check_stop=lambda: seen.append(1),
        exported=exported,
        identity=fingerprint(model, architecture, {}),
    )
    return made, store, architecture


def test_runs_of_one_model_export_each_graph_once():
    exported, seen = {}, []
    first, before, architecture = library(exported, Scaled(), seen)
    refs = first.train_steps(architecture.groups, [None], 0)
    assert len(seen) == 1

    model = Scaled()  # other weights
    model.norm.running_mean += 1
    second, after, _ = library(exported, model, seen)
    assert second.train_steps(architecture.groups, [None], 0) == refs
    assert (len(seen), after.graphs) == (1, before.graphs)
    second.observe(architecture.groups)
    assert len(seen) == 2


@pytest.mark.parametrize("other", [{"momentum": 0.5}, {"prior": 0.5}, {"batch": 8}])
def test_other_options_are_other_graphs(other):
    exported, seen = {}, []
    options = {"batch": 4, **other}
    one, _, architecture = library(exported, Scaled(), seen)
    one.train_steps(architecture.groups, [None], 0)
    made = GraphLibrary(
        Scaled(),
        architecture,
        torch.zeros(1, 4),
        Store(),
        StepOptions(**options),
        exported=exported,
        identity=identity(Scaled()),
    )
    made.train_steps(architecture.groups, [None], 0)
    assert len(exported) == 2


def outputs(onnx):
    return {o.name for o in load_model_from_string(onnx).graph.output}


def test_a_graph_says_of_units_what_its_criterion_needs():
    made, store, architecture = library({}, Scaled(), [])
    dense = architecture.groups
    for criterion in ("none", "taylor", "fisher", "magnitude", "wanda"):
        made.train_steps(dense, [None], 0, criterion=Criterion(criterion))
    scored = {}
    for onnx in store.graphs:
        (entry,) = load_model_from_string(onnx).metadata_props
        meta = parse_graph_meta(entry.value)
        scored[meta.criterion] = ("scores" in outputs(onnx), meta.units)
    assert scored == {"": (False, 0), "taylor": (True, 8), "fisher": (True, 8)}
    assert len(store.graphs) == 3  # what needs no gradient shares one


def test_an_observing_graph_sums_what_its_criterion_needs():
    made, store, architecture = library({}, Scaled(), [])
    dense = architecture.groups
    for criterion in ("taylor", "wanda", "apoz", "reconstruction", "movement"):
        made.observe(dense, Criterion(criterion))
    always = {"logits", "bn_sum", "bn_sumsq", "bn_count"}
    assert [outputs(onnx) - always for onnx in store.graphs] == [
        set(),
        {"sumsq"},
        {"zeros"},
        {"gram"},
    ]


def test_the_flow_is_that_of_the_parameters_that_are_given():
    made, _, _ = library({}, Scaled(), [])
    params, _ = read(Scaled())
    gradients = made.flow(params)
    for name in ("hidden.weight", "norm.weight", "out.weight"):
        assert np.abs(params[name] * gradients[name]).sum() == pytest.approx(1, rel=1e-5)


def test_a_fingerprint_tells_constants_and_arguments_but_not_weights():
    model = Scaled()
    same = identity(model, factory="f")
    with torch.no_grad():
        model.hidden.weight += 1
        model.norm.running_var *= 2
    assert identity(model, factory="f") == same
    others = [
        identity(model, factory="g"),
        identity(Scaled(scale=3.0), factory="f"),
    ]
    assert len({same, *others}) == 3
