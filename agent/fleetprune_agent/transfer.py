"""Named bytes from and to the coordinator, in blocks, over whatever carries messages.

Worker threads call `read`, `pull` and `push` and wait; the thread that receives messages calls
`feed`, which hands each answer to the transfer that drew its number. What was fetched before a
kill is not fetched again: a pull keeps its blocks in a part file named by the content's hash, and
the coordinator remembers what was pushed.
"""

import hashlib
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from pathlib import Path

from fleetprune.blocks import BLOCK_SIZE, Block, NotFound, Stored, decode
from fleetprune.errors import TransportError, TrustError, WireError
from fleetprune.files import storage_errors
from fleetprune.partfile import PartFile
from fleetprune.windows import WINDOW, Download, Upload

log = logging.getLogger(__name__)

PATIENCE_S = 120.0  # without any new block; two of the longest retransmission timeouts
INBOX = 64  # messages: eight windows; what does not fit is asked for again
MAX_PARTS = 4  # interrupted pulls kept on disk: model, graph, release and golden samples
ABORT_S = 0.25  # between looks at the abort event

KINDS = ("block", "stored")
_Answer = Block | NotFound | Stored


class _Signal(Enum):
    """What may lie in the inbox beside messages."""

    RECONNECTED = auto()


_Inbox = queue.Queue[_Answer | _Signal]


