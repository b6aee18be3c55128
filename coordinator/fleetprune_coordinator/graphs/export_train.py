"""The training graph: forward, loss, backward, optimiser step, BatchNorm statistics."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from fleetprune.criteria import Criterion
from fleetprune.errors import GraphError
from fleetprune.graphmeta import METADATA_KEY, GraphMeta, Verification
from fleetprune_coordinator.graphs import verification as check
from fleetprune_coordinator.graphs.losses import LOSSES, Loss
from fleetprune_coordinator.graphs.lowering import Lowering, NotLoweredError, dtype_name
from fleetprune_coordinator.graphs.trace import explain, is_batch_norm, prepare, trace
from fleetprune_coordinator.graphs.training_step import TrainingStep, training_step
from fleetprune_coordinator.graphs.types import Fixed, GateMember, Graph, Student, finished
from fleetprune_coordinator.graphs.unit_scores import check_criterion, expected, lowered
from fleetprune_coordinator.graphs.values import Value
from fleetprune_coordinator.graphs.writer import NCHWC, GraphWriter

Gates = Sequence[Sequence[GateMember]]


def export_train_step(
    model: nn.Module,
    example: torch.Tensor,
    *,
    batch: int,
    loss: str | Loss = "cross_entropy",
    target: torch.Tensor | None = None,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    block: int = 0,
    gates: Gates = (),
    criterion: Criterion = Criterion.TAYLOR,
    student: Student | None = None,
    prior: float = 0.0,
    fixed: Fixed | None = None,
    frozen: Collection[str] = (),
    gradient: bool = False,
) -> Graph:
    """One step of SGD as a graph.

    Inputs: x (batch, *shape), y, sw (batch,) float32 sample weights, lr float32 without axes,
    params (P,), momentum (P,), and stats (S,) if the model has BatchNorm. Outputs: loss without
    axes, params_out (P,), momentum_out (P,), stats_out (S,) if there are statistics, scores (U,)
    if there are gates, grad (P,) if asked for.

        loss = sum(loss_i * sw_i) / sum(sw)
        v = momentum * v + (g + weight_decay * p)        p = p - lr * v

    Weight decay leaves tensors with fewer than two axes (norm scales, biases) alone. A sample of
    weight 0 counts nowhere, not even in BatchNorm: a short batch is filled up with such samples.
    scores holds, per group and unit, what `criterion` makes of w and dL/dw over the unit's elements
    in all gate members of the group (`fleetprune.criteria.gradients`; SNIP not yet divided by the
    network's sum).

    Args:
        model: All its parameters are trained, but those that are frozen.
        example: (n, *shape); shape and dtype count, and of integers the largest.
        batch: Samples per step.
        loss: "cross_entropy" (y (batch,) int64), "mse" (y of the output's shape), or a function
            of output and y that returns (batch,) losses.
        target: An example of y (n, ...), for a loss function whose y is not (batch,) int64
            class numbers.
        momentum: Of SGD.
        weight_decay: Of SGD.
        block: Channels per memory block of the device (16 with AVX-512, 8 with AVX2); 0 makes a
            graph that any machine can run.
        gates: Per group its gate members.
        criterion: What the output scores holds; one that needs gradients.
        student: Trained along with the model, by distillation; classification only.
        prior: If not 0, take an input prior (classes,) that is added so many times to the output
            in the task's loss, and there only: with the log frequencies of the device's labels, a
            class that the device seldom sees is not unlearned (logit adjustment, Menon et al.
            2021; per device, FedLC, Zhang et al. 2022).
        fixed: BatchNorm normalises by the input `stats`, which then also holds the statistics of
            all narrower models, and there is no output stats_out ("FixBN", Zhong et al. 2023).
        frozen: Parameters that stay as they are: their momentum stays zero, too. Their gradients
            still count for the scores, and in grad.
        gradient: Also return the gradient.

    Raises:
        GraphError: A layer cannot be lowered, an argument does not fit the model, or the graph
            computes something else than torch.
    """
    function = LOSSES.get(loss) if isinstance(loss, str) else loss
    if function is None:
        raise GraphError(f"loss {loss!r}, expected one of {sorted(LOSSES)} or a function")
    _check_block(block)
    check_criterion(criterion)
    step = training_step(model, function, student, torch.float32, prior=prior, fixed=fixed)
    units = _check_gates(gates, step.params)
    if unknown := sorted(set(frozen) - step.params.keys()):
        raise GraphError(f"frozen parameter {unknown[0]}: the model has no such parameter")
    x = example[:1].expand(batch, *example.shape[1:]).contiguous()
    if batch == 1:
        _check_norms(step.model, x)
    y = _targets(step.model, x, loss, target)
    writer = GraphWriter()
    try:
        _write(
            writer,
            step,
            x,
            y,
            momentum=momentum,
            weight_decay=weight_decay,
            block=block,
            gates=gates,
            criterion=criterion,
            frozen=frozen,
            gradient=gradient,
        )
    except NotLoweredError as e:
        raise explain(e, model, x) from e
    meta = GraphMeta(
        kind="train_step",
        block=block if writer.uses_domain(NCHWC) else 0,
        batch=batch,
        parameters=_count(step.params),
        statistics=_count(step.stats),
        units=units,
        criterion=criterion.value if units else "",
        classes=_classes(step, x) if prior else 0,
        momentum=momentum,
        verification=Verification(
            x=check.reference_input(example, tuple(x.shape)),
            y=check.reference_input(y, tuple(y.shape)),
            live=check.live_samples(batch),
            params=check.parameter_runs(step.params),
            stats=check.statistic_runs(step.stats),
        ),
    )
    if not writer.uses("RandomUniform"):
        exact = training_step(model, function, student, torch.float64, prior=prior, fixed=fixed)
        meta = _expect(exact, meta, weight_decay, gates, criterion, frozen=frozen)
    onnx = writer.serialize({METADATA_KEY: meta.to_json()}, turn="loss")
    check.check_here(onnx, meta)
    return finished(onnx, meta)


def _check_block(block: int) -> None:
    if block not in (0, 8, 16):
        raise GraphError(f"block {block}, expected 0, 8 or 16")


def _check_norms(model: nn.Module, x: torch.Tensor) -> None:
    """GraphError if a BatchNorm would get a single number per channel, which has no spread."""

    def refuse(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            raise GraphError(
                f"layer '{name}' ({type(module).__name__}): a batch of 1 gives it one number per "
                "channel, which has no spread to divide by; set training.batch to at least 2"
            )

    twin = prepare(model)
    for name, module in twin.named_modules():
        if is_batch_norm(module) and module.training:
            module.register_forward_pre_hook(partial(refuse, name))
    with torch.no_grad():
        twin(x)


def _count(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(t.numel() for t in tensors.values())


def _check_gates(gates: Gates, params: Mapping[str, torch.Tensor]) -> int:
    """The number of units of all groups together."""
    total = 0
    for number, group in enumerate(gates):
        counts = {member.units for member in group}
        if len(counts) != 1:
            raise GraphError(f"gates of group {number}: units {sorted(counts)}, expected one count")
        for m in group:
            if m.parameter not in params:
                raise GraphError(f"gate {m.parameter}: the model has no such parameter")
            shape = tuple(params[m.parameter].shape)
            end = m.start + m.units * m.block
            if not 0 <= m.axis < len(shape) or not 0 <= m.start < end <= shape[m.axis]:
                raise GraphError(
                    f"gate {m.parameter}: indices {m.start}..{end} on axis {m.axis} "
                    f"do not exist in shape {shape}"
                )
        total += counts.pop()
    return total


def _targets(
    model: nn.Module, x: torch.Tensor, loss: str | Loss, target: torch.Tensor | None
) -> torch.Tensor:
    """An example of y for the whole batch; of class numbers, the largest."""
    if target is not None:
        return target[:1].expand(len(x), *target.shape[1:]).contiguous()
    with torch.no_grad():
        output = prepare(model)(x)
    if loss == "mse":
        return torch.zeros_like(output)
    return torch.full((len(x),), output.shape[-1] - 1, dtype=torch.int64)


def _classes(step: TrainingStep, x: torch.Tensor) -> int:
    with torch.no_grad():
        return int(prepare(step.model)(x).shape[-1])


def _write(
    writer: GraphWriter,
    step: TrainingStep,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    momentum: float,
    weight_decay: float,
    block: int,
    gates: Gates,
    criterion: Criterion,
    frozen: Collection[str],
    gradient: bool,
) -> None:
    """Write the whole graph."""
    size, statistic_size = _count(step.params), _count(step.stats)
    priors = [torch.zeros(_classes(step, x))] if step.adjusted else []
    state = [*step.params.values(), *step.stats.values(), *priors]
    traced = trace(step, x, y, torch.ones(len(x)), *state)
    inputs = [
        Value(
            tuple(t.shape),
            dtype_name(t.dtype),
            plain=writer.input(name, t.shape, dtype_name(t.dtype)),
        )
        for name, t in (("x", x), ("y", y), ("sw", torch.ones(len(x))))
    ]
    lr = writer.input("lr", (), "float32")
    params = writer.input("params", (size,), "float32")
    velocity = writer.input("momentum", (size,), "float32")
    weights = split_state(writer, params, step.params)
    stats = []
    if step.stats:
        stats = split_state(writer, writer.input("stats", (statistic_size,), "float32"), step.stats)
    shift = [
        Value(tuple(p.shape), "float32", plain=writer.input("prior", p.shape, "float32"))
        for p in priors
    ]
    low = Lowering(writer, block, live=writer.op("Sign", inputs[2].plain or ""))
    low.batch = len(x)
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    low.values.update(zip(placeholders, [*inputs, *weights, *stats, *shift], strict=True))
    loss, *gradients = low.run(traced)

    names = [low.plain(g) for g in gradients]
    decayed = [
        writer.op("Add", g, writer.op("Mul", low.plain(w), writer.scalar(weight_decay)))
        if weight_decay and len(w.shape) > 1
        else g
        for g, w in zip(names, weights, strict=True)
    ]
    decayed = [
        writer.zeros(*tensor.shape) if name in frozen else g
        for g, (name, tensor) in zip(decayed, step.params.items(), strict=True)
    ]
    kept = writer.op("Mul", velocity, writer.scalar(momentum))
    moved = writer.op("Add", kept, join_state(writer, decayed))
    writer.output(low.plain(loss), "loss", ())
    writer.output(writer.op("Sub", params, writer.op("Mul", moved, lr)), "params_out", (size,))
    writer.output(moved, "momentum_out", (size,))
    if step.stats and step.fixed is None:
        now = [low.updated.get(s) or low.plain(s) for s in stats]
        writer.output(join_state(writer, now), "stats_out", (statistic_size,))
    if gates:
        by_name = dict(zip(step.params, zip(weights, names, strict=True), strict=True))
        scores = [lowered(low, criterion, group, by_name) for group in gates]
        joined = writer.op("Concat", *scores, axis=0) if len(scores) > 1 else scores[0]
        writer.output(joined, "scores", (sum(g[0].units for g in gates),))
    if gradient:
        writer.output(join_state(writer, names), "grad", (size,))


def split_state(writer: GraphWriter, flat: str, tensors: Mapping[str, torch.Tensor]) -> list[Value]:
    """A flat input cut into the tensors that it holds."""
    sizes = [t.numel() for t in tensors.values()]
    parts = [flat]
    if len(sizes) > 1:
        parts = writer.multi("Split", flat, writer.ints(*sizes), outputs=len(sizes), axis=0)
    return [
        Value(
            tuple(t.shape),
            plain=p if t.dim() == 1 else writer.op("Reshape", p, writer.ints(*t.shape)),
        )
        for p, t in zip(parts, tensors.values(), strict=True)
    ]


def join_state(writer: GraphWriter, names: Sequence[str]) -> str:
    """One flat tensor of all."""
    flat = [writer.op("Reshape", n, writer.ints(-1)) for n in names]
    return writer.op("Concat", *flat, axis=0)


def _expect(
    step: TrainingStep,
    meta: GraphMeta,
    weight_decay: float,
    gates: Gates,
    criterion: Criterion,
    *,
    frozen: Collection[str],
) -> GraphMeta:
    """Add what torch makes of the reference inputs: float64, live samples only, lr = 1."""
    feeds, live = check.doubles(meta), meta.verification.live
    params = check.split_like(feeds["params"], step.params)
    stats = check.split_like(feeds["stats"], step.stats) if step.stats else []
    batch = [feeds[name][:live] for name in ("x", "y", "sw")]
    priors = [feeds["prior"]] if step.adjusted else []
    loss, *gradients = step(*batch, *params, *stats, *priors)
    moved = [
        g + weight_decay * p if p.dim() > 1 else g for g, p in zip(gradients, params, strict=True)
    ]
    moved = [
        torch.zeros_like(g) if name in frozen else g
        for name, g in zip(step.params, moved, strict=True)
    ]
    outputs = {
        "loss": loss,
        "momentum_out": check.flatten(moved),
        "params_out": feeds["params"] - check.flatten(moved),
    }
    scales = {}
    if stats and step.fixed is None:
        outputs["stats_out"] = check.flatten(stats)
    if gates:
        outputs["scores"], scales["scores"] = expected(
            criterion,
            gates,
            dict(zip(step.params, params, strict=True)),
            dict(zip(step.params, gradients, strict=True)),
        )
    return check.with_expected(meta, outputs, scales)
