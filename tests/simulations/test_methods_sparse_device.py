"""A device that trains under a mask, against torch on the same batches."""

import hashlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fleetprune.errors import WireError
from fleetprune.messages import Blob, Codec, GraphRef, Task, TaskKind
from fleetprune_agent.data import Batches, checked
from fleetprune_agent.feedback import InMemory
from fleetprune_agent.sessions import Arrays, Graphs
from fleetprune_agent.worker import WorkerSettings, streams
from fleetprune_coordinator.graphs import export_train_step
from fleetprune_sim.methods import find_method
from fleetprune_sim.methods.feddst import HALFWAY, READJUST, ReadjustingWorker, readjust
from fleetprune_sim.methods.sparse.candidates import JUDGED, SELECT, CandidateWorker
from fleetprune_sim.methods.sparse.device import MaskedWorker, dense_gradient
from fleetprune_sim.methods.sparse.frames import (
    SparseHeader,
    decode_answer,
    decode_mask,
    encode_sparse_model,
    floats,
)
from fleetprune_sim.methods.sparse.grow import GROW, GradientWorker
from fleetprune_sim.methods.sparse.importance import (
    IMPORTANCE,
    SHRINK,
    ImportanceWorker,
    reconfigure,
)
from fleetprune_sim.methods.sparse.prunable import Prunable, best_per_tensor

BATCH, MOMENTUM, DECAY, RATE = 8, 0.9, 1e-2, 0.1
SAMPLES = 27  # three whole batches and one of three


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.Softplus(),  # a ReLU that rounds to the other side makes any two float32 runs part
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(6 * 16, 3),
    )


PRUNABLE = Prunable(36 + 8 + 216 + 6 + 288 + 3, ((0, 36), (44, 216), (266, 288)))
KEPT = (12, 50, 60)


class Bench:
    """A graph, samples and a source that has both graph and model."""

    def __init__(self):
        self.net = make_net()
        graph = export_train_step(
            self.net,
            torch.zeros(1, 1, 4, 4),
            batch=BATCH,
            momentum=MOMENTUM,
            weight_decay=DECAY,
        )
        self.onnx = graph.onnx
        self.ref = GraphRef(target="graphs/x", sha256=hashlib.sha256(graph.onnx).hexdigest())
        rng = np.random.default_rng(1)
        x = rng.normal(size=(SAMPLES, 1, 4, 4)).astype(np.float32)
        self.samples = checked(x, rng.integers(0, 3, SAMPLES), str, "memory")
        self.params = np.concatenate([p.detach().numpy().ravel() for p in self.net.parameters()])
        self.stats = np.array([0.0] * 4 + [1.0] * 4, np.float32)
        every = np.ones(PRUNABLE.n, np.bool_)
        self.mask = best_per_tensor(PRUNABLE, rng.random(PRUNABLE.n), every, KEPT)
        self.graphs, self.memory = Graphs(), InMemory()

    def graph(self, ref=None):
        return self.onnx if ref else self.graphs.get(self.ref, self.graph)

    def model(self, blob):
        return self.payload

    def encode(self, *, masks=None, mask=None, version=1, **header):
        mask = self.mask if mask is None else mask
        support = PRUNABLE.support(mask)
        head = SparseHeader(
            mask_version=version,
            round=1,
            codec=Codec.FP32,
            params=int(support.sum()),
            stats=8,
            runs=PRUNABLE.runs,
            kept=int(mask.sum()),
            weight_decay=DECAY,
            **header,
        )
        masks = (mask,) if masks is None else masks
        return encode_sparse_model(head, self.params[support], self.stats, masks)

    def do(self, kind, payload, *, task="t1", version=1, epochs=2, **changes):
        """The answer of a worker of class `kind`."""
        self.payload = payload
        self.task = Task(
            task=task,
            device="d",
            kind=TaskKind.TRAIN,
            round=1,
            mask_version=version,
            shape="s",
            graphs=(self.ref,),
            model=Blob.of(payload),
            epochs=epochs,
            learning_rate=RATE,
            seed=5,
            **changes,
        )
        worker = kind(WorkerSettings("d"), self.samples, self.graphs, self.memory, source=self)
        return decode_answer(worker.handle(self.task))

    def batches(self):
        """The task's batches, as its device draws them."""
        order, *_ = streams(self.task)
        return Batches(self.samples.x, self.samples.y, BATCH, order)


@pytest.fixture(scope="module")
def compiled():
    return Bench()


@pytest.fixture
def bench(compiled):
    compiled.memory = InMemory()
    compiled.mask = compiled.mask.copy()
    return compiled


