"""Models x granularities x schedules x criteria: each runs, and ends exactly at its budget.

Rounds are random changes of the weights and random reports of importance; all else is real: the
planner, the masks, the network that is cut out of the fleet's, its file and onnxruntime. The usual
run tries a set of combinations in which every pair of values occurs; `make matrix` tries them all.
"""

import os
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, pairwise, product

import numpy as np
import pytest
import torch

from fleetprune.budgets import Budget
from fleetprune.criteria import CATALOGUE, Criterion, Needs, gamma
from fleetprune.errors import BudgetError
from fleetprune.layout import Architecture, unit_slices
from fleetprune.patterns import Granularity, Pattern
from fleetprune.schedule import Curve, Schedule
from fleetprune_coordinator.artifacts import GOLDEN_TOLERANCE, predict, small_model
from fleetprune_coordinator.config import TrainingConfig
from fleetprune_coordinator.cutting import Cutting
from fleetprune_coordinator.fleet_model import initial_model
from fleetprune_coordinator.graphs import export_infer
from fleetprune_coordinator.onnx_costs import file_costs, overhead_bytes
from fleetprune_coordinator.plan import Planner
from fleetprune_coordinator.policy import Policy
from fleetprune_coordinator.resize import read
from fleetprune_coordinator.sparse_file import pack
from fleetprune_coordinator.synflow import flow_gradients
from fleetprune_coordinator.tracing import trace
from fleetprune_coordinator.weight_pruning import WeightRule
from fleetprune_sim import models

torch.set_num_threads(1)  # on a busy machine, threads that wait for each other take minutes

ROUNDS = 5
MODELS = {
    "resnet8": (lambda: models.resnet8(classes=4, channels=1), (1, 8, 8)),
    "mobilenet_v2": (lambda: models.mobilenet_v2(0.1, classes=4, channels=1), (1, 16, 16)),
    "ds_cnn": (lambda: models.ds_cnn(classes=4, channels=1), (1, 8, 8)),
    "efficientnet": (lambda: models.efficientnet_lite0(0.1, classes=4, channels=1), (1, 16, 16)),
    "cnn1d": (lambda: models.cnn1d(8, classes=4), (8, 16)),
    "mlp": (lambda: models.mlp(64, 128, 4), (64,)),
    "transformer": (
        lambda: models.transformer(8, 32, 4, width=32, hidden=64, layers=1),
        (8, 32),
    ),
}
KINDS = {
    "channel": (Granularity.CHANNEL, "1x1", {"flash": 0.5, "macs": 0.7}),
    "weight": (Granularity.WEIGHT, "1x1", {"flash": 0.4}),
    "hybrid": (Granularity.HYBRID, "1x1", {"flash": 0.3, "macs": 0.6}),
    "2:4": (Granularity.WEIGHT, "2:4", {}),
    "4x1": (Granularity.WEIGHT, "4x1", {"flash": 0.6}),
    "1x4": (Granularity.HYBRID, "1x4", {"flash": 0.5, "macs": 0.8}),
}
SCHEDULES = {
    Curve.ONE_SHOT: {"begin": 2},
    Curve.CONSTANT: {"begin": 2},
    Curve.LINEAR: {"begin": 1, "end": 4},
    Curve.POLYNOMIAL: {"begin": 1, "end": 5},
    Curve.COSINE: {"begin": 1, "end": 5, "frequency": 2},
    Curve.DYNAMIC: {"end": 5, "step": 0.5, "window": 1, "stable": 1.0},
}
CRITERIA = [c for c in Criterion if CATALOGUE[c].later]
NORMED = {"resnet8", "mobilenet_v2", "ds_cnn", "efficientnet", "cnn1d"}
"""Models with norms that scale units, which `gamma` goes by."""

Case = tuple[str, str, Curve, Criterion]
AXES = (tuple(MODELS), tuple(KINDS), tuple(SCHEDULES), tuple(CRITERIA))


def makes_sense(case: Case) -> bool:
    """Without what a fleet's description refuses."""
    model, kind, _, criterion = case
    if criterion is Criterion.GAMMA and model not in NORMED:
        return False
    return CATALOGUE[criterion].weights or KINDS[kind][0] is not Granularity.WEIGHT


