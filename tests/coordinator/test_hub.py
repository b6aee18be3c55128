import time
from contextlib import contextmanager

import pytest

from fleetprune.blocks import NotFoundError, RefusedError
from fleetprune.messages import Announcement, Enrol, Progress, TaskAck, Telemetry
from fleetprune.mqtt import Connection, packet_size
from fleetprune.retry import Backoff
from fleetprune_coordinator import hub as hub_module
from fleetprune_coordinator.hub import Hub
from tests.brokers import BACK_S, broker, restartable  # noqa: F401
from tests.coordinator.fleet_fakes import MODEL, FakeDevice, MemoryStore, task

WAIT_S = 10.0


def until(condition, seconds=WAIT_S):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@contextmanager
def running(settings, store, folder, fleet="f", read=lambda name: None, **options):
    hub = Hub(settings, fleet, store, read, folder / "spool", **options)
    hub.start()
    hub.connection.wait_connected(WAIT_S)
    try:
        yield hub
    finally:
        hub.stop()


@pytest.fixture
def fleet(request):
    """A name of its own for each test: retained messages of one must not reach the next."""
    return f"f{abs(hash(request.node.nodeid)) % 10**8}"


def test_task_is_announced_done_and_stored(broker, fleet, tmp_path):  # noqa: F811
    todo = task()
    store, outcomes, seen = MemoryStore(), [], []
    with running(
        broker.settings, store, tmp_path, fleet, on_status=lambda *s: seen.append(s)
    ) as hub:
        hub.watch(outcomes.append)
        with FakeDevice(broker.settings, "d1", tmp_path / "d1", fleet=fleet) as device:
            until(lambda: device.enrolled)
            assert device.enrolled[0].accepted
            store.tasks["t1"] = todo
            hub.announce(todo, MODEL)
            until(lambda: outcomes)
            assert store.results == {"t1": b"result of t1"}
            assert outcomes[0].refused is None
            assert (tmp_path / "d1" / "t1").read_bytes() == MODEL
            assert hub.online("d1")
        hub.withdraw(["t1"])
        assert list((tmp_path / "spool" / "blobs").iterdir()) == []
        up, down = hub.traffic("d1")
        assert 200 < up < 2000
        assert len(MODEL) + 500 < down < len(MODEL) + 5000
        assert hub.traffic("nobody") == (0, 0)
    assert ("d1", True) in seen


