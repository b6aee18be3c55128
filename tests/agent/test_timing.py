import hashlib
from importlib.metadata import version

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from step_graphs import Shelf, step

from fleetprune.errors import DataError, GraphError, TrustError
from fleetprune.graphmeta import METADATA_KEY, GraphMeta, ReferenceInput, Verification
from fleetprune.messages import Blob, GraphRef, TaskKind
from fleetprune.result import decode_result
from fleetprune_agent.data import checked
from fleetprune_agent.feedback import InMemory
from fleetprune_agent.sessions import Graphs
from fleetprune_agent.timing import MOST_GRAPHS, RUNS, SWEEPS, WARM_UP, time_graphs
from fleetprune_agent.trainer import StoppedError
from fleetprune_agent.worker import Worker, WorkerSettings


def inference(width: int = 1) -> bytes:
    """y = x @ ones(1, width)."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(np.ones((1, width), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    meta = GraphMeta(kind="infer", verification=Verification(x=ReferenceInput(shape=(3, 1))))
    helper.set_model_props(model, {METADATA_KEY: meta.to_json()})
    return model.SerializeToString()


class Clock:
    """Gives each timed run the next of some durations; all else takes no time.

    A visit asks when it begins, before each warm-up run, and before, after and behind each run.
    """

    def __init__(self, durations: list[float], runs: int) -> None:
        self.durations, self.time, self.calls = iter(durations), 0.0, 0
        self.visit = 1 + WARM_UP + 3 * runs

    def __call__(self) -> float:
        place = self.calls % self.visit - 1 - WARM_UP
        self.calls += 1
        if place >= 0 and place % 3 == 1:
            self.time += next(self.durations)
        return self.time


def test_times_in_the_head():
    # Two graphs, three sweeps, three runs each: 1, 2 and 3 ms, and twice that.
    clock = Clock([0.001, 0.002, 0.003, 0.002, 0.004, 0.006] * 3, runs=3)
    timed = time_graphs([inference(), inference(2)], sweeps=3, runs=3, clock=clock)
    assert timed.median_ms.tolist() == pytest.approx([2, 4])
    assert timed.spread_ms.tolist() == pytest.approx([2, 4])  # 1 to 3: a third of runs each
    assert timed.runs == 18
    assert timed.median_ms.dtype == timed.spread_ms.dtype == np.float32


def test_a_sweep_at_another_speed_changes_nothing():
    once = [0.001, 0.003]
    slow = [10 * seconds for seconds in once]
    for order in ([once, once, slow], [slow, once, once], [once, slow, once]):
        clock = Clock([seconds for sweep in order for seconds in sweep], runs=1)
        timed = time_graphs([inference(), inference(2)], sweeps=3, runs=1, clock=clock)
        assert timed.median_ms.tolist() == pytest.approx([1, 3])
        assert timed.spread_ms.tolist() == pytest.approx([0, 0], abs=1e-6)


def test_a_slow_graph_is_left_for_the_next_one():
    clock = Clock([0.6, 0.6, 0.6, 0.6], runs=2)  # over a second after two of a hundred runs
    assert time_graphs([inference()], sweeps=2, runs=100, clock=clock).runs == 4


def test_a_clock_that_sees_no_time_pass():
    timed = time_graphs([inference()], sweeps=1, runs=2, clock=lambda: 5.0)
    assert timed.median_ms.tolist() == pytest.approx([1e-6])


def test_real_time():
    timed = time_graphs([inference(), inference(1000)])
    assert timed.runs == 2 * SWEEPS * RUNS
    assert (timed.median_ms > 0).all()
    assert (timed.spread_ms >= 0).all()


def test_only_inference_is_timed():
    with pytest.raises(GraphError) as e:
        time_graphs([step()], sweeps=1, runs=1)
    assert str(e.value) == "a graph of kind train_step is to be timed, expected infer"


# ---- as a task


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def worker(shelf: Shelf, **changes) -> Worker:
    samples = checked(np.zeros((4, 7)), [0] * 4, lambda i: f"memory row {i}", "memory")
    settings = WorkerSettings("d1", trains=False, **changes.pop("settings", {}))
    return Worker(settings, samples, Graphs(), InMemory(), source=shelf, **changes)


def timing(shelf: Shelf, *graphs: bytes, **fields):
    empty = Blob.of(b"")
    return shelf.task("t1", graphs, kind=TaskKind.TIME, model=empty, max_steps=2, **fields)


def test_any_device_times(shelf):
    w = worker(shelf)
    task = timing(shelf, inference(), inference(2), epochs=3)
    result = decode_result(w.handle(task))
    assert result.update is None
    assert result.vectors.keys() == {"median_ms", "spread_ms"}
    assert [v.shape for v in result.vectors.values()] == [(2,), (2,)]
    header = result.header
    assert (header.kind, header.steps, header.samples) == (TaskKind.TIME, 12, 4)
    assert (header.runtime, header.runtime_version) == ("onnxruntime", version("onnxruntime"))
    assert w.handle(task) == w.answer("t1")  # a second time it is not measured again
    assert shelf.asked == [ref.target for ref in task.graphs]  # and there is no model to fetch


def test_a_timing_task_has_only_so_much_time(shelf):
    w = worker(shelf, settings={"max_task_s": 5}, clock=iter(range(1000)).__next__)
    with pytest.raises(DataError, match=r"^task t1 takes longer than max_task_s = 5$"):
        w.handle(timing(shelf, inference(), epochs=10**9))
    assert w.answer("t1") is None


def test_stopping_leaves_no_trace(shelf):
    w = worker(shelf, stopped=lambda: True)
    with pytest.raises(StoppedError):
        w.handle(timing(shelf, inference()))
    assert w.answer("t1") is None


def test_a_graph_with_another_hash(shelf):
    task = timing(shelf, inference())
    wrong = GraphRef(target=task.graphs[0].target, sha256="0" * 64)
    with pytest.raises(TrustError) as e:
        worker(shelf).handle(task.model_copy(update={"graphs": (wrong,)}))
    got = hashlib.sha256(inference()).hexdigest()
    assert str(e.value) == f"{wrong.target}: SHA-256 {got}, expected {'0' * 64}"


def test_too_many_graphs(shelf):
    task = timing(shelf, *[inference()] * (MOST_GRAPHS + 1))
    with pytest.raises(DataError, match=r"^task t1 times 65 graphs, expected at most 64$"):
        worker(shelf).handle(task)
