import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlite_utils import Database

from fleetprune.errors import RegistryError
from fleetprune.latency import LatencyPoint, LatencyTable, Precision
from fleetprune_coordinator.migrations import migrations
from fleetprune_coordinator.registry import Registry
from fleetprune_coordinator.store import DATABASE

ONE, OTHER = "1" * 64, "2" * 64
FLOAT, INT8 = Precision.FLOAT32, Precision.INT8


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        self.time += 1
        return self.time


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path, Clock()) as opened:
        opened.set_classes({"phone": True, "sensor": False})
        yield opened


def table(
    version: str = "1.0",
    device_class: str = "phone",
    ms: float = 2.5,
    precision: Precision = FLOAT,
) -> LatencyTable:
    points = (
        LatencyPoint(keep={"a": 8, "b.0": 16}, median_ms=ms, spread_ms=0.5),
        LatencyPoint(keep={"a": 4, "b.0": 8}, median_ms=ms / 2),
    )
    return LatencyTable(
        device_class=device_class,
        runtime="onnxruntime",
        version=version,
        precision=precision,
        devices=3,
        points=points,
    )


def test_a_table_is_kept_as_it_is(registry: Registry) -> None:
    assert registry.latency("phone", ONE, FLOAT) is None
    registry.set_latency(table(), ONE)
    assert registry.latency("phone", ONE, FLOAT) == table()
    assert registry.latency("sensor", ONE, FLOAT) is None


def test_a_newer_measurement_replaces_the_older(registry: Registry) -> None:
    registry.set_latency(table(ms=2.5), ONE)
    registry.set_latency(table(ms=3.0), ONE)
    assert registry.latencies() == [table(ms=3.0)]


def test_the_newest_of_several_versions_counts(registry: Registry) -> None:
    for version in ("1.9", "1.10", "1.8"):
        registry.set_latency(table(version), ONE)
    newest = registry.latency("phone", ONE, FLOAT)
    assert newest is not None
    assert newest.version == "1.8"  # the last that was measured, whatever it is called
    assert [t.version for t in registry.latencies()] == ["1.10", "1.8", "1.9"]


def test_another_models_table_does_not_count(registry: Registry) -> None:
    registry.set_latency(table("1.0"), ONE)
    assert registry.latency("phone", OTHER, FLOAT) is None
    registry.set_latency(table("1.0"), OTHER)  # takes its place
    assert registry.latency("phone", ONE, FLOAT) is None


def test_float32_and_int8_are_tables_of_their_own(registry: Registry) -> None:
    registry.set_latency(table(ms=2.5), ONE)
    assert registry.latency("phone", ONE, INT8) is None
    registry.set_latency(table(ms=1.0, precision=INT8), ONE)
    assert registry.latency("phone", ONE, FLOAT) == table(ms=2.5)
    assert registry.latency("phone", ONE, INT8) == table(ms=1.0, precision=INT8)
    assert registry.latencies() == [table(ms=2.5), table(ms=1.0, precision=INT8)]


def test_tables_from_before_there_was_int8_are_of_float32(tmp_path: Path) -> None:
    """A registry whose last migration is `m0005_latencies`."""
    db = Database(tmp_path / DATABASE)
    migrations.apply(db, stop_before="m0006_precision")
    db.table("classes").insert({"name": "phone", "trains": 1, "active": 1})
    key = {"class": "phone", "runtime": "onnxruntime", "version": "1.0"}
    db.table("latency_tables").insert(key | {"model": ONE, "devices": 3, "measured_at": 1.0})
    for point in table().points:
        times = {"median_ms": point.median_ms, "spread_ms": point.spread_ms}
        db.table("latency_points").insert(key | {"keep": json.dumps(point.keep)} | times)
    db.close()
    with Registry.open(tmp_path, Clock()) as registry:
        assert registry.latency("phone", ONE, FLOAT) == table()
        assert registry.latency("phone", ONE, INT8) is None
        registry.set_latency(table(ms=1.0, precision=INT8), ONE)
        assert registry.latency("phone", ONE, FLOAT) == table()
    with pytest.raises(RegistryError), Registry.open(tmp_path, Clock()) as registry:
        registry.set_latency(table(device_class="watch"), ONE)  # the class still has to be there


def test_an_unknown_class_is_refused_and_leaves_nothing(registry: Registry) -> None:
    with pytest.raises(RegistryError, match=r"FOREIGN KEY constraint failed$"):
        registry.set_latency(table(device_class="watch"), ONE)
    assert registry.latencies() == []
    assert registry.query("SELECT count(*) AS n FROM latency_points") == [{"n": 0}]
