import hashlib
import re

import numpy as np
import pytest
from step_graphs import Shelf, observation, step, wrong_expectation

from fleetprune.errors import DataError, GraphError, MessageError, TrustError, WireError
from fleetprune.messages import Codec, Task, TaskKind
from fleetprune.model_payload import decode_model
from fleetprune.result import Result, decode_result
from fleetprune.update import decode_update
from fleetprune_agent.data import Batches, checked
from fleetprune_agent.feedback import InMemory, OnDisk
from fleetprune_agent.sessions import KEPT_FILES, Graphs
from fleetprune_agent.trainer import StoppedError, train
from fleetprune_agent.worker import (
    FRAME_BYTES,
    Worker,
    WorkerSettings,
    as_loop_device,
    holding,
    lossy,
    streams,
)


def samples(labels=(0, 1, 0, 1)):
    x = np.array([[1.0], [0.0], [1.0], [0.0]])
    return checked(x, labels, lambda i: f"memory row {i}", "memory")


@pytest.fixture
def shelf():
    return Shelf()


def worker(shelf, answers=None, **changes):
    return Worker(
        WorkerSettings("d1", trains=changes.pop("trains", True)),
        changes.pop("samples", samples()),
        changes.pop("graphs", Graphs()),
        answers or InMemory(),
        source=shelf,
        clock=iter(range(100)).__next__,
        **changes,
    )


def answer(frame: bytes) -> tuple[Result, list[float]]:
    result = decode_result(frame)
    update = decode_update(result.update, mask_version=1, size=2)
    return result, update.dense().tolist()


def test_training_in_the_head(shelf):
    result, update = answer(worker(shelf).handle(shelf.task("t1", [step()])))
    assert update == [-1, -2]  # two steps of -0.5 * (1, 2)
    assert result.vectors.keys() == {"stats", "scores"}
    assert result.vectors["stats"].tolist() == [1, 2]
    assert result.vectors["scores"].tolist() == [3, 3]
    header = result.header
    assert (header.task, header.device, header.kind) == ("t1", "d1", TaskKind.TRAIN)
    assert (header.samples, header.steps, header.train_s) == (4, 2, 1.0)
    assert header.loss == pytest.approx(0.5, abs=1e-6)
    assert header.correct is None
    assert header.rss_mb > 10


@pytest.mark.parametrize("kind", ["train", "observe"])
def test_a_task_has_only_so_much_time(shelf, kind):
    """Whoever can write to the broker can ask for a thousand million epochs."""
    many = checked(np.zeros((400, 1)), [0] * 400, lambda i: f"memory row {i}", "memory")
    w = worker(shelf, samples=many)
    w.settings = WorkerSettings("d1", max_task_s=5)
    graph = step() if kind == "train" else observation()
    task = shelf.task("t1", [graph], kind=kind, epochs=10**9)
    with pytest.raises(DataError, match=r"^task t1 takes longer than max_task_s = 5$"):
        w.handle(task)
    assert w.answer("t1") is None


def test_a_model_that_cannot_be_one_is_not_fetched(shelf):
    task = shelf.task("t1", [step()])
    huge = task.model_copy(update={"model": task.model.model_copy(update={"size": 2**32})})
    most = 4 * (2 + 2) + 2 + FRAME_BYTES  # 2: which of its parameters are pruned
    with pytest.raises(WireError, match=f"^model of {2**32} bytes, expected at most {most}$"):
        worker(shelf).handle(huge)
    assert shelf.asked == [task.graphs[0].target]


def test_what_top_k_leaves_out_is_sent_later(shelf):
    w = worker(shelf)
    sent = [answer(w.handle(shelf.task(f"t{i}", [step()], top_k=0.5)))[1] for i in range(3)]
    # Totals: (-1, -2); then (-1, 0) + (-1, -2); then (0, -2) + (-1, -2).
    assert sent == [[0, -2], [-2, 0], [0, -4]]


