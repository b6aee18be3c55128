import os
import re
from dataclasses import replace

import numpy as np
import pytest
from models import INPUTS
from repositories import NOW, MemoryRepository
from step_graphs import Shelf, step

from fleetprune.errors import InstallError, TransportError, TrustError
from fleetprune.messages import Blob, GraphRef, Progress, Telemetry
from fleetprune.mqtt import BrokerSettings
from fleetprune.outbox import Kind
from fleetprune_agent.config import AgentConfig, NpzData
from fleetprune_agent.data import checked, split
from fleetprune_agent.duties import Duties
from fleetprune_agent.feedback import InMemory
from fleetprune_agent.inbox import TaskInbox
from fleetprune_agent.recent import Recent
from fleetprune_agent.sessions import Graphs
from fleetprune_agent.slots import Slots
from fleetprune_agent.sources import DeviceSource
from fleetprune_agent.telemetry import Traffic
from fleetprune_agent.trial import TrialStoppedError, in_process
from fleetprune_agent.trust import TrustedRepository
from fleetprune_agent.worker import Worker, WorkerSettings


class Bench:
    """Duties with everything that they need, and what they said."""

    def __init__(self, folder) -> None:
        self.shelf, self.full = Shelf(), False
        self.delivered, self.acks = [], []
        self.released = MemoryRepository()
        parts = split(checked(np.ones((4, 1)), [0, 1, 0, 1], str, "memory"), 0)
        repository = TrustedRepository(
            folder / "trust", self.released.bootstrap, self.released, lambda: NOW
        )
        config = AgentConfig(
            device="d1",
            device_class="phone",
            fleet="f",
            broker=BrokerSettings(),
            root=folder / "root.json",
            state=folder,
            data=NpzData(kind="npz", path=folder),
        )
        self.inbox = TaskInbox(folder / "tasks")
        self.duties = Duties(
            config=config,
            split=parts,
            worker=Worker(
                WorkerSettings("d1"), parts.train, Graphs(), InMemory(), source=self.shelf
            ),
            inbox=self.inbox,
            slots=Slots(folder),
            repository=lambda: repository,
            deliver=self.deliver,
            acknowledge=self.acks.append,
            traffic=Traffic,
        )

    def deliver(self, kind, name, data) -> None:
        if self.full:
            raise TransportError("outbox is full")
        self.delivered.append((kind, name))

    def accepted(self, **fields):
        task = self.shelf.task("t1", [step()], **fields)
        self.inbox.add(task)
        return task


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_a_task_is_answered_and_forgotten(bench):
    assert bench.duties.task(bench.accepted())
    assert bench.delivered == [(Kind.RESULT, "results/t1")]
    assert (bench.inbox.waiting(), bench.acks) == ([], [])


def test_a_full_outbox_or_a_silent_source_keeps_the_task(bench, monkeypatch):
    task = bench.accepted()
    bench.full = True
    assert not bench.duties.task(task)
    assert bench.inbox.waiting() == [task]
    bench.full = False
    assert bench.duties.task(task)
    assert bench.delivered == [(Kind.RESULT, "results/t1")]

    def silent(_name):
        raise TransportError("no answer")

    second = bench.shelf.task("t2", [step()])
    bench.inbox.add(second)
    monkeypatch.setattr(bench.shelf, "read", silent)
    assert not bench.duties.task(second)
    assert bench.inbox.waiting() == [second]
    assert bench.acks == []


def test_nobody_waits_for_an_old_task(bench, tmp_path):
    task = bench.accepted(deadline_s=60)
    os.utime(tmp_path / "tasks" / "t1.json", (0, 0))
    assert bench.duties.task(task)
    assert (bench.delivered, bench.acks, bench.inbox.waiting()) == ([], [], [])


def test_a_defect_is_a_refusal_and_not_the_end(bench, monkeypatch):
    def defect(_task):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(bench.duties.worker, "handle", defect)
    assert bench.duties.task(bench.accepted())
    (ack,) = bench.acks
    assert (ack.state, ack.reason) == (Progress.REFUSED, "ZeroDivisionError: a defect")
    assert bench.inbox.waiting() == []


def test_a_young_fleet_has_no_release_and_that_is_no_error(bench, monkeypatch):
    assert bench.duties.refresh()
    assert bench.delivered == []
    bench.released.release(1, fields={"golden": "elsewhere"})
    assert bench.duties.refresh()
    assert bench.delivered == [(Kind.TELEMETRY, "telemetry")]
    assert b"has no target elsewhere" in (bench.duties.config.state / "last.json").read_bytes()

    def silent(_name, _max_bytes):
        raise TransportError("no answer")

    monkeypatch.setattr(bench.released, "read", silent)
    assert not bench.duties.refresh()


def test_a_report_is_repeated_as_it_was(bench):
    bench.duties.repeat_report()
    first = (bench.duties.config.state / "last.json").read_bytes()
    bench.duties.repeat_report()
    assert (bench.duties.config.state / "last.json").read_bytes() == first
    assert bench.delivered == [(Kind.TELEMETRY, "telemetry")] * 2


def test_a_report_from_before_an_installation_is_measured_anew(bench):
    bench.duties.repeat_report()
    last = bench.duties.config.state / "last.json"
    before = last.read_bytes()  # no model
    bench.released.release(1)
    assert bench.duties.refresh()
    assert Telemetry.from_bytes(last.read_bytes()).release == 1
    last.write_bytes(before)  # as after a kill between installing and reporting
    bench.duties.repeat_report()
    assert Telemetry.from_bytes(last.read_bytes()).release == 1
    last.write_bytes(b"{")
    bench.duties.repeat_report()
    assert Telemetry.from_bytes(last.read_bytes()).release == 1