def pairs(case: Case) -> set[tuple]:
    return set(combinations(enumerate(case), 2))


def covering() -> list[Case]:
    """Few cases in which every pair of values that makes sense occurs."""
    sensible = [case for case in product(*AXES) if makes_sense(case)]
    left = set().union(*map(pairs, sensible))
    by_ends: dict[tuple, list[Case]] = {}
    for case in sensible:
        by_ends.setdefault((case[0], case[3]), []).append(case)
    chosen = []
    for cases in by_ends.values():  # the two longest axes: as many cases as they have pairs
        best = max(cases, key=lambda case: len(pairs(case) & left))
        chosen.append(best)
        left -= pairs(best)
    for case in sensible:
        if pairs(case) & left:
            chosen.append(case)
            left -= pairs(case)
    return chosen


FULL = bool(os.environ.get("MATRIX"))
CASES = [c for c in product(*AXES) if makes_sense(c)] if FULL else covering()
EXPORTED = set({case[:2]: case for case in CASES}.values())
"""Of the usual run, the cases whose files are looked at: one of each model and granularity."""


@dataclass(frozen=True)
class Subject:
    """A model of the zoo, traced, and samples for it."""

    network: torch.nn.Module
    architecture: Architecture
    params: dict
    stats: dict
    x: np.ndarray

    def flow(self, params):
        return flow_gradients(self.network, torch.zeros(1, *self.x.shape[1:]), params)


@cache
def subject(name: str) -> Subject:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    network = make().eval()
    example = torch.zeros(1, *shape)
    architecture = trace(network, example)
    overhead = overhead_bytes(network, architecture, example, lambda m, x: export_infer(m, x).onnx)
    architecture = architecture.model_copy(update={"overhead_bytes": overhead})
    x = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    return Subject(network, architecture, *read(network), x)


def report(cutting: Cutting, criterion: Criterion, architecture: Architecture, rng) -> None:
    """What devices that hold all of the model might say of it."""
    keep, ledger = architecture.groups, cutting.ledger
    inputs = sum(architecture.tensor(n).shape(keep)[1] for n in architecture.observed)
    needs = CATALOGUE[criterion].needs
    if needs in (Needs.BACKWARD, Needs.TRAINING):
        units = sum(1 for g, _ in unit_slices(architecture, keep) for _ in range(keep[g]))
        ledger.add_scores(criterion, keep, rng.random(units), 1, 1.0)
    elif criterion is Criterion.WANDA:
        ledger.add_sumsq(keep, rng.random(inputs).astype(np.float32), 1)
    elif criterion is Criterion.APOZ:
        ledger.add_zeros(keep, rng.random(inputs).astype(np.float32), 1)
    ledger.close_round()


@pytest.mark.parametrize("case", CASES, ids=["-".join(case) for case in CASES])
def test_it_runs_and_ends_exactly_at_its_budget(case):
    model_name, kind, curve, criterion = case
    granularity, text, shares = KINDS[kind]
    pattern, of = Pattern.parse(text), subject(model_name)
    architecture = of.architecture
    rng = np.random.default_rng([AXES[i].index(value) for i, value in enumerate(case)])
    dense = Planner(architecture, {}, schedule=Schedule()).dense
    budget = Budget(
        flash_bytes=int(shares["flash"] * dense.artifact_bytes) if "flash" in shares else None,
        macs=int(shares["macs"] * dense.macs) if "macs" in shares else None,
    )
    planner = Planner(
        architecture,
        {"large": Budget(), "small": budget},
        schedule=Schedule.model_validate({"curve": curve, **SCHEDULES[curve]}),
        multiple=4,
        weights=WeightRule(granularity, pattern),
    )
    settings = TrainingConfig.model_validate(
        {"rounds": ROUNDS, "remask_every": 1, "last_remask": ROUNDS, "criterion": criterion}
    )
    cutting = Cutting(settings, architecture, planner, Policy(), watch=None, flow=of.flow)
    cutting.start(None)
    flat = {g: np.zeros(n, np.float32) for g, n in architecture.groups.items()}
    model = initial_model(architecture, of.params, of.stats, planner.shapes(1, flat))
    cutting.start(model)
    model = cutting.prune_weights(model, 0, before=model)
    sizes = []
    for number in range(1, ROUNDS + 1):
        report(cutting, criterion, architecture, rng)
        params = {
            n: v + rng.normal(0, 0.01, v.shape).astype(np.float32) for n, v in model.params.items()
        }
        everyone = {n: np.ones_like(v) for n, v in params.items()}
        cutting.trained(model.params, params, everyone)
        model = cutting.after_round(number, 1.0, replace(model, params=params))
        keep, masks = model.shapes["small"], model.supports.get("small", {})
        sizes.append(planner.weights.bytes(keep, masks))
    assert all(b <= a + 2 * (1 + 4 * pattern.block) for a, b in pairwise(sizes))
    assert model.shapes["large"] == architecture.groups
    at_the_budget(planner, budget, keep, masks, pattern)
    if FULL or case in EXPORTED:
        its_file(of, planner, budget, model)


