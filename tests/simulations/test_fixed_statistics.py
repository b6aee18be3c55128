"""Training with BatchNorm statistics that are measured half-way and stay as they are."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.graphs import Fixed, Student, export_train_step
from fleetprune_sim.loop import LoopDevice, open_coordinator, train


def net(width: int = 8) -> nn.Module:
    """A user's model with one BatchNorm; input (4,)."""
    return nn.Sequential(
        nn.Linear(4, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3)
    )


def flat(tensors) -> np.ndarray:
    return np.concatenate([t.detach().numpy().ravel() for t in tensors]).astype(np.float32)


def test_a_step_normalises_by_the_statistics_that_it_is_given():
    torch.manual_seed(0)
    model, small = net(8), net(4)
    index = {
        "0.weight": (slice(0, 4), slice(0, 4)),
        "1.weight": (slice(0, 4),),
        "1.bias": (slice(0, 4),),
        "3.weight": (slice(0, 3), slice(0, 4)),
        "3.bias": (slice(0, 3),),
    }
    other = net(2)  # another narrower class, which this graph does not teach
    graph = export_train_step(
        model,
        torch.zeros(1, 4),
        batch=6,
        momentum=0.0,
        student=Student(small, index, weight=1.0, task=0.5, mutual=0.5),
        fixed=Fixed([other, small], 1),
        gradient=True,
    )
    session = ort.InferenceSession(graph.onnx, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    assert "stats_out" not in names
    assert graph.meta.statistics == 2 * (8 + 2 + 4)
    rng = np.random.default_rng(0)
    stats = [rng.uniform(0.5, 2.0, n).astype(np.float32) for n in (8, 8, 2, 2, 4, 4)]
    x = rng.normal(size=(6, 4)).astype(np.float32)
    y = np.array([0, 1, 2, 0, 1, 2])
    feeds = {
        "x": x,
        "y": y,
        "sw": np.ones(6, np.float32),
        "lr": np.array(0.0, np.float32),
        "params": flat(model.parameters()),
        "momentum": np.zeros(sum(p.numel() for p in model.parameters()), np.float32),
        "stats": np.concatenate(stats),
    }
    wanted = {i.name for i in session.get_inputs()}
    out = dict(zip(names, session.run(names, {k: feeds[k] for k in wanted}), strict=True))

    # The same by hand, in torch, without any BatchNorm layer.
    values = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}

    def forward(p, mean, variance):
        h = torch.from_numpy(x).double() @ p["0.weight"].T
        mean, variance = (torch.from_numpy(v).double() for v in (mean, variance))
        h = (h - mean) / (variance + 1e-5).sqrt() * p["1.weight"] + p["1.bias"]
        return h.relu() @ p["3.weight"].T + p["3.bias"]

    narrow = {
        "0.weight": values["0.weight"][:4],
        "1.weight": values["1.weight"][:4],
        "1.bias": values["1.bias"][:4],
        "3.weight": values["3.weight"][:, :4],
        "3.bias": values["3.bias"],
    }
    own, guess = forward(values, *stats[:2]), forward(narrow, *stats[4:])
    target = torch.from_numpy(y)
    entropy = nn.functional.cross_entropy

    def teach(teacher, pupil):
        teacher = teacher.detach().softmax(1)
        return (teacher * (teacher.log() - pupil.log_softmax(1))).sum(1).mean()

    loss = entropy(own, target) + teach(own, guess) + 0.5 * entropy(guess, target)
    loss = loss + 0.5 * teach(guess, own)
    gradients = torch.autograd.grad(loss, list(values.values()))
    assert out["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert np.allclose(out["grad"], flat(gradients), atol=1e-5)


def fleet(folder, **training) -> FleetConfig:
    return FleetConfig.model_validate(
        {
            "fleet": "fixed",
            "state": folder / "state",
            "model": {
                "factory": "tests.simulations.test_fixed_statistics:net",
                "input_shape": [4],
                "classes": 3,
            },
            "training": {"rounds": 6, "batch": 8, "remask_every": 2, **training},
            "pruning": {"channel_multiple": 2},
            "classes": {"large": {}, "small": {"macs_share": 0.5}},
        }
    )


def devices() -> dict[str, LoopDevice]:
    rng = np.random.default_rng(3)
    found = {}
    for i in range(4):
        # Each owner's samples are shifted, which a batch's own statistics would hide.
        x = (rng.normal(size=(32, 4)) + 2 * rng.normal(size=4)).astype(np.float32)
        y = x[:, :3].argmax(axis=1).astype(np.int64)
        found[f"d{i}"] = LoopDevice("large" if i < 2 else "small", i != 1, x, y)
    return found


def statistics(coordinator) -> dict[str, np.ndarray]:
    stats = coordinator.rounds.model.stats
    return {f"{c}/{n}": v.copy() for c, tensors in stats.items() for n, v in tensors.items()}


def test_statistics_are_measured_half_way_and_shipped_as_they_were_then(tmp_path):
    told, seen = [], []
    with open_coordinator(fleet(tmp_path, fixed_statistics=0.5), devices()) as coordinator:

        def closed(metrics):
            told.append((metrics["phase"], metrics["round"]))
            seen.append(statistics(coordinator))

        train(coordinator, devices(), closed)
        released = coordinator.release()
    phases = [phase for phase, _ in told]
    measured = phases.count("calibrate")
    assert measured >= 1
    assert told[:3] == [("train", 1), ("train", 2), ("train", 3)]
    assert told[3 : 3 + measured] == [("calibrate", 3)] * measured
    assert told[3 + measured :] == [("train", 4), ("train", 5), ("train", 6)]
    then, last = seen[2 + measured], seen[-1]
    assert all(np.array_equal(then[name], last[name]) for name in then)
    assert any(not np.array_equal(seen[2][name], then[name]) for name in then)
    assert set(released) == {"large", "small"}


def test_a_coordinator_that_stops_half_way_goes_on_with_the_same_statistics(tmp_path):
    class Stop(Exception):
        pass

    def run(folder, stop_after=None):
        config, own = fleet(folder, fixed_statistics=0.5), devices()
        with open_coordinator(config, own) as coordinator:

            def closed(metrics):
                if (metrics["phase"], metrics["round"]) == stop_after:
                    raise Stop

            train(coordinator, own, closed)
            return statistics(coordinator)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run(tmp_path / "a")
    with pytest.raises(Stop):
        run(tmp_path / "b", ("train", 4))
    resumed = run(tmp_path / "b")
    assert all(np.allclose(whole[name], resumed[name], atol=1e-5) for name in whole)


def test_by_default_statistics_are_measured_at_the_end(tmp_path):
    told = []
    with open_coordinator(fleet(tmp_path), devices()) as coordinator:
        train(coordinator, devices(), lambda m: told.append((m["phase"], m["round"])))
    assert told[:6] == [("train", n) for n in range(1, 7)]
    assert {phase for phase, _ in told[6:]} == {"calibrate"}
