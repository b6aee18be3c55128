"""A class's own devices time shapes before training, and what they measured decides."""

import logging

import numpy as np
import onnx
import pytest

from fleetprune.errors import BudgetError
from fleetprune.latency import LatencyModel, Precision
from fleetprune.messages import ResultHeader, TaskKind
from fleetprune.result import encode_result
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.records import Phase
from fleetprune_coordinator.round_plan import RoundKey
from fleetprune_coordinator.timing import digest
from fleetprune_sim.loop import open_coordinator, train
from tests.simulations.fleets import tiny_config, tiny_devices

FLOAT, INT8 = Precision.FLOAT32, Precision.INT8


def config(folder, latency_ms, int8=False, **training) -> FleetConfig:
    """The tiny fleet; its smaller class has a limit of latency instead of one of MACs."""
    made = tiny_config(folder, rounds=1, **training).model_dump()
    made["classes"]["small"] = {"latency_ms": latency_ms}
    made["model"]["arguments"] = {"inputs": 6, "hidden": 64, "classes": 3}
    made["pruning"]["int8"] = int8
    return FleetConfig.model_validate(made)


def times(asked, milliseconds, **header):
    """A device's answer: so many milliseconds per shape."""
    fields = {
        "task": asked.task,
        "device": asked.device,
        "kind": TaskKind.TIME,
        "round": 0,
        "mask_version": asked.mask_version,
        "samples": 1,
        "runtime": "onnxruntime",
        "runtime_version": "1.0",
        **header,
    }
    values = np.asarray(milliseconds, np.float32)
    sections = {"median_ms": values, "spread_ms": np.zeros_like(values)}
    return encode_result(ResultHeader(**fields), sections, None)


def linear(coordinator, task):
    """What takes a millisecond, and a tenth of one for each unit."""
    shapes = coordinator.rounds._timing._shapes(task.shape)
    return [1.0 + 0.1 * keep["0"] for keep in shapes]


def test_only_devices_of_classes_with_the_limit_are_asked_and_their_word_decides(tmp_path):
    with open_coordinator(config(tmp_path, 4.3), tiny_devices()) as coordinator:
        rounds = coordinator.rounds
        assert rounds.model.shapes["small"] == {"0": 64}
        assert rounds.remaining()[0] == RoundKey(Phase.TIME, 0)
        asked = [a.task for a in rounds.begin()]
        assert [(t.device, t.kind) for t in asked] == [
            ("d2", TaskKind.TIME),
            ("d3", TaskKind.TIME),
        ]
    # Killed here: the same is asked again, and the answers of before would be as good.
    with open_coordinator(config(tmp_path, 4.3), tiny_devices()) as coordinator:
        rounds = coordinator.rounds
        assert [a.task for a in rounds.begin()] == asked
        metrics = rounds.finish([times(t, linear(coordinator, t)) for t in asked])
        assert (metrics["answers"], metrics["timed"]) == (2, ["small"])
        assert rounds.model.shapes == {"large": {"0": 64}, "small": {"0": 32}}  # 4.2 of 4.3 ms
        assert rounds.remaining()[0] == RoundKey(Phase.TRAIN, 1)
    with open_coordinator(config(tmp_path, 4.3), tiny_devices()) as coordinator:
        assert coordinator.rounds.remaining()[0] == RoundKey(Phase.TRAIN, 1)
        assert coordinator.rounds.model.shapes["small"] == {"0": 32}


def timed_operators(coordinator) -> list[set[str]]:
    """What is in each of the graphs that the open round has devices time."""
    (asked, _) = coordinator.rounds.begin()
    found = []
    for ref in asked.task.graphs:
        folder, _, name = ref.target.rpartition("/")
        file = coordinator.read(f"targets/{folder}/{ref.sha256}.{name}").read_bytes()
        found.append({node.op_type for node in onnx.load_from_string(file).graph.node})
    return found


@pytest.mark.parametrize(("int8", "precision"), [(False, FLOAT), ("auto", FLOAT), (True, INT8)])
def test_real_devices_time_real_graphs_of_what_ships(tmp_path, int8, precision):
    with open_coordinator(config(tmp_path, 1000.0, int8), tiny_devices()) as coordinator:
        for operators in timed_operators(coordinator):
            assert "Gemm" in operators
            assert ("QuantizeLinear" in operators) == (precision is INT8)
        train(coordinator, tiny_devices())
        architecture = coordinator.architecture
        (other,) = {FLOAT, INT8} - {precision}
        assert coordinator.registry.latency("small", digest(architecture), other) is None
        table = coordinator.registry.latency("small", digest(architecture), precision)
        assert table is not None
        assert (table.runtime, table.devices) == ("onnxruntime", 2)
        assert LatencyModel.fit(architecture, table).at_most({"0": 64}) < 1000
        assert coordinator.release()["small"].manifest.max_latency_ms == 1000


