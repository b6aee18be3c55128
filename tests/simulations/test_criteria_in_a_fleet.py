"""Every criterion through the real coordinator, the real graphs and the real device core."""

import time
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from fleetprune import criteria
from fleetprune.criteria import CATALOGUE, Criterion, Needs, needs
from fleetprune.errors import BudgetError
from fleetprune.masks import order_units
from fleetprune.messages import Enrol, GraphRef, TaskKind
from fleetprune.model_payload import ModelPayload
from fleetprune_agent.data import Batches
from fleetprune_agent.observer import observe
from fleetprune_agent.runtime import training_session
from fleetprune_coordinator.coordinator import Coordinator
from fleetprune_coordinator.events import EventLog
from fleetprune_coordinator.graph_library import GraphLibrary, StepOptions
from fleetprune_coordinator.keys import RELEASES, init_repository
from fleetprune_coordinator.ledger import Ledger
from fleetprune_coordinator.resize import read
from fleetprune_coordinator.tracing import trace
from fleetprune_sim.loop import LoopDevice, train
from tests.simulations.fleets import CLASSES, INPUTS, tiny_config, tiny_devices


class Shelf:
    """Keeps the last graph that was published."""

    onnx = b""

    def publish_graph(self, onnx):
        self.onnx = onnx
        return GraphRef(target="graphs/g.onnx", sha256=64 * "0")


def whole_numbers(model, seed):
    """Small integers as weights, so that float32 sums are exact in whatever order."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))
    return model


LENGTH = 10  # 8 positions behind the first convolution


def conv_net():
    layers = [nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 5, 3), nn.ReLU(), nn.Flatten()]
    return whole_numbers(nn.Sequential(*layers, nn.Linear(5 * 6, 3)), seed=1)


def reports(model, architecture, criterion, devices):
    """What devices without labels measure of their samples, with batches of 4."""
    shelf = Shelf()
    example = torch.zeros(1, *architecture.input_shape)
    library = GraphLibrary(model, architecture, example, shelf, StepOptions(batch=4))
    library.observe(architecture.groups, criterion)
    session = training_session(shelf.onnx)
    params = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
    payload = ModelPayload(1, 0, params, np.zeros(0, np.float32))
    return [observe(session, payload, Batches(x, None, 4)) for x in devices]


def scored(model, architecture, criterion, devices):
    ledger = Ledger(architecture, architecture.groups)
    for seen in reports(model, architecture, criterion, devices):
        add = ledger.add_sumsq if criterion is Criterion.WANDA else ledger.add_zeros
        add(architecture.groups, seen.sums[CATALOGUE[criterion].section], seen.samples)
    ledger.close_round()
    return ledger.scores(criterion, read(model)[0])


@pytest.mark.parametrize("criterion", [Criterion.WANDA, Criterion.APOZ])
@pytest.mark.parametrize("sizes", [(1, 22), (7, 16), (3, 4, 5, 11)])
def test_devices_that_only_infer_give_the_score_of_their_pooled_samples(criterion, sizes):
    """To the bit: with integers no sum is rounded, nor are shares of 8 positions."""
    model = conv_net()
    architecture = trace(model, torch.zeros(1, 2, LENGTH))
    x = np.random.default_rng(0).integers(-3, 4, (23, 2, LENGTH)).astype(np.float32)
    split = [x[a:b] for a, b in pairwise(np.cumsum([0, *sizes]))]
    apart = scored(model, architecture, criterion, split)
    pooled = scored(model, architecture, criterion, [x])
    assert apart.keys() == pooled.keys() == {"0", "2"}
    for group, scores in pooled.items():
        assert np.unique(scores).size > 1
        np.testing.assert_array_equal(apart[group], scores)


def test_the_pooled_score_is_wandas():
    """|W| times the norms of the inputs that torch itself sees in the pooled samples."""
    model = conv_net()
    architecture = trace(model, torch.zeros(1, 2, LENGTH))
    x = np.random.default_rng(0).integers(-3, 4, (23, 2, LENGTH)).astype(np.float32)
    with torch.no_grad():
        first = torch.relu(model[0](torch.from_numpy(x)))
        second = torch.relu(model[2](first)).flatten(1)
    mean = {
        "2.weight": first.square().sum((0, 2)).numpy() / 23,
        "5.weight": second.square().sum(0).numpy() / 23,
    }
    want = criteria.wanda(architecture, read(model)[0], mean)
    got = scored(model, architecture, Criterion.WANDA, [x[:9], x[9:]])
    for group, scores in want.items():
        np.testing.assert_array_equal(got[group], scores)


@pytest.mark.parametrize("criterion", [Criterion.WANDA, Criterion.APOZ])
def test_pooling_holds_up_to_rounding_for_any_numbers(criterion):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(7, 12), nn.GELU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    architecture = trace(model, torch.zeros(1, 7))
    x = np.random.default_rng(1).normal(size=(40, 7)).astype(np.float32)
    apart = scored(model, architecture, criterion, [x[:3], x[3:20], x[20:]])
    pooled = scored(model, architecture, criterion, [x])
    for group, scores in pooled.items():
        np.testing.assert_allclose(apart[group], scores, rtol=1e-6)
        assert order_units(apart[group]).tolist() == order_units(scores).tolist()


def norm_net(inputs, hidden, classes):
    """With a norm, for the criteria that look at one."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, classes)
    )


def config(folder, initial=None, **training):
    made = tiny_config(folder, **training)
    factory = "tests.simulations.test_criteria_in_a_fleet:norm_net"
    model = made.model.model_copy(update={"factory": factory, "initial": initial})
    return made.model_copy(update={"model": model})


