"""Error feedback and answered tasks, committed together.

What a lossy update leaves out (small values that top-k does not choose, rounding of int4) is kept
as the *residual* and added to the next update, so nothing is lost for good.

The residual may be moved on exactly once per answered task, though power may fail at any
instant. Two files, one for the answer and one for the residual, cannot promise that: after a kill
between the two writes either the answer's loss is forgotten or it is counted twice. So there is
one file, replaced atomically, that holds the residual *and* the answers that led to it:

    before the write   task unanswered, old residual    a repeat computes the task anew
    after the write    task answered, new residual      a repeat is given the stored answer

A task computed anew starts from the same residual, seed and model, so it has the same answer.
The residual belongs to one mask version and one shape; for any other it counts as zero (flushed),
because its values lie at other weights. A file that is damaged or of another version counts as
empty: at worst one round's rounding error is lost, and a task is answered twice, which the
coordinator recognises by the task's id.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from fleetprune.errors import FleetpruneError
from fleetprune.files import write_atomic
from fleetprune.frame import decode_frame, encode_frame
from fleetprune.messages import Message, Name

KEPT_ANSWERS: Final = 4  # a coordinator repeats the latest task, seldom the one before
_KIND: Final = "ANSW"


@dataclass(frozen=True, eq=False)
class Memory:
    """What a device remembers of the tasks it has answered.

    Attributes:
        mask_version: The mask that `residual` belongs to.
        shape: The model shape that `residual` belongs to.
        residual: (k,) float32, what has not been sent, of the parameters that are not pruned; (0,)
            none.
        answers: Result frames by task id, the latest last.
    """

    mask_version: int
    shape: str
    residual: NDArray[np.float32]
    answers: dict[str, bytes]

    def residual_for(self, mask_version: int, shape: str, size: int) -> NDArray[np.float32]:
        """What to add to the next update of that mask and shape.

        Returns:
            (size,) float32; zeros if the residual belongs to another mask, shape or size.
        """
        same = (mask_version, shape, size) == (
            self.mask_version,
            self.shape,
            self.residual.size,
        )
        return self.residual if same else np.zeros(size, np.float32)

    def answered(self, task: str, answer: bytes) -> "Memory":
        """With one more answer (the oldest beyond `KEPT_ANSWERS` is dropped)."""
        answers = {**self.answers, task: answer}
        kept = list(answers)[-KEPT_ANSWERS:]
        return replace(self, answers={t: answers[t] for t in kept})

    def left_out(self, mask_version: int, shape: str, residual: NDArray[np.float32]) -> "Memory":
        """With the (k,) residual of another mask, shape or update."""
        if not residual.any():  # a codec that loses nothing: zeros need no room
            residual = np.zeros(0, np.float32)
        return replace(self, mask_version=mask_version, shape=shape, residual=residual)


EMPTY: Final = Memory(0, "", np.zeros(0, np.float32), {})


class MemoryStore(Protocol):
    """Where a `Memory` is kept; `save` is one commit."""

    def load(self) -> Memory:
        """The last one saved; `EMPTY` if there is none."""
        ...

    def save(self, memory: Memory) -> None:
        """Replace it, atomically."""
        ...


class InMemory:
    """A store for simulated devices, which do not outlive their process."""

    def __init__(self) -> None:
        """Begin empty."""
        self._memory = EMPTY

    def load(self) -> Memory:
        """The last one saved."""
        return self._memory

    def save(self, memory: Memory) -> None:
        """Replace it."""
        self._memory = memory


class _Header(Message):
    mask_version: int = Field(ge=0)
    model_shape: str = ""
    tasks: tuple[Name, ...] = Field(max_length=KEPT_ANSWERS)


def encode_memory(memory: Memory) -> bytes:
    """The whole of a memory as one frame."""
    header = _Header(
        mask_version=memory.mask_version, model_shape=memory.shape, tasks=tuple(memory.answers)
    )
    sections = {f"answer{i}": data for i, data in enumerate(memory.answers.values())}
    sections["residual"] = memory.residual.astype("<f4").tobytes()
    return encode_frame(_KIND, header.to_bytes(), sections)


def decode_memory(data: bytes) -> Memory:
    """What `encode_memory` was given; `EMPTY` if `data` is damaged or of another version."""
    try:
        head, sections = decode_frame(data, _KIND)
        header = _Header.from_bytes(head)
        return Memory(
            header.mask_version,
            header.model_shape,
            np.frombuffer(sections["residual"], "<f4").astype(np.float32),
            {task: sections[f"answer{i}"] for i, task in enumerate(header.tasks)},
        )
    except (FleetpruneError, ValidationError, KeyError, ValueError):
        return EMPTY


class OnDisk:
    """A store of one file; nothing is kept in RAM between tasks."""

    def __init__(self, path: Path) -> None:
        """Keep it at `path`, whose folder exists."""
        self.path = path

    def load(self) -> Memory:
        """The last one saved; `EMPTY` if the file is missing, damaged or of another version."""
        try:
            return decode_memory(self.path.read_bytes())
        except OSError:
            return EMPTY

    def save(self, memory: Memory) -> None:
        """Replace the file; InstallError if the disk refuses (the old one then still stands)."""
        write_atomic(self.path, encode_memory(memory))
