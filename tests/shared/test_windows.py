"""The state machines over a link that loses, doubles and reorders, with a clock of its own."""

import heapq
import random

import pytest

from fleetprune.blocks import (
    Block,
    NotFound,
    NotFoundError,
    Put,
    RefusedError,
    Request,
    Stored,
    StoreState,
    block_length,
    decode,
)
from fleetprune.errors import WireError
from fleetprune.windows import Download, Upload

BS = 100
DATA = random.Random(1).randbytes(BS * 50 + 7)  # 51 blocks
PERMANENT_S = 10_000.0


class Link:
    """Carries messages between two functions; a fifth is lost, a fifth doubled, delays vary."""

    def __init__(self, seed: int, loss: float = 0.2):
        self.rng, self.loss, self.now, self.sent = random.Random(seed), loss, 0.0, 0
        self._queue: list[tuple[float, int, object, bytes]] = []

    def send(self, to, data: bytes) -> None:
        self.sent += 1
        if self.rng.random() < self.loss:
            return
        for _ in range(2 if self.rng.random() < self.loss else 1):
            delay = self.rng.uniform(0.01, 0.3 if self.rng.random() < self.loss else 0.05)
            heapq.heappush(self._queue, (self.now + delay, self.rng.getrandbits(62), to, data))

    def step(self, wake_at: float | None) -> None:
        """Let the next message arrive, or time pass until `wake_at`."""
        if self._queue and (wake_at is None or self._queue[0][0] <= wake_at):
            at, _, to, data = heapq.heappop(self._queue)
            self.now = max(self.now, at)
            to(data)
        else:
            assert wake_at is not None, "nothing is under way and nobody waits: a deadlock"
            self.now = max(self.now, wake_at)
        assert self.now < PERMANENT_S, "no end in sight"


def block(index: int, transfer: int = 1, edition: int = 1, data: bytes = DATA) -> Block:
    start = index * BS
    length = block_length(index, len(data), BS)
    return Block(transfer, index, edition, BS, len(data), data[start : start + length])


def download(machine: Download, link: Link, data: bytes = DATA) -> tuple[bytes, list[int]]:
    content, asked = bytearray(len(data)), []

    def server(raw: bytes) -> None:
        request = decode(raw)
        assert isinstance(request, Request)
        for index in request.indices:
            asked.append(index)
            link.send(device, block(index, request.transfer, data=data).encode())

    def device(raw: bytes) -> None:
        new = machine.receive(decode(raw), link.now)
        if new is not None:
            content[new.index * BS : new.index * BS + len(new.data)] = new.data

    while not machine.done:
        request = machine.poll(link.now)
        if request is not None:
            link.send(server, request.encode())
        link.step(machine.wake_at())
    return bytes(content), asked


class Server:
    """What `BlockServer.put` does, in memory."""

    def __init__(self):
        self.blocks: dict[int, bytes] = {}
        self.edition = 5
        self.stored: list[bytes] = []

    def put(self, put: Put) -> Stored:
        if self.stored:
            return Stored(put.transfer, StoreState.COMPLETE, put.sha256)
        self.blocks[put.index] = put.data
        count = -(-put.size // put.block_size)
        if len(self.blocks) == count:
            self.stored.append(b"".join(self.blocks[i] for i in range(count)))
            return Stored(put.transfer, StoreState.COMPLETE, put.sha256)
        have = frozenset(self.blocks)
        return Stored(put.transfer, StoreState.RECEIVING, put.sha256, have, count, "", self.edition)


def upload(machine: Upload, link: Link, server: Server) -> int:
    puts = 0

    def coordinator(raw: bytes) -> None:
        put = decode(raw)
        assert isinstance(put, Put)
        link.send(device, server.put(put).encode())

    def device(raw: bytes) -> None:
        machine.receive(decode(raw), link.now)

    while not machine.done:
        for put in machine.poll(link.now):
            puts += 1
            link.send(coordinator, put.encode())
        link.step(machine.wake_at())
    return puts


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("size", [None, len(DATA)])
def test_download_over_a_bad_link(seed, size):
    machine = Download("n", 1, max_size=10**6, size=size, block_size=BS)
    content, _ = download(machine, Link(seed))
    assert content == DATA


@pytest.mark.parametrize("seed", range(20))
def test_upload_over_a_bad_link_is_stored_once(seed):
    server = Server()
    upload(Upload("n", 1, DATA, block_size=BS), Link(seed), server)
    assert server.stored == [DATA]


def test_a_good_link_sees_every_block_once_and_few_requests():
    link = Link(0, loss=0.0)
    machine = Download("n", 1, max_size=10**6, size=len(DATA), block_size=BS)
    content, asked = download(machine, link)
    assert content == DATA
    assert sorted(asked) == list(range(51))
    assert link.sent == 51 + 12  # 8 blocks, then 4 at a time

    server = Server()
    assert upload(Upload("n", 1, DATA, block_size=BS), Link(0, loss=0.0), server) == 51


def test_blocks_that_are_there_are_not_asked_for():
    have = set(range(0, 51, 2))
    machine = Download("n", 1, max_size=10**6, size=len(DATA), have=have, block_size=BS)
    _, asked = download(machine, Link(0, loss=0.0))
    assert sorted(asked) == list(range(1, 51, 2))


def test_download_with_everything_there_is_done_at_once():
    machine = Download("n", 1, max_size=6, size=6, have={0}, block_size=BS)
    assert machine.done
    assert machine.poll(0.0) is None


def test_window_bounds_what_is_under_way():
    machine = Download("n", 1, max_size=10**6, size=len(DATA), block_size=BS, window=8)
    assert machine.poll(0.0).indices == tuple(range(8))
    assert machine.poll(0.0) is None
    for i in range(3):
        machine.receive(block(i), 0.1)
        assert machine.poll(0.1) is None
    machine.receive(block(3), 0.1)
    assert machine.poll(0.1).indices == (8, 9, 10, 11)
    assert [p.index for p in Upload("n", 1, DATA, block_size=BS, window=3).poll(0.0)] == [0, 1, 2]


def test_lost_requests_are_repeated_ever_more_slowly():
    machine = Download("n", 1, max_size=10**6, size=None, block_size=BS)
    waits = []
    now = 0.0
    for _ in range(8):
        assert machine.poll(now).indices == (0,)
        waits.append(machine.wake_at() - now)
        now = machine.wake_at()
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60]
    machine.reconnected()
    assert machine.poll(now).indices == (0,)
    assert machine.wake_at() - now == 2


