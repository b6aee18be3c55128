"""What updates cost on the wire: `python benchmarks/codec.py [values]`.

Bytes per value and speed of every codec, and the bits of the positions against the bound
`n * H(p)`, for positions without structure and for the top-k of layers of unlike scales.
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fleetprune.deflate import deflate
from fleetprune.messages import Codec
from fleetprune.positions import decode_positions, encode_positions
from fleetprune.update import top_k
from fleetprune.values import decode_values, encode_values

FORMS = ("bitmap", "gaps", "bitmap+z", "gaps+z")


def best_of(times: int, work: Callable[[], object]) -> float:
    """Seconds of the fastest run."""
    fastest = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def entropy_bits(p: float) -> float:
    return float(-p * np.log2(p) - (1 - p) * np.log2(1 - p))


def values_table(n: int) -> Table:
    values = np.random.default_rng(0).normal(size=n).astype(np.float32)
    table = Table(
        "codec", "rounding", "bytes/value", "+z", "encode MB/s", "decode MB/s", "rms error"
    )
    for codec in Codec:
        draws = (None, np.random.default_rng(1)) if codec in {Codec.INT8, Codec.INT4} else (None,)
        for rng in draws:
            data = encode_values(values, codec, rng)
            error = decode_values(data, n, codec) - values
            encode = best_of(3, partial(encode_values, values, codec, rng))
            decode = best_of(3, partial(decode_values, data, n, codec))
            table.add_row(
                codec,
                "nearest" if rng is None else "stochastic",
                f"{len(data) / n:.4f}",
                f"{len(deflate(data, match=False)) / n:.4f}",
                f"{4 * n / encode / 1e6:.0f}",
                f"{4 * n / decode / 1e6:.0f}",
                f"{np.sqrt(np.mean(error * error)):.5f}",
            )
    return table


def layered(n: int) -> NDArray[np.float32]:
    """Values whose scale differs between 10 layers and between units of 72, as updates' do."""
    rng = np.random.default_rng(2)
    layers = np.exp(rng.normal(size=10)).repeat(-(-n // 10))[:n]
    units = np.exp(0.5 * rng.normal(size=-(-n // 72))).repeat(72)[:n]
    return (rng.normal(size=n) * layers * units).astype(np.float32)


def positions_table(n: int) -> Table:
    plain = np.random.default_rng(3).normal(size=n).astype(np.float32)
    table = Table("chosen", "p", "form", "bits/n", "H(p)", "ratio", "encode M/s", "decode M/s")
    for what, values in (("uniform", plain), ("layered", layered(n))):
        for p in (0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 0.9):
            chosen = top_k(values, p)
            data = encode_positions(chosen, n)
            encode = best_of(3, partial(encode_positions, chosen, n))
            decode = best_of(3, partial(decode_positions, data, n, chosen.size))
            bits = 8 * len(data) / n
            table.add_row(
                what,
                f"{p:g}",
                FORMS[data[0]],
                f"{bits:.4f}",
                f"{entropy_bits(p):.4f}",
                f"{bits / entropy_bits(p):.3f}",
                f"{n / encode / 1e6:.0f}",
                f"{n / decode / 1e6:.0f}",
            )
    return table


def main(n: int) -> None:
    console = Console()
    console.print(f"{n} values; MB/s of float32, M/s of values chosen from; +z: deflated")
    console.print(values_table(n))
    console.print(positions_table(n))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