def test_nothing_is_lost_by_coarse_codecs(shelf):
    w = worker(shelf)
    total = np.zeros(2)
    for i in range(40):
        task = shelf.task(f"t{i}", [step((1.0, 0.013))], codec="int4", seed=i)
        total += answer(w.handle(task))[1]
    left = w._answers.load().residual
    assert total + left == pytest.approx([-40, -40 * 0.013], abs=1e-4)


@pytest.mark.parametrize("change", [{"mask_version": 2}, {"shape": "watch"}])
def test_the_residual_is_flushed_with_the_mask_or_shape(shelf, change):
    w = worker(shelf)
    w.handle(shelf.task("t1", [step()], top_k=0.5))
    version = change.get("mask_version", 1)
    model = shelf.add_model([1, 2], [4, 8], mask_version=version)
    task = shelf.task("t2", [step()], model=model, top_k=0.5, **change)
    sent = decode_result(w.handle(task)).update
    assert decode_update(sent, mask_version=version, size=2).dense().tolist() == [0, -2]


def test_lossy_splits_exactly(shelf):
    task = shelf.task("t1", [step()], codec="int4", top_k=0.5)
    total = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    encoded, left_out = lossy(total, task, np.random.default_rng(0))
    sent = decode_update(encoded, mask_version=1, size=1000)
    assert sent.values.size == 500
    assert np.abs(sent.dense() + left_out - total).max() < 1e-6


def test_a_repeat_gives_the_same_bytes_and_moves_nothing(shelf, tmp_path):
    store = OnDisk(tmp_path / "answers.bin")
    task = shelf.task("t1", [step()], top_k=0.5)
    first = worker(shelf, store).handle(task)
    before = (tmp_path / "answers.bin").read_bytes()
    asked = len(shelf.asked)
    again = worker(shelf, store).handle(task)  # after a restart
    assert again == first
    assert (tmp_path / "answers.bin").read_bytes() == before
    assert len(shelf.asked) == asked
    assert worker(shelf, store).answer("t1") == first
    assert worker(shelf, store).answer("t2") is None


class Killed(BaseException):
    """Stands for a power cut."""


@pytest.mark.parametrize("after_the_write", [False, True])
def test_killed_around_the_commit(shelf, tmp_path, after_the_write):
    """Whatever the instant, the residual moves on exactly once per answered task."""

    class Dying(OnDisk):
        def save(self, memory):
            if after_the_write:
                super().save(memory)
            raise Killed

    path = tmp_path / "answers.bin"
    one, two = (shelf.task(t, [step()], top_k=0.5) for t in ("t1", "t2"))
    with pytest.raises(Killed):
        worker(shelf, Dying(path)).handle(one)
    assert path.exists() == after_the_write
    survivor = worker(shelf, OnDisk(path))
    assert answer(survivor.handle(one))[1] == [0, -2]
    assert answer(survivor.handle(two))[1] == [-2, 0]


# ---- pruned weights


def pruned(shelf, name="t1", *, kept=(False, True), version=1, **fields):
    """A training task on a model of which some weights are pruned."""
    model = shelf.add_model([1, 2], [4, 8], mask_version=version, support=kept)
    return shelf.task(name, [step()], model=model, mask_version=version, **fields)


def sent(frame, size, version=1):
    return (
        decode_update(decode_result(frame).update, mask_version=version, size=size).dense().tolist()
    )


def test_an_update_has_the_weights_that_are_left_and_no_others(shelf):
    assert sent(worker(shelf).handle(pruned(shelf)), 1) == [-2]
    assert sent(worker(shelf).handle(pruned(shelf, kept=(True, False))), 1) == [-1]
    assert sent(worker(shelf).handle(pruned(shelf, kept=(True, True))), 2) == [-1, -2]
    assert sent(worker(shelf).handle(pruned(shelf, kept=(False, False))), 0) == []


