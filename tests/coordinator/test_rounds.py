"""Answers that lie, repeat or do not fit change nothing."""

import time

import numpy as np
import pytest
import torch

from fleetprune.errors import TransportError
from fleetprune.layout import FlatLayout, Role
from fleetprune.messages import Codec, ResultHeader, TaskKind
from fleetprune.result import encode_result
from fleetprune.update import SparseUpdate
from fleetprune_coordinator.coordinator import Coordinator
from fleetprune_coordinator.events import EventLog
from fleetprune_coordinator.records import Phase
from fleetprune_coordinator.round_plan import RoundKey
from fleetprune_sim.loop import open_coordinator
from fleetprune_sim.models import mlp
from tests.simulations.fleets import tiny_config, tiny_devices


@pytest.fixture
def coordinator(tmp_path):
    with open_coordinator(tiny_config(tmp_path, outlier=0), tiny_devices()) as opened:
        yield opened


def size(coordinator, task):
    return coordinator.rounds.model.vectors(coordinator.architecture, task.shape)[0].size


def answer(coordinator, task, /, *, values=None, update=None, vectors=None, **header):
    """A well-formed answer to a training task, but for what is given."""
    if update is None:
        if values is None:
            values = np.ones(size(coordinator, task), np.float32)
        update = SparseUpdate(task.mask_version, values.size, values, None).encode(Codec.FP32)
    fields = {
        "task": task.task,
        "device": task.device,
        "kind": task.kind,
        "round": task.round,
        "mask_version": task.mask_version,
        "samples": 20,
        "steps": 1,
        "loss": 1.0,
        **header,
    }
    return encode_result(ResultHeader(**fields), vectors or {}, update)


def refusals(coordinator):
    return [e.text for e in coordinator.registry.events() if e.kind == "refused"]


def weights(coordinator):
    return {n: v.copy() for n, v in coordinator.rounds.model.params.items()}


def test_a_good_answer_moves_the_weights_by_its_update(coordinator):
    rounds = coordinator.rounds
    before = weights(coordinator)
    (task,) = [a.task for a in rounds.begin() if a.task.device == "d0"]
    metrics = rounds.finish([answer(coordinator, task)])
    assert (metrics["answers"], metrics["refused"]) == (1, 0)
    for name, old in before.items():
        np.testing.assert_allclose(rounds.model.params[name], old + 1, rtol=1e-6)


def test_movement_is_read_off_the_updates(tmp_path):
    """Units that grew by a tenth are worth more than those that shrank by as much."""
    with open_coordinator(tiny_config(tmp_path, criterion="movement"), tiny_devices()) as opened:
        (task,) = [a.task for a in opened.rounds.begin() if a.task.device == "d0"]
        assert (task.criterion, task.scores, task.look) == ("movement", True, None)
        layout = FlatLayout(
            opened.architecture, opened.rounds.model.shapes["large"], Role.PARAMETER
        )
        start = layout.split(opened.rounds.model.vectors(opened.architecture, "large")[0])
        grow = np.where(np.arange(16) < 8, 0.1, -0.1).astype(np.float32)
        moves = {n: np.zeros_like(v) for n, v in start.items()}
        moves |= {"0.weight": start["0.weight"] * grow[:, None], "0.bias": start["0.bias"] * grow}
        assert opened.rounds.finish([answer(opened, task, values=layout.join(moves))])["answers"]
        size = (start["0.weight"] ** 2).sum(1) + start["0.bias"] ** 2
        factor = np.where(grow > 0, 1.1**2 - 1, 0.9**2 - 1)
        scores = opened.rounds.ledger.arrays()["scores/movement/0"]
        smallest = opened.rounds.model.shapes["small"]["0"]
        expected = size * factor / np.abs(size * factor)[:smallest].mean()
        np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_scores_that_nobody_asked_for_are_not_taken(tmp_path):
    with open_coordinator(tiny_config(tmp_path, criterion="magnitude"), tiny_devices()) as opened:
        (task,) = [a.task for a in opened.rounds.begin() if a.task.device == "d0"]
        assert not task.scores
        vectors = {"scores": np.ones(16, np.float32), "zeros": -np.ones(1, np.float32)}
        assert opened.rounds.finish([answer(opened, task, vectors=vectors)])["answers"] == 1
        assert opened.rounds.ledger.arrays() == {}


