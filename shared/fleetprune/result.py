"""A device's answer to a task: a frame of kind RSLT (docs/wire-format.md, "Result")."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import UsageError, WireError
from fleetprune.frame import decode_frame, encode_frame
from fleetprune.messages import Codec, ResultHeader
from fleetprune.values import check_vector, encode_values

KIND: Final = "RSLT"
VECTORS: Final = frozenset(
    {"stats", "scores", "sumsq", "zeros", "bn_sum", "bn_sumsq", "bn_count", "gram", "ranges"}
    | {"median_ms", "spread_ms"}
)
"""Sections that are float32 vectors; `ResultHeader` says what they hold."""


@dataclass(frozen=True, eq=False, slots=True)
class Result:
    """A decoded answer.

    Attributes:
        header: What was done.
        update: Bytes for `update.decode_update`, still unverified; None: none was sent.
        vectors: By section name, (n,) float32, finite; their lengths are still unverified.
    """

    header: ResultHeader
    update: bytes | None
    vectors: dict[str, NDArray[np.float32]]


def encode_result(
    header: ResultHeader,
    sections: Mapping[str, NDArray[np.float32]],
    update: bytes | None,
) -> bytes:
    """Encode an answer.

    Args:
        header: What was done.
        sections: By name out of `VECTORS`, (n,) float32, finite.
        update: What `SparseUpdate.encode` made; None: no update.

    Returns:
        A frame of kind RSLT.

    Raises:
        UsageError: A section has another name or is not a float32 vector.
        WireError: A value is NaN or infinite.
    """
    if unknown := sorted(sections.keys() - VECTORS):
        raise UsageError(f"result sections {unknown}, expected some of {sorted(VECTORS)}")
    bodies = {name: encode_values(vector, Codec.FP32) for name, vector in sections.items()}
    if update is not None:
        bodies["update"] = update
    return encode_frame(KIND, header.to_bytes(), bodies)


def decode_result(data: bytes) -> Result:
    """Decode an unverified answer; sections with unknown names are ignored.

    Args:
        data: What `encode_result` made.

    Returns:
        The answer; its update and the lengths of its vectors are for the caller to check.

    Raises:
        WireError: `data` is not such a frame, or a vector is not whole or not finite.
        MessageError: Its header is malformed.
    """
    head, sections = decode_frame(data, KIND)
    header = ResultHeader.from_bytes(head)
    vectors: dict[str, NDArray[np.float32]] = {}
    for name in sorted(VECTORS & sections.keys()):
        body = sections[name]
        if len(body) % 4:
            raise WireError(f"section {name} of {len(body)} bytes, expected whole float32s")
        vectors[name] = np.frombuffer(body, "<f4").astype(np.float32)
        check_vector(vectors[name], name)
    return Result(header, sections.get("update"), vectors)
