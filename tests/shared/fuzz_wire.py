"""Mutate valid encodings and check that nothing but `HostileInputError` escapes.

`python -m tests.shared.fuzz_wire 60` runs for a minute; the seed of a failure is in its message.
"""

import struct
import sys
import time
import zlib
from collections.abc import Callable
from functools import cache, partial

import numpy as np

from fleetprune.delta import apply
from fleetprune.errors import HostileInputError
from fleetprune.frame import decode_frame, encode_frame
from fleetprune.messages import Codec, ResultHeader, TaskAck, TaskKind
from fleetprune.model_payload import decode_model, encode_model
from fleetprune.positions import decode_positions, encode_positions
from fleetprune.result import decode_result, encode_result
from fleetprune.update import SparseUpdate, decode_update
from fleetprune.values import decode_values, encode_values
from tests.shared import delta_examples as deltas

Target = tuple[str, bytes, Callable[[bytes], object], bool]
"""A name, a valid encoding, its decoder, and whether the encoding ends in a CRC32."""


@cache
def targets() -> list[Target]:
    """One valid encoding of every kind, form and codec."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=130).astype(np.float32)
    header = ResultHeader(
        task="t", device="d", kind=TaskKind.TRAIN, round=1, mask_version=1, samples=1
    )
    ack = b'{"schema":1,"task":"t","device":"d","state":"accepted","reason":"x"}'
    out: list[Target] = [
        ("message", ack, TaskAck.from_bytes, False),
        (
            "frame",
            encode_frame("TEST", b"{}", {"a": b"z", "b": b"xy"}),
            partial(decode_frame, kind="TEST"),
            True,
        ),
        ("delta", deltas.DELTA, partial(apply, deltas.BASE, max_bytes=100), False),
        ("sparse delta", deltas.SPARSE, partial(apply, deltas.MARKS_BASE, max_bytes=100), False),
    ]
    for codec in Codec:
        data = encode_values(values, codec, rng)
        out.append((f"values {codec}", data, partial(decode_values, n=130, codec=codec), False))
        data = encode_model(1, 1, values, values[:9], codec)
        out.append(
            (f"model {codec}", data, partial(decode_model, parameters=130, statistics=9), True)
        )
    units = np.repeat(rng.random(60) < 0.3, 40)
    for share in (rng.random(2400) < 0.45, rng.random(2400) < 0.05, units, ~units):
        chosen = np.flatnonzero(share)
        data = encode_positions(chosen, 2400)
        decode = partial(decode_positions, n=2400, k=chosen.size)
        out.append((f"positions in form {data[0]}", data, decode, False))
        data = SparseUpdate(1, 2400, np.ones(chosen.size, np.float32), chosen).encode(Codec.INT4)
        out.append(
            (
                f"update with {chosen.size}",
                data,
                partial(decode_update, mask_version=1, size=2400),
                True,
            )
        )
        data = encode_result(header, {"stats": values}, data)
        out.append((f"result with {chosen.size}", data, decode_result, True))
    return out


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip, overwrite, insert, delete, repeat or cut: one to four of these."""
    body = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, len(body) + 1))
        size = int(rng.integers(1, 9))
        match rng.integers(0, 6):
            case 0 if at < len(body):
                body[at] ^= 1 << int(rng.integers(0, 8))
            case 1:
                body[at : at + size] = rng.bytes(len(body[at : at + size]))
            case 2:
                body[at:at] = rng.bytes(size)
            case 3:
                del body[at : at + size]
            case 4:
                body[at:at] = body[at : at + 8 * size]
            case _:
                edge = (b"\0", b"\xff", b"\x7f", b"\x80")[int(rng.integers(0, 4))]
                body[at : at + size] = edge * size
    return bytes(body)


def fuzz(iterations: int, seed: int) -> tuple[int, int]:
    """Mutate every target `iterations` times; half of the checksums are made right again.

    Returns:
        How many mutants were read, and how many were refused.

    Raises:
        AssertionError: A decoder raised something else; names the target, the seed and the bytes.
    """
    rng = np.random.default_rng(seed)
    read = refused = 0
    for _ in range(iterations):
        for name, data, decode, has_crc in targets():
            hostile = mutate(data, rng)
            if has_crc and len(hostile) > 4 and rng.random() < 0.5:
                hostile = hostile[:-4] + struct.pack("<I", zlib.crc32(hostile[:-4]))
            try:
                decode(hostile)
                read += 1
            except HostileInputError:
                refused += 1
            except Exception as e:
                raise AssertionError(f"{name}, seed {seed}: {e!r} from {hostile.hex()}") from e
    return read, refused


def main(seconds: float) -> None:
    """Fuzz with seeds 0, 1, 2, ... for about so long."""
    end = time.monotonic() + seconds
    seed = read = refused = 0
    while time.monotonic() < end:
        more_read, more_refused = fuzz(20, seed)
        read, refused, seed = read + more_read, refused + more_refused, seed + 1
    print(f"{seed} seeds: {read} mutants read, {refused} refused, nothing else escaped")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0)