def test_pruned_weights_stay_at_zero_after_every_step_of_training(shelf):
    """Momentum and the pull towards the start push on them; neither moves them."""
    seen = []
    hold = holding(np.array([False, True]))

    def after_step(state):
        hold(state)
        seen.append((state["params"].tolist(), state["momentum"].tolist()))

    task = pruned(shelf, proximal=0.5)
    payload = decode_model(shelf.model(task.model), parameters=2, statistics=2)
    assert payload.params.tolist() == [0, 2]
    graph = Graphs().get(task.graphs[0], shelf.graph)
    data = samples()
    trained = train(
        [graph.session],
        payload,
        Batches(data.x, data.y, 3, np.random.default_rng(0)),
        epochs=2,
        max_steps=0,
        learning_rate=0.5,
        proximal=0.5,
        after_step=after_step,
    )
    assert len(seen) == trained.steps == 4
    assert all(params[0] == momentum[0] == 0 for params, momentum in seen)
    assert all(params[1] != 2 and momentum[1] > 0 for params, momentum in seen)
    assert trained.params[0] == 0


def test_holding_by_hand():
    state = {
        "params": np.float32([1, 2, 3]),
        "momentum": np.float32([4, 5, 6]),
        "stats": np.ones(2),
    }
    holding(np.array([True, False, True]))(state)
    assert state["params"].tolist() == [1, 0, 3]
    assert state["momentum"].tolist() == [4, 0, 6]
    assert state["stats"].tolist() == [1, 1]


def test_what_is_left_out_of_pruned_updates_is_sent_later_and_flushed_with_the_mask(shelf):
    w = worker(shelf)
    task = pruned(shelf, kept=(True, True), top_k=0.5)
    assert sent(w.handle(task), 2) == [0, -2]
    assert w._answers.load().residual.tolist() == [-1, 0]
    again = pruned(shelf, "t2", kept=(True, True), top_k=0.5)
    assert sent(w.handle(again), 2) == [-2, 0]
    # A new mask, as many weights as before or fewer: nothing of the old one is added.
    assert sent(w.handle(pruned(shelf, "t3", kept=(True, True), version=2)), 2, 2) == [-1, -2]
    assert sent(w.handle(pruned(shelf, "t4", kept=(True, True), version=3, top_k=0.5)), 2, 3) == [
        0,
        -2,
    ]
    assert sent(w.handle(pruned(shelf, "t5", version=4)), 1, 4) == [-2]
    # Even a coordinator that forgets to count its masks up cannot mix what has another length.
    w.handle(pruned(shelf, "t6", kept=(True, True), version=5, top_k=0.5))
    assert sent(w.handle(pruned(shelf, "t7", version=5)), 1, 5) == [-2]


def test_a_look_sees_the_pruned_model(shelf):
    look = shelf.add_graph(observation()).model_dump(by_alias=True)
    frame = worker(shelf).handle(pruned(shelf, look=look))
    assert sent(frame, 1) == [-2]
    assert decode_result(frame).vectors["sumsq"].tolist() == [2]


def test_observing_in_the_head_and_without_labels(shelf):
    task = shelf.task("t1", [observation()], kind="observe")
    for labels, correct in (((0, 1, 0, 0), 3), (None, None)):
        got = decode_result(worker(shelf, samples=samples(labels), trains=False).handle(task))
        assert got.update is None
        assert {k: v.tolist() for k, v in got.vectors.items()} == {
            "sumsq": [2],
            "bn_sum": [2],
            "bn_sumsq": [4],
            "bn_count": [4],
        }
        assert (got.header.samples, got.header.correct, got.header.steps) == (4, correct, 0)


@pytest.mark.parametrize("kind", ["train", "observe"])
def test_importance_is_sent_only_where_it_is_asked_for(shelf, kind):
    graph = step() if kind == "train" else observation()
    task = shelf.task("t1", [graph], kind=kind, scores=False)
    got = decode_result(worker(shelf).handle(task)).vectors
    assert got.keys() == ({"stats"} if kind == "train" else {"bn_sum", "bn_sumsq", "bn_count"})


