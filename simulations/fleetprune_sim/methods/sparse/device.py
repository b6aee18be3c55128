"""A device that trains under a mask, with the same graphs and the same runtime as all others.

The graph's step is dense: after each one, what the mask prunes is set to zero again, in the
parameters and in the momentum. So a step costs what a dense one costs, and its dense gradient is
there for the asking.
"""

import numpy as np
from numpy.typing import NDArray

from fleetprune.messages import Codec, Task
from fleetprune.model_payload import ModelPayload
from fleetprune.values import encode_values
from fleetprune_agent.data import Batch, Batches
from fleetprune_agent.feedback import Memory
from fleetprune_agent.sessions import Arrays, Graph, require_finite, run_graph
from fleetprune_agent.trainer import Trained, train
from fleetprune_agent.worker import Worker, streams
from fleetprune_sim.methods.sparse.frames import (
    SparsePayload,
    decode_sparse_model,
    encode_answer,
    pack,
)
from fleetprune_sim.methods.sparse.prunable import Bools, Prunable

MOST_CANDIDATES = 16
"""Masks to compare that a model may bring along."""


class Masking:
    """Holds pruned weights at zero: called after each step of training."""

    def __init__(self, prunable: Prunable, mask: Bools) -> None:
        """Start from a (n,) mask."""
        self.prunable = prunable
        self.mask = mask

    @property
    def mask(self) -> Bools:
        """(n,), as it stands."""
        return self._mask

    @mask.setter
    def mask(self, mask: Bools) -> None:
        self._mask = mask
        self.support = self.prunable.support(mask)
        """(P,), as it stands"""

    def __call__(self, state: Arrays) -> None:
        """Set what is pruned to zero, in place."""
        self._hold(state)

    def _hold(self, state: Arrays) -> None:
        state["params"] *= self.support
        state["momentum"] *= self.support


class GradientMasking(Masking):
    """Knows each step's gradient, that of kept weights too.

    The graph adds decay and earlier steps to what it calls momentum: both are taken off again,
    with the parameters and the momentum that the step began with.
    """

    def __init__(self, payload: SparsePayload, momentum: float) -> None:
        """Start where a task starts, with the momentum that the graph was made with."""
        super().__init__(payload.prunable, payload.mask)
        self._factor = np.float32(momentum)
        self._decay = np.float32(payload.header.weight_decay)
        self._params = payload.params[self.prunable.index]
        self._momentum = np.zeros_like(self._params)

    def _gradient(self, state: Arrays) -> NDArray[np.float32]:
        """(n,) of the step that led to a state in which pruned weights have not been held yet."""
        moved = state["momentum"][self.prunable.index]
        gradient: NDArray[np.float32] = (
            moved - self._factor * self._momentum - self._decay * self._params
        )
        return gradient

    def _hold(self, state: Arrays) -> None:
        super()._hold(state)
        self._params = state["params"][self.prunable.index]
        self._momentum = state["momentum"][self.prunable.index]


class MaskedWorker(Worker):
    """Trains the weights that the mask keeps, and sends them.

    Everything is sent in full, so there is no residual: the room that a device's memory has for
    one, tied to a version of the mask, holds the mask itself, eight marks to a number.
    """

    def _longest(self, graph: Graph) -> int:
        masks = (1 + MOST_CANDIDATES) * (graph.meta.parameters // 8 + 2)
        return super()._longest(graph) + masks

    def _decode(self, data: bytes, task: Task, graph: Graph) -> SparsePayload:
        memory = self._answers.load()

        def known(n: int) -> Bools | None:
            packed = memory.residual_for(task.mask_version, task.shape, -(-n // 8))
            return unpacked(packed, n) if packed.any() else None

        meta = graph.meta
        return decode_sparse_model(
            data, parameters=meta.parameters, statistics=meta.statistics, known=known
        )

    def _train(
        self,
        task: Task,
        graphs: list[Graph],
        payload: ModelPayload,
        memory: Memory,
        started: float,
    ) -> tuple[Memory, bytes]:
        assert isinstance(payload, SparsePayload)
        order, *_ = streams(task)
        graph = graphs[0]
        batches = Batches(self.samples.x, self.samples.y, graph.meta.batch or 1, order)
        steps = task.epochs * len(batches)
        steps = min(steps, task.max_steps) if task.max_steps else steps
        masking = self._masking(graph, payload, steps)
        trained = train(
            [graph.session],
            payload,
            batches,
            epochs=task.epochs,
            max_steps=task.max_steps,
            learning_rate=task.learning_rate,
            rng=order,
            prior=self._prior(graph),
            after_step=masking,
            stopped=self._watch(task, started),
        )
        sections = {"params": pack(trained.params[masking.support])}
        if trained.stats.size:
            sections["stats"] = encode_values(trained.stats, Codec.FP32)
        sections |= self._report(graph, payload, trained, masking, batches)
        seconds = self._clock() - started
        header = self._header(task, seconds, steps=trained.steps, loss=trained.loss)
        memory = memory.left_out(task.mask_version, task.shape, packed(payload.mask))
        return memory, encode_answer(header, sections)

    def _masking(self, graph: Graph, payload: SparsePayload, steps: int) -> Masking:
        """What is called after each of the task's steps."""
        return Masking(payload.prunable, payload.mask)

    def _report(
        self,
        graph: Graph,
        payload: SparsePayload,
        trained: Trained,
        masking: Masking,
        batches: Batches,
    ) -> dict[str, bytes]:
        """Sections that go with the weights."""
        return {}

    def _gradient(
        self, graph: Graph, payload: SparsePayload, trained: Trained, batch: Batch
    ) -> NDArray[np.float32]:
        """(n,) gradient of the prunable weights after training."""
        return dense_gradient(
            graph,
            Arrays(params=trained.params, stats=trained.stats),
            batch,
            payload.prunable,
            weight_decay=payload.header.weight_decay,
            prior=self._prior(graph),
        )


def dense_gradient(
    graph: Graph,
    state: Arrays,
    batch: Batch,
    prunable: Prunable,
    *,
    weight_decay: float,
    prior: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The loss's gradient by each prunable weight, pruned ones too, on one batch.

    From momentum 0 a step makes `momentum_out = gradient + weight_decay * params` (tensors of one
    axis do not decay, but none of them is prunable).

    Args:
        graph: Of kind `train_step`.
        state: `params` (P,) and `stats` (S,); not changed.
        batch: Samples.
        prunable: Which weights.
        weight_decay: That the graph was made with.
        prior: (classes,) for graphs that adjust logits.

    Returns:
        (n,) float32.

    Raises:
        GraphError: It is not finite, or the runtime fails.
    """
    params = state["params"]
    feeds: Arrays = {
        **state,
        "momentum": np.zeros_like(params),
        "lr": np.zeros((), np.float32),
        "x": batch.x,
        "y": batch.y,
        "sw": batch.sw,
    }
    if prior is not None:
        feeds["prior"] = prior
    moved = run_graph(graph.session, feeds)["momentum_out"][prunable.index]
    gradient: NDArray[np.float32] = moved - np.float32(weight_decay) * params[prunable.index]
    require_finite("gradient", gradient)
    return gradient


def packed(mask: Bools) -> NDArray[np.float32]:
    """(ceil(n / 8),) float32: eight marks to a number."""
    return np.packbits(mask).astype(np.float32)


def unpacked(numbers: NDArray[np.float32], n: int) -> Bools:
    """The (n,) mask that `packed` was given."""
    return np.unpackbits(numbers.astype(np.uint8), count=n).astype(np.bool_)
