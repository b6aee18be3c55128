"""The graph that tells which values a class's shipped file works with, so that it can be quantised.

It is the inference graph with the weights as inputs and its norms folded in the graph itself, so it
has every tensor that the file will have, and a histogram of each that is to run on integers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import fx, nn

from fleetprune.errors import GraphError
from fleetprune.graphmeta import METADATA_KEY, GraphMeta, Verification, reference_feeds
from fleetprune_coordinator.graphs import verification as check
from fleetprune_coordinator.graphs.export_infer import (
    Folding,
    Inference,
    inference_file,
    lower_inference,
    trace_inference,
)
from fleetprune_coordinator.graphs.export_train import split_state
from fleetprune_coordinator.graphs.lowering import NotLoweredError, dtype_name
from fleetprune_coordinator.graphs.sample_axes import SAMPLES, blocks_before
from fleetprune_coordinator.graphs.trace import explain, prepare, statistics
from fleetprune_coordinator.graphs.types import Graph, finished
from fleetprune_coordinator.graphs.values import Value
from fleetprune_coordinator.graphs.writer import GraphWriter
from fleetprune_coordinator.integer_kernels import depends
from fleetprune_coordinator.quantise import prepared
from fleetprune_coordinator.selfcheck import randomised
from fleetprune_coordinator.value_ranges import (
    BINS,
    HIGHEST,
    LOWEST,
    PER_OCTAVE,
    PER_TENSOR,
)

_LARGEST: Final = 2.0**HIGHEST * (1 - 2.0**-20)  # still in the last bin


def export_ranges(model: nn.Module, example: torch.Tensor, *, batch: int) -> Graph:
    """A forward pass in evaluation mode that counts the values of the shipped file's tensors.

    Inputs: x (n, *shape) float32 for any n, sw (n,) float32, params (P,), and stats (S,) if the
    model has BatchNorm. Outputs: logits (n, classes); ranges (T * PER_TENSOR,), for each tensor
    that `quantise.prepared` chooses in the inference file, in its order, how many values have
    which magnitude, each counted sw times: `BINS` bins of values from 0 up, then as many of those
    below. Bin b holds magnitudes from 2**(LOWEST + b / PER_OCTAVE) up to the next one; the first
    also all that is smaller, the last all that is larger.

    Args:
        model: Its weights are inputs of the graph.
        example: (n, *shape) float32; the shape counts.
        batch: Samples per call.

    Raises:
        GraphError: A layer cannot be lowered, the input is not float32, nothing can run on
            integers, a tensor mixes samples, or the graph computes something else than torch.
    """
    if example.dtype != torch.float32:
        raise _not_float(example)
    # Random weights: equal ones would be written once, and their nodes counted once.
    twin = randomised(prepare(model), torch.float32)
    params = {n: p.detach() for n, p in twin.named_parameters()}
    stats = statistics(twin)
    writer = GraphWriter()
    try:
        inference = trace_inference(twin, example)
        tensors = _write(writer, inference, example, params, stats)
    except NotLoweredError as e:
        raise explain(e, model, example[:1]) from e
    meta = GraphMeta(
        kind="observe",
        batch=batch,
        parameters=sum(t.numel() for t in params.values()),
        statistics=sum(t.numel() for t in stats.values()),
        ranges=tensors * PER_TENSOR,
        verification=Verification(
            x=check.reference_input(example, (batch, *example.shape[1:])),
            live=check.live_samples(batch),
            params=check.parameter_runs(params),
            stats=check.statistic_runs(stats),
        ),
    )
    meta = _expect(prepare(model).double().eval(), meta, writer)
    onnx = writer.serialize({METADATA_KEY: meta.to_json()})
    check.check_here(onnx, meta)
    return finished(onnx, meta)


def check_countable(model: nn.Module, example: torch.Tensor) -> None:
    """Refuse a model of which `export_ranges` makes no graph because of what its tensors are.

    Args:
        model: Any weights.
        example: (n, *shape); the shape and the type count.

    Raises:
        GraphError: The input is not float32, nothing can run on integers, or a tensor mixes
            samples.
    """
    if example.dtype != torch.float32:
        raise _not_float(example)
    twin = randomised(prepare(model), torch.float32)
    try:
        _chosen(trace_inference(twin, example), example)
    except NotLoweredError as e:
        raise explain(e, model, example[:1]) from e


def _not_float(example: torch.Tensor) -> GraphError:
    return GraphError(f"ranges of a model whose input is {example.dtype}, expected float32")


def _write(
    writer: GraphWriter,
    inference: Inference,
    example: torch.Tensor,
    params: Mapping[str, torch.Tensor],
    stats: Mapping[str, torch.Tensor],
) -> int:
    """Write the whole graph; returns how many tensors are counted."""
    x = writer.input("x", ("n", *example.shape[1:]), "float32")
    sw = writer.input("sw", ("n",), "float32")
    size = sum(t.numel() for t in params.values())
    state = split_state(writer, writer.input("params", (size,), "float32"), params)
    if stats:
        size = sum(t.numel() for t in stats.values())
        state += split_state(writer, writer.input("stats", (size,), "float32"), stats)
    given = dict(zip([*params, *stats], state, strict=True))
    values = {
        node: given[name] if name in given else _fixed(inference.constants[node])
        for name, node in inference.tensors.items()
    }
    for folding in inference.foldings:
        _fold(writer, folding, values)
    logits = lower_inference(writer, inference, x, values)
    writer.output(logits.plain or "", "logits", ("n", *logits.shape[1:]))
    counted = _counted(writer.live_nodes(), x, inference, example)
    counts = [_count(writer, name, sw, blocks) for name, blocks in counted]
    writer.output(writer.op("Concat", *counts, axis=0), "ranges", (len(counts) * PER_TENSOR,))
    return len(counts)


def _counted(
    nodes: Sequence[onnx.NodeProto], x: str, inference: Inference, example: torch.Tensor
) -> list[tuple[str, int]]:
    """The tensors to count, by the names that they have here, and how their samples lie.

    They are chosen in the file itself, which stores its weights; here they are computed from the
    input. What depends on the samples is made by the same operators in the same order.
    """
    shipped, tensors, blocks = _chosen(inference, example)
    source = shipped.graph.input[0].name
    theirs, ours = _made_of(shipped.graph.node, source), _made_of(nodes, x)
    if [kind for _, kind in theirs] != [kind for _, kind in ours]:
        raise GraphError("the graph that counts values has other operators than the file")
    names = {source: x} | {a: b for (a, _), (b, _) in zip(theirs, ours, strict=True)}
    return [(names[name], at) for name, at in zip(tensors, blocks, strict=True)]


def _chosen(
    inference: Inference, example: torch.Tensor
) -> tuple[onnx.ModelProto, tuple[str, ...], list[int]]:
    """The file as it is quantised, the tensors of it that are, and how their samples lie."""
    shipped, choice = prepared(inference_file(inference, example))
    if len(choice.tensors) < 2:  # the input alone
        raise GraphError("the model has no operator that can run on integers")
    samples = np.random.default_rng(0).normal(size=(SAMPLES, *example.shape[1:]))
    return (
        shipped,
        choice.tensors,
        blocks_before(shipped, choice.tensors, samples.astype(np.float32)),
    )


def _made_of(nodes: Sequence[onnx.NodeProto], x: str) -> list[tuple[str, str]]:
    """Every value that depends on the input, with the operator that makes it, in order."""
    inside = depends(nodes, x)
    return [(name, n.op_type) for n in nodes for name in n.output if name in inside]


def _fixed(tensor: torch.Tensor) -> Value:
    return Value(tuple(tensor.shape), dtype_name(tensor.dtype), constant=tensor.numpy())


def _fold(writer: GraphWriter, folding: Folding, values: dict[fx.Node, Value]) -> None:
    """Compute a folded layer's weight and bias, as `export_infer.fold_batch_norms` does."""

    def name(node: fx.Node | None) -> str:
        if node is None:
            return ""
        value = values[node]
        return value.plain or writer.constant(value.constant)

    weight, bias = folding.layer
    gain, offset, mean, variance = map(name, folding.norm)
    spread = writer.op("Sqrt", writer.op("Add", variance, writer.scalar(folding.eps)))
    scale = writer.op("Div", gain or writer.scalar(1.0), spread)
    shape = values[weight].shape
    column = writer.op("Reshape", scale, writer.ints(-1, *[1] * (len(shape) - 1)))
    values[folding.weight] = Value(shape, plain=writer.op("Mul", name(weight), column))
    centre = writer.op("Sub", name(bias), mean) if bias is not None else writer.op("Neg", mean)
    shift = writer.op("Mul", centre, scale)
    shift = writer.op("Add", shift, offset) if offset else shift
    values[folding.bias] = Value((shape[0],), plain=shift)


