"""The inference graph: what a release ships. Weights are constants, the batch size is open."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fleetprune.errors import GraphError
from fleetprune.graphmeta import METADATA_KEY, GraphMeta, Verification, reference_feeds
from fleetprune_coordinator.graphs import verification as check
from fleetprune_coordinator.graphs.lowering import BATCH, Lowering, NotLoweredError, dtype_name
from fleetprune_coordinator.graphs.trace import explain, prepare, trace
from fleetprune_coordinator.graphs.types import Graph, finished
from fleetprune_coordinator.graphs.values import Value
from fleetprune_coordinator.graphs.writer import GraphWriter

AGREEMENT = 1e-4
"""Largest error against torch in float64, relative to the output's norm."""

_aten = torch.ops.aten
_BATCH_NORMS = ("aten.native_batch_norm", "aten._native_batch_norm_legit")


def export_infer(model: nn.Module, example: torch.Tensor) -> Graph:
    """The model in evaluation mode.

    Input: x (n, *shape) for any n. Output: y (n, ...). BatchNorm is folded into the convolution
    or linear layer before it, where nothing else reads that layer's output.

    Args:
        model: With the weights to ship.
        example: (n, *shape); shape and dtype count, and of integers the largest.

    Raises:
        GraphError: A layer cannot be lowered, or the graph does not agree with torch for one
            sample and for three.
    """
    writer = GraphWriter()
    try:
        _write(writer, trace_inference(model, example), example)
    except NotLoweredError as e:
        raise explain(e, model, example[:1]) from e
    shape = tuple(example.shape[1:])
    meta = GraphMeta(
        kind="infer",
        verification=Verification(x=check.reference_input(example, (3, *shape)), live=3),
    )
    exact = prepare(model).eval().double()
    with torch.no_grad():
        y = exact(check.doubles(meta)["x"])
    meta = check.with_expected(meta, {"y": y})
    onnx = writer.serialize({METADATA_KEY: meta.to_json()})
    _check_batches(onnx, meta, y)
    return finished(onnx, meta)


@dataclass(frozen=True)
class Folding:
    """Where the weight and the bias of a layer come from that a BatchNorm is folded into."""

    weight: fx.Node
    bias: fx.Node
    layer: tuple[fx.Node, fx.Node | None]
    """The layer's own weight and bias."""
    norm: tuple[fx.Node | None, ...]
    """The norm's weight, bias, mean and variance."""
    eps: float


@dataclass(frozen=True)
class Inference:
    """A model in evaluation mode as ATen operators, its norms folded, the batch size open."""

    graph: fx.GraphModule
    x: fx.Node
    tensors: Mapping[str, fx.Node]
    """Parameters and buffers by name."""
    constants: dict[fx.Node, torch.Tensor]
    """Values of these, and of what the norms were folded into."""
    foldings: list[Folding] = field(default_factory=list)


def trace_inference(model: nn.Module, example: torch.Tensor) -> Inference:
    """Trace a model in evaluation mode and fold its norms.

    Args:
        model: With its weights.
        example: (n, *shape); shape and dtype count.
    """
    twin = prepare(model).eval()
    tensors = {n: t.detach() for n, t in [*twin.named_parameters(), *twin.named_buffers()]}

    def forward(x: torch.Tensor, *values: torch.Tensor) -> Any:
        named = dict(zip(tensors, values, strict=True))
        return torch.func.functional_call(twin, named, (x,))

    # Never touched: traced only.
    batch = torch.empty((BATCH, *example.shape[1:]), dtype=example.dtype)
    with torch.no_grad():
        graph = trace(forward, batch, *tensors.values())
    x, *nodes = [n for n in graph.graph.nodes if n.op == "placeholder"]
    constants = dict(zip(nodes, tensors.values(), strict=True))
    foldings = fold_batch_norms(graph, constants)
    return Inference(graph, x, dict(zip(tensors, nodes, strict=True)), constants, foldings)


def lower_inference(
    writer: GraphWriter, inference: Inference, x: str, values: Mapping[fx.Node, Value]
) -> Value:
    """Write a traced model.

    Args:
        writer: Receives the nodes.
        inference: The model.
        x: Name of its input (n, *shape).
        values: Of its `constants`.

    Returns:
        Its output.

    Raises:
        NotLoweredError: An operator cannot be lowered.
        GraphError: It returns several tensors.
    """
    meta = inference.x.meta["val"]
    low = Lowering(writer)
    low.batch_size = writer.op("Shape", x, start=0, end=1)
    low.values[inference.x] = Value(tuple(meta.shape), dtype_name(meta.dtype), plain=x)
    low.values.update(values)
    outputs = low.run(inference.graph)
    if not isinstance(outputs, Value):
        raise GraphError("the model returns several outputs, expected one tensor")
    low.plain(outputs)
    return outputs


def inference_file(inference: Inference, example: torch.Tensor) -> bytes:
    """A traced model as a file, not proved and without metadata.

    Args:
        inference: The model.
        example: (n, *shape); shape and dtype count.

    Raises:
        NotLoweredError: An operator cannot be lowered.
        GraphError: It returns several tensors.
    """
    writer = GraphWriter()
    _write(writer, inference, example)
    return writer.serialize({})


