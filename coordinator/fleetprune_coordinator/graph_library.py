"""The signed graphs of every shape in use: made once per shape, then named by hash."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from fleetprune.criteria import Criterion, Needs, Tensors, locate, makers, needs
from fleetprune.latency import Precision
from fleetprune.layout import Architecture, Gate, KeepCounts, Role, axis_indices
from fleetprune.messages import GraphRef
from fleetprune_coordinator.gram import measured
from fleetprune_coordinator.graphs import (
    Fixed,
    GateMember,
    Graph,
    Student,
    export_infer,
    export_observe,
    export_ranges,
    export_train_step,
    finished,
    graph_meta,
)
from fleetprune_coordinator.graphs.weightless import weightless
from fleetprune_coordinator.quantise import no_ranges, quantise
from fleetprune_coordinator.resize import resize
from fleetprune_coordinator.synflow import flow_gradients

log = logging.getLogger(__name__)

Loss = str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class GraphStore(Protocol):
    """Where graphs are published (the release repository)."""

    def publish_graph(self, onnx: bytes) -> GraphRef:
        """Sign and store a graph; the same bytes give the same reference."""


@dataclass(frozen=True)
class StepOptions:
    """What is fixed in a training graph beside the shape."""

    batch: int = 32
    loss: Loss = "cross_entropy"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    distill_weight: float = 1.0
    student_task_weight: float = 0.5
    mutual_weight: float = 0.5
    prior: float = 1.0
    """How far devices adjust logits by their own label frequencies (classification only)."""
    frozen: tuple[str, ...] = ()
    """Parameters that are not trained."""


ON_GATES = frozenset({Criterion.TAYLOR, Criterion.TAYLOR_ABS})
"""Criteria that sum over a unit's gates; the others sum over the weights that make it."""


def gate_members(
    architecture: Architecture, keep: KeepCounts, criterion: Criterion = Criterion.TAYLOR
) -> list[list[GateMember]]:
    """Per group, in order, the tensors over which a criterion sums, at their place under `keep`."""
    places = architecture.gates if criterion in ON_GATES else makers(architecture)
    return [
        [
            member
            for gate in places.get(group, ())
            if (member := _member(architecture, keep, gate)) is not None
        ]
        for group in architecture.groups
    ]


def _member(architecture: Architecture, keep: KeepCounts, gate: Gate) -> GateMember | None:
    found = locate(architecture.tensor(gate.tensor).axes[gate.axis], gate.start, keep)
    if found is None:
        return None
    start, segment = found
    return GateMember(gate.tensor, gate.axis, start, segment.kept(keep), segment.block)


def student_index(
    architecture: Architecture, wide: KeepCounts, keep: KeepCounts
) -> dict[str, tuple[slice | list[int], ...]]:
    """Per parameter, the part of the `wide` model's tensor that the `keep` model has."""
    index: dict[str, tuple[slice | list[int], ...]] = {}
    for spec in architecture.role(Role.PARAMETER):
        parts: list[slice | list[int]] = []
        for axis in spec.axes:
            chosen = axis_indices(axis, wide, keep)
            leading = bool((chosen == np.arange(chosen.size)).all())
            parts.append(slice(0, chosen.size) if leading else chosen.tolist())
        index[spec.name] = tuple(parts)
    return index


def narrower(shapes: Mapping[str, KeepCounts], name: str) -> list[dict[str, int]]:
    """The distinct shapes that lie within a class's own and are smaller, the widest first."""
    own = dict(shapes[name])
    inside: list[dict[str, int]] = []
    for shape in map(dict, shapes.values()):
        if shape != own and shape not in inside and all(shape[g] <= own[g] for g in own):
            inside.append(shape)
    return sorted(inside, key=lambda shape: -sum(shape.values()))


def fingerprint(model: nn.Module, architecture: Architecture, described: Mapping[str, Any]) -> str:
    """Digest of what a model's graphs are made from beside shapes, parameters and statistics.

    Args:
        model: The user's; of its tensors the buffers count, which graphs hold as constants.
        architecture: Its description.
        described: JSON values that tell its code and its arguments.
    """
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    inputs = {spec.name for spec in architecture.role(Role.STATISTIC)}
    for name, value in model.named_buffers():
        if name not in inputs:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().numpy().tobytes())
    return digest.hexdigest()


