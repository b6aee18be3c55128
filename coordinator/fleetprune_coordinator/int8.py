"""Whether a class's model ships in int8: quantised, measured beside the float32 file, and judged.

The float32 file ships where quantising costs too much, and the reason is told with the release.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fleetprune.errors import GraphError
from fleetprune.layout import Architecture
from fleetprune_coordinator.artifacts import Artifact, golden, predict
from fleetprune_coordinator.graphs import check_countable, export_infer
from fleetprune_coordinator.onnx_costs import file_costs, overhead_bytes
from fleetprune_coordinator.quantise import (
    all_integer,
    float_layers,
    float_weights,
    no_ranges,
    quantise,
    quantised,
)
from fleetprune_coordinator.selfcheck import randomised

Int8 = bool | Literal["auto"]

UNMEASURED: Final = "no device has measured the ranges of activations"

COMPARED: Final = 512
"""Samples on which the integer kernels are held against the file as it is written."""
TIMES: Final = 3.0
"""How much farther than that another machine's roundings may lead."""
STEPS: Final = 4.0
"""Of 255 between the smallest and the largest output: the least tolerance."""


@dataclass(frozen=True)
class Verdict:
    """What quantising a class's model came to, told with the release."""

    int8: bool
    """Whether the quantised file ships."""
    reason: str = ""
    """Why not, or why all the same; or which layers stay in float32 even so."""
    accuracy: float | None = None
    """Of the quantised file on the test set."""
    float_accuracy: float | None = None
    agreement: float | None = None
    """Share of samples for which both files' largest outputs are the same."""


def choose_file(
    made: Artifact,
    ranges: NDArray[np.float32] | None,
    x: NDArray[np.float32],
    y: NDArray[np.int64] | None,
    *,
    wanted: Int8,
    most_lost: float,
    fits: Callable[[Artifact], bool],
    unranged: str = UNMEASURED,
) -> tuple[Artifact, Verdict]:
    """Quantise a class's file and decide which of the two ships.

    Args:
        made: The float32 artifact.
        ranges: (tensors, 2) as `quantise` takes them; None: nobody has measured any.
        x: (n, ...) samples to compare the files on, the test set if there is one.
        y: (n,) their labels; None: they are not known.
        wanted: True: the class's budget was planned for the quantised file, which ships even if it
            loses too much where the other is over the budget. "auto": the budget was planned for
            the float32 file.
        most_lost: Largest loss of accuracy, as a share of all samples.
        fits: Whether a file is within the class's budget.
        unranged: Why there are no ranges, if there are none.

    Returns:
        The artifact to ship, and why.
    """
    if ranges is None:
        return made, Verdict(int8=False, reason=unranged)
    try:
        small = quantised_artifact(made, ranges, x)
    except GraphError as e:
        return made, Verdict(int8=False, reason=str(e))
    outputs = [predict(artifact.onnx, x).argmax(axis=1) for artifact in (small, made)]
    agreement = round(float((outputs[0] == outputs[1]).mean()), 4)
    if y is None:
        if wanted == "auto":
            reason = "there is no test set (data.test) to measure what int8 costs"
            return made, Verdict(int8=False, reason=reason, agreement=agreement)
        return small, Verdict(int8=True, reason=float_layers(made.onnx), agreement=agreement)
    ours, before = (float((guess == y).mean()) for guess in outputs)
    ships, reason = before - ours <= most_lost + 1e-9, float_layers(made.onnx)
    if not ships:
        reason = f"int8 loses {before - ours:.4f} of accuracy, allowed are {most_lost:g}"
        if not fits(made):
            ships, reason = True, f"{reason}; the float32 file is over the budget"
    verdict = Verdict(ships, reason, round(ours, 4), round(before, 4), agreement)
    return small if ships else made, verdict


def quantised_artifact(
    made: Artifact, ranges: NDArray[np.float32], x: NDArray[np.float32]
) -> Artifact:
    """The quantised file of a class.

    Its golden outputs are those of this machine's integer kernels. Another machine's sums are the
    same, but not how they are rounded to the next tensor's steps; how far that leads is seen
    from the same file run as it is written, in float32. Samples on which the model is so sure that
    outputs within the tolerance have the same largest one come first.

    Args:
        made: The float32 artifact.
        ranges: (tensors, 2) as `quantise` takes them.
        x: (n, ...) samples.

    Raises:
        GraphError: The ranges are not those of this file.
    """
    onnx = quantise(made.onnx, ranges)
    x = x[:COMPARED]
    y = predict(onnx, x)
    apart = float(np.abs(y - predict(onnx, x, as_written=True)).max())
    tolerance = max(TIMES * apart, STEPS * float(np.ptp(y)) / 255, made.tolerance)
    with np.load(io.BytesIO(made.golden)) as before:
        count = len(before["x"])
    ordered = np.sort(y, axis=1)
    sure = ordered[:, -1] - ordered[:, -2] > 2 * tolerance
    first = np.argsort(~sure, kind="stable")[:count]
    return replace(
        made,
        onnx=onnx,
        golden=golden(x[first], y[first]),
        costs=file_costs(onnx),
        tolerance=tolerance,
        int8=True,
    )


def planned(model: nn.Module, architecture: Architecture) -> Architecture:
    """What budgets are held against where the quantised file is to ship (see `quantised`).

    Args:
        model: The dense model; it is not changed.
        architecture: Its description.

    Raises:
        GraphError: The model cannot be quantised, or its values cannot be counted.
    """
    example = torch.zeros(1, *architecture.input_shape)
    check_countable(model, example)

    def export(dense: nn.Module, sample: Tensor) -> bytes:
        onnx = export_infer(dense, sample).onnx
        return quantise(onnx, no_ranges(onnx))

    twin = randomised(model, torch.float32)
    file = export(twin, example)
    weights = {name: p.detach().numpy() for name, p in twin.named_parameters()}
    floats = float_weights(file, weights)
    found = quantised(architecture, integer=all_integer(file), floats=floats)
    overhead = overhead_bytes(model, architecture, example, export, found)
    return found.model_copy(update={"overhead_bytes": overhead})
