"""What travels: values where the mask is, and the mask itself to those who do not have it yet.

Models are frames of kind MODL and answers frames of kind RSLT, as everybody's, with other
sections: `params` holds the values on the mask's support alone, in fp32; `mask` the positions of
the kept among the prunable weights. What else a method sends is in sections of its own. Numbers
of an answer are packed as everybody's updates are, Huffman-coded where that is shorter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import WireError
from fleetprune.frame import decode_frame, encode_frame
from fleetprune.messages import Codec, Count, ResultHeader, Size
from fleetprune.model_payload import KIND as MODEL
from fleetprune.model_payload import ModelHeader, ModelPayload
from fleetprune.positions import decode_positions, encode_positions
from fleetprune.result import KIND as RESULT
from fleetprune.result import Result, decode_result
from fleetprune.update import SparseUpdate, decode_update
from fleetprune.values import decode_values, encode_values
from fleetprune_sim.methods.sparse.prunable import Bools, Prunable

Known = Callable[[int], Bools | None]
"""The (n,) mask that a device has kept, n given; None: it has none of this version."""


class SparseHeader(ModelHeader):
    """Header of a model; `params` counts the values that are sent."""

    runs: tuple[tuple[Count, Count], ...]
    """`Prunable.runs`."""
    kept: Count
    """Weights that the mask keeps."""
    ask: str = ""
    """What the method wants done beside training; "": nothing."""
    counts: tuple[Size, ...] = ()
    """Numbers that go with it."""
    weight_decay: float = 0.0
    """Of the training graph, to be taken off its gradient."""
    candidates: tuple[Count, ...] = ()
    """Weights that each of the masks to compare keeps; their sections are `mask0`, ..."""


@dataclass(frozen=True, eq=False, slots=True)
class SparsePayload(ModelPayload):
    """A model as a device sees it; `params` are zero where the mask is."""

    prunable: Prunable
    mask: Bools
    """(n,)"""
    header: SparseHeader
    candidates: tuple[Bools, ...]
    """(n,) each"""


def encode_mask(mask: Bools) -> bytes:
    """Positions of what a (n,) mask keeps."""
    return encode_positions(np.flatnonzero(mask), mask.size)


def decode_mask(data: bytes, n: int, kept: int) -> Bools:
    """An unverified (n,) mask that keeps so many; WireError if it is none."""
    mask = np.zeros(n, np.bool_)
    mask[decode_positions(data, n, kept)] = True
    return mask


def encode_sparse_model(
    header: SparseHeader,
    values: NDArray[np.float32],
    stats: NDArray[np.float32],
    masks: Sequence[Bools],
) -> bytes:
    """A frame of kind MODL.

    Args:
        header: With the counts that belong to what follows.
        values: (header.params,), on the support.
        stats: (S,).
        masks: Of those that `header.kept` and `header.candidates` count, first the mask itself,
            left out where the device has it; then all candidates.
    """
    sections = {
        "params": encode_values(values, Codec.FP32),
        "stats": encode_values(stats, Codec.FP32),
    }
    first = len(masks) - len(header.candidates)
    names = ["mask"] * first + [f"mask{i}" for i in range(len(header.candidates))]
    sections |= {name: encode_mask(mask) for name, mask in zip(names, masks, strict=True)}
    return encode_frame(MODEL, header.to_bytes(), sections)


def decode_sparse_model(
    data: bytes, *, parameters: int, statistics: int, known: Known
) -> SparsePayload:
    """Decode an unverified model.

    Args:
        data: What `encode_sparse_model` made.
        parameters: P that the device's graph has.
        statistics: S that it has.
        known: The mask that the device has kept, for where none is sent.

    Raises:
        WireError: `data` is not such a model, or the device has no mask for it.
        MessageError: Its header is malformed.
    """
    head, sections = decode_frame(data, MODEL)
    header = SparseHeader.from_bytes(head)
    prunable = Prunable(parameters, header.runs)
    ends = [0, *(start + size for start, size in header.runs)]
    starts = [*(start for start, _ in header.runs), parameters]
    if any(a > b for a, b in zip(ends, starts, strict=True)):
        raise WireError(f"prunable weights {header.runs} overlap, or lie outside 0..{parameters}")
    if "mask" in sections:
        mask = decode_mask(sections["mask"], prunable.n, header.kept)
    else:
        kept = known(prunable.n)
        if kept is None or np.count_nonzero(kept) != header.kept:
            raise WireError(f"a model without mask {header.mask_version}, which is not here")
        mask = kept
    support = prunable.support(mask)
    wanted = {"params", "stats", *(f"mask{i}" for i in range(len(header.candidates)))}
    if missing := sorted(wanted - sections.keys()):
        raise WireError(f"model without sections {missing}")
    params = np.zeros(parameters, np.float32)
    count = int(np.count_nonzero(support))
    params[support] = decode_values(sections["params"], count, Codec.FP32)
    return SparsePayload(
        header.mask_version,
        header.round,
        params,
        decode_values(sections["stats"], statistics, Codec.FP32),
        prunable,
        mask,
        header,
        tuple(
            decode_mask(sections[f"mask{i}"], prunable.n, kept)
            for i, kept in enumerate(header.candidates)
        ),
    )


@dataclass(frozen=True, eq=False, slots=True)
class SparseResult(Result):
    """An answer with all of its sections, still unverified."""

    sections: Mapping[str, bytes]


def encode_answer(header: ResultHeader, sections: Mapping[str, bytes]) -> bytes:
    """A frame of kind RSLT."""
    return encode_frame(RESULT, header.to_bytes(), sections)


def decode_answer(data: bytes) -> SparseResult:
    """Decode an unverified answer; HostileInputError if it is none."""
    result = decode_result(data)
    return SparseResult(result.header, result.update, result.vectors, decode_frame(data, RESULT)[1])


def section(result: SparseResult, name: str) -> bytes:
    """A section that an answer must have; WireError if it has not."""
    if name not in result.sections:
        raise WireError(f"answer to {result.header.task} without section {name}")
    return result.sections[name]


def pack(values: NDArray[np.float32]) -> bytes:
    """(k,) finite values as a section of an answer."""
    return SparseUpdate(0, values.size, values, None).encode(Codec.FP32)


def floats(result: SparseResult, name: str, count: int) -> NDArray[np.float32]:
    """A section of so many finite values; WireError if it is none."""
    return decode_update(section(result, name), mask_version=0, size=count).dense()