def test_a_fleet_that_comes_to_ship_int8_is_asked_again(tmp_path):
    """What was asked in float32 is taken in as that, though int8 is wanted when answers come."""
    with open_coordinator(config(tmp_path, 4.3), tiny_devices()) as coordinator:
        first = [a.task for a in coordinator.rounds.begin()]
    with open_coordinator(config(tmp_path, 4.3, int8=True), tiny_devices()) as coordinator:
        rounds, name = coordinator.rounds, digest(coordinator.architecture)
        assert [a.task for a in rounds.begin()] == first
        rounds.finish([times(t, linear(coordinator, t)) for t in first])
        assert coordinator.registry.latency("small", name, INT8) is None
        assert rounds.model.shapes["small"] == {"0": 64}
        assert rounds.remaining()[0] == RoundKey(Phase.TIME, 0, 1)
        second = [a.task for a in rounds.begin()]
        assert not {t.task for t in first} & {t.task for t in second}
        halves = [[ms / 2 for ms in linear(coordinator, t)] for t in second]
        rounds.finish([times(t, ms) for t, ms in zip(second, halves, strict=True)])
        assert rounds.model.shapes["small"] == {"0": 64}  # 7.4 / 2 of 4.3 ms
        assert rounds.remaining()[0] == RoundKey(Phase.TRAIN, 1)
    with open_coordinator(config(tmp_path, 4.3), tiny_devices()) as coordinator:
        assert coordinator.rounds.remaining()[0] == RoundKey(Phase.TRAIN, 1)
        assert coordinator.rounds.model.shapes["small"] == {"0": 32}  # by what is known of float32


def test_an_unreachable_limit_is_refused_once_it_is_known_to_be(tmp_path):
    with open_coordinator(config(tmp_path, 0.5), tiny_devices()) as coordinator:
        asked = [a.task for a in coordinator.rounds.begin()]
        with pytest.raises(BudgetError, match=r"class small: latency_ms 0\.5"):
            coordinator.rounds.finish([times(t, linear(coordinator, t)) for t in asked])
    with pytest.raises(BudgetError, match=r"class small: latency_ms 0\.5"):
        open_coordinator(config(tmp_path, 0.5), tiny_devices())
    # What was measured is kept: with a limit that can be met, nobody is asked again.
    with open_coordinator(config(tmp_path, 4.3), tiny_devices()) as coordinator:
        assert coordinator.rounds.remaining()[0] == RoundKey(Phase.TRAIN, 1)
        assert coordinator.rounds.model.shapes["small"] == {"0": 32}


def test_where_nobody_answers_training_goes_on_without(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    with open_coordinator(config(tmp_path, 4.3), tiny_devices()) as coordinator:
        coordinator.rounds.begin()
        coordinator.rounds.finish([])
        assert coordinator.rounds.remaining()[0] == RoundKey(Phase.TRAIN, 1)
        assert coordinator.rounds.model.shapes["small"] == {"0": 64}
    assert "class small: nobody has measured how long models take" in caplog.text


def test_answers_that_are_none_are_refused(tmp_path):
    with open_coordinator(config(tmp_path, 4.3), tiny_devices()) as coordinator:
        first, second = [a.task for a in coordinator.rounds.begin()]
        good = linear(coordinator, first)
        bad = [
            times(first, good, task="another"),
            times(first, good, device="d3"),
            times(first, good[:-1]),
            times(first, [*good[:-1], -1.0]),
            times(first, good, runtime=""),
            b"nothing",
        ]
        metrics = coordinator.rounds.finish([*bad, times(second, good), times(second, good)])
        assert (metrics["answers"], metrics["refused"]) == (1, 7)
        assert coordinator.rounds.model.shapes["small"] == {"0": 32}


def test_a_fleet_without_limits_of_latency_is_not_asked(tmp_path):
    with open_coordinator(tiny_config(tmp_path), tiny_devices()) as coordinator:
        assert coordinator.rounds.remaining()[0] == RoundKey(Phase.TRAIN, 1)