def _count(writer: GraphWriter, name: str, sw: str, blocks: int) -> str:
    """(PER_TENSOR,) histogram of a tensor that is (blocks, samples, rest) in memory."""
    op, one = writer.op, writer.ints(-1)
    samples = op("Shape", sw)
    rows = op("Reshape", name, op("Concat", writer.ints(blocks), samples, one, axis=0))
    size = op("Clip", op("Abs", rows), writer.scalar(2.0**LOWEST), writer.scalar(_LARGEST))
    octave = op("Mul", op("Log", size), writer.scalar(PER_OCTAVE / math.log(2)))
    place = op("Floor", op("Add", octave, writer.scalar(-LOWEST * PER_OCTAVE)))
    behind = op("Cast", op("Less", rows, writer.scalar(0.0)), to=TensorProto.FLOAT)
    place = op("Add", place, op("Mul", behind, writer.scalar(BINS)))
    places = op("Reshape", op("Cast", place, to=TensorProto.INT64), one)
    column = op("Reshape", sw, op("Concat", samples, writer.ints(1), axis=0))
    weights = op("Reshape", op("Expand", column, op("Shape", rows)), one)
    zeros = writer.zeros(PER_TENSOR)
    return op("ScatterElements", zeros, places, weights, axis=0, reduction="add")


def _expect(exact: nn.Module, meta: GraphMeta, writer: GraphWriter) -> GraphMeta:
    """Add what torch makes of the reference inputs, and the counts that this machine finds.

    A value at the edge of a bin may be counted in the next one elsewhere: far below tolerance.
    """
    feeds = check.doubles(meta)
    named = dict(exact.named_parameters())
    state = dict(zip(named, check.split_like(feeds["params"], named), strict=True))
    if stats := statistics(exact):
        state |= dict(zip(stats, check.split_like(feeds["stats"], stats), strict=True))
    with torch.no_grad():
        logits = torch.func.functional_call(exact, state, (feeds["x"],))
    here = check.run(writer.serialize({}), reference_feeds(meta))
    counts = torch.from_numpy(here["ranges"].astype(np.float64))
    return check.with_expected(meta, {"logits": logits, "ranges": counts})