def test_a_movement_that_no_float_holds_is_refused_whole(tmp_path):
    settings = tiny_config(tmp_path, criterion="movement", outlier=0)
    with open_coordinator(settings, tiny_devices()) as opened:
        (task,) = [a.task for a in opened.rounds.begin() if a.task.device == "d0"]
        values = np.full(size(opened, task), 3e38, np.float32)
        before = weights(opened)
        assert opened.rounds.finish([answer(opened, task, values=values)])["refused"] == 1
        assert refusals(opened)[0].startswith("movement: unit 0 of group 0 scores inf, ")
        for name, old in before.items():
            np.testing.assert_array_equal(opened.rounds.model.params[name], old)


def hostile(coordinator, task):
    """One answer of each kind that must be refused, with what the registry says about it."""
    n = size(coordinator, task)
    ones = np.ones(n, np.float32)
    good = SparseUpdate(0, n, ones, None).encode(Codec.FP32)
    flipped = bytearray(good)
    flipped[-5] ^= 1
    poisoned = bytearray(answer(coordinator, task))
    poisoned[len(poisoned) // 2] ^= 1
    return {
        "wrong mask version": (
            answer(coordinator, task, mask_version=7),
            rf"answer to {task.task} says device, kind, round, mask version d0, train, 1, 7, "
            rf"expected d0, train, 1, 0",
        ),
        "wrong mask version inside": (
            answer(coordinator, task, update=SparseUpdate(9, n, ones, None).encode(Codec.FP32)),
            "mask version",
        ),
        "wrong length": (answer(coordinator, task, values=np.ones(n + 1, np.float32)), str(n + 1)),
        "one value that would broadcast": (
            answer(coordinator, task, values=np.ones(1, np.float32)),
            f"support of 1 values, expected {n}",
        ),
        "checksum of the update": (answer(coordinator, task, update=bytes(flipped)), "checksum"),
        "checksum of the frame": (bytes(poisoned), "checksum"),
        "truncated": (answer(coordinator, task)[:-1], ""),
        "not a frame": (b"hello", ""),
        "another device": (answer(coordinator, task, device="d1"), "expected d0"),
        "unknown task": (
            answer(coordinator, task, task="x.t1.0.9.0"),
            "answer to x.t1.0.9.0, which is not a task of this round",
        ),
        "no update": (
            encode_result(
                ResultHeader(
                    task=task.task, device="d0", kind="train", round=1, mask_version=0, samples=1
                ),
                {},
                None,
            ),
            f"answer to {task.task} has no update, expected {n} values",
        ),
        "negative scores": (
            answer(
                coordinator,
                task,
                vectors={"scores": -np.ones(16, np.float32)},
            ),
            "scores: -1.0, expected at least 0",
        ),
    }


KINDS = [
    "wrong mask version",
    "wrong mask version inside",
    "wrong length",
    "one value that would broadcast",
    "checksum of the update",
    "checksum of the frame",
    "truncated",
    "not a frame",
    "another device",
    "unknown task",
    "no update",
    "negative scores",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_answer_is_noted_and_changes_nothing(coordinator, kind):
    rounds = coordinator.rounds
    before = weights(coordinator)
    (task,) = [a.task for a in rounds.begin() if a.task.device == "d0"]
    cases = hostile(coordinator, task)
    assert sorted(cases) == sorted(KINDS)
    data, message = cases[kind]
    metrics = rounds.finish([data])
    assert (metrics["answers"], metrics["refused"]) == (0, 1)
    (said,) = refusals(coordinator)
    assert message in said
    assert "\n" not in said
    for name, old in before.items():
        np.testing.assert_array_equal(rounds.model.params[name], old)


def test_an_answer_that_comes_twice_counts_once(coordinator):
    rounds = coordinator.rounds
    before = weights(coordinator)
    (task,) = [a.task for a in rounds.begin() if a.task.device == "d0"]
    data = answer(coordinator, task)
    metrics = rounds.finish([data, data])
    assert (metrics["answers"], metrics["refused"]) == (1, 1)
    assert refusals(coordinator) == [f"answer to {task.task} came twice; the first one stands"]
    for name, old in before.items():
        np.testing.assert_allclose(rounds.model.params[name], old + 1, rtol=1e-6)


def test_a_device_weighs_no_more_than_the_samples_it_enrolled_with(coordinator):
    rounds = coordinator.rounds
    tasks = {a.task.device: a.task for a in rounds.begin()}
    before = weights(coordinator)
    liar = answer(
        coordinator,
        tasks["d0"],
        samples=10**9,
        values=np.full(size(coordinator, tasks["d0"]), 1.0, np.float32),
    )
    honest = answer(
        coordinator,
        tasks["d1"],
        samples=23,
        values=np.zeros(size(coordinator, tasks["d1"]), np.float32),
    )
    rounds.finish([liar, honest])
    for name, old in before.items():  # 20 samples say 1, 23 say 0
        np.testing.assert_allclose(rounds.model.params[name] - old, 20 / 43, rtol=1e-4)


def test_the_rest_of_a_round_counts_when_one_answer_is_bad(coordinator):
    rounds = coordinator.rounds
    tasks = {a.task.device: a.task for a in rounds.begin()}
    good = [answer(coordinator, tasks[d]) for d in ("d1", "d2", "d3")]
    metrics = rounds.finish([good[0], b"junk", *good[1:]])
    assert (metrics["answers"], metrics["refused"]) == (3, 1)


def test_where_no_device_answers_the_model_stays(coordinator):
    rounds = coordinator.rounds
    before = weights(coordinator)
    rounds.begin()
    metrics = rounds.finish([])
    assert metrics["answers"] == 0
    assert metrics["loss"] is None
    for name, old in before.items():
        np.testing.assert_array_equal(rounds.model.params[name], old)


def test_a_round_that_nobody_trained_in_is_tried_again_and_given_up_in_the_end(coordinator):
    rounds = coordinator.rounds
    before = weights(coordinator)
    for attempt in (0, 1):
        asked = rounds.begin()
        assert all(f".t1.{attempt}." in a.task.task for a in asked)
        assert rounds.finish([])["trained"] == 0
    rounds.begin()
    with pytest.raises(
        TransportError,
        match=r"^round 1: no device has trained in 3 tries; "
        r"`fleetprune coordinator status` says what they reported$",
    ):
        rounds.finish([])
    assert rounds.remaining()[0] == RoundKey(Phase.TRAIN, 1, 3)
    for name, old in before.items():
        np.testing.assert_array_equal(rounds.model.params[name], old)


def test_one_answer_after_silence_is_enough(coordinator):
    rounds = coordinator.rounds
    rounds.begin()
    rounds.finish([])
    (task,) = [a.task for a in rounds.begin() if a.task.device == "d0"]
    assert rounds.finish([answer(coordinator, task)])["trained"] == 1
    assert rounds.remaining()[0] == RoundKey(Phase.TRAIN, 2)


def test_an_open_round_is_taken_up_with_the_same_tasks(coordinator):
    asked = [(a.node_id, a.task, a.model) for a in coordinator.rounds.begin()]
    again = [(a.node_id, a.task, a.model) for a in coordinator.rounds.begin()]
    assert asked == again


def test_a_task_that_was_refused_is_not_asked_again(coordinator):
    rounds = coordinator.rounds
    first, *others = (a.task for a in rounds.begin())
    assert coordinator.registry.refuse_task(first.task, first.device, "no data")
    assert [a.task for a in rounds.begin()] == others


def test_an_open_round_is_finished_before_a_longer_training(tmp_path):
    def answered(opened):
        asked = opened.rounds.begin()
        trained = [a.task for a in asked if a.task.kind is TaskKind.TRAIN]
        opened.rounds.finish(answer(opened, task) for task in trained)
        return {(a.task.round, a.task.kind.value) for a in asked}

    with open_coordinator(tiny_config(tmp_path, rounds=1), tiny_devices()) as opened:
        assert answered(opened) == {(1, "train")}
        opened.rounds.begin()
    with open_coordinator(tiny_config(tmp_path, rounds=2), tiny_devices()) as opened:
        assert answered(opened) == {(1, "observe")}
        assert answered(opened) == {(2, "train")}
        assert answered(opened) == {(2, "observe")}
        assert opened.rounds.remaining() == []


def test_a_stop_comes_before_the_next_export(tmp_path):
    class StopHereError(Exception):
        pass

    def stop():
        raise StopHereError

    with open_coordinator(tiny_config(tmp_path), tiny_devices()):
        pass
    config = tiny_config(tmp_path)
    with Coordinator(config, time.time, EventLog(None, time.time), stop) as opened:
        for work in (opened.rounds.prepare, opened.rounds.begin, opened.release):
            with pytest.raises(StopHereError):
                work()
        assert opened.registry.rounds() == []
        assert opened.repository.latest_release() == 0


@pytest.fixture
def trained(tmp_path):
    """Makes configurations of a tiny fleet that starts from a checkpoint; and the checkpoint."""
    checkpoint = tmp_path / "model.pt"
    torch.manual_seed(0)
    state = mlp(inputs=6, hidden=16, classes=3).state_dict()
    torch.save(state, checkpoint)

    def config(**training):
        made = tiny_config(tmp_path, outlier=0, **training)
        return made.model_copy(
            update={"model": made.model.model_copy(update={"initial": checkpoint})}
        )

    return config, {name: value.numpy() for name, value in state.items()}


def seen(task, x):
    """The answer of a device whose last layer saw the inputs `x`."""
    fields = {
        "task": task.task,
        "device": task.device,
        "kind": task.kind,
        "round": task.round,
        "mask_version": task.mask_version,
        "samples": len(x),
    }
    products = (x.T @ x)[np.triu_indices(x.shape[1])].astype(np.float32)
    return encode_result(ResultHeader(**fields), {"gram": products}, None)


def units(coordinator):
    """Which units of the checkpoint stand where."""
    (order,) = coordinator.rounds.model.origin.values()
    return order


def test_a_trained_model_is_measured_then_cut_and_rebuilt(trained):
    make, before = trained
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 8)) @ rng.normal(size=(8, 16))  # 8 units can stand for all
    with open_coordinator(make(), tiny_devices()) as coordinator:
        rounds = coordinator.rounds
        assert rounds.remaining()[0] == RoundKey(Phase.SCORE, 0, 1)
        asked = [a.task for a in rounds.begin()]
        # Only who holds the whole model sees what all of its units give.
        assert [(t.device, t.kind, t.scores) for t in asked] == [
            ("d0", TaskKind.OBSERVE, True),
            ("d1", TaskKind.OBSERVE, True),
        ]
    # Killed here: the next one waits for the same answers.
    with open_coordinator(make(), tiny_devices()) as coordinator:
        rounds = coordinator.rounds
        assert [a.task for a in rounds.begin()] == asked
        by_size = units(coordinator)
        rounds.finish([seen(t, x[:, by_size]) for t in asked])
        wanted = x @ before["2.weight"].T
        for keep in (8, 16):
            kept = units(coordinator)[:keep]
            given = x[:, kept] @ rounds.model.params["2.weight"][:, :keep].T
            assert np.abs(given - wanted).max() < 0.05 * np.abs(wanted).max()
        assert rounds.remaining()[0] == RoundKey(Phase.TRAIN, 1)
        assert rounds.model.mask_version == 2  # after the order by size
    with open_coordinator(make(), tiny_devices()) as coordinator:
        kept = units(coordinator)[:8]
        given = x[:, kept] @ coordinator.rounds.model.params["2.weight"][:, :8].T
        assert np.abs(given - wanted).max() < 0.05 * np.abs(wanted).max()


