"""Single weights over whole trainings: real coordinator, real devices, real files."""

from itertools import pairwise

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from fleetprune.criteria import CATALOGUE, Criterion, weights
from fleetprune.layout import Role, tensor_index
from fleetprune.messages import Codec, ResultHeader
from fleetprune.model_payload import decode_model
from fleetprune.result import decode_result, encode_result
from fleetprune.update import SparseUpdate, decode_update
from fleetprune_coordinator.artifacts import build, predict, small_model
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.export import Format, export, load
from fleetprune_coordinator.records import Phase
from fleetprune_coordinator.weight_scores import Changes, weight_scores, within_rows
from fleetprune_sim import loop
from fleetprune_sim.loop import LoopDevice, open_coordinator, train
from fleetprune_sim.models import mlp

INPUTS, HIDDEN, CLASSES = 32, 48, 4
FLASH = 3400
"""Of 7,9 kB for the dense file."""


def config(folder, pruning, classes=None, **training):
    """Two classes over a perceptron of 1536 and 192 weights."""
    folder.mkdir(exist_ok=True)
    x, y = samples(200, seed=9)
    np.savez(folder / "test.npz", x=x, y=y)
    schedule, hidden = training.pop("schedule", {}), training.pop("hidden", HIDDEN)
    return FleetConfig.model_validate(
        {
            "fleet": "tiny",
            "state": folder / "state",
            "model": {
                "factory": "fleetprune_sim.models:mlp",
                "arguments": {"inputs": INPUTS, "hidden": hidden, "classes": CLASSES},
                "input_shape": [INPUTS],
                "classes": CLASSES,
            },
            "data": {"test": folder / "test.npz"},
            "training": {
                "rounds": 4,
                "batch": 8,
                "devices_per_round": 4,
                "remask_every": 1,
                "last_remask": 3,
                "calibration_passes": 1,
                "codec": "fp32",
                **training,
            },
            "schedule": schedule,
            "pruning": {"channel_multiple": 4, **pruning},
            "release": {"deltas": False},  # what is compared with torch is not rounded
            "classes": classes or {"large": {}, "small": {"flash_bytes": FLASH}},
        }
    )


def samples(n, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, INPUTS)).astype(np.float32)
    return x, x[:, :CLASSES].argmax(axis=1).astype(np.int64)


def devices(small="small"):
    """Four of them, two of each class."""
    return {
        f"d{i}": LoopDevice("large" if i < 2 else small, True, *samples(40 + 8 * i, seed=i))
        for i in range(4)
    }


def file_weights(data):
    """The weights of a file as its operators see them, largest first."""
    proto = onnx.load_from_string(data)
    names = [n.input[1] for n in proto.graph.node if n.op_type in {"Gemm", "MatMul"}]
    held = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    for name in names:
        if name not in held:
            proto.graph.output.append(helper.make_tensor_value_info(name, 1, None))
    session = ort.InferenceSession(proto.SerializeToString())
    feed = {session.get_inputs()[0].name: np.zeros((1, INPUTS), np.float32)}
    made = dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))
    return [held.get(name, made.get(name)) for name in names]


def supports(coordinator, name="small"):
    return {n: k.copy() for n, k in coordinator.rounds.model.supports.get(name, {}).items()}


def raw(masks):
    return {name: kept.tobytes() for name, kept in masks.items()}


GRANULARITIES = {
    "weight": ({"granularity": "weight"}, {"flash_bytes": FLASH}, FLASH),
    "hybrid": ({"granularity": "hybrid"}, {"macs_share": 0.6, "flash_bytes": 2400}, 2400),
    "2:4": ({"granularity": "weight", "pattern": "2:4"}, {"flash_bytes": 6000}, None),
    "4x1": ({"granularity": "weight", "pattern": "4x1"}, {"flash_bytes": FLASH}, FLASH),
    "1x4": ({"granularity": "hybrid", "pattern": "1x4"}, {"flash_bytes": FLASH}, FLASH),
}


