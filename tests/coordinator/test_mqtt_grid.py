import threading
import time
from contextlib import ExitStack

import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from fleetprune.errors import MessageError, UsageError
from fleetprune_coordinator.flower_messages import (
    DEVICE_FAILED,
    instruction,
    read_instruction,
    read_result,
)
from fleetprune_coordinator.hub import Hub
from fleetprune_coordinator.mqtt_grid import MqttGrid
from tests.brokers import BACK_S, broker, restartable  # noqa: F401
from tests.coordinator.fleet_fakes import MODEL, FakeDevice, MemoryStore, task

NODES = {"d1": 101, "d2": 102, "d3": 103}


@pytest.fixture
def fleet(request):
    return f"g{abs(hash(request.node.nodeid)) % 10**8}"


class Site:
    """Hub, grid and devices of one test."""

    def __init__(self, settings, folder, fleet, store, check_stop=lambda: None, quorum=1.0):
        self.check_stop, self.quorum = check_stop, quorum
        self.settings, self.folder, self.fleet, self.store = settings, folder, fleet, store
        self.stack = ExitStack()

    def __enter__(self):
        hub = Hub(self.settings, self.fleet, self.store, lambda n: None, self.folder / "spool")
        self.hub = hub
        hub.start()
        self.stack.callback(hub.stop)
        hub.connection.wait_connected(10)
        self.grid = MqttGrid(hub, self.store, lambda: NODES, self.check_stop, quorum=self.quorum)
        self.stack.callback(self.grid.close)
        return self

    def __exit__(self, *exc):
        self.stack.close()

    def device(self, name, **options):
        made = FakeDevice(self.settings, name, self.folder / name, fleet=self.fleet, **options)
        return self.stack.enter_context(made)


def messages(store, *tasks):
    for t in tasks:
        store.tasks[t.task] = t
    return [instruction(t, MODEL, NODES[t.device]) for t in tasks]


def test_instruction_and_reply_carry_the_bytes_untouched():
    message = instruction(task(), MODEL, 101)
    assert read_instruction(message) == (task(), MODEL)
    about = message.metadata
    assert (about.message_id, about.dst_node_id, about.group_id) == ("t1", 101, "3")
    assert dict(message.content["task"]) == {"json": task().to_bytes()}
    array = message.content["model"]["blob"]
    assert (array.dtype, array.shape, array.stype) == (
        "uint8",
        (len(MODEL),),
        "fleetprune.model.v1",
    )
    for content in (RecordDict(), RecordDict({"task": message.content["task"]})):
        with pytest.raises(MessageError, match=r"^Flower message without "):
            read_instruction(Message(content, 101, "train"))
    task_twice = RecordDict(dict.fromkeys(("task", "model"), message.content["task"]))
    task_twice["model"]["blob"] = b"not an array"
    with pytest.raises(MessageError, match=r"^model/blob is bytes, expected an Array$"):
        read_instruction(Message(task_twice, 101, "train"))


def test_replies_are_yielded_as_they_come(broker, fleet, tmp_path):  # noqa: F811
    store = MemoryStore()

    def slow(todo, model):
        time.sleep(1.0)
        return b"slow"

    with Site(broker.settings, tmp_path, fleet, store) as site:
        site.device("d1", work=slow)
        site.device("d2")
        site.device("d3", refuse="no data")
        replies = site.grid.send_and_receive(
            messages(store, task("t1"), task("t2", "d2"), task("t3", "d3")), timeout=10
        )
        began = time.monotonic()
        early = {r.metadata.src_node_id: r for r in (next(replies), next(replies))}
        assert time.monotonic() - began < 0.9
        assert read_result(early[102]) == b"result of t2"
        assert early[102].metadata.reply_to_message_id == "t2"
        assert early[103].has_error()
        assert early[103].error.code == DEVICE_FAILED
        with pytest.raises(MessageError, match=r"^node 103: no data$"):
            read_result(early[103])
        (late,) = replies
        assert read_result(late) == b"slow"
        assert (tmp_path / "d1" / "t1").read_bytes() == MODEL
        assert list((tmp_path / "spool" / "blobs").iterdir()) == []


def test_the_deadline_ends_the_round_without_the_silent(broker, fleet, tmp_path):  # noqa: F811
    store = MemoryStore()
    with Site(broker.settings, tmp_path, fleet, store) as site:
        site.device("d1")
        began = time.monotonic()
        batch = messages(store, task("t1"), task("t2", "d2"))
        replies = list(site.grid.send_and_receive(batch, timeout=1.0))
        assert 0.9 < time.monotonic() - began < 2
        assert [r.metadata.src_node_id for r in replies] == [101]
        assert site.hub._announced == {}
        assert site.grid._pending == {}