class BlobClient:
    """The device's side of block transfers; several may run at once, one `pull` among them."""

    def __init__(
        self,
        send: Callable[[str, bytes], object],
        device: str,
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
        *,
        window: int = WINDOW,
        block_size: int = BLOCK_SIZE,
        patience_s: float = PATIENCE_S,
        abort: threading.Event | None = None,
    ) -> None:
        """Prepare; nothing is sent.

        Args:
            send: Sends a payload below `up/{device}`: the topic's kind ("get" or "put") and the
                payload. It may drop it; a TransportError counts as dropped.
            device: Our name, for messages to people.
            folder: For part files, on the same file system as what `pull` writes; created.
            clock: Monotonic seconds.
            window: Blocks under way at once.
            block_size: Bytes per block.
            patience_s: Without progress for so long, a transfer gives up; it can be resumed.
            abort: When set, the transfer that runs and later ones raise TransportError.
        """
        self._send, self._device, self._folder, self._clock = send, device, folder, clock
        self._window, self._block_size, self._patience = window, block_size, patience_s
        self._abort = abort or threading.Event()
        self._inboxes: dict[int, _Inbox] = {}  # by transfer
        self._lock = threading.Lock()
        self._pulling = threading.Lock()
        with storage_errors("create", folder):
            folder.mkdir(parents=True, exist_ok=True)

    def feed(self, kind: str, payload: bytes) -> None:
        """Take in an unverified message of `down/{device}/block` or `/stored`; never blocks."""
        if kind not in KINDS or not self._inboxes:
            return
        try:
            message = decode(payload)
        except WireError as e:
            log.warning("%s: message on %s ignored: %s", self._device, kind, e)
            return
        if isinstance(message, Stored if kind == "stored" else Block | NotFound):
            with self._lock:
                inbox = self._inboxes.get(message.transfer)
            if inbox is not None:
                self._enqueue(inbox, message)

    def reconnected(self) -> None:
        """The connection is a new one: what was under way is asked for again at once."""
        with self._lock:
            inboxes = list(self._inboxes.values())
        for inbox in inboxes:
            self._enqueue(inbox, _Signal.RECONNECTED)

    def _enqueue(self, inbox: _Inbox, item: _Answer | _Signal) -> None:
        try:
            inbox.put_nowait(item)
        except queue.Full:
            log.debug("%s: inbox is full, a message is dropped", self._device)

    def read(self, name: str, max_bytes: int) -> bytes:
        """The content of a small file.

        Args:
            name: Such as `metadata/timestamp.json`.
            max_bytes: A longer file is refused before it is fetched.

        Raises:
            NotFoundError: The coordinator has none of that name.
            WireError: It is longer, or the answers do not fit the request.
            TransportError: No progress, or aborted.
        """
        with self._transfer() as (transfer, inbox):
            machine = self._download(name, transfer, max_size=max_bytes)
            content = bytearray()

            def keep(block: Block) -> None:
                del content[block.size :]
                content.extend(bytes(block.size - len(content)))
                start = block.index * self._block_size
                content[start : start + len(block.data)] = block.data

            self._run_download(machine, inbox, keep)
            return bytes(content)

    def pull(self, name: str, size: int, sha256: str, into: Path) -> None:
        """Fetch a large file whose size and hash a signed message has named.

        Args:
            name: Such as `blobs/<sha256>` or `targets/...`.
            size: Bytes.
            sha256: Lower-case hex.
            into: Where the verified content goes, in one step.

        Raises:
            NotFoundError: The coordinator has none of that name.
            TrustError: The content has another hash; nothing of it is left.
            WireError: The answers do not fit the request.
            TransportError: No progress, or aborted; the next pull goes on where this one stopped.
            InstallError: The disk is full or refuses.
        """
        digest = _digest(sha256)
        with self._pulling, self._transfer() as (transfer, inbox):
            self._tidy(keep=sha256)
            path = self._folder / f"{sha256}.part"
            with PartFile(path, size, digest, self._block_size) as part:
                machine = self._download(name, transfer, max_size=size, size=size, have=part.have)
                self._run_download(
                    machine, inbox, lambda block: part.write(block.index, block.data)
                )
                try:
                    part.finish(into)
                except WireError as e:
                    raise TrustError(f"{name}: {e}") from e

    def push(self, name: str, data: bytes) -> None:
        """Deliver `data`; returns when the coordinator has stored it.

        Raises:
            RefusedError: The coordinator does not want it, now or later.
            WireError: The answers do not fit what was sent.
            TransportError: No progress, or aborted; the next push goes on where this one stopped.
        """
        with self._transfer() as (transfer, inbox):
            machine = Upload(
                name,
                transfer,
                data,
                block_size=self._block_size,
                window=self._window,
            )
            last_progress = self._clock()
            while not machine.done:
                for put in machine.poll(self._clock()):
                    self._try_send("put", put.encode())
                answer = self._next(inbox, machine.wake_at(), last_progress, name)
                if answer is _Signal.RECONNECTED:
                    machine.reconnected()
                elif isinstance(answer, Stored) and machine.receive(answer, self._clock()):
                    last_progress = self._clock()

    def _download(
        self,
        name: str,
        transfer: int,
        *,
        max_size: int,
        size: int | None = None,
        have: Iterable[int] = (),
    ) -> Download:
        return Download(
            name,
            transfer,
            max_size=max_size,
            size=size,
            have=have,
            block_size=self._block_size,
            window=self._window,
        )

    def _run_download(
        self, machine: Download, inbox: _Inbox, keep: Callable[[Block], None]
    ) -> None:
        last_progress = self._clock()
        while not machine.done:
            request = machine.poll(self._clock())
            if request is not None:
                self._try_send("get", request.encode())
            answer = self._next(inbox, machine.wake_at(), last_progress, machine.name)
            if answer is _Signal.RECONNECTED:
                machine.reconnected()
            elif isinstance(answer, Block | NotFound):
                block = machine.receive(answer, self._clock())
                if block is not None:
                    keep(block)
                    last_progress = self._clock()

    def _next(
        self, inbox: _Inbox, wake_at: float | None, last_progress: float, name: str
    ) -> _Answer | _Signal | None:
        """The next message, or None when it is time to look at the machine again."""
        now = self._clock()
        if self._abort.is_set():
            raise TransportError(f"transfer of {name} was stopped")
        if now - last_progress > self._patience:
            raise TransportError(
                f"transfer of {name}: no answer from the coordinator for {self._patience:g} s"
            )
        wait = ABORT_S if wake_at is None else min(ABORT_S, wake_at - now)
        try:
            return inbox.get(timeout=max(0.0, wait))
        except queue.Empty:
            return None

    def _try_send(self, kind: str, payload: bytes) -> None:
        try:
            self._send(kind, payload)
        except TransportError as e:
            log.debug("%s: %s not sent, will be repeated: %s", self._device, kind, e)

    @contextmanager
    def _transfer(self) -> Iterator[tuple[int, _Inbox]]:
        """A number that no transfer of ours has, and the inbox of its answers."""
        inbox: _Inbox = queue.Queue(INBOX)
        with self._lock:
            transfer = secrets.randbits(32)
            while transfer in self._inboxes:
                transfer = secrets.randbits(32)
            self._inboxes[transfer] = inbox
        try:
            yield transfer, inbox
        finally:
            with self._lock:
                del self._inboxes[transfer]

    def _tidy(self, keep: str) -> None:
        """Remove the oldest part files: interrupted pulls that nobody resumed."""
        with storage_errors("tidy", self._folder):
            parts = [p for p in self._folder.glob("*.part") if p.stem != keep]
            parts.sort(key=lambda p: p.stat().st_mtime_ns, reverse=True)
            for old in parts[MAX_PARTS - 1 :]:
                old.with_name(f"{old.name}.map").unlink(missing_ok=True)
                old.unlink(missing_ok=True)


def _digest(sha256: str) -> bytes:
    try:
        digest = bytes.fromhex(sha256)
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size or digest.hex() != sha256:
        raise WireError(f"{sha256[:80]!r} is not a SHA-256 in lower-case hex")
    return digest
