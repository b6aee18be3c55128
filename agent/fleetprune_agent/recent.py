"""What the model saw in service lately: samples to try its successor on.

Off unless the owner asks for it: these are the data that a device meets at work, and a file of
them outlives the moment. They stay on the device, in a file that only its user can read.
"""

import io
import logging
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import InstallError
from fleetprune.files import write_atomic

log = logging.getLogger(__name__)

RECENT: Final = "recent.npy"  # in the state folder
MAX_BYTES: Final = 4 * 1024 * 1024


class Recent:
    """A ring of the last samples. The file is written once per turn, to spare the flash."""

    def __init__(self, state: Path, keep: int, max_bytes: int = MAX_BYTES) -> None:
        """Nothing is read.

        Args:
            state: The agent's state folder.
            keep: Samples, at most.
            max_bytes: Of all samples together.
        """
        self.path, self._keep, self._max_bytes = state / RECENT, keep, max_bytes
        self._ring: NDArray[np.float32] | None = None
        self._count = 0

    def add(self, x: NDArray[np.float32]) -> None:
        """Note (n, *shape) samples; those of another shape replace what was kept."""
        keep = min(self._keep, self._max_bytes // max(1, x[:1].nbytes))
        if not keep:
            return
        shape = (keep, *x.shape[1:])
        if self._ring is None or self._ring.shape != shape:
            self._ring, self._count = np.zeros(shape, np.float32), 0
        for sample in x[-keep:]:
            self._ring[self._count % keep] = sample
            self._count += 1
            if self._count % keep == 0:
                self._write(self._ring)

    def _write(self, ring: NDArray[np.float32]) -> None:
        file = io.BytesIO()
        np.save(file, ring)
        try:
            write_atomic(self.path, file.getvalue(), mode=0o600, sync=False)
        except InstallError as e:
            log.warning("recent samples are not kept: %s", e)


def read_recent(state: Path, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """(n, *shape) samples that were kept; None: none of that shape."""
    try:
        x = np.load(state / RECENT, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = isinstance(x, np.ndarray) and x.dtype == np.float32 and x.shape[1:] == shape
    return x if fits and len(x) and np.isfinite(x).all() else None
