"""Sliding windows over blocks: which blocks to ask for or to send next, and when again.

Both machines are free of I/O, clocks and threads: they are fed messages and `now` (seconds,
any monotonic clock) and say which messages to send. Several blocks are under way at once, since
waiting for each one in turn makes a transfer as slow as the link's round trip.
"""

import hashlib
from collections import deque
from collections.abc import Iterable

from fleetprune.blocks import (
    BLOCK_SIZE,
    MAX_REQUESTED,
    Block,
    NotFound,
    NotFoundError,
    Put,
    RefusedError,
    Request,
    Stored,
    StoreState,
    block_length,
    count_blocks,
)
from fleetprune.errors import WireError
from fleetprune.retry import RoundTrip

WINDOW = 8  # blocks under way: 512 KiB fill most links; `benchmarks/transfer.py` compares


class _Window:
    """Blocks that are wanted, under way, or done."""

    def __init__(self, window: int) -> None:
        if not 1 <= window <= MAX_REQUESTED:
            raise WireError(f"window of {window} blocks, expected 1..{MAX_REQUESTED}")
        self.window = window
        self.round_trip = RoundTrip()
        self.wanted: deque[int] = deque()
        self.done: set[int] = set()
        self.under_way: dict[int, float] = {}
        self.sent: set[int] = set()
        """Blocks that went out once, unambiguous for measuring (Karn's rule)."""
        self.resent: set[int] = set()

    def expire(self, now: float) -> None:
        """Blocks that are overdue are wanted again, lowest first."""
        timeout = self.round_trip.timeout_s
        late = sorted(i for i, at in self.under_way.items() if at + timeout <= now)
        if late:
            self.round_trip.expired()
            self._want_again(late)

    def _want_again(self, indices: Iterable[int]) -> None:
        for index in sorted(indices, reverse=True):
            self.under_way.pop(index, None)
            if index not in self.done:
                self.wanted.appendleft(index)

    def take(self, room: int, now: float) -> list[int]:
        """Up to `room` wanted blocks, now under way."""
        taken: list[int] = []
        while self.wanted and len(taken) < room:
            index = self.wanted.popleft()
            if index in self.done or index in self.under_way:
                continue
            (self.resent if index in self.sent else self.sent).add(index)
            self.under_way[index] = now
            taken.append(index)
        return sorted(taken)

    def arrived(self, index: int, now: float) -> bool:
        """Note an answered block; whether it is a new one."""
        at = self.under_way.pop(index, None)
        if at is not None and index in self.resent:
            self.round_trip.answered()
        elif at is not None:
            self.round_trip.measured(now - at)
        new = index not in self.done
        self.done.add(index)
        return new

    def restart(self, wanted: Iterable[int]) -> None:
        """Want `wanted` and nothing else; what is under way is forgotten."""
        self.under_way.clear()
        self.resent |= self.sent
        self.wanted = deque(wanted)
        self.round_trip.forget_losses()

    def wake_at(self) -> float | None:
        """When the oldest block under way is overdue; None: nothing is under way."""
        if not self.under_way:
            return None
        return min(self.under_way.values()) + self.round_trip.timeout_s


