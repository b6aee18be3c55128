"""The observing graph: activations per input channel, and exact BatchNorm statistics.

All its sums are additive: added up over devices they are those of the pooled data. The score
|W| * ||X||_2 of Wanda needs `sumsq`, the share of zeros (APoZ) `zeros`; a narrower model's
BatchNorm is recalibrated from `bn_sum / bn_count` and `bn_sumsq / bn_count`, without any sample
leaving its device; and how far the inputs of a layer stand in for each other is told by their
products, `gram`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import nn

from fleetprune.errors import GraphError
from fleetprune.graphmeta import METADATA_KEY, GraphMeta, Verification
from fleetprune_coordinator.graphs import verification as check
from fleetprune_coordinator.graphs.export_train import split_state
from fleetprune_coordinator.graphs.lowering import Lowering, NotLoweredError, dtype_name
from fleetprune_coordinator.graphs.trace import explain, prepare, statistics, trace
from fleetprune_coordinator.graphs.types import Graph, finished
from fleetprune_coordinator.graphs.values import Value
from fleetprune_coordinator.graphs.writer import GraphWriter


@dataclass
class Observation:
    """The observing pass as a torch function of tensors alone."""

    model: nn.Module
    """In evaluation mode; hooks are added to it."""
    observed: Sequence[str]
    """Weights whose inputs' squares are summed."""
    crossed: Sequence[str] = ()
    """Those whose inputs' products are."""
    counted: Sequence[str] = ()
    """Those whose inputs' zeros are counted."""
    params: dict[str, torch.Tensor] = field(init=False)
    stats: dict[str, torch.Tensor] = field(init=False)
    _seen: dict[str, list[torch.Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.params = {n: p.detach() for n, p in self.model.named_parameters()}
        self.stats = statistics(self.model)
        names = [*self.observed, *self.crossed, *self.counted]
        layers = {n: observed_layer(self.model, n) for n in names}
        self._layers = layers
        self._triangles = {name: _triangle(layers[name]) for name in self.crossed}
        self._norms = [
            name.removesuffix(".running_mean").removesuffix("running_mean")
            for name in self.stats
            if name.endswith("running_mean")
        ]
        paths = {name.rpartition(".")[0] for name in layers} | set(self._norms)
        for path, module in self.model.named_modules():
            if path in paths:
                module.register_forward_pre_hook(
                    lambda _, args, path=path: self._seen.setdefault(path, []).append(args[0])
                )

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what a call returns, in its order."""
        asked = {
            "sumsq": self.observed,
            "zeros": self.counted,
            "bn_sum": self._norms,
            "bn_sumsq": self._norms,
            "bn_count": self._norms,
            "gram": self.crossed,
        }
        return ("logits", *(name for name, of in asked.items() if of))

    def __call__(
        self, x: torch.Tensor, sw: torch.Tensor, *state: torch.Tensor
    ) -> list[torch.Tensor]:
        """Logits, and what is named in `outputs`.

        Args:
            x: (batch, *shape).
            sw: (batch,) sample weights.
            *state: Parameters, then BatchNorm statistics.
        """
        self._seen.clear()
        tensors = dict(zip([*self.params, *self.stats], state, strict=True))
        logits = torch.func.functional_call(self.model, tensors, (x,))
        outputs = [logits]
        if self.observed:
            outputs.append(torch.cat([self._squares(name, sw) for name in self.observed]))
        if self.counted:
            outputs.append(torch.cat([self._zeros(name, sw) for name in self.counted]))
        if self._norms:
            moments = [self._moments(path, sw) for path in self._norms]
            outputs += [
                torch.cat([m[0] for m in moments]),
                torch.cat([m[1] for m in moments]),
                torch.stack([m[2] for m in moments]),
            ]
        if self.crossed:
            outputs.append(torch.cat([self._products(name, sw) for name in self.crossed]))
        return outputs

    def _squares(self, name: str, sw: torch.Tensor) -> torch.Tensor:
        """Sums of squares of a layer's inputs."""
        inputs = self._inputs(name.rpartition(".")[0], len(sw))
        return _total(_input_sums(self._layers[name], i * i, sw) for i in inputs)

    def _zeros(self, name: str, sw: torch.Tensor) -> torch.Tensor:
        """Per input the share of each sample's values that are at most 0, summed over samples."""
        layer = self._layers[name]
        inputs = self._inputs(name.rpartition(".")[0], len(sw))
        total = _total(_input_sums(layer, (i <= 0).to(i.dtype), sw) for i in inputs)
        return total * (1 / sum(_values_per_input(layer, i) for i in inputs))

    def _products(self, name: str, sw: torch.Tensor) -> torch.Tensor:
        """Upper triangle, row by row, of a layer's input products."""
        inputs = self._inputs(name.rpartition(".")[0], len(sw))
        total = _total(_input_products(self._layers[name], i, sw) for i in inputs)
        return total.reshape(-1).index_select(0, self._triangles[name])

    def _inputs(self, path: str, batch: int) -> list[torch.Tensor]:
        inputs = self._seen.get(path)
        if not inputs:
            raise GraphError(f"layer '{path}' is never called")
        if any(i.shape[0] != batch for i in inputs):
            raise GraphError(f"layer '{path}' does not see samples along its input's first axis")
        return inputs

    def _moments(self, path: str, sw: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Per channel sum and sum of squares of the input, and the weight of all positions."""
        inputs = self._inputs(path, len(sw))
        total = _total(sw @ _per_sample(i) for i in inputs)
        squares = _total(sw @ _per_sample(i * i) for i in inputs)
        count = sw.sum() * float(sum(prod(i.shape[2:]) for i in inputs))
        return total, squares, count


def _total(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return reduce(torch.add, tensors)


def observed_layer(model: nn.Module, name: str) -> nn.Module:
    """The layer whose weight is called `name`."""
    path, _, leaf = name.rpartition(".")
    try:
        layer = model.get_submodule(path)
    except AttributeError as e:
        raise GraphError(f"observed weight {name}: the model has no such layer") from e
    if leaf != "weight" or not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
        raise GraphError(
            f"observed weight {name}: expected the weight of a Conv1d, Conv2d or Linear, "
            f"got {leaf!r} of a {type(layer).__name__}"
        )
    return layer


def _triangle(layer: nn.Module) -> torch.Tensor:
    """Places of the upper triangle, row by row, in a matrix over a layer's input channels."""
    weight: Any = layer.weight
    columns = int(weight.shape[1])
    row, column = torch.triu_indices(columns, columns)
    places: torch.Tensor = row * columns + column
    return places


def _per_sample(x: torch.Tensor) -> torch.Tensor:
    """(N, C, ...) -> (N, C), summed over positions."""
    return x.flatten(2).sum(2) if x.dim() > 2 else x


def _input_sums(layer: nn.Module, values: torch.Tensor, sw: torch.Tensor) -> torch.Tensor:
    """Sum of an input's values per index of the weight's axis 1; that of all groups together."""
    if isinstance(layer, nn.Linear):
        return sw @ (values.flatten(1, -2).sum(1) if values.dim() > 2 else values)
    total = sw @ _per_sample(values)
    groups: Any = layer.groups
    return total.view(groups, -1).sum(0) if groups > 1 else total


def _values_per_input(layer: nn.Module, x: torch.Tensor) -> int:
    """How many values of one sample belong to one index of the weight's axis 1."""
    weight: Any = layer.weight
    return x[0].numel() // int(weight.shape[1])


def _input_products(layer: nn.Module, x: torch.Tensor, sw: torch.Tensor) -> torch.Tensor:
    """(C, C) sums over samples and positions of x x^T, C along the weight's axis 1."""
    if isinstance(layer, nn.Linear):
        rows = x.reshape(len(sw), -1, x.shape[-1])
    else:
        groups: Any = layer.groups
        rows = x.reshape(len(sw), groups, x.shape[1] // groups, -1).transpose(2, 3)
        rows = rows.reshape(len(sw), -1, x.shape[1] // groups)
    weighted = rows * sw.reshape(-1, 1, 1)
    return weighted.reshape(-1, rows.shape[-1]).T @ rows.reshape(-1, rows.shape[-1])


def export_observe(
    model: nn.Module,
    example: torch.Tensor,
    *,
    batch: int,
    observed: Sequence[str],
    crossed: Sequence[str] = (),
    counted: Sequence[str] = (),
) -> Graph:
    """A forward pass in evaluation mode that measures what layers get.

    Inputs: x (batch, *shape), sw (batch,) float32, params (P,), and stats (S,) if the model has
    BatchNorm. Outputs: logits (batch, classes); with `observed` sumsq (Q,), for each of its weights
    in order, per input channel (the weight's axis 1), sw times the squared input, summed over
    samples and positions; with `counted` zeros (Q,), for each of its weights in order, per input
    channel, sw times the share of a sample's positions at which the input is at most 0, summed over
    samples; with BatchNorm bn_sum (S/2,) and bn_sumsq (S/2,), the sums of each BatchNorm's input
    and its square, and bn_count (number of BatchNorms,), sum(sw) times positions; and with
    `crossed` gram (K,), for each of its weights in order, the upper triangle row by row of sw times
    the products of the input channels, summed likewise.

    zeros are counted in samples, so that the samples that a device says it has are all that is
    needed to make shares of them, for layers of any number of positions.

    Args:
        model: Its weights are inputs of the graph.
        example: (n, *shape); shape and dtype count, and of integers the largest.
        batch: Samples per call.
        observed: Names of weights of Conv1d, Conv2d or Linear layers.
        crossed: The same, of layers whose inputs' products are wanted.
        counted: The same, of layers whose inputs' zeros are wanted.

    Raises:
        GraphError: A layer cannot be lowered, a name is wrong, or the graph computes something
            else than torch.
    """
    observation = Observation(prepare(model).eval(), observed, crossed, counted)
    x = example[:1].expand(batch, *example.shape[1:]).contiguous()
    writer = GraphWriter()
    try:
        sizes = _write(writer, observation, x)
    except NotLoweredError as e:
        raise explain(e, model, x) from e
    meta = GraphMeta(
        kind="observe",
        batch=batch,
        parameters=_count(observation.params),
        statistics=_count(observation.stats),
        observed=max((sizes[name][0] for name in ("sumsq", "zeros") if name in sizes), default=0),
        verification=Verification(
            x=check.reference_input(example, tuple(x.shape)),
            live=check.live_samples(batch),
            params=check.parameter_runs(observation.params),
            stats=check.statistic_runs(observation.stats),
        ),
    )
    exact = Observation(prepare(model).double().eval(), observed, crossed, counted)
    feeds = check.doubles(meta)
    params = check.split_like(feeds["params"], exact.params)
    stats = check.split_like(feeds["stats"], exact.stats) if exact.stats else []
    with torch.no_grad():
        values = exact(feeds["x"], feeds["sw"], *params, *stats)
    named = dict(zip(exact.outputs, values, strict=True))
    meta = check.with_expected(meta, named)
    onnx = writer.serialize({METADATA_KEY: meta.to_json()})
    check.check_here(onnx, meta)
    return finished(onnx, meta)


def _count(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(t.numel() for t in tensors.values())


def _write(
    writer: GraphWriter, observation: Observation, x: torch.Tensor
) -> dict[str, tuple[int, ...]]:
    """Write the whole graph; returns its outputs' shapes."""
    sw = torch.ones(len(x))
    params, stats = observation.params, observation.stats
    with torch.no_grad():
        traced = trace(observation, x, sw, *params.values(), *stats.values())
    inputs = [
        Value(
            tuple(t.shape),
            dtype_name(t.dtype),
            plain=writer.input(name, t.shape, dtype_name(t.dtype)),
        )
        for name, t in (("x", x), ("sw", sw))
    ]
    inputs += split_state(writer, writer.input("params", (_count(params),), "float32"), params)
    if stats:
        inputs += split_state(writer, writer.input("stats", (_count(stats),), "float32"), stats)
    low = Lowering(writer)
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    low.values.update(zip(placeholders, inputs, strict=True))
    outputs = dict(zip(observation.outputs, low.run(traced), strict=True))
    for name, value in outputs.items():
        writer.output(low.plain(value), name, value.shape)
    return {name: value.shape for name, value in outputs.items()}
