"""Interrupted pulls, kept by the hash of what they are to become; all roads share them."""

import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from fleetprune.blocks import BLOCK_SIZE
from fleetprune.errors import TrustError, WireError
from fleetprune.files import storage_errors
from fleetprune.partfile import PartFile

log = logging.getLogger(__name__)

MAX_PARTS = 4  # kept on disk: model, graph, release and golden samples


class Parts:
    """A folder of part files, of which one is filled at a time."""

    def __init__(self, folder: Path, block_size: int = BLOCK_SIZE) -> None:
        """Make the folder, on the same file system as what `fill` writes.

        Raises:
            InstallError: The disk refuses.
        """
        self._folder, self.block_size = folder, block_size
        self._filling = threading.Lock()
        with storage_errors("create", folder):
            folder.mkdir(parents=True, exist_ok=True)

    def fill(
        self, name: str, size: int, sha256: str, into: Path, fetch: Callable[[PartFile], None]
    ) -> None:
        """Let `fetch` add what is missing, verify the whole and move it to `into` in one step.

        What an earlier call left may have come over another road, whose lies are found out only
        when all is there; so a whole that is wrong is fetched once more if part of it was old.

        Args:
            name: For messages.
            size: Bytes.
            sha256: Lower-case hex.
            into: Where the verified content goes.
            fetch: Writes the missing blocks of the part file, or raises.

        Raises:
            TrustError: The content has another hash; nothing of it is left.
            WireError: `sha256` is none.
            InstallError: The disk is full or refuses.
        """
        digest = _digest(sha256)
        path = self._folder / f"{sha256}.part"
        with self._filling:
            self._tidy(keep=sha256)
            while True:
                with PartFile(path, size, digest, self.block_size) as part:
                    resumed = bool(part.have)
                    fetch(part)
                    try:
                        part.finish(into)
                    except WireError as e:
                        if not resumed:
                            raise TrustError(f"{name}: {e}") from e
                        log.warning("%s: %s; it is fetched from the beginning", name, e)
                    else:
                        return

    def _tidy(self, keep: str) -> None:
        """Remove the oldest part files: interrupted pulls that nobody resumed."""
        with storage_errors("tidy", self._folder):
            parts = [p for p in self._folder.glob("*.part") if p.stem != keep]
            parts.sort(key=lambda p: p.stat().st_mtime_ns, reverse=True)
            for old in parts[MAX_PARTS - 1 :]:
                old.with_name(f"{old.name}.map").unlink(missing_ok=True)
                old.unlink(missing_ok=True)
            for path in self._folder.glob("*.part.map"):
                if not path.with_suffix("").exists():  # killed between the file and its map
                    path.unlink(missing_ok=True)


def _digest(sha256: str) -> bytes:
    try:
        digest = bytes.fromhex(sha256)
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size or digest.hex() != sha256:
        raise WireError(f"{sha256[:80]!r} is not a SHA-256 in lower-case hex")
    return digest