def test_a_training_device_can_be_asked_to_look_as_well(shelf):
    look = shelf.add_graph(observation()).model_dump(by_alias=True)
    result, update = answer(worker(shelf).handle(shelf.task("t1", [step()], look=look)))
    assert update == [-1, -2]  # as without
    assert {n: v.tolist() for n, v in result.vectors.items()} == {
        "stats": [1, 2],
        "scores": [3, 3],
        "sumsq": [2],
    }
    silent = shelf.task("t2", [step()], look=look, scores=False)
    assert decode_result(worker(shelf).handle(silent)).vectors.keys() == {"stats"}
    assert shelf.asked.count(shelf.add_graph(observation()).target) == 1


def test_what_a_training_device_looks_with_is_checked(shelf):
    ref = shelf.add_graph(step())
    task = shelf.task("t1", [step()], look=ref.model_dump(by_alias=True))
    with pytest.raises(
        GraphError, match=f"^{ref.target} is a graph of kind train_step, expected observe$"
    ):
        worker(shelf).handle(task)
    other = shelf.add_graph(observation(statistics=4)).model_dump(by_alias=True)
    task = shelf.task("t2", [step()], look=other)
    with pytest.raises(GraphError, match=r"^task t2: its graphs are of different shapes$"):
        worker(shelf).handle(task)


def test_graphs_that_score_units_differently_are_not_mixed(shelf):
    task = shelf.task("t1", [step(), step((3, 3), criterion="fisher")])
    with pytest.raises(GraphError, match=r"^task t1: its graphs are of different shapes$"):
        worker(shelf).handle(task)


def test_observing_leaves_the_residual_alone(shelf):
    w = worker(shelf)
    w.handle(shelf.task("t1", [step()], top_k=0.5))
    w.handle(shelf.task("t2", [observation()], kind="observe"))
    assert answer(w.handle(shelf.task("t3", [step()], top_k=0.5)))[1] == [-2, 0]


def test_a_graph_that_computes_wrong_numbers_gives_way_to_the_portable_one(shelf):
    fast, portable = wrong_expectation(step((5, 5))), step()
    refs = [shelf.add_graph(portable).model_dump(by_alias=True)]
    w = worker(shelf)
    assert answer(w.handle(shelf.task("t1", [fast], portable=refs)))[1] == [-1, -2]
    asked = shelf.asked.count(shelf.add_graph(fast).target)
    w.handle(shelf.task("t2", [fast], portable=refs))
    assert shelf.asked.count(shelf.add_graph(fast).target) == asked == 1  # the verdict stands
    with pytest.raises(GraphError, match="computes wrong numbers on this machine"):
        w.handle(shelf.task("t3", [fast]))


def test_refusals(shelf):
    train, watch = shelf.task("t1", [step()]), shelf.task("t2", [observation()], kind="observe")
    cases = [
        (
            worker(shelf),
            shelf.task("t3", [step()], device="d2"),
            MessageError,
            "task t3 is for device d2, this is d1",
        ),
        (
            worker(shelf, trains=False),
            train,
            DataError,
            "task t1 trains, but this device has trains = false",
        ),
        (
            worker(shelf, samples=samples(None)),
            train,
            DataError,
            "task t1 trains, but this device's data has no labels",
        ),
        (
            worker(shelf, samples=samples((0, 1, 2, 0))),
            train,
            DataError,
            "memory row 2: label 2, but the model has classes 0..1",
        ),
        (
            worker(shelf, samples=checked(np.zeros((1, 7)), [0], lambda i: f"row {i}", "m")),
            watch,
            DataError,
            "row 0: sample of shape (7,), but the model expects (1,)",
        ),
        (
            worker(shelf),
            shelf.task("t4", [observation()]),
            GraphError,
            f"{shelf.add_graph(observation()).target} is a graph of kind observe, "
            "expected train_step",
        ),
        (
            worker(shelf),
            shelf.task("t5", [step(), step(batch=4)]),
            GraphError,
            "task t5: its graphs are of different shapes",
        ),
        (
            worker(shelf),
            shelf.task("t6", [step()], mask_version=9),
            WireError,
            "model of mask version 1 and round 0, expected 9 and 0",
        ),
        (
            worker(shelf),
            shelf.task("t7", [step()], model=shelf.add_model([1, 2, 3], [4, 8])),
            WireError,
            "model of 3 parameters, expected 2",
        ),
    ]
    for w, task, error, message in cases:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            w.handle(task)
        assert w.answer(task.task) is None


