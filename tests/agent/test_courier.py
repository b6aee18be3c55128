import random
import threading

import pytest
from hub import wait_until

from fleetprune.blocks import RefusedError
from fleetprune.errors import TransportError
from fleetprune.outbox import Kind, Outbox
from fleetprune_agent import courier as module
from fleetprune_agent.courier import Courier
from fleetprune_agent.jobs import Jobs


class Road:
    """Where a courier delivers to."""

    def __init__(self) -> None:
        self.open = True
        self.got: list[tuple[str, bytes]] = []
        self.attempts = 0

    def push(self, name: str, data: bytes) -> None:
        self.attempts += 1
        if name == "results/unwanted":
            raise RefusedError("the coordinator refused results/unwanted: too late")
        if not self.open:
            raise TransportError("closed")
        self.got.append((name, data))

    def publish(self, data: bytes) -> bool:
        if self.open:
            self.got.append(("telemetry", data))
        return self.open


@pytest.fixture
def road():
    return Road()


@pytest.fixture
def courier(tmp_path, road):
    made = Courier(Outbox(tmp_path, 2**20), road.push, road.publish, random.Random(0))
    yield made
    made.stop(10)


def test_delivers_in_order_and_forgets(courier, road):
    courier.put(Kind.RESULT, "results/t1", b"one")
    courier.put(Kind.TELEMETRY, "telemetry", b"old")
    courier.put(Kind.TELEMETRY, "telemetry", b"new")
    courier.put(Kind.RESULT, "results/unwanted", b"late")
    courier.start()
    wait_until(lambda: len(courier) == 0, "delivery")
    assert road.got == [("results/t1", b"one"), ("telemetry", b"new")]


def test_keeps_what_cannot_be_delivered_and_wakes(courier, road, tmp_path):
    road.open = False
    courier.put(Kind.RESULT, "results/t1", b"one")
    courier.put(Kind.TELEMETRY, "telemetry", b"new")
    courier.start()
    wait_until(lambda: road.attempts >= 1, "an attempt")
    assert len(courier) == 2
    assert road.got == []
    road.open = True
    courier.wake()
    wait_until(lambda: len(courier) == 0, "delivery")
    assert sorted(road.got) == [("results/t1", b"one"), ("telemetry", b"new")]


def test_tries_again_by_itself(courier, road, monkeypatch):
    monkeypatch.setattr(module, "RETRY", module.Backoff(first_s=0.01, most_s=0.02))
    road.open = False
    courier.put(Kind.RESULT, "results/t1", b"one")
    courier.start()
    wait_until(lambda: road.attempts >= 3, "three attempts")
    road.open = True
    wait_until(lambda: len(courier) == 0, "delivery")


def test_jobs_run_one_at_a_time_whatever_happens():
    jobs, done = Jobs(after_each=lambda: done.append("after")), []
    first = threading.Event()

    def fails() -> None:
        first.wait(10)
        raise ValueError("a defect")

    assert jobs.put("late", lambda: done.append("late"), delay_s=0.2)
    assert jobs.put("a", fails)
    assert not jobs.put("a", lambda: done.append("never"))
    assert jobs.put("b", lambda: done.append("b"), delay_s=60)
    assert jobs.put("b", lambda: done.append("b, sooner"))
    assert not jobs.put("b", lambda: done.append("never"), delay_s=1)
    jobs.start()
    wait_until(lambda: jobs._running == "a", "the first job")
    assert done == []
    assert jobs.knows("a")
    assert jobs.knows("b")
    first.set()
    wait_until(lambda: "late" in done, "the last job")
    assert jobs.stop(10)
    assert done == ["after", "b, sooner", "after", "late", "after"]
    assert not jobs.knows("b")