class Download:
    """Asks for the blocks of one named thing until all have come.

    With `size` known (from a signed message) all of the window is used at once, and blocks of any
    edition count, because the caller checks a SHA-256 of the whole. Without it block 0 is asked
    for first and says the size, and blocks of different editions are never mixed.
    """

    def __init__(
        self,
        name: str,
        transfer: int,
        *,
        max_size: int,
        size: int | None = None,
        have: Iterable[int] = (),
        block_size: int = BLOCK_SIZE,
        window: int = WINDOW,
    ) -> None:
        if size is not None and size > max_size:
            raise WireError(f"{name} has {size} bytes, expected at most {max_size}")
        self.name, self.transfer = name, transfer
        self.size, self.max_size, self.block_size = size, max_size, block_size
        self._pinned = size is not None
        self._edition: int | None = None
        self._blocks = _Window(window)
        self._blocks.done.update(have)
        self._blocks.restart(self._missing())

    def _missing(self) -> list[int]:
        if self.size is None:
            return [0]
        count = count_blocks(self.size, self.block_size)
        return [i for i in range(count) if i not in self._blocks.done]

    @property
    def done(self) -> bool:
        """Whether every block has come."""
        if self.size is None:
            return False
        return len(self._blocks.done) == count_blocks(self.size, self.block_size)

    def poll(self, now: float) -> Request | None:
        """The request to send now, if any.

        New blocks are asked for when half of the window is free: a request per block would cost
        as many messages upwards as there are blocks.
        """
        blocks = self._blocks
        blocks.expire(now)
        room = blocks.window - len(blocks.under_way)
        if 2 * room < blocks.window:
            return None
        taken = blocks.take(room, now)
        if not taken:
            return None
        return Request(self.name, self.transfer, tuple(taken), self.block_size)

    def wake_at(self) -> float | None:
        """When `poll` should be called again if nothing arrives; None: nothing is awaited."""
        return self._blocks.wake_at()

    def reconnected(self) -> None:
        """Ask again for all that was under way, since the connection is a new one."""
        self._blocks.restart(self._missing())

    def receive(self, message: Block | NotFound, now: float) -> Block | None:
        """Take an answer in.

        Returns:
            The block if it is a new one, to be written at `index * block_size`; None for
            duplicates and for answers to other transfers. After an edition changed, blocks that
            were returned before come again and replace them.

        Raises:
            NotFoundError: The coordinator has nothing of that name.
            WireError: The block does not fit what was asked for.
        """
        if message.transfer != self.transfer:
            return None
        if isinstance(message, NotFound):
            raise NotFoundError(f"the coordinator has no {self.name}")
        if message.block_size != self.block_size:
            raise WireError(
                f"{self.name}: blocks of {message.block_size} bytes, asked for {self.block_size}"
            )
        if message.size > self.max_size:
            raise WireError(
                f"{self.name} has {message.size} bytes, expected at most {self.max_size}"
            )
        if self._pinned and message.size != self.size:
            raise WireError(f"{self.name} has {message.size} bytes, expected {self.size}")
        if not self._pinned and message.edition != self._edition:
            self._adopt(message)
        return message if self._blocks.arrived(message.index, now) else None

    def _adopt(self, message: Block) -> None:
        self.size, self._edition = message.size, message.edition
        self._blocks.done.clear()
        self._blocks.restart(i for i in self._missing() if i != message.index)


class Upload:
    """Sends the blocks of one named thing until the coordinator has confirmed it.

    The coordinator's bitmap decides what is missing, so a device that restarts sends at most one
    window twice and needs no notes of its own.
    """

    def __init__(
        self,
        name: str,
        transfer: int,
        data: bytes,
        *,
        block_size: int = BLOCK_SIZE,
        window: int = WINDOW,
    ) -> None:
        self.name, self.transfer, self.data, self.block_size = name, transfer, data, block_size
        self.count = count_blocks(len(data), block_size)
        self.sha256 = hashlib.sha256(data).digest()
        self.done = False
        self._edition: int | None = None
        self._blocks = _Window(window)
        self._blocks.restart(range(self.count))

    def poll(self, now: float) -> list[Put]:
        """The blocks to send now."""
        if self.done:
            return []
        blocks = self._blocks
        blocks.expire(now)
        return [self._block(i) for i in blocks.take(blocks.window - len(blocks.under_way), now)]

    def _block(self, index: int) -> Put:
        start = index * self.block_size
        length = block_length(index, len(self.data), self.block_size)
        return Put(
            self.name,
            self.transfer,
            index,
            self.block_size,
            len(self.data),
            self.sha256,
            self.data[start : start + length],
        )

    def wake_at(self) -> float | None:
        """When `poll` should be called again if nothing arrives; None: nothing is awaited."""
        return self._blocks.wake_at()

    def reconnected(self) -> None:
        """Send again all that was under way, since the connection is a new one."""
        self._blocks.restart(i for i in range(self.count) if i not in self._blocks.done)

    def receive(self, message: Stored, now: float) -> bool:
        """Take an answer in; whether it brought the transfer forward.

        Raises:
            RefusedError: The coordinator does not want this result.
            WireError: The answer is about something else of the same transfer.
        """
        if message.transfer != self.transfer:
            return False
        if message.sha256 != self.sha256:
            raise WireError(f"{self.name}: confirmation of another content")
        if message.state is StoreState.REFUSED:
            raise RefusedError(f"the coordinator refused {self.name}: {message.reason}")
        if message.state is StoreState.COMPLETE:
            self.done = True
            return True
        if message.count != self.count:
            raise WireError(f"{self.name}: bitmap of {message.count} blocks, sent {self.count}")
        blocks = self._blocks
        news = [blocks.arrived(i, now) for i in sorted(message.blocks)]
        if message.edition != self._edition:
            self._edition = message.edition
            lost = blocks.done - message.blocks
            blocks.done -= lost
            blocks.wanted.extend(sorted(lost))
        if len(blocks.done) == self.count:
            # All has come but is not confirmed: the last block is overdue after a timeout and its
            # answer will be the confirmation. (At once would be an endless loop of two machines.)
            last = self.count - 1
            blocks.done.discard(last)
            blocks.resent.add(last)
            blocks.under_way[last] = now
        return any(news)