def its_file(of, planner, budget, model):
    """The class's file is within its budget, has its zeros, and computes what torch does."""
    architecture, rule = of.architecture, planner.weights.rule
    keep, masks = model.shapes["small"], model.supports.get("small", {})
    network = small_model(of.network, architecture, model, "small")
    plain = export_infer(network, torch.zeros(1, *of.x.shape[1:])).onnx
    data = pack(plain, rule.pattern) if rule.granularity.weights else plain
    costs = file_costs(data)
    assert budget.meets(costs)
    assert costs.artifact_bytes <= planner.weights.bytes(keep, masks)
    assert costs.macs == planner.costs(keep).macs
    for name, kept in masks.items():
        assert not network.get_parameter(name).detach().numpy()[~kept].any()
    with torch.no_grad():
        expected = network(torch.from_numpy(of.x)).numpy()
    np.testing.assert_allclose(
        predict(data, of.x), expected, atol=GOLDEN_TOLERANCE * max(1, np.abs(expected).max())
    )


def at_the_budget(planner, budget, keep, masks, pattern):
    """Within every limit, and one more step would not be."""
    rule = planner.weights.rule
    bytes_ = planner.weights.bytes(keep, masks)
    assert budget.flash_bytes is None or bytes_ <= budget.flash_bytes
    assert budget.macs is None or planner.costs(keep).macs <= budget.macs
    units = planner.of_units(budget)
    for group, levels in planner.grids["small"].levels.items():
        wider = [level for level in levels if level > keep[group]]
        if wider:
            assert not units.meets(planner.costs({**keep, group: wider[0]}))
    if pattern.m:
        for kept in masks.values():
            o, i, *rest = kept.shape
            groups = kept.reshape(o, i // pattern.m, pattern.m, *rest)
            assert (groups.sum(axis=2) == pattern.n).all()
    elif rule.granularity.weights:
        # A block more has one or two steps and its four-byte weights.
        assert budget.flash_bytes - bytes_ <= 2 * (1 + 4 * pattern.block)
        for kept in masks.values():
            assert kept.any()
            assert np.array_equal(pattern.spread(pattern.marks(kept)), kept)


def test_every_pair_that_makes_sense_is_tried():
    wanted = set().union(*(pairs(c) for c in product(*AXES) if makes_sense(c)))
    assert set().union(*map(pairs, CASES)) == wanted
    for axis, values in enumerate(AXES):
        assert {case[axis] for case in CASES} == set(values)
    assert FULL or len(CASES) <= 110


@pytest.mark.parametrize("name", MODELS)
def test_what_has_norms_to_go_by(name):
    """Or `makes_sense` leaves out what it should not."""
    of = subject(name)
    if name in NORMED:
        assert gamma(of.architecture, of.params).keys() == of.architecture.groups.keys()
    else:
        with pytest.raises(
            BudgetError, match=r"^gamma: no norm layer scales any unit; choose magnitude$"
        ):
            gamma(of.architecture, of.params)