@pytest.mark.parametrize("kind", GRANULARITIES)
def test_what_is_released_is_the_masked_network_within_its_bytes(tmp_path, kind):
    pruning, small, limit = GRANULARITIES[kind]
    made = config(tmp_path, pruning, {"large": {}, "small": small})
    with open_coordinator(made, devices()) as coordinator:
        train(coordinator, devices())
        released = coordinator.release()
        model = coordinator.rounds.model
        network = small_model(coordinator.network, coordinator.architecture, model, "small")
        dense = build(
            coordinator.network, coordinator.architecture, model, "small",
            coordinator.test.x[:8],
        )  # fmt: skip
    file = released["small"].artifact.onnx
    assert len(file) <= small["flash_bytes"]
    assert len(file) < len(dense.onnx)
    if limit is not None:
        # What is counted for two layers, their shared constants and the rest is an upper bound.
        assert len(file) > limit - 2 * 100 * (1 + ("x" in kind)) - 150 - 96 - 20
    masks = model.supports["small"]
    assert masks.keys() == {"0.weight", "2.weight"}
    for spec, found in zip(("0.weight", "2.weight"), file_weights(file), strict=True):
        weight = network.get_parameter(spec).detach().numpy()
        oriented = found if found.shape == weight.shape else found.T
        np.testing.assert_array_equal(oriented, weight)
        assert not oriented[~masks[spec]].any()
        assert np.count_nonzero(oriented) == masks[spec].sum()
    x, y = coordinator.test.x, coordinator.test.y
    with torch.no_grad():
        outputs = network(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(predict(file, x), outputs, atol=1e-5)
    accuracy = float((outputs.argmax(axis=1) == y).mean())
    assert released["small"].manifest.accuracy == accuracy
    assert accuracy > 0.4  # it has learned something: chance is a quarter


@pytest.mark.parametrize("curve", ["polynomial", "linear"])
def test_density_falls_from_round_to_round_and_masks_still_change_at_the_end(tmp_path, curve):
    made = config(
        tmp_path,
        {"granularity": "weight"},
        schedule={"curve": curve, "begin": 1, "end": 4},
        rounds=6,
        last_remask=6,
    )
    left, masks = [], []

    def look(metrics):
        if metrics["phase"] == "train":
            masks.append(supports(coordinator))
            left.append(sum(int(k.sum()) for k in masks[-1].values()) or INPUTS * HIDDEN + 192)

    with open_coordinator(made, devices()) as coordinator:
        assert coordinator.rounds.model.supports == {}
        train(coordinator, devices(), look)
    assert left == sorted(left, reverse=True)
    assert left[0] > left[1] > left[2]
    assert left[2] == pytest.approx(left[5], abs=20)
    assert all(raw(a) != raw(b) for a, b in pairwise(masks[2:5]))


def test_masks_stay_between_two_that_are_asked_for(tmp_path):
    made = config(tmp_path, {"granularity": "weight"}, remask_every=2, last_remask=4, rounds=5)
    masks = []

    def look(metrics):
        if metrics["phase"] == "train":
            masks.append(raw(supports(coordinator)))

    with open_coordinator(made, devices()) as coordinator:
        first = raw(supports(coordinator))
        train(coordinator, devices(), look)
    assert [a == b for a, b in pairwise([first, *masks])] == [True, False, True, False, True]


def test_updates_are_as_long_as_what_is_left_and_arrive_as_zeros_elsewhere(tmp_path, monkeypatch):
    """Looked at on the way: what a device gets and what it says."""
    seen = []
    whole = loop._device

    def listening(name, device, graphs):
        run = whole(name, device, graphs)

        def heard(task, read):
            answer = run(task, read)
            seen.append((coordinator.rounds.model, decode_result(answer), task, read))
            return answer

        return heard

    monkeypatch.setattr(loop, "_device", listening)
    made = config(tmp_path, {"granularity": "hybrid"}, codec="int4", top_k=0.5, rounds=3)
    with open_coordinator(made, devices()) as coordinator:
        train(coordinator, devices())
        architecture = coordinator.architecture
        checked = 0
        for model, result, task, read in seen:
            if result.update is None:
                continue
            said = loop.Task.from_bytes(task)
            kept = model.support(architecture, said.shape)
            size = model.parameters(architecture, said.shape)
            update = decode_update(result.update, mask_version=model.mask_version, size=size)
            assert update.dense().size == size
            payload = decode_model(
                read(f"blobs/{said.model.sha256}"),
                parameters=model.vectors(architecture, said.shape)[0].size,
                statistics=0,
            )
            assert (payload.support is None) == (kept is None)
            if kept is not None:
                assert np.array_equal(payload.support, kept)
                assert not payload.params[~kept].any()
                checked += 1
        assert checked >= 6


def answered(coordinator, task, values, **header):
    update = SparseUpdate(task.mask_version, values.size, values, None).encode(Codec.FP32)
    fields = {
        "task": task.task, "device": task.device, "kind": task.kind, "round": task.round,
        "mask_version": task.mask_version, "samples": 10, "steps": 1, "loss": 1.0, **header,
    }  # fmt: skip
    return encode_result(ResultHeader(**fields), {}, update)


def test_an_update_of_another_length_is_refused_and_changes_nothing(tmp_path):
    made = config(tmp_path, {"granularity": "weight"}, outlier=0, criterion="magnitude")
    with open_coordinator(made, devices()) as coordinator:
        rounds, architecture = coordinator.rounds, coordinator.architecture
        (task,) = [a.task for a in rounds.begin() if a.task.device == "d3"]
        size = rounds.model.parameters(architecture, "small")
        every = rounds.model.support(architecture, "small").size
        assert size < every
        before = {n: v.copy() for n, v in rounds.model.params.items()}
        bad = [
            answered(coordinator, task, np.ones(n, np.float32))
            for n in (every, size + 1, size - 1, 1, 0)
        ]
        assert rounds.finish(bad)["refused"] == 5
        said = [e.text for e in coordinator.registry.events() if e.kind == "refused"]
        assert sorted(said) == sorted(
            f"update of a support of {n} values, expected {size}"
            for n in (every, size + 1, size - 1, 1, 0)
        )
        for name, old in before.items():
            np.testing.assert_array_equal(rounds.model.params[name], old)


def test_what_a_class_has_pruned_is_averaged_over_the_others_and_else_stays(tmp_path):
    classes = {"large": {"flash_bytes": 5000}, "small": {"flash_bytes": FLASH}}
    made = config(
        tmp_path, {"granularity": "weight"}, classes, outlier=0, criterion="magnitude",
        remask_every=0,
    )  # fmt: skip
    with open_coordinator(made, devices()) as coordinator:
        rounds, architecture = coordinator.rounds, coordinator.architecture
        tasks = {a.task.device: a.task for a in rounds.begin()}
        before = rounds.model
        sizes = {n: before.parameters(architecture, n) for n in classes}
        one = answered(
            coordinator, tasks["d0"], np.full(sizes["large"], 2.0, np.float32), samples=10
        )
        other = answered(
            coordinator, tasks["d3"], np.full(sizes["small"], 6.0, np.float32), samples=30
        )
        assert rounds.finish([one, other])["answers"] == 2
        wide, thin = (before.supports[n]["0.weight"] for n in classes)
        assert not (thin & ~wide).any()  # the smaller class's is within the other's
        moved = rounds.model.params["0.weight"] - before.params["0.weight"]
        np.testing.assert_allclose(moved[wide & thin], 5.0, rtol=1e-5)  # (10*2 + 30*6) / 40
        np.testing.assert_allclose(moved[wide & ~thin], 2.0, rtol=1e-5)
        assert (~wide).any()
        assert not moved[~wide].any()


class StopHereError(Exception):
    pass


@pytest.mark.parametrize(
    ("pruning", "training"),
    [
        ({"granularity": "weight"}, {"criterion": "taylor"}),
        ({"granularity": "hybrid"}, {"criterion": "movement"}),
    ],
)
def test_a_coordinator_that_was_restarted_releases_the_same_bytes(tmp_path, pruning, training):
    classes = {"large": {}, "small": {"flash_bytes": 6000}}
    if pruning["granularity"] == "hybrid":
        classes["small"] |= {"flash_bytes": 2400, "macs_share": 0.6}
    schedule = {"begin": 1, "end": 4}

    def made(folder):
        return config(
            folder, pruning, classes, **training, schedule=schedule, rounds=5, last_remask=5
        )

    with open_coordinator(made(tmp_path / "one"), devices()) as whole:
        train(whole, devices())
        expected = {n: r.artifact.onnx for n, r in whole.release().items()}
    stopped, before = [], {}

    def stop(metrics):
        stopped.append(metrics["round"])
        raise StopHereError

    for _ in range(4):
        with open_coordinator(made(tmp_path / "two"), devices()) as part:
            if stopped:
                assert raw(supports(part)) == before
            with pytest.raises(StopHereError):
                train(part, devices(), stop)
            before = raw(supports(part))
    assert stopped == [1, 2, 3, 4]
    with open_coordinator(made(tmp_path / "two"), devices()) as part:
        train(part, devices())
        got = {n: r.artifact.onnx for n, r in part.release().items()}
        assert part.rounds.model.mask_version == whole.rounds.model.mask_version
    assert raw(supports(part)) == raw(supports(whole))
    assert got == expected


LATER = [c for c in Criterion if CATALOGUE[c].later]
CASES = [(c, "hybrid") for c in LATER] + [(c, "weight") for c in LATER if CATALOGUE[c].weights]


@pytest.mark.parametrize(("criterion", "granularity"), CASES)
def test_every_criterion_runs(tmp_path, criterion, granularity):
    small = {"flash_bytes": FLASH}
    if granularity == "hybrid":
        small |= {"macs_share": 0.6}
    made = config(
        tmp_path, {"granularity": granularity}, {"large": {}, "small": small},
        rounds=2, last_remask=2, criterion=criterion,
    )  # fmt: skip
    if criterion is Criterion.GAMMA:  # goes by the scale of norms
        model = made.model.model_copy(
            update={"factory": "tests.coordinator.test_weight_rounds:normed", "arguments": {}}
        )
        made = made.model_copy(update={"model": model})
    with open_coordinator(made, devices()) as coordinator:
        first = raw(supports(coordinator))
        train(coordinator, devices())
        model = coordinator.rounds.model
        assert (raw(supports(coordinator)) != first) == (criterion is not Criterion.NONE)
        bytes_ = coordinator.planner.weights.bytes(model.shapes["small"], model.supports["small"])
        assert FLASH - 10 < bytes_ <= FLASH
        assert len(coordinator.artifact("small").onnx) <= FLASH


def normed():
    """The perceptron with a norm."""
    return nn.Sequential(
        nn.Linear(INPUTS, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)
    )


def test_wanda_of_a_fleet_is_that_of_its_pooled_samples(tmp_path):
    """Of the second layer: what the first reads is no unit, so nobody measures it."""
    made = config(
        tmp_path, {"granularity": "weight"}, {"small": {"flash_bytes": FLASH}},
        rounds=1, last_remask=1, criterion="wanda", down_codec="fp32",
    )  # fmt: skip
    fleet = {n: LoopDevice("small", True, d.x, d.y) for n, d in devices().items()}
    with open_coordinator(made, fleet) as coordinator:
        rounds, architecture = coordinator.rounds, coordinator.architecture
        start = rounds.model.dense(architecture, "small")
        train(coordinator, fleet)
        norms, end = rounds.ledger.norms(), rounds.model.params
        names = coordinator.planner.weights.names
    found = weight_scores(
        Criterion.WANDA, end, Changes(Criterion.WANDA, names), norms=norms, flow=None
    )
    pooled = np.concatenate([d.x for d in fleet.values()]).astype(np.float64)
    hidden = np.maximum(pooled @ start["0.weight"].T.astype(np.float64) + start["0.bias"], 0)
    mean = np.square(hidden).mean(axis=0)
    assert norms.keys() == {"2.weight"}
    np.testing.assert_allclose(norms["2.weight"], mean, rtol=1e-5)
    exact = within_rows(weights.wanda(end["2.weight"], mean))
    np.testing.assert_array_equal(found["2.weight"], exact)
    np.testing.assert_array_equal(found["0.weight"], np.abs(end["0.weight"]))


def test_quantised_files_of_pruned_weights_hold_the_budget_and_stay_integer(tmp_path):
    limit = 4800
    classes = {"large": {}, "small": {"macs_share": 0.9, "flash_bytes": limit}}
    made = config(tmp_path, {"granularity": "hybrid", "int8": True}, classes, hidden=128)
    with open_coordinator(made, devices()) as coordinator:
        train(coordinator, devices())
        packed = coordinator.artifact("small")
        model, planner = coordinator.rounds.model, coordinator.planner
        coordinator.planner.weights.rule = type(planner.weights.rule)()  # as without pruning
        coordinator.planner.check = lambda name, costs: None
        plain = coordinator.artifact("small")
    assert packed.int8
    assert plain.int8
    assert len(packed.onnx) <= limit < len(plain.onnx)
    assert not model.supports["small"]["0.weight"].all()
    x = coordinator.test.x
    assert predict(packed.onnx, x).tobytes() == predict(plain.onnx, x).tobytes()
    kernels = [ran(data, tmp_path / "optimised.onnx") for data in (packed.onnx, plain.onnx)]
    assert kernels[0] == kernels[1]
    assert any("QGemm" in k or "QLinear" in k or "MatMulInteger" in k for k in kernels[0])


def ran(data, path):
    """The operators that onnxruntime makes of a file."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3  # that such a file suits this machine alone
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("kind", [Format.ONNX, Format.STATE_DICT])
def test_an_exported_class_has_its_zeros(tmp_path, kind):
    made = config(tmp_path, {"granularity": "weight"}, rounds=1)
    with open_coordinator(made, devices()) as coordinator:
        train(coordinator, devices())
        masks = supports(coordinator)
        released = coordinator.release()["small"].artifact.onnx
    (one,) = export(made, "small", kind, tmp_path / "small.out")
    if kind is Format.ONNX:
        data = one.path.read_bytes()
        assert (
            predict(data, coordinator.test.x).tobytes()
            == predict(released, coordinator.test.x).tobytes()
        )
        assert len(data) <= FLASH
        return
    network = load(one.path, tmp_path)
    for name, kept in masks.items():
        weight = network.get_parameter(name).detach().numpy()
        assert np.array_equal(weight != 0, kept)


def test_a_model_that_comes_trained_is_pruned_before_the_first_round(tmp_path):
    torch.manual_seed(0)
    start = tmp_path / "start.pt"
    made = config(
        tmp_path,
        {"granularity": "hybrid"},
        {"large": {}, "small": {"macs_share": 0.6, "flash_bytes": 2400}},
    )
    torch.save(mlp(INPUTS, HIDDEN, CLASSES).state_dict(), start)
    made = made.model_copy(update={"model": made.model.model_copy(update={"initial": start})})
    with open_coordinator(made, devices()) as coordinator:
        first = coordinator.rounds.model
        assert first.supports.keys() == {"small"}
        seen = []
        train(coordinator, devices(), lambda m: seen.append((m["phase"], m["mask_version"])))
        assert seen[0][0] == Phase.SCORE.value
        assert seen[0][1] > first.mask_version
        spec = coordinator.architecture.tensor("0.weight")
        assert spec.role is Role.PARAMETER
        model = coordinator.rounds.model
        index = tensor_index(spec, coordinator.architecture.groups, model.shapes["small"])
        assert model.params["0.weight"][index].shape == model.supports["small"]["0.weight"].shape
        assert len(coordinator.release()["small"].artifact.onnx) <= 2400
