import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time

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
    count_blocks,
    decode,
)
from fleetprune.errors import TransportError, TrustError, WireError
from fleetprune.mqtt import Connection
from fleetprune.partfile import PartFile
from fleetprune.topics import Topics
from fleetprune_agent.pacing import Limit
from fleetprune_agent.parts import MAX_PARTS
from fleetprune_agent.transfer import BlobClient
from tests.brokers import BACK_S, restartable  # noqa: F401

BS = 1000
DATA = random.Random(5).randbytes(30 * BS + 17)
SHA = hashlib.sha256(DATA).hexdigest()


class Peer:
    """A coordinator in memory: answers at once, in the caller's thread."""

    def __init__(self, folder, blobs=None, **options):
        self.blobs = {"blobs/x": DATA} if blobs is None else blobs
        self.asked, self.results, self.refuse = [], {}, None
        self.lose = lambda: False
        self.spool = {}
        options = {"block_size": BS, "patience_s": 5.0, **options}
        self.client = BlobClient(self.send, "d1", folder / "parts", **options)

    def send(self, kind, payload):
        message = decode(payload)
        if self.lose():
            return
        if isinstance(message, Request):
            for answer in self.answers(message):
                if not self.lose():
                    self.client.feed("block", answer.encode())
        else:
            answer = self.store(message)
            if not self.lose():
                self.client.feed("stored", answer.encode())

    def answers(self, request):
        data = self.blobs.get(request.name)
        if data is None:
            return [NotFound(request.transfer)]
        self.asked.extend(request.indices)
        return [
            Block(
                request.transfer,
                i,
                1,
                BS,
                len(data),
                data[i * BS : i * BS + block_length(i, len(data), BS)],
            )
            for i in request.indices
        ]

    def store(self, put: Put):
        if self.refuse:
            return Stored(put.transfer, StoreState.REFUSED, put.sha256, reason=self.refuse)
        blocks = self.spool.setdefault(put.name, {})
        blocks[put.index] = put.data
        count = count_blocks(put.size, BS)
        if len(blocks) == count:
            self.results[put.name] = b"".join(blocks[i] for i in range(count))
            return Stored(put.transfer, StoreState.COMPLETE, put.sha256)
        return Stored(put.transfer, StoreState.RECEIVING, put.sha256, frozenset(blocks), count)


def test_read(tmp_path):
    small = {"metadata/timestamp.json": b"{}", "long": DATA, "empty": b""}
    client = Peer(tmp_path, small).client
    assert client.read("metadata/timestamp.json", 2) == b"{}"
    assert client.read("long", len(DATA)) == DATA
    assert client.read("empty", 0) == b""
    with pytest.raises(NotFoundError, match=r"^the coordinator has no metadata/2.root.json$"):
        client.read("metadata/2.root.json", 100)
    with pytest.raises(WireError, match=r"^long has 30017 bytes, expected at most 30016$"):
        client.read("long", len(DATA) - 1)


