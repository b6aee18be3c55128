"""What is in memory at each operator of an inference.

An inference runtime works in place where it can, so views, elementwise operators on a tensor that
nobody needs any more, and BatchNorm that export folds into the layer before it share the buffer of
their input. Everything else writes to a buffer of its own.
"""

from dataclasses import dataclass

from fleetprune_coordinator.recording import Kind, Recording


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


def peak_bytes(recording: Recording) -> int:
    """Most bytes of values in memory at once."""
    plan = memory(recording)
    made = [values[0] for values in plan.buffers]
    sizes = [recording.item_bytes[v] * recording.sizes[v] for v in made]
    return max(sum(sizes[b] for b in live) for live in plan.live)
