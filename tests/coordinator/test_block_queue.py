import threading

from fleetprune.blocks import Request
from fleetprune_coordinator import block_queue
from fleetprune_coordinator.block_queue import MAX_WAITING, BlockQueue


def request(*indices, transfer=1):
    return Request("targets/x", transfer, indices, 1000)


def drain(queue):
    taken = []
    while (item := queue.take(0.0)) is not None:
        taken.append((item[0], item[1].transfer, item[2]))
    return taken


def test_devices_take_turns():
    queue = BlockQueue()
    queue.put("a", request(0, 1, 2))
    queue.put("b", request(7))
    queue.put("c", request(3, 4))
    assert drain(queue) == [
        ("a", 1, 0), ("b", 1, 7), ("c", 1, 3), ("a", 1, 1), ("c", 1, 4), ("a", 1, 2)
    ]  # fmt: skip


def test_what_waits_already_is_not_sent_twice():
    queue = BlockQueue()
    queue.put("a", request(0, 1))
    queue.put("a", request(1, 2))
    queue.put("a", request(1, transfer=2))
    assert drain(queue) == [("a", 1, 0), ("a", 1, 1), ("a", 1, 2), ("a", 2, 1)]
    queue.put("a", request(1))
    assert drain(queue) == [("a", 1, 1)]


def test_what_waits_is_bounded(monkeypatch):
    monkeypatch.setattr(block_queue, "MAX_DEVICES", 2)
    queue = BlockQueue()
    for first in range(0, 4 * MAX_WAITING, 64):
        queue.put("a", request(*range(first, first + 64)))
    queue.put("b", request(0))
    queue.put("c", request(0))
    taken = drain(queue)
    assert [i for device, _, i in taken if device == "a"] == list(
        range(3 * MAX_WAITING, 4 * MAX_WAITING)
    )
    assert {device for device, _, _ in taken} == {"a", "b"}


def test_closing_wakes_whoever_waits():
    queue, got = BlockQueue(), []
    waiting = threading.Thread(target=lambda: got.append(queue.take()))
    waiting.start()
    queue.close()
    waiting.join(10)
    assert got == [None]
    queue.put("a", request(0))
    assert queue.take(0.0) is None