def test_pull_and_push(tmp_path):
    peer = Peer(tmp_path)
    peer.client.pull("blobs/x", len(DATA), SHA, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA
    assert sorted(peer.asked) == list(range(31))
    assert list((tmp_path / "parts").iterdir()) == []
    peer.client.push("results/t", DATA)
    assert peer.results == {"results/t": DATA}


def test_pull_and_push_over_a_link_that_loses_a_fifth(tmp_path):
    peer = Peer(tmp_path, window=16)
    rng = random.Random(1)
    peer.lose = lambda: rng.random() < 0.2
    peer.client.pull("blobs/x", len(DATA), SHA, tmp_path / "x")
    peer.client.push("results/t", DATA)
    assert (tmp_path / "x").read_bytes() == peer.results["results/t"] == DATA


def test_content_with_another_hash_is_removed(tmp_path):
    peer = Peer(tmp_path, {"blobs/x": DATA[::-1]})
    with pytest.raises(TrustError, match=f"^blobs/x: x has SHA-256 [0-9a-f]*, expected {SHA}$"):
        peer.client.pull("blobs/x", len(DATA), SHA, tmp_path / "x")
    assert list((tmp_path / "parts").iterdir()) == []
    assert not (tmp_path / "x").exists()


def test_content_of_another_size_is_refused(tmp_path):
    with pytest.raises(WireError, match=r"^blobs/x has 30017 bytes, expected 40000$|at most"):
        Peer(tmp_path).client.pull("blobs/x", 40_000, SHA, tmp_path / "x")
    with pytest.raises(WireError, match=r"^'XY' is not a SHA-256 in lower-case hex$"):
        Peer(tmp_path).client.pull("blobs/x", 1, "XY", tmp_path / "x")


def test_refusal_is_final(tmp_path):
    peer = Peer(tmp_path)
    peer.refuse = "the round is closed"
    with pytest.raises(RefusedError, match=r"refused results/t: the round is closed$"):
        peer.client.push("results/t", DATA)


def test_silence_ends_in_a_clear_error_and_the_next_pull_goes_on(tmp_path):
    peer = Peer(tmp_path, patience_s=0.3)
    peer.lose = lambda: len(peer.asked) > 10
    with pytest.raises(TransportError) as e:
        peer.client.pull("blobs/x", len(DATA), SHA, tmp_path / "x")
    assert str(e.value) == "transfer of blobs/x: no answer from the coordinator for 0.3 s"
    peer.lose = lambda: False
    arrived = peer.asked[:8]
    peer.asked.clear()
    peer.client.pull("blobs/x", len(DATA), SHA, tmp_path / "x")
    assert not set(peer.asked) & set(arrived)


def test_abort_ends_a_transfer(tmp_path):
    abort = threading.Event()
    peer = Peer(tmp_path, abort=abort, patience_s=60)
    peer.lose = lambda: True
    threading.Timer(0.1, abort.set).start()
    started = time.monotonic()
    with pytest.raises(TransportError, match=r"^transfer of results/t was stopped$"):
        peer.client.push("results/t", b"x")
    assert time.monotonic() - started < 2


def test_a_send_that_fails_counts_as_lost(tmp_path):
    peer = Peer(tmp_path)
    fails = iter([True])

    def send(kind, payload):
        if next(fails, False):
            raise TransportError("queue is full")
        peer.send(kind, payload)

    peer.client._send = send
    threading.Timer(0.1, peer.client.reconnected).start()  # instead of waiting for the timeout
    peer.client.pull("blobs/x", len(DATA), SHA, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA


def test_damaged_and_foreign_messages_are_ignored(tmp_path):
    peer = Peer(tmp_path)
    answers = peer.answers

    def poisoned(request):
        good = answers(request)
        for answer in good:
            raw = bytearray(answer.encode())
            raw[-10] ^= 1
            peer.client.feed("block", bytes(raw))
            peer.client.feed("block", raw[:20])
            peer.client.feed("stored", answer.encode())
            peer.client.feed("task", answer.encode())
            peer.client.feed("block", NotFound(request.transfer ^ 1).encode())
        return good

    peer.answers = poisoned
    peer.client.feed("block", b"nobody asked")
    peer.client.pull("blobs/x", len(DATA), SHA, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA


def test_two_transfers_at_once(tmp_path):
    peer = Peer(tmp_path)
    inner = peer.send
    pushed = []

    def send(kind, payload):
        if kind == "get" and not pushed:
            pushed.append(True)
            peer.client.push("results/t", DATA)  # from within a pull
        inner(kind, payload)

    peer.client._send = send
    peer.client.pull("blobs/x", len(DATA), SHA, tmp_path / "x")
    assert peer.results == {"results/t": DATA}
    assert (tmp_path / "x").read_bytes() == DATA


def test_interrupted_pulls_do_not_pile_up(tmp_path):
    for i in range(10):
        data = bytes([i]) * (3 * BS)
        peer = Peer(tmp_path, {"blobs/x": data}, patience_s=0.05, window=1)
        peer.lose = lambda peer=peer: len(peer.asked) > 1
        with pytest.raises(TransportError):
            sha = hashlib.sha256(data).hexdigest()
            peer.client.pull("blobs/x", len(data), sha, tmp_path / "x")
    assert len(list((tmp_path / "parts").glob("*.part"))) == MAX_PARTS


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.agent.test_transfer import BS, DATA, SHA, Peer
folder = Path(sys.argv[1])
peer = Peer(folder, window=4)
inner = peer.send
def send(kind, payload):
    time.sleep(0.02)
    inner(kind, payload)
    print(*peer.asked, flush=True)
peer.client._send = send
peer.client.pull("blobs/x", len(DATA), SHA, folder / "x")
"""


def test_pull_killed_in_the_middle_goes_on_without_fetching_anything_twice(tmp_path, request):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path), str(request.config.rootpath)],
        stdout=subprocess.PIPE,
    )
    for _ in range(5):
        said = child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.stdout.close()
    child.wait()
    asked_before = {int(i) for i in said.split()}
    assert 8 <= len(asked_before) < 31
    peer = Peer(tmp_path, window=4)
    peer.client.pull("blobs/x", len(DATA), SHA, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA
    assert len(peer.asked) == len(set(peer.asked))
    finished = set(range(31)) - set(peer.asked)
    assert len(asked_before) - 4 <= len(finished)  # all but the window that was under way
    assert finished | set(peer.asked) == set(range(31))


def test_broker_killed_in_mid_transfer(tmp_path, restartable):  # noqa: F811
    """Pull and push over a real broker that is killed and comes back."""
    from fleetprune_coordinator.block_server import BlockServer  # noqa: PLC0415

    topics, stored, served = Topics("f"), {}, []
    big = random.Random(9).randbytes(3 * 1024 * 1024)
    server = BlockServer(
        lambda name: big, lambda d, n, data: stored.update({n: data}), tmp_path / "spool"
    )

    def at_coordinator(topic, payload):
        _, kind = topics.parse_up(topic)
        if kind == "get":
            for answer in server.get(payload):
                time.sleep(0.005)
                served.append(decode(answer).index)
                coordinator.publish(topics.down("d1", "block"), answer)
        else:
            time.sleep(0.005)
            coordinator.publish(topics.down("d1", "stored"), server.put("d1", payload))

    coordinator = Connection(restartable.settings, "c", on_message=at_coordinator)
    coordinator.subscribe([topics.up("+", "#")])
    device = Connection(
        restartable.settings,
        "d1",
        on_message=lambda topic, payload: client.feed(topic.rsplit("/", 1)[1], payload),
        on_up=lambda: client.reconnected(),  # noqa: PLW0108  (bound later)
    )
    device.subscribe([topics.down("d1", "+")])
    client = BlobClient(
        lambda kind, data: device.publish(topics.up("d1", kind), data), "d1", tmp_path / "parts"
    )
    for connection in (coordinator, device):
        connection.start()
        connection.wait_connected(10)

    def restart():
        restartable.kill()
        time.sleep(0.1)
        restartable.start()

    threading.Timer(0.15, restart).start()
    client.pull("blobs/x", len(big), hashlib.sha256(big).hexdigest(), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == big
    assert set(served) == set(range(48))
    for connection in (coordinator, device):
        connection.wait_connected(BACK_S)
    again = threading.Timer(0.15, restart)
    again.start()
    client.push("results/t", big)
    again.join()
    assert stored == {"results/t": big}
    device.stop()
    coordinator.stop()
    server.close()


def test_a_bandwidth_limit_holds_for_both_directions_together(tmp_path):
    limit = Limit(100_000, time.monotonic)
    peer = Peer(tmp_path, limit=limit, patience_s=0.1)  # waiting for the limit is no silence
    began = time.monotonic()
    peer.client.pull("blobs/x", len(DATA), SHA, tmp_path / "x")
    peer.client.push("results/t", DATA)
    # 60 kB at 100 kB/s, of which the last window is spent and not waited for
    assert time.monotonic() - began > (2 * len(DATA) - 8 * BS) / 100_000
    assert peer.results["results/t"] == (tmp_path / "x").read_bytes() == DATA
    assert len(peer.asked) == 31


def test_a_slow_limit_asks_for_one_block_at_a_time(tmp_path):
    spent, limit, short = [], Limit(1024, time.monotonic), DATA[: 3 * BS]
    limit.spend = spent.append  # so that nothing is waited for
    wide = Peer(tmp_path, {"blobs/x": short}, limit=limit)
    wide.client.pull("blobs/x", len(short), hashlib.sha256(short).hexdigest(), tmp_path / "x")
    assert spent == [2 * BS, BS]  # a window of two blocks: what 1024 B/s bring in two seconds


def test_what_another_road_spoilt_is_fetched_again(tmp_path):
    peer = Peer(tmp_path)
    with PartFile(tmp_path / "parts" / f"{SHA}.part", len(DATA), bytes.fromhex(SHA), BS) as part:
        part.write(3, bytes(BS))
    peer.client.pull("blobs/x", len(DATA), SHA, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA
    assert len(peer.asked) == 30 + 31
