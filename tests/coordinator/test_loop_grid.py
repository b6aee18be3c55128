import hashlib

import pytest
from flwr.app import ArrayRecord

from fleetprune.errors import UsageError
from fleetprune.messages import Task
from fleetprune_coordinator.flower_messages import instruction, read_result
from fleetprune_coordinator.loop_grid import LoopGrid
from tests.coordinator.fleet_fakes import MODEL, MemoryStore, task
from tests.coordinator.test_mqtt_grid import NODES, Streaming


def honest(task_json, read):
    todo = Task.from_bytes(task_json)
    model = read(f"blobs/{todo.model.sha256}")
    assert hashlib.sha256(model).hexdigest() == todo.model.sha256
    return b"result of " + todo.task.encode()


def failing(task_json, read):
    raise ValueError("no data")


def batch():
    return [
        instruction(task("t1"), MODEL, 101),
        instruction(task("t2", "d2"), MODEL, 102),
        instruction(task("t3", "d3"), MODEL, 103),
    ]


def test_devices_are_called_one_by_one_as_replies_are_asked_for():
    called = []

    def device(task_json, read):
        called.append(Task.from_bytes(task_json).device)
        return honest(task_json, read)

    grid = LoopGrid(dict.fromkeys(NODES, device), NODES)
    replies = grid.send_and_receive(batch(), timeout=1)
    assert called == []
    first = next(replies)
    assert called == ["d1"]
    assert read_result(first) == b"result of t1"
    assert (first.metadata.src_node_id, first.metadata.reply_to_message_id) == (101, "t1")
    assert [read_result(r) for r in replies] == [b"result of t2", b"result of t3"]


def test_an_exception_becomes_an_error_and_the_others_go_on():
    grid = LoopGrid({"d1": honest, "d2": failing, "d3": honest}, NODES)
    replies = list(grid.send_and_receive(batch()))
    assert [r.has_error() for r in replies] == [False, True, False]
    assert replies[1].error.reason == "ValueError: no data"
    assert replies[1].metadata.src_node_id == 102


def test_what_the_coordinator_lacks_is_an_error_of_the_device():
    grid = LoopGrid({"d1": lambda task_json, read: read("targets/x")})
    (reply,) = grid.send_and_receive([instruction(task(), MODEL, 1000)])
    assert reply.error.reason == "NotFoundError: the coordinator has no targets/x"


def test_payload_is_counted_in_both_directions():
    def device(task_json, read):
        read("targets/graph")
        return honest(task_json, read)

    grid = LoopGrid({"d1": device}, read=lambda name: b"g" * 10)
    assert grid.traffic("d1") == (0, 0)
    list(grid.send_and_receive([instruction(task(), MODEL, 1000)]))
    assert grid.traffic("d1") == (len("result of t1"), len(task().to_bytes()) + 10 + len(MODEL))


def test_push_pull_and_nodes():
    grid = LoopGrid({"d1": honest, "d2": honest})
    assert grid.get_node_ids() == [1000, 1001]
    ids = grid.push_messages([instruction(task(), MODEL, 1000)])
    assert [read_result(r) for r in grid.pull_messages(ids)] == [b"result of t1"]
    assert grid.pull_messages(ids) == []
    with pytest.raises(UsageError, match=r"^task for device d1 \(node 1000\) is addressed to"):
        grid.push_messages([instruction(task(), MODEL, 1001)])


def test_flowers_own_strategy_loop_runs_in_process():
    strategy = Streaming(MemoryStore())
    grid = LoopGrid(dict.fromkeys(NODES, honest), NODES)
    strategy.start(grid, ArrayRecord(), num_rounds=2)
    assert strategy.seen == [[f"result of r{r}-{d}".encode() for d in NODES] for r in (1, 2)]