def test_a_stop_ends_the_wait_and_leaves_the_tasks_open(broker, fleet, tmp_path):  # noqa: F811
    store, stop = MemoryStore(), threading.Event()

    def check_stop():
        if stop.is_set():
            raise KeyboardInterrupt

    with Site(broker.settings, tmp_path, fleet, store, check_stop) as site:
        replies = site.grid.send_and_receive(messages(store, task("t1")), timeout=30)
        threading.Timer(0.3, stop.set).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            next(replies)
        assert 0.2 < time.monotonic() - began < 2
        assert (site.hub._announced, site.grid._pending) == ({}, {})
        assert store.open_tasks("d1") == [task("t1")]


def test_answered_tasks_of_an_interrupted_round_are_yielded_at_once(
    broker,  # noqa: F811
    fleet,
    tmp_path,
):
    store = MemoryStore()
    batch = messages(store, task("t1"), task("t2", "d2"))
    store.results["t1"] = b"from before the restart"
    with Site(broker.settings, tmp_path, fleet, store) as site:
        replies = site.grid.send_and_receive(batch, timeout=10)
        assert read_result(next(replies)) == b"from before the restart"
        site.device("d2")
        assert [read_result(r) for r in replies] == [b"result of t2"]


def test_push_and_pull(broker, fleet, tmp_path):  # noqa: F811
    store = MemoryStore()
    with Site(broker.settings, tmp_path, fleet, store) as site:
        ids = site.grid.push_messages(messages(store, task("t1")))
        assert ids == ["t1"]
        assert site.grid.pull_messages(ids) == []
        site.device("d1")
        end = time.monotonic() + 10
        while not (got := site.grid.pull_messages(ids)):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert read_result(got[0]) == b"result of t1"
        assert site.grid.pull_messages(ids) == []
        assert site.grid.get_node_ids() == [101, 102, 103]
        assert [(n.node_id, n.name) for n in site.grid.get_nodes()] == [
            (101, "d1"),
            (102, "d2"),
            (103, "d3"),
        ]


def test_a_task_addressed_to_another_node_is_refused(broker, fleet, tmp_path):  # noqa: F811
    with Site(broker.settings, tmp_path, fleet, MemoryStore()) as site:
        with pytest.raises(UsageError) as e:
            site.grid.push_messages([instruction(task(), MODEL, 102)])
        assert str(e.value) == "task for device d1 (node 101) is addressed to node 102"


class Streaming(FedAvg):
    """Flower's own round loop around our messages; adds up what comes, one reply at a time."""

    def __init__(self, store):
        super().__init__()
        self.store, self.seen = store, []

    def configure_train(self, server_round, arrays, config, grid):
        return messages(
            self.store, *(task(f"r{server_round}-{d}", d, round=server_round) for d in NODES)
        )

    def aggregate_train(self, server_round, replies):
        self.seen.append(sorted(read_result(r) for r in replies))
        return None, None

    def configure_evaluate(self, server_round, arrays, config, grid):
        return []

    def aggregate_evaluate(self, server_round, replies):
        return None


def test_flowers_own_strategy_loop_runs_over_mqtt(broker, fleet, tmp_path):  # noqa: F811
    store = MemoryStore()
    with Site(broker.settings, tmp_path, fleet, store) as site:
        for name in NODES:
            site.device(name)
        strategy = Streaming(store)
        strategy.start(site.grid, ArrayRecord(), num_rounds=2, timeout=20)
        assert strategy.seen == [[f"result of r{r}-{d}".encode() for d in NODES] for r in (1, 2)]


def test_a_round_goes_on_after_the_broker_was_killed(restartable, tmp_path):  # noqa: F811
    store = MemoryStore()
    with Site(restartable.settings, tmp_path, "f", store) as site:
        site.device("d1")
        replies = site.grid.send_and_receive(messages(store, task("t1")), timeout=BACK_S)
        restartable.kill()
        time.sleep(0.2)
        restartable.start()
        assert [read_result(r) for r in replies] == [b"result of t1"]


def test_a_quorum_does_not_wait_for_the_rest(broker, fleet, tmp_path):  # noqa: F811
    store = MemoryStore()
    asked = [task(f"t{i}", f"d{i}") for i in (1, 2, 3)]
    with Site(broker.settings, tmp_path, fleet, store, quorum=2 / 3) as site:
        site.device("d1")
        site.device("d2")  # and d3 never comes
        replies = list(site.grid.send_and_receive(messages(store, *asked), timeout=60))
        assert sorted(r.metadata.src_node_id for r in replies) == [101, 102]