def test_a_trained_model_that_nobody_measures_is_cut_by_size(trained):
    make, before = trained
    with open_coordinator(make(), tiny_devices()) as coordinator:
        coordinator.rounds.begin()
        coordinator.rounds.finish([])
        size = np.linalg.norm(before["0.weight"], axis=1)
        assert set(units(coordinator)[:8]) == set(np.argsort(-size)[:8])
        weight = coordinator.rounds.model.params["2.weight"]
        np.testing.assert_array_equal(weight, before["2.weight"][:, units(coordinator)])


@pytest.mark.parametrize(
    ("training", "measured"),
    [
        ({}, [1]),
        ({"first_criterion": "taylor"}, [0, 1]),
        ({"first_criterion": "taylor", "refit": False}, [0]),
        ({"first_criterion": "magnitude"}, [1]),
        ({"first_criterion": "none", "refit": False}, []),
    ],
)
def test_what_is_measured_before_a_cut(trained, training, measured):
    make, _ = trained
    with open_coordinator(make(**training), tiny_devices()) as coordinator:
        left = coordinator.rounds.remaining()
        assert [key.step for key in left if key.phase is Phase.SCORE] == measured


def test_a_trained_model_that_stays_whole_is_not_measured(trained):
    make, _ = trained
    config = make()
    whole = config.model_copy(update={"classes": {"large": config.classes["large"]}})
    devices = {name: d for name, d in tiny_devices().items() if d.device_class == "large"}
    with open_coordinator(whole, devices) as coordinator:
        assert coordinator.rounds.remaining()[0] == RoundKey(Phase.TRAIN, 1)


def test_a_gram_matrix_that_cannot_be_is_refused(trained):
    make, _ = trained
    with open_coordinator(make(), tiny_devices()) as coordinator:
        (task, *_) = [a.task for a in coordinator.rounds.begin()]
        metrics = coordinator.rounds.finish([seen(task, np.ones((3, 5)))])
        assert metrics["refused"] == 1
        assert refusals(coordinator) == ["gram of shape (15,), expected (136,)"]
