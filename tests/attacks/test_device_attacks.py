"""What one device that lies well-formedly can do to a training: little, and never end it."""

import json

import numpy as np
import pytest

from fleetprune.criteria import Criterion
from fleetprune.errors import MessageError
from fleetprune.frame import encode_frame
from fleetprune.messages import Enrol, ResultHeader, TaskKind
from fleetprune.result import encode_result
from fleetprune_coordinator.bounds import Bounds
from fleetprune_coordinator.ledger import MOST
from fleetprune_sim.loop import open_coordinator
from tests.coordinator.test_rounds import answer, refusals, size, weights
from tests.simulations.fleets import tiny_config, tiny_devices

LARGEST = float(np.finfo(np.float32).max)
TOO_MANY = 10**400  # valid JSON, but no number of numpy's or SQLite's


@pytest.fixture
def coordinator(tmp_path):
    with open_coordinator(tiny_config(tmp_path), tiny_devices()) as opened:
        yield opened


def tasks(coordinator, kind):
    """The tasks of the next round of that kind."""
    while True:
        found = [a.task for a in coordinator.rounds.begin()]
        if found[0].kind is kind:
            return found
        nothing = np.zeros(size(coordinator, found[0]), np.float32)
        coordinator.rounds.finish([answer(coordinator, found[0], values=nothing)])


def raw(task, **fields):
    """An answer without sections whose header nobody has checked."""
    header = ResultHeader(
        task=task.task,
        device=task.device,
        kind=task.kind,
        round=task.round,
        mask_version=task.mask_version,
        samples=20,
    )
    changed = {**json.loads(header.to_bytes()), **fields}
    return encode_frame("RSLT", json.dumps(changed).encode(), {})


@pytest.mark.parametrize("field", ["samples", "steps", "correct", "round", "mask_version"])
def test_counts_that_no_machine_holds_are_refused(coordinator, field):
    (task, *_) = tasks(coordinator, TaskKind.OBSERVE)
    metrics = coordinator.rounds.finish([raw(task, **{field: TOO_MANY})])
    assert metrics["answers"] == 0
    assert refusals(coordinator) == [
        f"ResultHeader: {field}: Input should be less than or equal to 4294967295"
    ]


def test_a_loss_that_no_float_can_sum_is_refused(coordinator):
    (task, *_) = tasks(coordinator, TaskKind.TRAIN)
    metrics = coordinator.rounds.finish([raw(task, loss=1.7e308)])
    assert (metrics["answers"], metrics["loss"]) == (0, None)
    assert refusals(coordinator) == [
        f"ResultHeader: loss: Input should be less than or equal to 34{37 * '0'}"
    ]


def test_an_enrolment_with_too_many_samples_is_refused():
    enrol = Enrol(device="d1", device_class="a", agent_version="1", trains=True, samples=1)
    data = enrol.to_bytes().replace(b'"samples":1', b'"samples":%d' % 2**63)
    message = "^Enrol: samples: Input should be less than or equal to 4294967295$"
    with pytest.raises(MessageError, match=message):
        Enrol.from_bytes(data)


@pytest.mark.parametrize("sent", [["bn_sum"], ["bn_sumsq", "bn_count"]])
def test_statistics_that_are_not_whole_are_refused(coordinator, sent):
    (task, *_) = tasks(coordinator, TaskKind.OBSERVE)
    header = ResultHeader.from_bytes(
        raw(task)[16:-4]  # head of the frame, no table, checksum
    )
    data = encode_result(header, {name: np.ones(4, np.float32) for name in sent}, None)
    metrics = coordinator.rounds.finish([data])
    assert (metrics["answers"], metrics["refused"]) == (0, 1)
    assert refusals(coordinator) == [
        f"answer to {task.task} has {len(sent)} of the sections bn_sum, bn_sumsq, bn_count"
    ]


def test_an_answer_that_is_refused_leaves_no_scores(coordinator):
    (task, *_) = tasks(coordinator, TaskKind.TRAIN)
    units = sum(coordinator.rounds.model.shapes[task.shape].values())
    vectors = {"scores": np.ones(units, np.float32), "stats": np.ones(1, np.float32)}
    coordinator.rounds.finish([answer(coordinator, task, vectors=vectors)])
    assert refusals(coordinator) == ["statistics of shape (1,), expected (0,)"]
    assert coordinator.rounds.ledger.arrays() == {}


def test_one_device_cannot_drown_the_others(coordinator):
    first, liar, *others = tasks(coordinator, TaskKind.TRAIN)
    assert first.shape == liar.shape

    def answers(asked, worst):
        small = {t.task: np.full(size(coordinator, t), 0.01, np.float32) for t in asked}
        small[asked[1].task][:] = worst
        return [answer(coordinator, t, values=small[t.task]) for t in asked]

    coordinator.rounds.finish(answers([first, liar, *others], 0.01))
    before = weights(coordinator)
    coordinator.rounds.finish(answers(tasks(coordinator, TaskKind.TRAIN), -LARGEST))
    moved = [np.abs(coordinator.rounds.model.params[n] - v).max() for n, v in before.items()]
    assert max(moved) < 10 * 0.01


