"""Whole trainings of the methods that prune single weights, on a fleet of eight."""

import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fleetprune.frame import decode_frame
from fleetprune.messages import Task, TaskKind
from fleetprune_sim.assemble import assemble
from fleetprune_sim.methods.fedrts import STREAM, Posterior, kept_outcome, pruned_outcome
from fleetprune_sim.methods.fedtiny import grow_and_prune
from fleetprune_sim.methods.sparse.candidates import POOL
from fleetprune_sim.methods.sparse.frames import (
    SparseHeader,
    decode_answer,
    decode_mask,
    floats,
)
from fleetprune_sim.methods.sparse.importance import reconfigure
from fleetprune_sim.methods.sparse.prunable import best_per_tensor
from fleetprune_sim.run import Simulation
from tests.simulations.sparse_task import SHARE

METHODS = ("prunefl", "feddst", "fedtiny", "fedrts")
DENSE = 72 * 36 + 576 * 36 + 1152 * 9 + 48
PARAMETERS = 72 + 576 + 1152 + 48 + 2 * (8 + 8 + 16) + 3
BUDGET = math.floor(SHARE * DENSE)
COSTS = (36, 36, 9, 1)


class PowerCutError(Exception):
    """The process is gone."""


class Wire:
    """An engine that notes what passes, and dies after some jobs."""

    def __init__(self, inner, jobs_left):
        self.inner, self.left, self.seen = inner, jobs_left, []

    def run(self, jobs) -> Iterator:
        for job, done in zip(jobs, self.inner.run(jobs), strict=True):
            if self.left == 0:
                raise PowerCutError
            self.left -= 1
            self.seen.append((Task.from_bytes(job.task), job.model, done.frame))
            yield done

    def close(self):
        self.inner.close()