@pytest.mark.parametrize("error", [TransportError("outbox is full"), InstallError("disk full")])
def test_a_report_that_fails_undoes_no_installation(bench, monkeypatch, error):
    """Broker away, outbox full, disk full: the release runs, and the fleet learns it later."""
    bench.released.release(1)

    def fail(*_args, **_kwargs):
        raise error

    with monkeypatch.context() as patch:
        if isinstance(error, InstallError):
            patch.setattr("fleetprune_agent.duties.write_atomic", fail)
        else:
            bench.full = True
        assert bench.duties.refresh()
    bench.full = False
    assert bench.duties.slots.active().release == 1
    assert bench.duties.slots.rejected() == {}
    assert bench.delivered == []
    bench.duties.repeat_report()
    assert bench.delivered == [(Kind.TELEMETRY, "telemetry")]
    assert last(bench).release == 1


def last(bench) -> Telemetry:
    return Telemetry.from_bytes((bench.duties.config.state / "last.json").read_bytes())


def test_a_report_that_is_no_longer_true_is_not_repeated(bench):
    bench.released.release(1)
    bench.duties.refresh()
    assert (last(bench).plan, last(bench).state) == (1, "trial")
    bench.duties.slots.commit()
    bench.duties.repeat_report()
    assert last(bench).state == "committed"
    bench.duties.slots.start()
    bench.duties.slots.start()
    bench.duties.repeat_report()
    assert last(bench).crashes == 1


def test_a_release_is_tried_in_a_process_of_its_own_on_our_samples(bench):
    """Four samples, none held out: what the model says of them is compared."""
    shape = {"input_shape": (INPUTS,)}
    bench.duties = replace(
        bench.duties,
        split=split(checked(np.ones((20, INPUTS)), [0] * 20, str, "memory"), 0.5),
    )
    for release in (1, 2):
        bench.released.release(release, fields=shape)
        assert bench.duties.refresh()
    report = last(bench)
    assert (report.release, report.plan, report.state) == (2, 2, "committed")
    assert report.samples == len(bench.duties.split.held_out) > 0
    assert (report.accuracy, report.accuracy_before, report.agreement) == (1.0, 1.0, 1.0)


def test_samples_seen_in_service_are_used_where_they_are_kept(bench, tmp_path):
    config = bench.duties.config.model_copy(update={"recent_samples": 12})
    data = checked(np.ones((2, INPUTS)), [0, 0], str, "memory")
    bench.duties = replace(bench.duties, config=config, split=split(data, 0))
    seen = []

    def trial(request, evidence):
        seen.append(len(evidence.recent))
        return in_process(request, evidence)

    bench.duties = replace(bench.duties, trial=trial)
    bench.released.release(1)
    bench.duties.refresh()
    Recent(tmp_path, keep=12).add(np.ones((12, INPUTS), np.float32))
    bench.released.release(2)
    bench.duties.refresh()
    assert seen == [2, 12]


def test_a_release_that_may_not_be_fetched_now_is_said_to_wait(bench):
    bench.released.release(1)
    bench.duties = replace(bench.duties, may_fetch=lambda _bytes: "quiet hours until 06:00")
    assert bench.duties.refresh()
    assert (last(bench).release, last(bench).postponed) == (0, "quiet hours until 06:00")
    bench.duties = replace(bench.duties, may_fetch=lambda _bytes: "")
    assert bench.duties.refresh()
    assert (last(bench).release, last(bench).postponed) == (1, "")


def test_an_agent_that_ends_during_a_trial_says_nothing(bench):
    def stopped(*_args):
        raise TrialStoppedError

    bench.released.release(1)
    bench.duties = replace(bench.duties, trial=stopped, stopped=lambda: True)
    assert bench.duties.refresh()
    assert bench.delivered == []


def test_graphs_come_signed_or_not_at_all(tmp_path):
    released, shelf = MemoryRepository(), Shelf()
    trusted = TrustedRepository(tmp_path / "trust", released.bootstrap, released, lambda: NOW)
    source = DeviceSource(lambda: trusted, released, tmp_path / "incoming")
    ref = shelf.add_graph(step())
    with pytest.raises(TrustError, match=f"^the release repository has no target {ref.target}$"):
        source.graph(ref)
    released.add(ref.target, step())
    released.bump()
    assert source.graph(ref) == step()  # signed since the last refresh
    other = "0" * 64
    with pytest.raises(
        TrustError,
        match=re.escape(f"{ref.target} is signed with SHA-256 {ref.sha256}, the task says {other}"),
    ):
        source.graph(GraphRef(target=ref.target, sha256=other))
    assert list((tmp_path / "incoming").iterdir()) == []


def test_models_come_as_blobs_and_leave_nothing_behind(tmp_path):
    released = MemoryRepository()
    trusted = TrustedRepository(tmp_path / "trust", released.bootstrap, released, lambda: NOW)
    source = DeviceSource(lambda: trusted, released, tmp_path / "incoming")
    released.blobs[f"blobs/{'a' * 64}"] = b"model"
    assert source.model(Blob(sha256="a" * 64, size=5)) == b"model"
    assert list((tmp_path / "incoming").iterdir()) == []