class Torch:
    """The same training, written down in torch."""

    def __init__(self, bench, mask):
        self.bench, self.mask = bench, mask
        self.net = make_net()
        self.load(bench.params * PRUNABLE.support(mask))
        weights = [p for p in self.net.parameters() if p.dim() > 1]
        scales = [p for p in self.net.parameters() if p.dim() == 1]
        groups = [{"params": weights, "weight_decay": DECAY}, {"params": scales}]
        self.optimizer = torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM)

    def load(self, flat):
        start = 0
        for p in self.net.parameters():
            part = torch.from_numpy(flat[start : start + p.numel()])
            p.data = part.reshape(p.shape).clone()
            start += p.numel()

    def flat(self, of=lambda p: p.detach()):
        return np.concatenate([of(p).numpy().ravel() for p in self.net.parameters()])

    def loss(self, batch):
        n = batch.samples
        return cross_entropy(self.net(torch.from_numpy(batch.x[:n])), torch.from_numpy(batch.y[:n]))

    def gradient(self, batch):
        """(n,) by the prunable weights; leaves the statistics alone."""
        state = {k: v.clone() for k, v in self.net.state_dict().items()}
        self.net.zero_grad()
        self.loss(batch).backward()
        self.net.load_state_dict(state)
        return self.flat(lambda p: p.grad)[PRUNABLE.index]

    def step(self, batch):
        self.optimizer.zero_grad()
        self.loss(batch).backward()
        gradient = self.flat(lambda p: p.grad)[PRUNABLE.index]
        self.optimizer.step()
        self.hold()
        return gradient

    def hold(self):
        """Parameters and momentum under the mask."""
        support, start = PRUNABLE.support(self.mask), 0
        for p in self.net.parameters():
            part = torch.from_numpy(support[start : start + p.numel()]).reshape(p.shape)
            p.data *= part
            self.optimizer.state[p]["momentum_buffer"] *= part
            start += p.numel()

    def weights(self):
        return self.flat()[PRUNABLE.index]


def close(got, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, atol=2e-4 * scale, rtol=0)


def sent(result, mask):
    """All parameters of an answer, zero where pruned."""
    support = PRUNABLE.support(mask)
    full = np.zeros(support.size, np.float32)
    full[support] = floats(result, "params", int(support.sum()))
    return full


def test_masked_training_is_torch_s_with_weights_and_momentum_held_at_zero(bench):
    result = bench.do(MaskedWorker, bench.encode())
    exact, batches = Torch(bench, bench.mask), bench.batches()
    for _ in range(2):
        for batch in batches:
            exact.step(batch)
    close(sent(result, bench.mask), exact.flat())
    assert not exact.weights()[~bench.mask].any()
    running = np.concatenate([exact.net[1].running_mean, exact.net[1].running_var])
    close(result.vectors["stats"], running)
    assert (result.header.steps, result.header.samples) == (8, SAMPLES)


def test_no_pruned_weight_is_sent_and_the_others_all_move(bench):
    result = bench.do(MaskedWorker, bench.encode())
    support = PRUNABLE.support(bench.mask)
    assert len(result.sections["params"]) < 4 * int(support.sum()) + 40
    moved = sent(result, bench.mask) - bench.params * support
    assert np.count_nonzero(moved[PRUNABLE.index]) == sum(KEPT)


def test_the_gradient_is_torch_s_for_kept_and_for_pruned_weights(bench):
    payload = bench.encode()
    bench.do(MaskedWorker, payload)
    exact = Torch(bench, bench.mask)
    params = bench.params * PRUNABLE.support(bench.mask)
    *_, short = bench.batches()
    for batch in (next(iter(bench.batches())), short):
        gradient = dense_gradient(
            bench.graph(),
            Arrays(params=params, stats=bench.stats),
            batch,
            PRUNABLE,
            weight_decay=DECAY,
        )
        expected = exact.gradient(batch)
        close(gradient, expected)
        assert np.abs(expected[~bench.mask]).max() > 0.01
    wrong = dense_gradient(
        bench.graph(),
        Arrays(params=params, stats=bench.stats),
        short,
        PRUNABLE,
        weight_decay=0.0,
    )
    np.testing.assert_allclose(wrong - gradient, DECAY * params[PRUNABLE.index], atol=1e-6)


def test_a_mask_is_kept_from_task_to_task_and_asked_for_once_it_is_another(bench):
    bench.do(MaskedWorker, bench.encode())
    bench.do(MaskedWorker, bench.encode(masks=()), task="t2")
    with pytest.raises(WireError, match=r"^a model without mask 2, which is not here$"):
        bench.do(MaskedWorker, bench.encode(masks=(), version=2), task="t3", version=2)
    bench.memory = InMemory()
    with pytest.raises(WireError, match=r"^a model without mask 1, which is not here$"):
        bench.do(MaskedWorker, bench.encode(masks=()), task="t4")