def test_unacknowledged_task_is_announced_again(broker, fleet, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(hub_module, "ANNOUNCE", Backoff(0.1, 0.2))
    monkeypatch.setattr(hub_module, "SETTLE_S", 0.0)
    todo = task()
    store = MemoryStore(todo)
    with running(broker.settings, store, tmp_path, fleet) as hub:
        with FakeDevice(broker.settings, "d1", tmp_path / "d1", fleet=fleet, deaf=5) as device:
            hub.announce(todo, MODEL)
            until(lambda: store.results)
            assert len(device.told) >= 6
        told = len(device.told)
        time.sleep(0.5)
        assert len(device.told) == told


def test_open_tasks_are_announced_at_a_devices_return(broker, fleet, tmp_path):  # noqa: F811
    def read(name):
        return MODEL if name.startswith("blobs/") else None

    store = MemoryStore(task("t1"), task("t2"), task("t3", "d2"))
    with (
        running(broker.settings, store, tmp_path, fleet, read=read),
        FakeDevice(broker.settings, "d1", tmp_path / "d1", fleet=fleet) as device,
    ):
        until(lambda: len(store.results) == 2)
        assert {t.task for t in device.told} == {"t1", "t2"}


def test_coordinator_restarted_announces_what_is_open(broker, fleet, tmp_path):  # noqa: F811
    def read(name):
        return MODEL if name.startswith("blobs/") else None

    store = MemoryStore()
    with FakeDevice(broker.settings, "d1", tmp_path / "d1", fleet=fleet):
        with running(broker.settings, store, tmp_path, fleet) as hub:
            until(lambda: hub.online("d1"))  # retained: the device said so before the hub was up
        store.tasks["t1"] = task()
        with running(broker.settings, store, tmp_path, fleet, read=read):
            until(lambda: "t1" in store.results)


def test_refused_device_gets_no_tasks(broker, fleet, tmp_path):  # noqa: F811
    store = MemoryStore()
    with (
        running(
            broker.settings,
            store,
            tmp_path,
            fleet,
            on_enrol=lambda e: f"class {e.device_class} is not known",
        ),
        FakeDevice(broker.settings, "d1", tmp_path / "d1", fleet=fleet) as device,
    ):
        until(lambda: device.enrolled)
        assert device.enrolled[0].accepted is False
        assert device.enrolled[0].reason == "class phone is not known"


def test_results_pushed_twice_are_stored_once(broker, fleet, tmp_path):  # noqa: F811
    store = MemoryStore(task())
    with (
        running(broker.settings, store, tmp_path, fleet),
        FakeDevice(broker.settings, "d1", tmp_path / "d1", fleet=fleet) as device,
    ):
        device.deaf = 99
        device.client.push("results/t1", b"first")
        device.client.push("results/t1", b"second")
        assert store.results == {"t1": b"first"}
        assert store.saves == [("t1", "d1")]


def test_results_of_others_and_of_nobody_are_refused(broker, fleet, tmp_path):  # noqa: F811
    store = MemoryStore(task("t1", "d1"), task("t2", "d2"))
    with (
        running(broker.settings, store, tmp_path, fleet) as hub,
        FakeDevice(broker.settings, "d2", tmp_path / "d2", fleet=fleet) as device,
    ):
        device.deaf = 99
        for name in ("results/t1", "results/none", "metadata/root.json", "t2", "results/a/b"):
            with pytest.raises(RefusedError, match=f"^the coordinator refused {name}: .* of d2$"):
                device.client.push(name, b"forged")
        hub.announce(store.tasks["t1"], MODEL)
        with pytest.raises(RefusedError):
            device.client.push("results/t1", b"forged")
        with pytest.raises(NotFoundError):
            device.client.read("blobs/none", 10)
        assert store.saves == []


def test_refusing_ack_ends_the_task(broker, fleet, tmp_path):  # noqa: F811
    todo, outcomes = task(), []
    store = MemoryStore(todo)

    def told(outcome):
        outcomes.append(outcome)
        store.tasks.pop(outcome.task, None)  # as the registry closes a refused task

    with running(broker.settings, store, tmp_path, fleet) as hub:
        hub.watch(told)
        with FakeDevice(
            broker.settings, "d1", tmp_path / "d1", fleet=fleet, refuse="no data"
        ) as device:
            until(lambda: device.enrolled)
            until(lambda: outcomes)  # the open task is announced at the device's return
            again = TaskAck(task="t1", device="d1", state=Progress.REFUSED, reason="no data")
            device.send("ack", again.to_bytes())
            device.send("status", b"offline")
            until(lambda: not hub.online("d1"))
        assert [(o.task, o.refused) for o in outcomes] == [("t1", "no data")]


def test_messages_that_lie_about_their_sender_are_dropped(broker, fleet, tmp_path, caplog):  # noqa: F811
    told, todo = [], task()
    with (
        running(
            broker.settings,
            MemoryStore(todo),
            tmp_path,
            fleet,
            on_telemetry=told.append,
        ) as hub,
        FakeDevice(broker.settings, "d2", tmp_path / "d2", fleet=fleet) as device,
    ):
        hub.announce(todo, MODEL)
        enrol = Enrol(device="d1", device_class="c", agent_version="", trains=True, samples=0)
        device.send("enrol", enrol.to_bytes())
        device.send("telemetry", Telemetry(device="d1", device_class="c").to_bytes())
        device.send("telemetry", b"{")
        device.send("status", b"maybe")
        device.send("get", b"nonsense")
        device.send("unknown", b"")
        forged = TaskAck(task="t1", device="d2", state=Progress.REFUSED)
        device.send("ack", forged.to_bytes())
        device.send("telemetry", Telemetry(device="d2", device_class="c").to_bytes())
        until(lambda: told)
        assert [t.device for t in told] == ["d2"]
        assert hub._announced["t1"].due is not None
        assert not hub.online("d1")
    assert "enrol of device d2 ignored: Enrol of 'd1', sent by 'd2'" in caplog.text
    assert "get of device d2 ignored: block message of 8 bytes, expected 12" in caplog.text


def test_release_and_presence_are_retained(broker, fleet, tmp_path):  # noqa: F811
    got = {}
    with running(broker.settings, MemoryStore(), tmp_path, fleet) as hub:
        hub.announce_release(7)
        late = Connection(
            broker.settings, "late", on_message=lambda topic, payload: got.update({topic: payload})
        )
        late.subscribe([f"fleetprune/{fleet}/#"])
        late.start()
        until(lambda: len(got) == 2)
        assert Announcement.from_bytes(got[f"fleetprune/{fleet}/release"]).release == 7
        assert got[f"fleetprune/{fleet}/coordinator"] == b"online"
    until(lambda: got[f"fleetprune/{fleet}/coordinator"] == b"offline")
    late.stop()


def test_round_survives_a_killed_broker(restartable, tmp_path):  # noqa: F811
    todo = task()
    store = MemoryStore()
    with (
        running(restartable.settings, store, tmp_path) as hub,
        FakeDevice(restartable.settings, "d1", tmp_path / "d1") as device,
    ):
        until(lambda: device.enrolled)
        restartable.kill()
        store.tasks["t1"] = todo
        hub.announce(todo, MODEL)
        time.sleep(0.2)
        restartable.start()
        until(lambda: store.results, BACK_S)


def test_traffic_is_counted_in_mqtt_packets(broker, fleet, tmp_path):  # noqa: F811
    with running(broker.settings, MemoryStore(), tmp_path, fleet) as hub:
        sender = Connection(broker.settings, "s", on_message=lambda *m: None)
        sender.start()
        sender.wait_connected(WAIT_S)
        topic = f"fleetprune/{fleet}/up/d9/status"
        sender.publish(topic, b"online")
        until(lambda: hub.online("d9"))
        assert hub.traffic("d9") == (packet_size(topic, b"online"), 0)
        sender.stop()
