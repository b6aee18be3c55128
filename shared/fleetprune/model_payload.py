"""A model on its way to a device: a frame of kind MODL (docs/wire-format.md, "Model")."""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import UsageError, WireError
from fleetprune.frame import decode_frame, encode_frame
from fleetprune.messages import Codec, Count, Message
from fleetprune.positions import decode_positions, encode_positions
from fleetprune.values import decode_values, encode_values

KIND: Final = "MODL"


class ModelHeader(Message):
    """Header of a frame of kind MODL.

    Sections: `params` by `codec`, `stats` in fp32, and `support` where some parameters are pruned.
    """

    mask_version: Count
    round: Count
    codec: Codec
    params: Count
    """Number of parameters."""
    stats: Count
    """Number of BatchNorm statistics."""
    kept: Count | None = None
    """Number of parameters that are not pruned, which alone are sent; None: all."""

    def to_bytes(self) -> bytes:
        """UTF-8 JSON, without what is None."""
        return self.model_dump_json(by_alias=True, exclude_none=True).encode()


@dataclass(frozen=True, eq=False, slots=True)
class ModelPayload:
    """The weights of one model shape, laid flat (see `layout.FlatLayout`).

    Attributes:
        mask_version: The mask that this shape is cut by.
        round: The round that starts from these weights.
        params: (P,) float32.
        stats: (S,) float32, BatchNorm running means and variances.
        support: (P,), which parameters are not pruned: the others are 0 and stay so; None: all.
    """

    mask_version: int
    round: int
    params: NDArray[np.float32]
    stats: NDArray[np.float32]
    support: NDArray[np.bool_] | None = field(default=None, kw_only=True)


def encode_model(
    mask_version: int,
    round: int,
    params: NDArray[np.float32],
    stats: NDArray[np.float32],
    codec: Codec,
    *,
    support: NDArray[np.bool_] | None = None,
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
        support: (P,), which parameters are not pruned, and travel; None: all.

    Returns:
        A frame of kind MODL.

    Raises:
        UsageError: A vector is not a float32 vector, or the support is of another length.
        WireError: A value is NaN or infinite.
    """
    if support is not None and support.shape != params.shape:
        raise UsageError(f"support of shape {support.shape}, expected {params.shape}")
    sent = params if support is None else params[support]
    header = ModelHeader(
        mask_version=mask_version,
        round=round,
        codec=codec,
        params=params.size,
        stats=stats.size,
        kept=None if support is None else sent.size,
    )
    sections = {"params": encode_values(sent, codec), "stats": encode_values(stats, Codec.FP32)}
    if support is not None:
        sections["support"] = encode_positions(np.flatnonzero(support), support.size)
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
    wanted = {"params", "stats"} | ({"support"} if header.kept is not None else set())
    if missing := sorted(wanted - sections.keys()):
        raise WireError(f"model without sections {missing}")
    stats = decode_values(sections["stats"], statistics, Codec.FP32)
    if header.kept is None:
        params = decode_values(sections["params"], parameters, header.codec)
        return ModelPayload(header.mask_version, header.round, params, stats)
    places = decode_positions(sections["support"], parameters, header.kept)
    params, support = np.zeros(parameters, np.float32), np.zeros(parameters, np.bool_)
    params[places] = decode_values(sections["params"], header.kept, header.codec)
    support[places] = True
    return ModelPayload(header.mask_version, header.round, params, stats, support=support)