def test_bytes_of_another_hash_are_refused(shelf):
    task = shelf.task("t1", [step()])
    honest = dict(shelf.blobs)
    shelf.blobs[task.graphs[0].target] = other = step((3, 3))
    got = hashlib.sha256(other).hexdigest()
    with pytest.raises(
        TrustError,
        match=f"^{task.graphs[0].target}: SHA-256 {got}, expected {task.graphs[0].sha256}$",
    ):
        worker(shelf).handle(task)
    shelf.blobs.update(honest)
    shelf.blobs[f"blobs/{task.model.sha256}"] = b"x"
    with pytest.raises(WireError, match=r"^model of 1 bytes with SHA-256 2d7116.*, expected"):
        worker(shelf).handle(task)


def test_graphs_on_disk_are_reused_checked_and_few(shelf, tmp_path):
    task = shelf.task("t1", [step()])
    target = task.graphs[0].target
    worker(shelf, graphs=Graphs(folder=tmp_path)).handle(task)
    worker(shelf, graphs=Graphs(folder=tmp_path)).handle(task)
    assert shelf.asked.count(target) == 1
    (tmp_path / f"{task.graphs[0].sha256}.onnx").write_bytes(b"damaged")
    worker(shelf, graphs=Graphs(folder=tmp_path)).handle(task)
    assert shelf.asked.count(target) == 2
    for i in range(KEPT_FILES):
        (tmp_path / f"{i}.onnx").write_bytes(b"old")
    worker(shelf, graphs=Graphs(folder=tmp_path)).handle(shelf.task("t2", [step((7, 7))]))
    assert len(list(tmp_path.glob("*.onnx"))) == KEPT_FILES


def test_the_task_s_seed_decides_order_and_rounding(shelf):
    def update(seed: int) -> bytes:
        task = shelf.task("t1", [step((1, 0.3)), step((0.4, 1))], codec="int4", seed=seed, epochs=9)
        return decode_result(worker(shelf).handle(task)).update

    assert update(1) == update(1)
    assert len({update(seed) for seed in range(6)}) > 1


def test_streams_are_those_of_one_spawned_seed(shelf):
    name = int.from_bytes(hashlib.blake2b(b"d1", digest_size=8).digest())
    task = shelf.task("t1", [step()], seed=5)
    assert task.device == "d1"
    spawned = [np.random.default_rng(s) for s in np.random.SeedSequence([5, name]).spawn(3)]
    assert [g.random() for g in streams(task)] == [g.random() for g in spawned]


def test_stopping_leaves_no_trace(shelf):
    store = InMemory()
    with pytest.raises(StoppedError):
        worker(shelf, store, stopped=lambda: True).handle(shelf.task("t1", [step()]))
    assert store.load().answers == {}


def test_a_loop_device_is_the_same_worker(shelf):
    task = shelf.task("t1", [step()])
    device = as_loop_device(worker(None))
    assert answer(device(task.to_bytes(), shelf.read))[1] == [-1, -2]
    name = task.graphs[0].sha256
    assert shelf.asked == [f"targets/graphs/{name}.{name}.onnx", f"blobs/{task.model.sha256}"]
    with pytest.raises(MessageError):
        device(b"{}", shelf.read)


def test_codecs_shrink_the_answer(shelf):
    sizes = []
    for codec in Codec:
        task = Task.model_validate(
            {**shelf.task("t1", [step()]).model_dump(by_alias=True), "codec": codec}
        )
        sizes.append(len(worker(shelf).handle(task)))
    assert sizes[0] > sizes[1]
