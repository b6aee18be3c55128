"""The step that measures ranges: what it asks, what it believes, and that it survives a kill."""

import numpy as np
import pytest

from fleetprune.messages import ResultHeader
from fleetprune.result import encode_result
from fleetprune_coordinator.config import PruningConfig
from fleetprune_coordinator.records import Phase
from fleetprune_coordinator.round_plan import RANGES, RoundKey
from fleetprune_coordinator.value_ranges import BINS, PER_TENSOR
from fleetprune_sim.loop import open_coordinator, train
from tests.simulations.fleets import tiny_config, tiny_devices

TENSORS = 3  # of an MLP: the input, what the ReLU makes, the logits
LAST = RoundKey(Phase.CALIBRATE, 1, RANGES)


class StopHereError(Exception):
    """Stands for a power cut."""


def config(folder):
    pruning = PruningConfig(int8="auto", channel_multiple=4)
    return tiny_config(folder, rounds=1, outlier=10).model_copy(update={"pruning": pruning})


@pytest.fixture
def waiting(tmp_path):
    """A coordinator that has only the ranges left to measure."""
    devices = tiny_devices()

    def stop(metrics):
        if metrics["phase"] == "calibrate":
            raise StopHereError

    with open_coordinator(config(tmp_path), devices) as coordinator:
        with pytest.raises(StopHereError):
            train(coordinator, devices, stop)
        assert coordinator.rounds.remaining() == [LAST]
        yield coordinator


def counts(place, tensors=TENSORS, side=0):
    table = np.zeros((tensors, 2, BINS), np.float32)
    table[:, side, place] = 5
    return table.ravel()


def answer(task, vectors):
    header = ResultHeader(
        task=task.task,
        device=task.device,
        kind=task.kind,
        round=task.round,
        mask_version=task.mask_version,
        samples=20,
    )
    return encode_result(header, vectors, None)


def tasks_of(coordinator, shape="large"):
    return [a.task for a in coordinator.rounds.begin() if a.task.shape == shape]


def test_ranges_are_those_of_the_devices(waiting):
    tasks = tasks_of(waiting)
    metrics = waiting.rounds.finish([answer(t, {"ranges": counts(64)}) for t in tasks])
    assert (metrics["answers"], metrics["refused"], metrics["step"]) == (2, 0, RANGES)
    assert list(waiting.rounds.ranges) == ["large"]
    np.testing.assert_allclose(waiting.rounds.ranges["large"], [[0, 2**0.25]] * TENSORS)
    assert waiting.rounds.remaining() == []


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (
            counts(64, tensors=2),
            f"ranges of shape ({2 * PER_TENSOR},), expected ({TENSORS * PER_TENSOR},)",
        ),
        (-counts(64), "ranges: -5.0, expected counts of at least 0"),
        (0 * counts(64), "ranges: tensor 0 has no values, expected some"),
    ],
)
def test_counts_that_cannot_be_are_refused(waiting, sent, message):
    liar, honest = tasks_of(waiting)
    answers = [answer(liar, {"ranges": sent}), answer(honest, {"ranges": counts(64)})]
    metrics = waiting.rounds.finish(answers)
    assert (metrics["answers"], metrics["refused"]) == (1, 1)
    assert [e.text for e in waiting.registry.events() if e.kind == "refused"] == [message]
    np.testing.assert_allclose(waiting.rounds.ranges["large"], [[0, 2**0.25]] * TENSORS)


def test_the_models_statistics_and_weights_stay(waiting):
    before = waiting.rounds.model
    (first, _) = tasks_of(waiting)
    waiting.rounds.finish([answer(first, {"ranges": counts(64), "sumsq": np.ones(3, np.float32)})])
    assert waiting.rounds.model is before


def test_a_round_without_answers_leaves_no_ranges(waiting):
    waiting.rounds.begin()
    waiting.rounds.finish([])
    assert waiting.rounds.ranges == {}
    assert waiting.rounds.remaining() == []


def test_counts_that_nobody_asked_for_are_left_unread(tmp_path):
    with open_coordinator(config(tmp_path), tiny_devices()) as coordinator:
        planned = coordinator.rounds.begin()
        assert planned[0].task.round == 1
        (task, *_) = [a.task for a in planned]
        observed = task.model_copy(update={"kind": "observe"})
        assert coordinator.rounds.finish([answer(observed, {"ranges": counts(64)})])["refused"] == 1
        assert coordinator.rounds.ranges == {}


def test_a_kill_in_the_last_step_and_behind_it(tmp_path):
    devices, seen = tiny_devices(), []
    with open_coordinator(config(tmp_path), devices) as coordinator:
        train(coordinator, devices, lambda m: seen.append((m["phase"], m["step"])))
        whole = coordinator.rounds.ranges
    assert seen == [("train", 0), ("calibrate", 1), ("calibrate", RANGES)]
    assert set(whole) == {"large", "small"}
    with open_coordinator(config(tmp_path), devices) as coordinator:
        assert coordinator.rounds.remaining() == []
        for name, ranges in whole.items():
            np.testing.assert_array_equal(coordinator.rounds.ranges[name], ranges)


def test_an_open_step_is_taken_up(waiting, tmp_path):
    asked = waiting.rounds.begin()
    waiting.registry.close()
    devices = tiny_devices()
    with open_coordinator(config(tmp_path), devices) as coordinator:
        assert coordinator.rounds.remaining() == [LAST]
        again = coordinator.rounds.begin()
        assert [a.task for a in again] == [a.task for a in asked]
        train(coordinator, devices)
        assert set(coordinator.rounds.ranges) == {"large", "small"}


def test_a_longer_training_measures_again(tmp_path):
    devices, seen = tiny_devices(), []
    with open_coordinator(config(tmp_path), devices) as coordinator:
        train(coordinator, devices)
    longer = config(tmp_path)
    training = longer.training.model_copy(update={"rounds": 2})
    longer = longer.model_copy(update={"training": training})
    with open_coordinator(longer, devices) as coordinator:
        train(coordinator, devices, lambda m: seen.append((m["phase"], m["round"], m["step"])))
    assert seen == [("train", 2, 0), ("calibrate", 2, 1), ("calibrate", 2, RANGES)]
