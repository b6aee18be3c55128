"""Named bytes from and to the coordinator, in blocks, over whatever carries messages.

Worker threads call `read`, `pull` and `push` and wait; the thread that receives messages calls
`feed`, which hands each answer to the transfer that drew its number. What was fetched before a
kill is not fetched again: a pull keeps its blocks in `parts`, and the coordinator remembers what
was pushed.
"""

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from pathlib import Path

from fleetprune.blocks import BLOCK_SIZE, Block, NotFound, Stored, block_length, decode
from fleetprune.errors import TransportError, WireError
from fleetprune.partfile import PartFile
from fleetprune.windows import WINDOW, Download, Upload
from fleetprune_agent.pacing import Limit
from fleetprune_agent.parts import Parts

log = logging.getLogger(__name__)

PATIENCE_S = 120.0  # without any new block; two of the longest retransmission timeouts
INBOX = 64  # messages: eight windows; what does not fit is asked for again
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
        limit: Limit | None = None,
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
            limit: How fast both directions may go together; narrows the window where it is slow.
        """
        self._send, self._device, self._clock = send, device, clock
        self._limit = limit or Limit(None, clock)
        self._window = self._limit.window(window, block_size)
        self._block_size, self._patience = block_size, patience_s
        self._abort = abort or threading.Event()
        self._inboxes: dict[int, _Inbox] = {}  # by transfer
        self._lock = threading.Lock()
        self.parts = Parts(folder, block_size)
        """Where pulls are kept; other roads to the same content may fill them too."""

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

        def fetch(part: PartFile) -> None:
            with self._transfer() as (transfer, inbox):
                machine = self._download(name, transfer, max_size=size, size=size, have=part.have)
                self._run_download(
                    machine, inbox, lambda block: part.write(block.index, block.data)
                )

        self.parts.fill(name, size, sha256, into, fetch)

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
                held = self._limit.wait_s()
                for put in () if held else machine.poll(self._clock()):
                    self._limit.spend(len(put.data))
                    self._try_send("put", put.encode())
                last_progress = self._clock() if held else last_progress
                wake_at = self._clock() + held if held else machine.wake_at()
                answer = self._next(inbox, wake_at, last_progress, name)
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
            held = self._limit.wait_s()
            request = None if held else machine.poll(self._clock())
            if request is not None:
                self._limit.spend(self._bytes(machine, request.indices))
                self._try_send("get", request.encode())
            last_progress = self._clock() if held else last_progress
            wake_at = self._clock() + held if held else machine.wake_at()
            answer = self._next(inbox, wake_at, last_progress, machine.name)
            if answer is _Signal.RECONNECTED:
                machine.reconnected()
            elif isinstance(answer, Block | NotFound):
                block = machine.receive(answer, self._clock())
                if block is not None:
                    keep(block)
                    last_progress = self._clock()

    def _bytes(self, machine: Download, indices: Sequence[int]) -> int:
        size = machine.size
        if size is None:  # a small file, whose size its first block will tell
            return 0
        return sum(block_length(i, size, self._block_size) for i in indices)

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
