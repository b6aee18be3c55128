"""FedTiny: devices choose the first mask by their BatchNorm, then masks move block by block.

Huang et al., "Distributed Pruning Towards Tiny Neural Networks in Federated Learning", ICDCS 2023.
The server prunes the initial model in several ways, with random densities per tensor. Devices
normalise each candidate by their own data and report its loss; the best one is trained on. In a
round of adjustment one block of layers is at stake: devices send the largest gradients of its
pruned weights, as many as will be grown; the server grows the largest mean ones and prunes the
smallest of the others. The share that moves falls along a cosine until a third of the rounds.

Left open by the paper or chosen here:

- *Selection* takes one exchange, which is round 1 of the training. Losses are measured in training
  mode, with each batch's own statistics, on at most `JUDGED` batches: the paper sends statistics
  to and fro once more and judges with the pooled ones.
- *Candidates* (`POOL`): the paper's pool grows as density falls. They differ by factors between
  `1 - NOISE` and `1 + NOISE` on a tensor's density; the first is uniform. All fit the budget.
- The paper starts from a model pre-trained on a public set; here that is `model.initial`, if there
  is one, else the random model.
- *Blocks*: at most `BLOCKS`, not more than there are adjustments; from the output backwards.
- *Gradients* are those of one batch after training.
- First and last layer, biases and norms stay, unless the two layers take more than half the
  budget.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fleetprune.messages import Codec, Task
from fleetprune.model_payload import ModelPayload
from fleetprune.positions import decode_positions, encode_positions
from fleetprune.result import Result
from fleetprune.values import encode_values
from fleetprune_agent.data import Batches
from fleetprune_agent.feedback import Memory
from fleetprune_agent.sessions import Graph, require_finite, run_graph
from fleetprune_agent.trainer import Trained
from fleetprune_agent.worker import streams
from fleetprune_coordinator.bounds import Bounds
from fleetprune_coordinator.rounds import RoundKey
from fleetprune_sim.methods.sparse.budget import keep_counts
from fleetprune_sim.methods.sparse.device import MaskedWorker, Masking
from fleetprune_sim.methods.sparse.frames import (
    SparsePayload,
    SparseResult,
    encode_answer,
    floats,
    section,
)
from fleetprune_sim.methods.sparse.intake import SparseIntake, check_counts
from fleetprune_sim.methods.sparse.method import SparseMethod
from fleetprune_sim.methods.sparse.prunable import Bools, Prunable, best_per_tensor
from fleetprune_sim.methods.sparse.rounds import SparseRounds

SELECT, GROW = "select", "grow"
POOL = 8
"""Candidates."""
NOISE = 0.5
"""Largest relative change of a candidate's density per tensor."""
JUDGED = 4
"""Batches per device and candidate."""
MOVED = 0.3
"""Share of a tensor's weights that changes places at first: 0.15 (1 + cos) in the paper."""
LAST_SHARE = 1 / 3
"""Of the rounds, until which the mask changes: round 100 of 300 in the paper."""
BLOCKS = 5
"""Into which a network is divided, as in the paper's ResNet-18."""


def block_of(turn: int, tensors: int, blocks: int) -> slice:
    """The tensors that are adjusted in the `turn`-th adjustment, counted from 0.

    Args:
        turn: Of the adjustment.
        tensors: Prunable tensors of the network.
        blocks: Into how many runs of tensors it is divided, as evenly as may be.

    Returns:
        A run of tensors: the last one first.
    """
    edges = np.linspace(0, tensors, blocks + 1).round().astype(int).tolist()
    place = blocks - 1 - turn % blocks
    return slice(edges[place], edges[place + 1])


