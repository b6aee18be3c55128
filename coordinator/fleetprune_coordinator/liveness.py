"""What is in memory at each operator of an inference.

An inference runtime works in place where it can, so views, elementwise operators on a tensor that
nobody needs any more, and BatchNorm that export folds into the layer before it share the buffer of
their input. Everything else writes to a buffer of its own.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fleetprune.errors import TraceError
from fleetprune.layout import Activation, Architecture, KeepCounts
from fleetprune_coordinator.recording import Kind, Recording, record
from fleetprune_coordinator.resize import resize

FLOAT_BYTES = 4  # the shipped model computes in float32


@dataclass(frozen=True)
class Memory:
    """Which values share a buffer, and which buffers are in memory at each operator."""

    buffers: tuple[tuple[int, ...], ...]
    """Per buffer its values; it was made for the first."""
    live: tuple[tuple[int, ...], ...]
    """Per operator the buffers in memory while it runs."""


def memory(recording: Recording) -> Memory:
    """Lay the values of a recording out in buffers.

    A buffer lives from the operator that writes it first to the last one that reads it. The
    model's input is a buffer like any other; its output lives to the end.
    """
    operators, end = recording.operators, len(recording.operators)
    last_read = {v: i for i, op in enumerate(operators) for v in op.inputs}
    last_read[recording.result] = end
    folded = recording.folded()
    buffer_of = {0: 0}
    members: list[list[int]] = [[0]]
    born = [0]

    def free_after(buffer: int, step: int) -> bool:
        return all(last_read.get(v, -1) <= step for v in members[buffer])

    for i, op in enumerate(operators):
        source = buffer_of[op.inputs[0]]
        in_place = op.kind is Kind.ELEMENTWISE or i in folded
        shares = op.kind is Kind.VIEW or (in_place and free_after(source, i))
        for value in op.outputs:
            if not shares:
                members.append([])
                born.append(i)
            buffer_of[value] = source if shares else len(members) - 1
            members[buffer_of[value]].append(value)
    dies = [
        max(birth, *(last_read.get(v, -1) for v in values))
        for birth, values in zip(born, members, strict=True)
    ]
    return Memory(
        buffers=tuple(tuple(values) for values in members),
        live=tuple(
            tuple(b for b in range(len(members)) if born[b] <= i <= dies[b])
            for i, op in enumerate(operators)
            if op.kind is not Kind.VIEW
        ),
    )


def _probes(groups: Mapping[str, int]) -> Iterator[tuple[str, dict[str, int]]]:
    """Each group with one unit less than the dense model."""
    for group, units in groups.items():
        yield group, {**groups, group: units - 1}


def activations(
    model: nn.Module, architecture: Architecture, dense: Recording, example: Tensor
) -> tuple[tuple[Activation, ...], tuple[tuple[int, ...], ...]]:
    """Each buffer's bytes as a linear function of the keep counts, and which are live when.

    Args:
        model: The dense model, in evaluation mode.
        architecture: Its groups and tensors.
        dense: The dense model's recording.
        example: (1, ...) its input.

    Returns:
        `Architecture.activations` and `Architecture.live`.

    Raises:
        TraceError: The model executes other operators when it is narrower, or a buffer does not
            grow linearly; names the group.
    """
    plan = memory(dense)

    def bytes_at(keep: KeepCounts, group: str) -> list[int]:
        try:
            narrow = record(resize(model, architecture, keep), example)
        except TraceError as error:
            raise TraceError(f"group {group}, with fewer units: {error}") from error
        if narrow.structure() != dense.structure() or narrow.output_shape != dense.output_shape:
            raise TraceError(
                f"group {group}: a narrower model executes other operators, expected control "
                f"flow that does not depend on channel counts"
            )
        return [FLOAT_BYTES * narrow.sizes[values[0]] for values in plan.buffers]

    full = [FLOAT_BYTES * dense.sizes[values[0]] for values in plan.buffers]
    slopes: list[dict[str, int]] = [{} for _ in full]
    for group, keep in _probes(architecture.groups):
        for slope, wide, narrow in zip(slopes, full, bytes_at(keep, group), strict=True):
            if wide != narrow:
                slope[group] = wide - narrow
    found = [
        (size - sum(b * architecture.groups[g] for g, b in slope.items()), slope)
        for size, slope in zip(full, slopes, strict=True)
    ]
    half = {g: max(1, n // 2) for g, n in architecture.groups.items()}
    for (fixed, slope), size in zip(found, bytes_at(half, min(half)), strict=True):
        linear = fixed + sum(b * half[g] for g, b in slope.items())
        if fixed < 0 or min(slope.values(), default=0) < 0 or linear != size:
            raise TraceError(
                f"group {min(slope, default='')}: an intermediate tensor has {size} bytes at half "
                f"the units, expected {linear}: its size must grow linearly with each group"
            )
    return tuple(Activation(fixed=f, per_unit=s) for f, s in found), plan.live
