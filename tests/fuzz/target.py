"""What a target is, and what several of them need."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from fleetprune.errors import FleetpruneError, HostileInputError

SHM = Path("/dev/shm")
FILES = SHM if SHM.is_dir() else None  # part files and the like need no real disk


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        run: Takes the fuzzer's bytes.
        seeds: Valid ones, to start from.
        family: What it may raise.
        max_len: Bytes worth trying.
        share: Of the executions asked for that this target gets: what is slow gets fewer.
    """

    run: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    family: tuple[type[FleetpruneError], ...] = (HostileInputError,)
    max_len: int = 4096
    share: float = 1.0

    def __call__(self, data: bytes) -> bool:
        """Whether `data` was read; False: refused with an error of the family."""
        try:
            self.run(data)
        except self.family:
            return False
        return True


def chosen(data: bytes, options: tuple) -> tuple[object, bytes]:
    """An option by the first byte, and the other bytes."""
    return options[data[0] % len(options) if data else 0], data[1:]


@cache
def scratch() -> Path:
    """A folder for the targets that read files; the process's own."""
    holder = TemporaryDirectory(dir=FILES, prefix="fleetprune-fuzz-")
    scratch.__dict__["holder"] = holder  # removed when the process ends
    return Path(holder.name)