EXPORTED: dict[str, bytes] = {}
"""Graphs are made once for all tests here: making them takes longer than all else."""


@contextmanager
def opened(settings, devices):
    """As `open_coordinator`, with shared graphs."""
    if not (settings.state / RELEASES).exists():
        init_repository(settings.state / RELEASES, datetime.now(UTC))
    events = EventLog(None, time.time)
    with Coordinator(settings, time.time, events, exported=EXPORTED) as coordinator:
        for name, device in devices.items():
            coordinator.registry.enrol(
                Enrol(
                    device=name,
                    device_class=device.device_class,
                    agent_version="loop",
                    trains=device.trains,
                    samples=len(device.x),
                )
            )
        yield coordinator


def asked_and_finished(coordinator, devices):
    """Train; the tasks of every round, in order."""
    seen = []
    begin = coordinator.rounds.begin

    def noted():
        assignments = begin()
        seen.append([a.task for a in assignments])
        return assignments

    coordinator.rounds.begin = noted
    metrics = []
    train(coordinator, devices, metrics.append)
    assert [m["refused"] for m in metrics] == [0] * len(metrics)
    return seen


LATER = [c for c in Criterion if CATALOGUE[c].later]
FIRST = [c for c in Criterion if CATALOGUE[c].first]


@pytest.mark.parametrize("criterion", LATER)
def test_every_criterion_orders_units_while_a_fleet_trains(tmp_path, criterion):
    devices = tiny_devices()
    with opened(config(tmp_path, criterion=criterion, codec="fp16"), devices) as coordinator:
        tasks = asked_and_finished(coordinator, devices)
        rounds = coordinator.rounds
        assert rounds.ledger.ready(criterion)
        scores = rounds.ledger.scores(criterion, rounds.model.params)
        assert all(np.isfinite(s).all() and np.unique(s).size > 1 for s in scores.values())
        (order,) = rounds.model.origin.values()
        assert (order.tolist() == list(range(16))) == (criterion is Criterion.NONE)
        listening = needs(criterion) is not Needs.NOTHING
        assert [{t.scores for t in of} for of in tasks if of][:3] == [
            {listening},
            {listening},
            {False},
        ]
        looks = {t.look is not None for t in tasks[0]}
        assert looks == {needs(criterion) is Needs.FORWARD}
        for name, released in coordinator.release().items():
            assert coordinator.planner.budgets[name].meets(released.artifact.costs)


@pytest.mark.parametrize("criterion", FIRST)
def test_every_criterion_orders_units_of_a_trained_model(tmp_path, criterion):
    torch.manual_seed(0)
    state = norm_net(INPUTS, 16, CLASSES).state_dict()
    state["1.weight"] = torch.linspace(0.5, 1.5, 16)
    torch.save(state, tmp_path / "model.pt")
    devices = tiny_devices()
    settings = config(
        tmp_path, tmp_path / "model.pt", first_criterion=criterion, rounds=1, refit=False
    )
    with opened(settings, devices) as coordinator:
        tasks = asked_and_finished(coordinator, devices)
        (order,) = coordinator.rounds.model.origin.values()
        assert (order.tolist() == list(range(16))) == (criterion is Criterion.NONE)
        kinds = {t.kind for t in tasks[0]} if needs(criterion) is not Needs.NOTHING else set()
        wanted = {Needs.FORWARD: {TaskKind.OBSERVE}, Needs.BACKWARD: {TaskKind.TRAIN}}
        assert kinds == wanted.get(needs(criterion), set())


@pytest.mark.parametrize(
    ("merge", "criterion"), [("median", "movement"), ("trimmed", "taylor"), ("median", "wanda")]
)
def test_robust_merging_survives_a_restart(tmp_path, merge, criterion):
    devices = tiny_devices()
    settings = {"criterion": criterion, "score_merge": merge, "codec": "fp32"}
    ledgers = []
    for name in ("whole", "cut"):
        made = config(tmp_path / name, **settings)
        with opened(made, devices) as coordinator:
            if name == "cut":
                with pytest.raises(StopIteration):
                    train(coordinator, devices, lambda metrics: next(iter(())))
            else:
                train(coordinator, devices)
                ledgers.append(coordinator.rounds.ledger.arrays())
        if name == "cut":
            with opened(made, devices) as coordinator:
                train(coordinator, devices)
                ledgers.append(coordinator.rounds.ledger.arrays())
    one, other = ledgers
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])


def test_fixed_statistics_of_narrower_models_are_no_part_of_what_is_looked_at(tmp_path):
    devices = tiny_devices()
    settings = config(
        tmp_path, criterion="wanda", fixed_statistics=0.25, remask_every=1, last_remask=4
    )
    with opened(settings, devices) as coordinator:
        asked_and_finished(coordinator, devices)
        assert coordinator.rounds.ledger.ready(Criterion.WANDA)


def test_who_trains_looks_as_well_and_who_does_not_observes(tmp_path):
    devices = tiny_devices()
    devices["d0"] = LoopDevice("large", trains=False, x=devices["d0"].x, y=devices["d0"].y)
    with opened(config(tmp_path, criterion="wanda"), devices) as coordinator:
        tasks = asked_and_finished(coordinator, devices)
        first = {t.device: (t.kind, t.look is not None) for t in tasks[0]}
        assert first["d0"] == (TaskKind.OBSERVE, False)
        assert first["d1"] == (TaskKind.TRAIN, True)


def test_gamma_without_a_norm_is_refused_before_the_first_round(tmp_path):
    settings = tiny_config(tmp_path, criterion="gamma")
    with (
        pytest.raises(BudgetError, match=r"^gamma: no norm layer scales any unit; choose "),
        opened(settings, tiny_devices()),
    ):
        pass