def test_in_the_first_round_no_update_is_longer_than_the_model(coordinator):
    (task, *_) = tasks(coordinator, TaskKind.TRAIN)
    start, _ = coordinator.rounds.model.vectors(coordinator.architecture, task.shape)
    values = np.full(size(coordinator, task), LARGEST, np.float32)
    coordinator.rounds.finish([answer(coordinator, task, values=values)])
    after, _ = coordinator.rounds.model.vectors(coordinator.architecture, task.shape)
    assert np.linalg.norm(after - start) == pytest.approx(np.linalg.norm(start), rel=1e-5)


def test_the_norms_survive_a_restart(tmp_path):
    config, devices = tiny_config(tmp_path), tiny_devices()
    with open_coordinator(config, devices) as opened:
        asked = tasks(opened, TaskKind.TRAIN)
        few = [answer(opened, t, values=np.full(size(opened, t), 0.01, np.float32)) for t in asked]
        opened.rounds.finish(few)
    with open_coordinator(config, devices) as opened:
        before = weights(opened)
        (task, *_) = tasks(opened, TaskKind.TRAIN)
        values = np.full(size(opened, task), LARGEST, np.float32)
        opened.rounds.finish([answer(opened, task, values=values)])
        for name, old in before.items():
            np.testing.assert_allclose(opened.rounds.model.params[name] - old, 0.1, rtol=1e-3)


def test_values_that_add_up_to_infinity_leave_the_model(tmp_path):
    with open_coordinator(tiny_config(tmp_path, outlier=0), tiny_devices()) as opened:
        for _ in range(2):
            before = weights(opened)
            (task, *_) = tasks(opened, TaskKind.TRAIN)
            values = np.full(size(opened, task), LARGEST, np.float32)
            opened.rounds.finish([answer(opened, task, values=values)])
        for name, old in before.items():
            np.testing.assert_array_equal(opened.rounds.model.params[name], old)
        assert refusals(opened) == [
            "a round's answers add up to values that are not finite; the model stays"
        ]
        assert opened.rounds.begin()  # the training goes on


def test_a_score_has_a_largest_value(coordinator):
    ledger, shapes = coordinator.rounds.ledger, coordinator.rounds.model.shapes
    (group,) = shapes["large"]
    scores = np.full(shapes["large"][group], LARGEST, np.float32)
    scores[: shapes["small"][group]] = 1e-38
    ledger.add_scores(Criterion.TAYLOR, shapes["large"], scores, 1, 20)
    ledger.close_round()
    assert ledger.arrays()[f"scores/taylor/{group}"].max() == MOST


def test_a_weight_is_bounded_by_the_median_device():
    assert Bounds(10, [20, 30, 2**32 - 1]).weight(2**32 - 1) == 300
    assert Bounds(10, [20, 2**32 - 1]).weight(2**32 - 1) == 200
    assert Bounds(10, [0, 0]).weight(2**32 - 1) == 10
    assert Bounds(10, [20, 30]).weight(25) == 25
    assert Bounds(0, [20, 30]).weight(10**6) == 10**6


def test_a_norm_is_bounded_by_the_median_of_the_round_before():
    bounds = Bounds(10, [1], {"a": 0.2}, {"a": 50.0, "b": 4.0, "c": 0.0})
    long = np.array([0, 3e38, 3e38], np.float32)
    assert np.linalg.norm(bounds.update("a", long)) == pytest.approx(2)
    assert np.linalg.norm(bounds.update("b", long)) == pytest.approx(4)
    assert bounds.update("c", long) is long  # a model of zeros says nothing
    short = np.array([0, 1, 0], np.float32)
    assert bounds.update("a", short) is short
    assert bounds.cut == 2
    assert bounds.norms() == {"a": 1, "b": 4, "c": pytest.approx(3e38 * 2**0.5)}
    assert Bounds(0, [1], {"a": 0.2}, {"a": 1.0}).update("a", long) is long


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ({"device": "d1"}, "says device, kind, round, mask version "),
        ({"mask_version": 7}, "says device, kind, round, mask version "),
        ({"round": 9}, "says device, kind, round, mask version "),
    ],
    ids=["another device", "another mask", "another round"],
)
def test_an_answer_to_something_else_moves_nothing(coordinator, lie, said):
    (task, *_) = [t for t in tasks(coordinator, TaskKind.TRAIN) if t.device != "d1"]
    before = weights(coordinator)
    metrics = coordinator.rounds.finish([answer(coordinator, task, **lie)])
    assert metrics["answers"] == 0
    (refusal,) = refusals(coordinator)
    assert said in refusal
    assert all(np.array_equal(before[n], v) for n, v in weights(coordinator).items())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_no_number_moves_nothing(coordinator, monkeypatch, value):
    (task, *_) = tasks(coordinator, TaskKind.TRAIN)
    values = np.ones(size(coordinator, task), np.float32)
    values[3] = value
    before = weights(coordinator)
    with monkeypatch.context() as patch:  # an attacker's encoder does not look
        for module in ("values", "update"):
            patch.setattr(f"fleetprune.{module}.check_vector", lambda *_: None)
        poisoned = answer(coordinator, task, values=values)
    metrics = coordinator.rounds.finish([poisoned])
    assert metrics["answers"] == 0
    (refusal,) = refusals(coordinator)
    assert "not finite" in refusal or "finite numbers" in refusal
    assert all(np.array_equal(before[n], v) for n, v in weights(coordinator).items())
