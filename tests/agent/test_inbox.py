import os

import pytest
from step_graphs import Shelf, step

from fleetprune_agent.inbox import MAX_WAITING, TaskInbox


@pytest.fixture
def tasks():
    shelf = Shelf()
    return [shelf.task(f"t{i}", [step()], deadline_s=60) for i in range(MAX_WAITING + 1)]


def test_tasks_wait_in_order_and_survive(tmp_path, tasks):
    inbox = TaskInbox(tmp_path / "tasks")
    for i, task in enumerate(tasks[:3]):
        assert inbox.add(task)
        os.utime(tmp_path / "tasks" / f"t{i}.json", (100 - i, 100 - i))  # the latest first
    assert inbox.add(tasks[0])
    inbox.done(tasks[1])
    inbox.done(tasks[1])
    (tmp_path / "tasks" / "damaged.json").write_bytes(b"{")
    assert TaskInbox(tmp_path / "tasks").waiting() == [tasks[2], tasks[0]]
    assert not (tmp_path / "tasks" / "damaged.json").exists()


def test_a_flood_is_refused(tmp_path, tasks):
    inbox = TaskInbox(tmp_path)
    assert [inbox.add(task) for task in tasks] == [True] * MAX_WAITING + [False]
    inbox.done(tasks[0])
    assert inbox.add(tasks[-1])


def test_deadlines(tmp_path, tasks):
    now = 1000.0
    inbox = TaskInbox(tmp_path, lambda: now)
    assert inbox.expired(tasks[0])
    inbox.add(tasks[0])
    for age, expired in ((0, False), (60, False), (61, True), (-500, False)):
        os.utime(tmp_path / "t0.json", (now - age, now - age))
        assert inbox.expired(tasks[0]) is expired
