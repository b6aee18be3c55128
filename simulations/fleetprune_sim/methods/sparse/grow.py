"""Devices name the pruned weights with the largest gradients: those they would have back."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fleetprune.positions import decode_positions, encode_positions
from fleetprune_agent.data import Batches
from fleetprune_agent.sessions import Graph
from fleetprune_agent.trainer import Trained
from fleetprune_sim.methods.sparse.device import MaskedWorker, Masking
from fleetprune_sim.methods.sparse.frames import SparsePayload, SparseResult, pack, section
from fleetprune_sim.methods.sparse.intake import check_counts
from fleetprune_sim.methods.sparse.prunable import Bools, Prunable, best_per_tensor

GROW = "grow"
"""What such devices are asked; the numbers are how many weights to name, per tensor."""


class GradientWorker(MaskedWorker):
    """Trains, and names as many pruned weights as it is asked for.

    The gradient is that of one batch after training: the authors of FedTiny and FedRTS take one
    too, so that a device needs no room for a second gradient.
    """

    with_values: ClassVar[bool] = True
    """Send the gradients too, not only where they are."""

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
        sections = {"grown": encode_positions(np.flatnonzero(top), top.size)}
        if self.with_values:
            sections["gradient"] = pack(gradient[top])
        return sections


def named_weights(
    result: SparseResult, prunable: Prunable, mask: Bools, counts: Sequence[int]
) -> NDArray[np.intp]:
    """Places of the pruned weights that an answer names, `counts` of each tensor.

    Raises:
        WireError: The section is missing or does not decode.
        MessageError: It names other numbers, or weights that are not pruned.
    """
    places = decode_positions(section(result, "grown"), prunable.n, sum(counts))
    named = np.zeros(prunable.n, np.bool_)
    named[places] = True
    check_counts(result, prunable.kept(named & ~mask), counts)
    return places
