"""The kept corpus: one file per target, one input per line, in base64.

One file of lines instead of a folder of inputs: it can be read in a diff, and a thousand files of
twenty bytes would take four megabytes of a disk.
"""

from base64 import b64decode, b64encode
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).with_name("corpus")
MOST = 64 * 1024  # bytes of one target's file; the shortest inputs are kept


def load(name: str) -> list[bytes]:
    """Inputs kept for a target."""
    path = FOLDER / f"{name}.txt"
    return [b64decode(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def save(name: str, inputs: Iterable[bytes]) -> int:
    """Replace a target's kept inputs; returns how many there is room for."""
    lines = [b64encode(data).decode() + "\n" for data in sorted(set(inputs), key=len)]
    kept, size = [], 0
    for line in lines:
        size += len(line)
        if size > MOST:
            break
        kept.append(line)
    (FOLDER / f"{name}.txt").write_text("".join(sorted(kept)))
    return len(kept)
