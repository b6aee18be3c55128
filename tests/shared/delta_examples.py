"""Deltas small enough to be written by hand, of files that are no models."""

import hashlib
import lzma
from collections.abc import Sequence

import numpy as np

from fleetprune.deflate import deflate
from fleetprune.delta import HEAD, LZMA, MAGIC, NO_UNIT, PLANES, VERSION, Kind, Side, Tensor
from fleetprune.packed_weights import Form


def dense(at, *shape):
    return Side(Form.DENSE, (1, 1), at, 0, 0, shape)


def encode(
    base: bytes,
    target: bytes,
    tensors: Sequence[Tensor] = (),
    about: bytes = b"",
    steps: Sequence[int] = (),
    rest: bytes = b"",
    before: bytes = b"",
    **head,
) -> bytes:
    """A delta of these parts; `head` overrides fields of the head."""
    zigzag = [2 * s if s >= 0 else -2 * s - 1 for s in steps]
    planes = bytes(z >> 8 * p & 255 for p in range(PLANES) for z in zigzag)
    streams = [
        deflate(b"".join(t.pack() for t in tensors), match=True),
        deflate(rest, match=True, dictionary=before),
        deflate(about, match=True),
        lzma.compress(planes, lzma.FORMAT_RAW, filters=[LZMA]),
    ]
    fields = {
        "magic": MAGIC,
        "version": VERSION,
        "tensors": len(tensors),
        "base_bytes": len(base),
        "target_bytes": len(target),
        "of_base": hashlib.sha256(base).digest(),
        "of_target": hashlib.sha256(target).digest(),
    } | head
    return HEAD.pack(*fields.values(), *map(len, streams)) + b"".join(streams)


ORDER = np.array([1, -1], "<i4").tobytes()
"""Of two units, the second stands first."""

BASE = b"<" + np.array([1, 2, 3, 4], np.float32).tobytes() + b">"
"""A weight of two outputs and two inputs, between two letters."""
TARGET = b"[" + np.array([3.5, 4, 1, 1.75], np.float32).tobytes() + b"]"
"""Its outputs in the other order, the first moved by halves, the second by quarters."""
DELTA = encode(
    BASE,
    TARGET,
    [Tensor(Kind.FLOAT32, dense(1, 2, 2, 1), dense(1, 2, 2, 1), True, False)],
    ORDER + np.array([-1, -2], np.int8).tobytes(),
    [1, 0, 0, -1],
    b"[]",
    b"<>",
)

MARKS_BASE = bytes([0b10010000]) + np.array([0, 5, 7], np.int8).tobytes()
"""Four weights, 5 0 0 7, by marks: a byte of bits, then 0 and what is stored."""
SKIPS_TARGET = np.array([6, 9], np.int8).tobytes() + bytes([0, 1])
"""Four weights, 6 9 0 0, by skips."""
SPARSE = encode(
    MARKS_BASE,
    SKIPS_TARGET,
    [
        Tensor(
            Kind.INT8,
            Side(Form.MARKS, (1, 1), 1, 0, 3, (1, 4, 1)),
            Side(Form.SKIPS, (1, 1), 0, 2, 2, (1, 4, 1)),
            False,
            False,
        )
    ],
    bytes([0b01010000]),
    [1, 9],
)

NEW = np.array([NO_UNIT, 1, -1], "<i4").tobytes()
"""Of three units, the first is new, and the two others have changed places."""