def _write(writer: GraphWriter, inference: Inference, example: torch.Tensor) -> None:
    x = writer.input("x", ("n", *example.shape[1:]), dtype_name(example.dtype))
    values = {
        node: Value(tuple(t.shape), dtype_name(t.dtype), constant=t.numpy())
        for node, t in inference.constants.items()
    }
    output = lower_inference(writer, inference, x, values)
    sizes = ["n" if size % BATCH == 0 else size for size in output.shape]
    writer.output(output.plain or "", "y", sizes, output.dtype)


def fold_batch_norms(
    traced: fx.GraphModule, constants: dict[fx.Node, torch.Tensor]
) -> list[Folding]:
    """Fold each BatchNorm into the convolution or linear layer that alone feeds it.

    With s = w / sqrt(var + eps): weight * s per output channel, bias = (bias - mean) * s + b.

    Args:
        traced: Is changed in place.
        constants: The tensors behind placeholders; those of the folded layers are added.

    Returns:
        What was folded, in the order in which it has to be computed.
    """
    foldings = []
    for node in list(traced.graph.nodes):
        name = getattr(getattr(node.target, "_schema", None), "name", "").replace("::", ".")
        if name not in _BATCH_NORMS or len(node.args) != 8 or node.args[5]:
            continue
        source, *vectors = node.args[:5]
        if len(source.users) != 1 or any(v is not None and v not in constants for v in vectors):
            continue
        folding = _absorb(traced, source, constants, tuple(vectors), node.args[7])
        if folding is not None:
            foldings.append(folding)
            for reader in list(node.users):
                if reader.target is operator.getitem and reader.args[1] == 0:
                    reader.replace_all_uses_with(source)
                traced.graph.erase_node(reader)
            traced.graph.erase_node(node)
    return foldings


def _affine(vectors: list[torch.Tensor | None], eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """BatchNorm as x * scale + shift, float64."""
    weight, bias, mean, variance = (None if v is None else v.double() for v in vectors)
    if mean is None or variance is None:
        raise GraphError("BatchNorm without running statistics cannot be used for inference")
    scale = torch.rsqrt(variance + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def _absorb(
    traced: fx.GraphModule,
    source: fx.Node,
    constants: dict[fx.Node, torch.Tensor],
    norm: tuple[fx.Node | None, ...],
    eps: float,
) -> Folding | None:
    """Put a norm into the layer that computes its input; None where it is no such layer."""
    arguments: list[Any] = list(source.args)
    if source.target is _aten.convolution.default:
        x, weight, bias, *rest = arguments
        transposed = rest[3]
    elif source.target is _aten.addmm.default and not source.kwargs:
        bias, x, turned = arguments
        weight, transposed = _untransposed(turned), False
    elif source.target is _aten.mm.default:
        bias, x, turned = None, *arguments
        weight, transposed = _untransposed(turned), False
    else:
        return None
    if transposed or weight not in constants or (bias is not None and bias not in constants):
        return None
    scale, shift = _affine([None if v is None else constants[v] for v in norm], eps)
    tensors = _scaled(constants[weight], constants.get(bias), scale, shift)
    with traced.graph.inserting_before(source):
        new_weight, new_bias = (_constant(traced, constants, t) for t in tensors)
        if source.target is _aten.convolution.default:
            source.args = (x, new_weight, new_bias, *rest)
        else:
            turn = traced.graph.call_function(_aten.t.default, (new_weight,))
            turn.meta["val"] = turned.meta["val"]
            source.target, source.args = _aten.addmm.default, (new_bias, x, turn)
    return Folding(new_weight, new_bias, (weight, bias), norm, eps)


def _untransposed(node: fx.Node) -> Any:
    """The weight of a linear layer, which multiplies by its transpose."""
    return node.args[0] if node.target is _aten.t.default else None


def _scaled(
    weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the layer whose output is scaled and shifted."""
    column = scale.reshape(-1, *[1] * (weight.dim() - 1))
    offset = shift if bias is None else shift + bias.double() * scale
    return (weight.double() * column).float(), offset.float()


def _constant(
    traced: fx.GraphModule, constants: dict[fx.Node, torch.Tensor], tensor: torch.Tensor
) -> fx.Node:
    """A node for a new constant; a placeholder, since its value comes from outside."""
    node = traced.graph.placeholder(f"folded{len(constants)}")
    constants[node] = tensor
    return node


def _check_batches(onnx: bytes, meta: GraphMeta, y: torch.Tensor) -> None:
    """Compare one sample and three with torch."""
    feeds, exact = reference_feeds(meta), y.numpy()
    for count in (1, 3):
        got = check.run(onnx, {"x": feeds["x"][:count]}, optimise=True)["y"]
        want = exact[:count]
        if got.shape != want.shape:
            raise GraphError(
                f"inference graph: y of shape {got.shape} for {count} samples, "
                f"expected {want.shape}"
            )
        error = float(np.linalg.norm(got - want) / (np.linalg.norm(want) or 1.0))
        if not error <= AGREEMENT:
            raise GraphError(
                f"inference graph differs from torch by {error:.1e} for {count} samples, "
                f"tolerated is {AGREEMENT:.1e}"
            )