class GraphLibrary:
    """Exports graphs on demand and remembers them by what they were made from."""

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        example: torch.Tensor,
        store: GraphStore,
        options: StepOptions,
        *,
        check_stop: Callable[[], None] = lambda: None,
        exported: MutableMapping[str, bytes] | None = None,
        identity: str = "",
    ) -> None:
        """Prepare for one model; nothing is exported yet.

        Args:
            model: The user's.
            architecture: Its description.
            example: One sample.
            store: Where graphs are published.
            options: What is the same for all shapes.
            check_stop: Called before each export, which may take seconds; raises to end.
            exported: Graphs that libraries have exported, for others with the same identity.
            identity: `fingerprint` of the model; shared graphs need one.
        """
        self._check_stop = check_stop
        self._model = model
        self._architecture = architecture
        self._example = example
        self._store = store
        self._options = options
        self._exported = {} if exported is None else exported
        self._identity = identity
        self._made: dict[str, GraphRef] = {}
        self._lengths: dict[str, int] = {}

    def train_steps(
        self,
        keep: KeepCounts,
        partners: Sequence[KeepCounts | None],
        block: int,
        *,
        fixed: bool = False,
        criterion: Criterion = Criterion.NONE,
    ) -> tuple[GraphRef, ...]:
        """Training graphs of a shape.

        Args:
            keep: The shape that trains.
            partners: Shapes within it that it teaches by distillation, one per graph; None: none.
            block: Channel block of the device's runtime; 0: portable operators.
            fixed: BatchNorm normalises by the statistics that come with the model: its own, then
                those of each partner in turn.
            criterion: What graphs say of units, if it is one that needs gradients.

        Returns:
            References to the published graphs, one per partner.
        """
        inside = [dict(partner) for partner in partners if partner is not None]
        among = inside if fixed else None
        scores = criterion if needs(criterion) is Needs.BACKWARD else Criterion.NONE
        return tuple(self._train_step(keep, partner, block, among, scores) for partner in partners)

    def observe(self, keep: KeepCounts, criterion: Criterion = Criterion.NONE) -> GraphRef:
        """The graph that sums BatchNorm moments, and what a criterion needs of inputs.

        Args:
            keep: The shape.
            criterion: If it needs forward passes: sums of squares, of zeros, or of products.
        """
        architecture = self._architecture
        crossed = measured(architecture) if criterion is Criterion.RECONSTRUCTION else ()

        def export() -> Graph:
            return export_observe(
                resize(self._model, architecture, keep),
                self._example,
                batch=self._options.batch,
                observed=architecture.observed if criterion is Criterion.WANDA else (),
                counted=architecture.observed if criterion is Criterion.APOZ else (),
                crossed=crossed,
            )

        sums = criterion if needs(criterion) is Needs.FORWARD else Criterion.NONE
        return self._once(export, kind="observe", keep=dict(keep), criterion=sums)

    def timed(self, keep: KeepCounts, precision: Precision) -> GraphRef:
        """The inference graph of a shape without its weights, for devices to time.

        Args:
            keep: The shape.
            precision: INT8: as it is when it is quantised, whatever values it works with.

        Raises:
            GraphError: It cannot be quantised.
        """

        def export() -> Graph:
            small = resize(self._model, self._architecture, keep).eval()
            whole = export_infer(small, self._example)
            onnx = whole.onnx
            if precision is Precision.INT8:
                onnx = quantise(onnx, no_ranges(onnx))
            return finished(weightless(onnx), whole.meta)

        return self._once(export, kind="timed", keep=dict(keep), precision=precision)

    def flow(self, params: Tensors) -> Tensors:
        """The gradient of SynFlow's R at other parameters (see `synflow.flow_gradients`)."""
        return flow_gradients(self._model, self._example, params)

    def _train_step(
        self,
        wide: KeepCounts,
        keep: KeepCounts | None,
        block: int,
        among: Sequence[dict[str, int]] | None,
        criterion: Criterion,
    ) -> GraphRef:
        def export() -> Graph:
            options = self._options
            scores: dict[str, Any] = {}
            if criterion is not Criterion.NONE:
                members = gate_members(self._architecture, wide, criterion)
                scores = {"gates": members, "criterion": criterion}
            student = fixed = None
            if among is not None:
                narrower = [resize(self._model, self._architecture, shape) for shape in among]
                fixed = Fixed(narrower, None if keep is None else among.index(dict(keep)))
            if keep is not None:
                student = Student(
                    resize(self._model, self._architecture, keep),
                    student_index(self._architecture, wide, keep),
                    weight=options.distill_weight,
                    task=options.student_task_weight,
                    mutual=options.mutual_weight,
                )
            return export_train_step(
                resize(self._model, self._architecture, wide),
                self._example,
                batch=options.batch,
                loss=options.loss,
                momentum=options.momentum,
                weight_decay=options.weight_decay,
                block=block,
                **scores,
                student=student,
                prior=options.prior,
                frozen=options.frozen,
                fixed=fixed,
            )

        partner = dict(keep) if keep is not None else None
        key = {"keep": dict(wide), "student": partner, "block": block, "fixed": among}
        return self._once(export, kind="train", criterion=criterion, **key)

    def ranges(self, keep: KeepCounts) -> tuple[GraphRef, int]:
        """The graph that counts the values of a shape's file, and the length of what it counts."""

        def export() -> Graph:
            small = resize(self._model, self._architecture, keep)
            return export_ranges(small, self._example, batch=self._options.batch)

        ref = self._once(export, kind="ranges", keep=dict(keep))
        return ref, self._lengths[ref.sha256]

    def _once(self, export: Callable[[], Graph], **key: Any) -> GraphRef:
        of = {"model": self._identity, "options": _plain(self._options), **key}
        digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
        if digest not in self._made:
            if digest not in self._exported:
                self._check_stop()
                self._exported[digest] = export().onnx
                log.info("exported %s graph of %d bytes", key["kind"], len(self._exported[digest]))
            ref = self._store.publish_graph(self._exported[digest])
            self._made[digest] = ref
            if key["kind"] == "ranges":
                self._lengths[ref.sha256] = graph_meta(self._exported[digest]).ranges
        return self._made[digest]


def _plain(options: StepOptions) -> dict[str, Any]:
    """As JSON values; a loss function is told by the model's identity."""
    return asdict(options) | {"loss": options.loss if isinstance(options.loss, str) else ""}
