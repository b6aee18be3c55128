"""Devices judge several masks by the loss that each has on their own data (see `fedtiny`)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetprune.messages import Task
from fleetprune.model_payload import ModelPayload
from fleetprune.result import Result
from fleetprune_agent.data import Batches
from fleetprune_agent.feedback import Memory
from fleetprune_agent.sessions import Arrays, Graph, require_finite, run_graph
from fleetprune_agent.worker import streams
from fleetprune_sim.methods.sparse.device import packed
from fleetprune_sim.methods.sparse.frames import (
    SparsePayload,
    SparseResult,
    encode_answer,
    floats,
    pack,
)
from fleetprune_sim.methods.sparse.grow import GradientWorker
from fleetprune_sim.methods.sparse.intake import SparseIntake

SELECT = "select"
"""What such devices are asked."""
POOL = 8
"""Candidates."""
JUDGED = 4
"""Batches per device and candidate."""


class CandidateWorker(GradientWorker):
    """Judges candidates; later names weights with their gradients."""

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
        batches = Batches(self.samples.x, self.samples.y, graphs[0].meta.batch or 1, order)
        losses = self._losses(graphs[0], payload, batches)
        header = self._header(task, self._clock() - started)
        sections = {"losses": pack(losses)}
        memory = memory.left_out(task.mask_version, task.shape, packed(payload.mask))
        return memory, encode_answer(header, sections)

    def _losses(
        self, graph: Graph, payload: SparsePayload, batches: Batches
    ) -> NDArray[np.float32]:
        """(candidates,) mean losses, with each batch's own BatchNorm statistics."""
        judged = [batch for _, batch in zip(range(JUDGED), batches, strict=False)]
        zeros = np.zeros_like(payload.params)
        feeds: Arrays = {"stats": payload.stats, "momentum": zeros, "lr": np.zeros((), np.float32)}
        if (prior := self._prior(graph)) is not None:
            feeds["prior"] = prior
        losses = np.zeros(len(payload.candidates), np.float32)
        for i, mask in enumerate(payload.candidates):
            feeds["params"] = payload.params * payload.prunable.support(mask)
            for batch in judged:
                out = run_graph(graph.session, feeds | {"x": batch.x, "y": batch.y, "sw": batch.sw})
                losses[i] += float(out["loss"]) * batch.samples
        losses /= sum(batch.samples for batch in judged)
        require_finite("losses", losses)
        return losses


class LossIntake(SparseIntake):
    """Devices' losses of the candidates."""

    def __init__(self, *args: Any, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.losses = np.zeros(POOL)
        """(candidates,) summed with the devices' weights."""

    def _add_trained(self, task: Task, result: Result, weight: float) -> None:
        assert isinstance(result, SparseResult)
        self.losses += weight * floats(result, "losses", POOL).astype(np.float64)
        self._answers += 1
