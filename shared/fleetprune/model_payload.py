"""A model on its way to a device: a frame of kind MODL (docs/wire-format.md, "Model")."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import WireError
from fleetprune.frame import decode_frame, encode_frame
from fleetprune.messages import Codec, Count, Message
from fleetprune.values import decode_values, encode_values

KIND: Final = "MODL"


class ModelHeader(Message):
    """Header of a frame of kind MODL; sections `params` by `codec`, `stats` in fp32."""

    mask_version: Count
    round: Count
    codec: Codec
    params: Count
    """Number of parameters."""
    stats: Count
    """Number of BatchNorm statistics."""


@dataclass(frozen=True, eq=False, slots=True)
class ModelPayload:
    """The weights of one model shape, laid flat (see `layout.FlatLayout`).

    Attributes:
        mask_version: The mask that this shape is cut by.
        round: The round that starts from these weights.
        params: (P,) float32.
        stats: (S,) float32, BatchNorm running means and variances.
    """

    mask_version: int
    round: int
    params: NDArray[np.float32]
    stats: NDArray[np.float32]


def encode_model(
    mask_version: int,
    round: int,
    params: NDArray[np.float32],
    stats: NDArray[np.float32],
    codec: Codec,
) -> bytes:
    """Encode a model for a device.

    Statistics travel as fp32 whatever the codec: they are few, and a variance rounded to zero
    divides by it.

    Args:
        mask_version: The mask that this shape is cut by.
        round: The round that starts from these weights.
        params: (P,) float32, finite.
        stats: (S,) float32, finite.
        codec: How the parameters travel, rounded to nearest.

    Returns:
        A frame of kind MODL.

    Raises:
        UsageError: A vector is not a float32 vector.
        WireError: A value is NaN or infinite.
    """
    header = ModelHeader(
        mask_version=mask_version,
        round=round,
        codec=codec,
        params=params.size,
        stats=stats.size,
    )
    sections = {
        "params": encode_values(params, codec),
        "stats": encode_values(stats, Codec.FP32),
    }
    return encode_frame(KIND, header.to_bytes(), sections)


def decode_model(data: bytes, *, parameters: int, statistics: int) -> ModelPayload:
    """Decode an unverified model of a known shape; unknown sections are ignored.

    Args:
        data: What `encode_model` made.
        parameters: Number of parameters expected.
        statistics: Number of BatchNorm statistics expected.

    Returns:
        The model, all values finite.

    Raises:
        WireError: `data` is not a model of that shape.
        MessageError: Its header is malformed.
    """
    head, sections = decode_frame(data, KIND)
    header = ModelHeader.from_bytes(head)
    for what, got, expected in (
        ("parameters", header.params, parameters),
        ("statistics", header.stats, statistics),
    ):
        if got != expected:
            raise WireError(f"model of {got} {what}, expected {expected}")
    if missing := sorted({"params", "stats"} - sections.keys()):
        raise WireError(f"model without sections {missing}")
    return ModelPayload(
        header.mask_version,
        header.round,
        decode_values(sections["params"], parameters, header.codec),
        decode_values(sections["stats"], statistics, Codec.FP32),
    )