def test_timeout_follows_a_slow_link():
    """64 KiB at 1 kB/s take a minute: blocks must not be asked for again meanwhile."""
    machine = Download("n", 1, max_size=10**6, size=len(DATA), block_size=BS, window=1)
    now, asked = 0.0, 0
    while not machine.done:
        if machine.poll(now) is not None:
            asked += 1
        index = len(machine._blocks.done)
        now += 20.0
        if now < 200:  # learns from the first blocks, which it asks for more than once
            machine.poll(now)
        machine.receive(block(index), now)
    assert asked < 51 + 10


def test_new_edition_starts_over_and_is_never_mixed():
    old, new = b"a" * 250, b"b" * 350
    machine = Download("n", 1, max_size=1000, block_size=BS)
    machine.poll(0.0)
    assert machine.receive(block(0, edition=1, data=old), 0.1) is not None
    assert machine.poll(0.1).indices == (1, 2)
    assert machine.receive(block(1, edition=2, data=new), 0.2) is not None
    assert machine.size == 350
    assert machine.poll(0.2).indices == (0, 2, 3)
    for i in (0, 2, 3):
        machine.receive(block(i, edition=2, data=new), 0.3)
    assert machine.done


def test_answers_to_other_transfers_and_duplicates_are_ignored():
    machine = Download("n", 1, max_size=10**6, size=len(DATA), block_size=BS)
    machine.poll(0.0)
    assert machine.receive(block(0, transfer=2), 0.1) is None
    assert machine.receive(NotFound(2), 0.1) is None
    assert machine.receive(block(0), 0.1) is not None
    assert machine.receive(block(0), 0.1) is None


def test_not_found():
    with pytest.raises(NotFoundError, match=r"^the coordinator has no blobs/x$"):
        Download("blobs/x", 1, max_size=1).receive(NotFound(1), 0.0)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Block(1, 0, 1, BS, 7, b"1234567"), "n has 7 bytes, expected 6"),
        (Block(1, 0, 1, BS, 11, b"12345678901"), "n has 11 bytes, expected at most 10"),
        (Block(1, 0, 1, 50, 6, b"123456"), "n: blocks of 50 bytes, asked for 100"),
    ],
)
def test_blocks_that_do_not_fit_the_request_are_refused(answer, error):
    with pytest.raises(WireError, match=f"^{error}$"):
        Download("n", 1, max_size=10, size=6, block_size=BS).receive(answer, 0.0)


def test_upload_resumes_from_the_coordinators_bitmap():
    server = Server()
    first = Upload("n", 1, DATA, block_size=BS)
    for put in first.poll(0.0):
        server.put(put)
    for index in range(8, 40):  # and what an earlier run of the device had brought
        server.blocks[index] = DATA[index * BS : index * BS + BS]
    again = Upload("n", 2, DATA, block_size=BS)
    assert upload(again, Link(0, loss=0.0), server) == 8 + 11
    assert server.stored == [DATA]


def test_coordinator_that_lost_its_spool_gets_everything_again():
    server = Server()
    machine = Upload("n", 1, DATA, block_size=BS)
    for _ in range(4):
        for put in machine.poll(0.0):
            machine.receive(server.put(put), 0.1)
    server.blocks.clear()
    server.edition = 6
    upload(machine, Link(0, loss=0.0), server)
    assert server.stored == [DATA]


def test_all_there_but_unconfirmed_asks_again_after_a_timeout_not_at_once():
    machine = Upload("n", 1, b"x" * 150, block_size=BS)
    puts = machine.poll(0.0)
    have = frozenset({0, 1})
    machine.receive(Stored(1, StoreState.RECEIVING, puts[0].sha256, have, 2), 0.1)
    assert not machine.done
    assert machine.poll(0.1) == []
    assert [p.index for p in machine.poll(machine.wake_at())] == [1]
    machine.receive(Stored(1, StoreState.COMPLETE, puts[0].sha256), 2.0)
    assert machine.done
    assert machine.poll(2.0) == []


def test_refusal_and_confusion():
    machine = Upload("results/t", 1, b"x", block_size=BS)
    sha = machine.poll(0.0)[0].sha256
    assert machine.receive(Stored(2, StoreState.COMPLETE, sha), 0.1) is False
    with pytest.raises(WireError, match=r"^results/t: confirmation of another content$"):
        machine.receive(Stored(1, StoreState.COMPLETE, bytes(32)), 0.1)
    with pytest.raises(WireError, match=r"^results/t: bitmap of 3 blocks, sent 1$"):
        machine.receive(Stored(1, StoreState.RECEIVING, sha, frozenset(), 3), 0.1)
    with pytest.raises(RefusedError, match=r"^the coordinator refused results/t: closed$"):
        machine.receive(Stored(1, StoreState.REFUSED, sha, reason="closed"), 0.1)
