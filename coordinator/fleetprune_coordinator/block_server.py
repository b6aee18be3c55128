"""The coordinator's side of block transfers: hands out blocks of files, takes in results.

It keeps no state per download, so devices may vanish and come back as they like, and per upload
only a part file, so the coordinator may too. Payloads are unverified; one device's nonsense ends
in a WireError for that message and touches nothing else.
"""

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from enum import Enum, auto
from pathlib import Path

from fleetprune.blocks import Put, RefusedError, Stored, StoreState, count_blocks, decode
from fleetprune.errors import HostileInputError, WireError
from fleetprune.files import storage_errors
from fleetprune.partfile import PartFile
from fleetprune_coordinator.block_reader import BlockReader

log = logging.getLogger(__name__)

MAX_PUT = 64 * 1024 * 1024  # bytes; an fp32 update of 16 million parameters
SPOOL_S = 7 * 24 * 3600.0  # no round lasts a week: what is older is nobody's upload any more
DEVICE_SPOOLS = 4  # uploads of one device on disk; an agent has one under way at a time
OPEN_SPOOLS = 64  # uploads kept open; more are reopened from disk, which reads them once


class Admission(Enum):
    """What is to be done with a name that a device wants to put."""

    ACCEPT = auto()
    DONE = auto()
    """It is stored already: confirm, take nothing."""
    REFUSE = auto()


class BlockServer(BlockReader):
    """Answers `Request` messages in one thread and `Put` messages in one, which may be another."""

    def __init__(
        self,
        read: Callable[[str], Path | bytes | None],
        store: Callable[[str, str, bytes], None],
        spool: Path,
        *,
        admit: Callable[[str, str], Admission] = lambda device, name: Admission.ACCEPT,
        max_put: int = MAX_PUT,
    ) -> None:
        """Open the spool.

        Args:
            read: File or bytes behind a name (a plain relative path); None: there is none.
            store: Keeps (device, name, data) for good before it returns; the device forgets its
                copy after that. RefusedError or HostileInputError: never wanted. Any other
                error: not now, the device is left to try again.
            spool: Folder for uploads that are not complete; created.
            admit: Asked with (device, name) before anything of an upload is kept.
            max_put: Largest upload in bytes.
        """
        super().__init__(read)
        self._store, self._admit = store, admit
        self._spool, self._max_put = spool, max_put
        self._spools: OrderedDict[Path, PartFile] = OrderedDict()
        with storage_errors("create", spool):
            spool.mkdir(parents=True, exist_ok=True)
            for left in spool.glob("*.part*"):
                if time.time() - left.stat().st_mtime > SPOOL_S:
                    left.unlink()

    def close(self) -> None:
        """Release all files; the spool stays."""
        for part in self._spools.values():
            part.close()
        self._spools.clear()
        super().close()

    def put(self, device: str, payload: bytes) -> bytes | None:
        """Take in an unverified `Put` of `device`.

        Args:
            device: Whom the transport knows the sender to be.
            payload: The message.

        Returns:
            The answer for the device; None if storing failed and the device is to try again.

        Raises:
            WireError: It is not a put.
        """
        put = decode(payload)
        if not isinstance(put, Put):
            raise WireError(f"{type(put).__name__} where a put was expected")
        admission = self._admit(device, put.name)
        if admission is Admission.DONE:
            return _answer(put, StoreState.COMPLETE)
        if admission is Admission.REFUSE:
            return _answer(put, StoreState.REFUSED, f"{put.name} is not asked of {device}")
        if put.size > self._max_put:
            return _answer(
                put, StoreState.REFUSED, f"{put.size} bytes, expected at most {self._max_put}"
            )
        part = self._part(device, put)
        part.write(put.index, put.data)
        if not part.complete:
            return _progress(put, part.have, part.edition)
        return self._complete(device, put, part)

    def _complete(self, device: str, put: Put, part: PartFile) -> bytes | None:
        data = part.content()
        if data is None:
            # The spool went bad, for the CRC of every block was right: begin again.
            self._spools.pop(part.path, None)
            log.warning("%s of %s did not have its SHA-256 and is fetched again", put.name, device)
            return _progress(put, (), part.edition ^ 1)
        try:
            self._store(device, put.name, data)
        except (RefusedError, HostileInputError) as e:
            log.warning("%s of %s is refused: %s", put.name, device, e)
            answer = _answer(put, StoreState.REFUSED, str(e))
        except Exception:
            log.exception("%s of %s could not be stored; it stays in the spool", put.name, device)
            return None
        else:
            answer = _answer(put, StoreState.COMPLETE)
        self._spools.pop(part.path, None)
        part.discard()
        return answer

    def _part(self, device: str, put: Put) -> PartFile:
        """The part file of (device, name); another content under that name replaces it."""
        owner, key = _key(device), _key(f"{device}\n{put.name}")
        path = self._spool / f"{owner}{key}.part"
        part = self._spools.get(path)
        same = (put.size, put.sha256, put.block_size)
        if part is not None and (part.size, part.sha256, part.block_size) == same:
            self._spools.move_to_end(path)
            return part
        if part is not None:
            part.close()
        self._tidy(owner, path)
        part = self._spools[path] = PartFile(path, put.size, put.sha256, put.block_size)
        if len(self._spools) > OPEN_SPOOLS:
            self._spools.popitem(last=False)[1].close()
        return part

    def _tidy(self, owner: str, keep: Path) -> None:
        """Of a device's uploads that were begun, the oldest go."""
        with storage_errors("tidy", self._spool):
            parts = [p for p in self._spool.glob(f"{owner}*.part") if p != keep]
            parts.sort(key=lambda p: p.stat().st_mtime_ns, reverse=True)
            for old in parts[DEVICE_SPOOLS - 1 :]:
                known = self._spools.pop(old, None)
                if known is not None:
                    known.close()
                old.with_name(f"{old.name}.map").unlink(missing_ok=True)
                old.unlink(missing_ok=True)


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _progress(put: Put, have: Iterable[int], edition: int) -> bytes:
    count = count_blocks(put.size, put.block_size)
    return Stored(
        put.transfer,
        StoreState.RECEIVING,
        put.sha256,
        frozenset(have),
        count,
        edition=edition,
    ).encode()


def _answer(put: Put, state: StoreState, reason: str = "") -> bytes:
    return Stored(put.transfer, state, put.sha256, reason=reason).encode()