def grow_and_prune(
    prunable: Prunable,
    mask: Bools,
    weights: NDArray[np.float32],
    gradient: NDArray[np.float64],
    counts: Sequence[int],
) -> Bools:
    """Grow pruned weights with the largest gradients, prune the smallest that were there before.

    Args:
        prunable: The tensors.
        mask: (n,) until now.
        weights: (n,).
        gradient: (n,) mean over devices; 0 for what none of them sent.
        counts: Per tensor how many move.

    Returns:
        (n,) with as many weights per tensor as before.
    """
    grown = best_per_tensor(prunable, np.abs(gradient), ~mask, counts)
    pruned = best_per_tensor(prunable, -np.abs(weights), mask, counts)
    return (mask & ~pruned) | grown


class CandidateWorker(MaskedWorker):
    """Judges candidates, and sends its largest gradients."""

    def _train(
        self,
        task: Task,
        graphs: list[Graph],
        payload: ModelPayload,
        memory: Memory,
        started: float,
    ) -> tuple[Memory, bytes]:
        assert isinstance(payload, SparsePayload)
        if payload.header.ask != SELECT:
            return super()._train(task, graphs, payload, memory, started)
        order, *_ = streams(task)
        losses = np.array([self._loss(graphs[0], payload, m, order) for m in payload.candidates])
        header = self._header(task, self._clock() - started)
        require_finite("losses", losses)
        sections = {"losses": encode_values(losses.astype(np.float32), Codec.FP32)}
        return memory, encode_answer(header, sections)

    def _loss(
        self, graph: Graph, payload: SparsePayload, mask: Bools, order: np.random.Generator
    ) -> float:
        """Mean loss under a candidate's mask, with each batch's own BatchNorm statistics."""
        batches = Batches(self.samples.x, self.samples.y, graph.meta.batch or 1, order)
        params = payload.params * payload.prunable.support(mask)
        feeds = {"params": params, "momentum": np.zeros_like(params), "stats": payload.stats}
        feeds["lr"] = np.zeros((), np.float32)
        if (prior := self._prior(graph)) is not None:
            feeds["prior"] = prior
        total = seen = 0.0
        for _, batch in zip(range(JUDGED), batches, strict=False):
            out = run_graph(
                graph.session, {**feeds, "x": batch.x, "y": batch.y, "sw": batch.sw}
            )
            total += float(out["loss"]) * batch.samples
            seen += batch.samples
        return total / seen

    def _report(
        self,
        graph: Graph,
        payload: SparsePayload,
        trained: Trained,
        masking: Masking,
        batches: Batches,
    ) -> dict[str, bytes]:
        if payload.header.ask != GROW:
            return {}
        gradient = self._gradient(graph, payload, trained, next(iter(batches)))
        counts = payload.header.counts
        top = best_per_tensor(payload.prunable, np.abs(gradient), ~payload.mask, counts)
        return {
            "grown": encode_positions(np.flatnonzero(top), top.size),
            "gradient": encode_values(gradient[top], Codec.FP32),
        }


def top_positions(
    result: SparseResult, prunable: Prunable, mask: Bools, counts: Sequence[int]
) -> NDArray[np.intp]:
    """Places of the pruned weights that an answer names, `counts` of each tensor.

    Raises:
        WireError: The section is missing or does not decode.
        MessageError: Other numbers are named, or weights that are there already.
    """
    data = section(result, "grown")
    places = decode_positions(data, prunable.n, sum(counts))
    named = np.zeros(prunable.n, np.bool_)
    named[places] = True
    check_counts(result, prunable.kept(named & ~mask), counts)
    return places


class LossIntake(SparseIntake):
    """Devices' losses of the candidates."""

    candidates = POOL

    def _add_trained(self, task: Task, result: Result, weight: float) -> None:
        assert isinstance(result, SparseResult)
        losses = floats(result, "losses", self.candidates)
        self.losses: NDArray[np.float64] = getattr(self, "losses", 0.0) + weight * losses.astype(
            np.float64
        )
        self._answers += 1


class GradientIntake(SparseIntake):
    """Devices' largest gradients."""

    counts: tuple[int, ...]

    def _take(self, result: SparseResult, values: NDArray[np.float32], weight: float) -> None:
        ...