def train(folder, method, jobs=-1, release=True, **changes):
    """Train to the end or to a power cut.

    Returns what passed on the wire, each round's metrics with the mask, counts and weights that
    it led to, and the summary, if there is one.
    """
    wanted = assemble(None, "tests.simulations.sparse_task:task", method, 0, changes)
    states = []

    def closed(metrics):
        rounds = simulation.coordinator.rounds
        states.append((metrics, rounds.mask, rounds.kept, dict(rounds.model.params)))

    with Simulation(wanted, folder, closed) as simulation:
        wire = simulation._engine = Wire(simulation._engine, jobs)
        try:
            simulation.train()
        except PowerCutError:
            return wire, states, None
        wire.rounds = simulation.coordinator.rounds
        wire.classes = {m.name: m.device_class for m in simulation.fleet.members.values()}
        return wire, states, simulation.finish() if release else None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trainings without interruption, by method; each is done once."""

    @cache
    def run(method):
        folder = tmp_path_factory.mktemp(method)
        return method, folder, *train(folder, method)

    return run


@pytest.fixture(params=METHODS)
def whole(request, trained):
    """Each of them."""
    return trained(request.param)


def prunable(params):
    """(n,) of the four weight tensors, in order."""
    return np.concatenate([v.ravel() for v in params.values() if v.ndim > 1])


def spent(method, kept):
    costs = COSTS[1:-1] if method == "fedtiny" else COSTS
    fixed = 72 * 36 + 48 if method == "fedtiny" else 0
    return fixed + sum(k * c for k, c in zip(kept, costs, strict=True))


def test_counts_are_exact_after_every_round_and_what_is_pruned_is_zero(whole):
    method, _, _, states, _ = whole
    trained = [s for s in states if s[0]["phase"] == "train"]
    assert [s[0]["trained"] for s in trained] == [1 if method == "prunefl" else 4] + [4] * 5
    first = trained[0][2]
    for metrics, mask, kept, params in states:
        assert metrics["refused"] == 0
        assert BUDGET - sum(COSTS) < spent(method, kept) <= BUDGET
        assert method == "prunefl" or kept == first
        weights = prunable(params)
        if method == "fedtiny":  # its ends are whole
            weights = weights[72:-48]
        assert not weights[~mask].any()
        assert mask.sum() == sum(kept)


def test_masks_move_when_they_should_and_rest_at_the_end(whole):
    method, _, _, states, _ = whole
    trained = [s for s in states if s[0]["phase"] == "train"]
    # Rounds 2 and 4 adjust where changes last for all rounds, else round 2 alone, since they must
    # have ended by twice the interval; round 1 selects or prunes first.
    moved = [s[0]["round"] for a, s in pairwise(trained) if (a[1] != s[1]).any()]
    assert moved == {"prunefl": [2, 4]}.get(method, [2])
    versions = [s[0]["mask_version"] for s in trained]
    begun = {"prunefl": 1, "fedtiny": 1}.get(method, 0)
    assert versions[0] == begun
    assert versions[-1] == begun + len(moved)


def test_the_model_learns_and_its_batch_norm_is_calibrated(whole):
    *_, summary = whole
    assert summary["classes"]["small"]["accuracy"] > 0.6  # a third by chance
    assert summary["classes"]["small"]["accuracy"] == summary["classes"]["large"]["accuracy"]


def test_the_file_is_the_dense_model_and_the_summary_says_so(whole):
    method, folder, _, states, summary = whole
    small = summary["classes"]["small"]
    artifact = small["artifact"]
    assert artifact["macs"] == summary["dense"]["macs"] == DENSE
    assert (small["within_budget"], summary["classes"]["large"]["within_budget"]) == (False, True)
    assert artifact["sparse_macs"] == spent(method, states[-1][2]) <= BUDGET
    assert artifact["density"] == states[-1][1].mean()
    assert artifact["sparse_bytes"] < artifact["bytes"]
    assert summary["dense"]["accuracy"] is None  # no dense model has been trained
    found = onnx.load(folder / artifact["path"])
    tensors = [numpy_helper.to_array(t) for t in found.graph.initializer]
    kernels = [t for t in tensors if t.ndim == 4]
    (middle,) = [t for t in kernels if t.shape == (8, 8, 3, 3)]
    kept = states[-1][2][0 if method == "fedtiny" else 1]
    assert 0 < np.count_nonzero(middle) <= kept < 576


def test_a_training_that_is_cut_in_mid_round_ends_the_same(whole, tmp_path):
    method, _, wire, states, _ = whole
    # FedRTS needs what round 1 has shown in round 2; later the others tell who has the mask.
    cut = 2 if method == "fedrts" else 4
    first = 1 if method == "prunefl" else 4
    _, before, _ = train(tmp_path, method, jobs=first + 4 * (cut - 2) + 2)
    assert [s[0]["round"] for s in before] == list(range(1, cut))
    resumed, after, _ = train(tmp_path, method, release=False)
    assert [s[0]["round"] for s in after] == [*range(cut, 7), 6, 6]
    np.testing.assert_array_equal(after[-1][1], states[-1][1])
    for name, values in states[-1][3].items():
        np.testing.assert_array_equal(after[-1][3][name], values)
    sizes = [[len(m) for t, m, _ in w.seen if t.round >= cut] for w in (wire, resumed)]
    assert sizes[0] == sizes[1]


def test_only_the_support_travels_and_the_mask_only_to_those_who_lack_it(whole):
    method, _, wire, _, _ = whole
    has = {}
    for task, model, frame in wire.seen:
        head, sections = decode_frame(model, "MODL")
        header = SparseHeader.from_bytes(head)
        assert len(sections["params"]) == 4 * header.params <= 4 * PARAMETERS
        assert ("mask" in sections) == (has.get(task.device) != task.mask_version)
        if task.kind is TaskKind.TRAIN:
            has[task.device] = task.mask_version
            answer = decode_answer(frame)
            if method == "fedtiny" and task.round == 1:
                assert answer.sections.keys() == {"losses"}
            elif method != "prunefl" or task.round > 1:
                assert floats(answer, "params", header.params).size == header.params
                assert len(answer.sections["params"]) < 4 * header.params + 40
    assert any("mask" not in decode_frame(m, "MODL")[1] for _, m, _ in wire.seen)


def test_who_does_not_answer_is_sent_the_mask_again(tmp_path):
    changes = {"simulation.classes.small.drop_out": 1.0, "training.calibration_passes": 0}
    wire, _, _ = train(tmp_path, "fedrts", release=False, **changes)
    again = {"large": [], "small": []}
    seen = set()
    for task, model, _ in wire.seen:
        key = (task.device, task.mask_version)
        if key in seen:
            again[wire.classes[task.device]].append("mask" in decode_frame(model, "MODL")[1])
        seen.add(key)
    assert set(again["large"]) == {False}
    assert set(again["small"]) == {True}


class Round:
    """What the server gets in a training round, added up once more."""

    def __init__(self, run, number):
        _, _, wire, states, _ = run
        self.prunable = wire.rounds.layout.prunable
        self.n = self.prunable.n
        seen = [s for s in wire.seen if s[0].round == number and s[0].kind is TaskKind.TRAIN]
        self.models = [model for _, model, _ in seen]
        self.answers = [decode_answer(frame) for *_, frame in seen]
        self.samples = np.array([a.header.samples for a in self.answers], float)
        self.before = states[number - 2][1] if number > 1 else None
        _, self.after, self.kept, self.params = states[number - 1]

    def mask(self, answer):
        """(n,) that a device ended with."""
        if "mask" not in answer.sections:
            return self.before
        return decode_mask(answer.sections["mask"], self.n, sum(self.kept))

    def weights(self):
        """Per device (n,) and whether it had each weight."""
        masks = [self.mask(a) for a in self.answers]
        rows = []
        for answer, mask in zip(self.answers, masks, strict=True):
            support = self.prunable.support(mask)
            full = np.zeros(support.size)
            full[support] = floats(answer, "params", int(support.sum()))
            rows.append(full[self.prunable.index])
        return np.array(rows), np.array(masks)

    def mean(self):
        """(n,) over the devices that had a weight."""
        rows, masks = self.weights()
        weight = self.samples @ masks
        return np.divide(self.samples @ rows, weight, out=np.zeros(self.n), where=weight > 0)


def test_feddst_divides_each_weight_by_the_devices_that_had_it(trained):
    run = trained("feddst")
    second = Round(run, 2)
    _, masks = second.weights()
    assert len({m.tobytes() for m in masks}) == 4
    mean, union = second.mean(), masks.any(axis=0)
    expected = best_per_tensor(second.prunable, np.abs(mean), union, second.kept)
    np.testing.assert_array_equal(second.after, expected)
    np.testing.assert_allclose(prunable(second.params), mean * expected, rtol=1e-6)
    assert (expected & ~masks.all(axis=0)).any()


def test_fedtiny_takes_the_candidate_of_the_least_loss_and_then_moves(trained):
    run = trained("fedtiny")
    first, second = Round(run, 1), Round(run, 2)
    losses = first.samples @ [floats(a, "losses", POOL) for a in first.answers]
    head, sections = decode_frame(first.models[0], "MODL")
    kept = SparseHeader.from_bytes(head).candidates[int(np.argmin(losses))]
    chosen = decode_mask(sections[f"mask{int(np.argmin(losses))}"], first.n, kept)
    np.testing.assert_array_equal(first.after, chosen)
    gradient = np.zeros(second.n)
    head, _ = decode_frame(second.models[0], "MODL")
    counts = SparseHeader.from_bytes(head).counts
    assert sum(counts) > 0
    for answer, samples in zip(second.answers, second.samples, strict=True):
        named = decode_mask(answer.sections["grown"], second.n, sum(counts))
        gradient[named] += samples * floats(answer, "gradient", sum(counts))
    expected = grow_and_prune(second.prunable, second.before, second.mean(), gradient, counts)
    np.testing.assert_array_equal(second.after, expected)
    assert np.count_nonzero(second.after & ~second.before) == sum(counts)


def test_fedrts_draws_from_what_two_rounds_have_shown(trained):
    run = trained("fedrts")
    posterior = None
    for number in (1, 2):
        this = Round(run, number)
        this.before = run[3][0][1]  # of both rounds
        head, _ = decode_frame(this.models[0], "MODL")
        counts = SparseHeader.from_bytes(head).counts
        # The share that moves: 0.2 (1 + cos(pi t / 4)), of 4 as twice the interval of 2.
        share = 0.2 * (1 + math.cos(math.pi * number / 4))
        sizes = zip(this.kept, this.prunable.sizes, strict=True)
        moving = [min(int(share * k), n - k) for k, n in sizes]  # of a whole tensor none
        large = [k - m for k, m in zip(this.kept, moving, strict=True)]
        rows, _ = this.weights()
        votes = sum(
            s * best_per_tensor(this.prunable, np.abs(row), this.before, large)
            for s, row in zip(this.samples, rows, strict=True)
        )
        outcome = kept_outcome(
            best_per_tensor(this.prunable, np.abs(this.mean()), this.before, large),
            votes / this.samples.sum(),
        )
        if posterior is None:
            assert counts == ()
            posterior = Posterior(np.ones(this.n), np.ones(this.n)).seen(outcome, this.before)
    assert counts == tuple(moving)
    assert 0 in moving
    assert sum(moving) > 0
    named = sum(
        s * decode_mask(a.sections["grown"], this.n, sum(counts))
        for s, a in zip(this.samples, this.answers, strict=True)
    )
    pruned = pruned_outcome(named / this.samples.sum())
    posterior = posterior.seen(np.where(this.before, outcome, pruned), np.ones(this.n, np.bool_))
    np.testing.assert_allclose(run[2].rounds.posterior.alpha, posterior.alpha, rtol=1e-12)
    np.testing.assert_allclose(run[2].rounds.posterior.beta, posterior.beta, rtol=1e-12)
    drawn = posterior.draw(this.prunable, this.kept, np.random.default_rng([0, STREAM, 2]))
    np.testing.assert_array_equal(this.after, drawn)


def test_prunefl_starts_with_one_device_and_goes_on_with_what_all_report(trained):
    run = trained("prunefl")
    first, second = Round(run, 1), Round(run, 2)
    (answer,) = first.answers
    assert answer.header.steps == 10 * math.ceil(answer.header.samples / 8)
    np.testing.assert_array_equal(first.after, first.mask(answer))
    importance = second.samples @ [floats(a, "importance", second.n) for a in second.answers]
    expected = reconfigure(
        second.prunable, COSTS, second.before, second.mean(), importance, limit=BUDGET
    )
    np.testing.assert_array_equal(second.after, expected)
    assert second.kept != first.kept