def test_feddst_moves_its_mask_halfway_by_the_gradient_of_that_step(bench):
    counts = (3, 10, 20)
    payload = bench.encode(ask=READJUST, counts=counts)
    result = bench.do(ReadjustingWorker, payload, epochs=1)
    after = decode_mask(result.sections["mask"], PRUNABLE.n, sum(KEPT))
    assert PRUNABLE.kept(after) == KEPT
    exact = Torch(bench, bench.mask)
    batches = list(bench.batches())
    for number, batch in enumerate(batches, 1):
        gradient = exact.step(batch)
        if number == len(batches) // HALFWAY:
            exact.mask, grown = readjust(PRUNABLE, bench.mask, exact.weights(), gradient, counts)
            exact.hold()
            exact.mask |= grown
    np.testing.assert_array_equal(after, exact.mask)
    close(sent(result, after), exact.flat())
    # Some have only been set to zero, since their gradient was among the largest.
    assert grown.sum() == sum(counts) > np.count_nonzero(after & ~bench.mask) > 0
    # New weights have been trained: this is what the other half of the steps is for.
    assert exact.weights()[grown].all()


def test_devices_name_the_pruned_weights_of_the_largest_gradients(bench):
    counts = (0, 7, 9)
    payload = bench.encode(ask=GROW, counts=counts)
    result = bench.do(GradientWorker, payload, epochs=1)
    exact, batches = Torch(bench, bench.mask), bench.batches()
    for batch in batches:
        exact.step(batch)
    gradient = exact.gradient(next(iter(batches)))
    places = decode_mask(result.sections["grown"], PRUNABLE.n, sum(counts))
    expected = best_per_tensor(PRUNABLE, np.abs(gradient), ~bench.mask, counts)
    np.testing.assert_array_equal(places, expected)
    close(floats(result, "gradient", 16), gradient[expected])
    worker = find_method("fedrts").worker()
    bare = bench.do(worker, payload, task="t2", epochs=1)
    assert bare.sections.keys() == {"params", "stats", "grown"}


def test_prunefl_reports_the_sum_of_squared_gradients_of_all_weights(bench):
    result = bench.do(ImportanceWorker, bench.encode(ask=IMPORTANCE), epochs=1)
    exact = Torch(bench, bench.mask)
    total = sum(np.square(exact.step(batch)) for batch in bench.batches())
    close(floats(result, "importance", PRUNABLE.n), total)


def test_prunefl_s_first_device_prunes_after_every_tenth_of_its_steps(bench):
    every = np.ones(PRUNABLE.n, np.bool_)
    limits = tuple(range(500, 49, -50))
    counts = (1, 1, 1, *limits)
    payload = bench.encode(mask=every, ask=SHRINK, counts=counts)
    result = bench.do(ImportanceWorker, payload, epochs=10)
    exact, total, steps = Torch(bench, every), 0.0, 0
    batches = bench.batches()
    for limit in limits:
        for batch in batches:
            total = total + np.square(exact.step(batch), dtype=np.float64)
        exact.mask = reconfigure(
            PRUNABLE, (1, 1, 1), exact.mask, exact.weights(), total, limit=limit
        )
        exact.hold()
        total, steps = 0.0, steps + 4
        assert sum(PRUNABLE.kept(exact.mask)) == limit
    after = decode_mask(result.sections["mask"], PRUNABLE.n, 50)
    assert result.header.steps == steps
    # Forty steps and ten choices among 540 weights: float32 may part from torch at a few of them.
    assert np.count_nonzero(after & exact.mask) >= 48
    assert result.sections["kept"] == (50).to_bytes(4, "little")
    assert floats(result, "params", 50 + PRUNABLE.parameters - PRUNABLE.n)[36:44].all()


def test_fedtiny_s_devices_judge_candidates_by_their_own_batches(bench):
    half = bench.mask & (np.arange(PRUNABLE.n) < 200)
    kept = tuple(int(np.count_nonzero(m)) for m in (bench.mask, half))
    payload = bench.encode(masks=(bench.mask, bench.mask, half), ask=SELECT, candidates=kept)
    result = bench.do(CandidateWorker, payload)
    assert result.sections.keys() == {"losses"}
    assert JUDGED == 4  # all four batches of this device
    for loss, mask in zip(floats(result, "losses", 2), (bench.mask, half), strict=True):
        exact = Torch(bench, mask)
        with torch.no_grad():
            sums = [b.samples * float(exact.loss(b)) for b in bench.batches()]
        assert loss == pytest.approx(sum(sums) / SAMPLES, rel=1e-5)
