import numpy as np
import pytest

from fleetprune.budgets import Grid
from fleetprune.errors import MessageError
from fleetprune.latency import LatencyModel, Precision
from fleetprune.messages import GraphRef, ResultHeader, TaskKind
from fleetprune.result import Result
from fleetprune_coordinator.records import DeviceRecord
from fleetprune_coordinator.timing import (
    MIXED,
    MOST_SHAPES,
    Answer,
    digest,
    read_times,
    shapes_to_time,
    tables,
    timers,
    timing_task,
)
from tests.shared.chains import axis, pair, weight

NET = pair()
GRID = Grid.of(NET.groups, 8)


def test_uniform_shares_come_first_then_single_changes_of_the_costliest_groups():
    shapes = shapes_to_time(NET, GRID)
    assert shapes[:6] == [
        {"a": 32, "b": 64},
        {"a": 24, "b": 48},
        {"a": 16, "b": 32},
        {"a": 8, "b": 24},
        {"a": 8, "b": 16},
        {"a": 8, "b": 8},
    ]
    assert shapes[6:8] == [{"a": 32, "b": 8}, {"a": 8, "b": 64}]  # an eighth, a quarter is left


def test_all_shapes_are_different_on_the_grid_and_always_the_same():
    shapes = shapes_to_time(NET, GRID)
    assert len(shapes) == MOST_SHAPES
    assert all(keep[g] in GRID.levels[g] for keep in shapes for g in keep)
    assert len({tuple(keep.values()) for keep in shapes}) == len(shapes)
    assert shapes == shapes_to_time(NET, GRID)


def test_a_model_of_many_groups_is_not_timed_group_by_group():
    groups = {f"g{i}": 16 for i in range(40)}
    layers = [
        weight(g, axis(16, g), axis(16, before))
        for before, g in zip(groups, [*groups][1:], strict=False)
    ]
    net = NET.model_copy(
        update={"groups": groups, "tensors": tuple(layers), "activations": (), "live": ()}
    )
    shapes = shapes_to_time(net, Grid.of(groups, 8))
    assert len(shapes) == MOST_SHAPES
    changed = [sum(n == 8 for n in keep.values()) for keep in shapes]
    assert sum(1 < n < 39 for n in changed) >= MIXED


def test_a_model_with_few_shapes():
    net = pair(8, 16)
    assert shapes_to_time(net, Grid.of(net.groups, 8)) == [{"a": 8, "b": 16}, {"a": 8, "b": 8}]


def test_the_model_is_named_without_its_overhead():
    assert digest(NET) == digest(NET.model_copy(update={"overhead_bytes": 5}))
    assert digest(NET) != digest(pair(32, 63))
    assert len(digest(NET)) == 64


def test_a_task():
    refs = [GraphRef(target=f"graphs/{i}.onnx", sha256=str(i) * 64) for i in range(3)]
    task = timing_task("run.l0.0.2.0", "d1", "phone", refs, sweeps=5, runs=20)
    assert (task.kind, task.shape, task.device) == (TaskKind.TIME, "phone", "d1")
    assert (task.epochs, task.max_steps) == (5, 20)
    assert task.graphs == tuple(refs)
    assert task.model.size == 0


def test_three_devices_of_each_class_time_it():
    def record(number, device_class, online=True):
        figures = {"samples": 1, "block": 0, "agent_version": "", "rss_mb": 0.0}
        return DeviceRecord(
            id=number,
            name=f"d{number}",
            device_class=device_class,
            trains=False,
            enrolled_at=0.0,
            last_seen=0.0,
            online=online,
            **figures,
        )

    devices = [record(n, "phone", online=n != 3) for n in (6, 5, 4, 3, 2)]
    devices += [record(7, "sensor"), record(8, "hub")]
    assert [d.id for d in timers(devices, {"phone", "sensor"})] == [2, 4, 5, 7]
    assert timers(devices, set()) == []


# ---- answers


def result(medians=(1.0, 2.0), spreads=(0.1, 0.2), **header) -> Result:
    fields = {"runtime": "onnxruntime", "runtime_version": "1.32.0", **header}
    head = ResultHeader(
        task="t1", device="d1", kind=TaskKind.TIME, round=0, mask_version=0, samples=1, **fields
    )
    vectors = {"median_ms": np.float32(medians), "spread_ms": np.float32(spreads)}
    return Result(head, None, {n: v for n, v in vectors.items() if v.size})


def test_an_answer_is_read():
    answer = read_times(result(), 2)
    assert (answer.runtime, answer.version) == ("onnxruntime", "1.32.0")
    assert answer.median_ms == (1.0, 2.0)
    assert answer.spread_ms == pytest.approx((0.1, 0.2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"runtime": ""}, "answer to t1 does not say which runtime measured"),
        ({"medians": ()}, "answer to t1 has no values of median_ms, expected 2"),
        ({"spreads": (1, 2, 3)}, "answer to t1 has 3 values of spread_ms, expected 2"),
        (
            {"medians": (0, 2)},
            "answer to t1: 0 to 2 ms, expected more than 0 and at most 600000",
        ),
        (
            {"medians": (1, 7e5)},
            "answer to t1: 1 to 700000 ms, expected more than 0 and at most 600000",
        ),
        ({"spreads": (1, -2)}, "answer to t1: a spread of -2 ms, expected at least 0"),
    ],
)
def test_answers_that_are_none(wrong, message):
    with pytest.raises(MessageError) as e:
        read_times(result(**wrong), 2)
    assert str(e.value) == message


def test_a_table_per_runtime_and_version_has_the_median_of_its_devices():
    shapes = [{"a": 32}, {"a": 8}]
    answers = [
        Answer("r", "2", (4.0, 2.0), (0.4, 0.2)),
        Answer("r", "2", (6.0, 1.0), (0.6, 0.1)),
        Answer("r", "2", (90.0, 3.0), (0.5, 0.3)),
        Answer("r", "1", (8.0, 7.0), (0.8, 0.7)),
    ]
    old, new = tables("phone", Precision.INT8, shapes, answers)
    assert (old.version, old.devices) == ("1", 1)
    assert old.precision is new.precision is Precision.INT8
    assert (new.device_class, new.runtime, new.version, new.devices) == ("phone", "r", "2", 3)
    assert [p.keep for p in new.points] == shapes
    assert [p.median_ms for p in new.points] == [6.0, 2.0]
    assert [p.spread_ms for p in new.points] == [0.5, 0.2]
    assert tables("phone", Precision.INT8, shapes, []) == []


def test_the_tables_shapes_are_enough_for_a_model():
    shapes = shapes_to_time(NET, GRID)
    took = [0.5 + keep["a"] * keep["b"] / 1000 for keep in shapes]
    answer = Answer("r", "1", tuple(took), (0.0,) * len(took))
    (table,) = tables("phone", Precision.FLOAT32, shapes, [answer])
    model = LatencyModel.fit(NET, table)
    assert model.error < 1e-6
    assert model.predict({"a": 20, "b": 20}) == pytest.approx(0.9)
