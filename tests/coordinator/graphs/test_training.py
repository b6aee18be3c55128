"""The training graph beyond gradients: state, short batches, Taylor scores, students."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fleetprune.errors import GraphError
from fleetprune_coordinator.graphs import Fixed, GateMember, Student, export_train_step
from fleetprune_sim import models

from .graph_cases import (
    BLOCKS,
    flat,
    open_session,
    randomise,
    relative_error,
    run_graph,
    running,
    step_feeds,
    torch_step,
)


def cross_entropy(output, y):
    return F.cross_entropy(output, y, reduction="none")


def data(shape, batch, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *shape, generator=generator)
    return x, torch.randint(0, classes, (batch,), generator=generator)


def smooth(module):
    """A ReLU that rounds to the other side makes any two float32 runs part."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU | nn.ReLU6):
            setattr(module, name, nn.Softplus())
        smooth(child)
    return module


def sgd_graph(model, x, block=0, **options):
    return export_train_step(model, x, batch=len(x), block=block, gradient=True, **options)


MODELS = {
    "mlp": (lambda: models.mlp(12, 16, 5), (12,)),
    "cnn1d": (lambda: models.cnn1d(3, 5), (3, 32)),
    "digits_cnn": (lambda: models.digits_cnn(5), (1, 8, 8)),
    "efficientnet_lite0": (lambda: smooth(models.efficientnet_lite0(0.25, 5)), (3, 32, 32)),
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", MODELS)
def test_a_short_batch_steps_as_torch_does_without_the_padding(name, block):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = randomise(make())
    x, y = data(shape, 8)
    live = 5
    x[live:] *= 100  # would be seen in any statistic
    graph = sgd_graph(model, x, block)
    out = run_graph(graph, step_feeds(model, x, y, np.arange(8) < live))
    loss, gradient, stats = torch_step(model, x[:live], y[:live], np.ones(live), cross_entropy)
    assert out["loss"] == pytest.approx(loss, rel=1e-5)
    assert relative_error(out["grad"], gradient) < 5e-6  # few samples: larger relative rounding
    if len(stats):
        assert relative_error(out["stats_out"], stats) < 2e-6


def test_a_batch_of_one_sample_moves_the_running_variance_by_the_biased_one():
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5)))
    x, y = data((6,), 4)
    out = run_graph(sgd_graph(model, x), step_feeds(model, x, y, [1, 0, 0, 0]))

    exact = copy.deepcopy(model).double()
    norm, sample = exact[1], x[:1].double()
    mean = exact[0](sample)  # of one sample: all of it is mean, and the norm lets only its bias by
    F.cross_entropy(exact[3](torch.tanh(norm.bias + 0 * mean)), y[:1]).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in exact.parameters()]
    assert relative_error(out["grad"], flat(gradients)) < 2e-6
    moved = [0.9 * norm.running_mean + 0.1 * mean[0], 0.9 * norm.running_var]
    assert relative_error(out["stats_out"], flat(moved)) < 2e-6


@pytest.mark.parametrize("block", BLOCKS)
def test_twenty_steps_stay_at_torch_float64(block):
    torch.manual_seed(0)
    model = smooth(models.digits_cnn())
    graph = export_train_step(
        model, torch.zeros(1, 1, 8, 8), batch=8, block=block, weight_decay=1e-2
    )
    exact = copy.deepcopy(model).double().train()
    matrices = [p for p in exact.parameters() if p.dim() > 1]
    vectors = [p for p in exact.parameters() if p.dim() <= 1]
    optimiser = torch.optim.SGD(
        [{"params": matrices, "weight_decay": 1e-2}, {"params": vectors}], lr=0.05, momentum=0.9
    )
    state = step_feeds(model, *data((1, 8, 8), 8), np.ones(8))
    for i in range(20):
        x, y = data((1, 8, 8), 8, classes=10, seed=i)
        state |= {"x": x.numpy(), "y": y.numpy()}
        out = run_graph(graph, state)
        state |= {k: out[f"{k}_out"] for k in ("params", "momentum", "stats")}
        optimiser.zero_grad()
        F.cross_entropy(exact(x.double()), y).backward()
        optimiser.step()
    assert relative_error(state["params"], flat(exact.parameters())) < 1e-5
    assert relative_error(state["stats"], flat(running(exact))) < 1e-5


def test_weight_decay_leaves_scales_and_biases_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2, bias=False))
    x, y = data((2,), 4, classes=2)
    out = run_graph(sgd_graph(model, x, weight_decay=0.5), step_feeds(model, x, y, np.ones(4)))
    matrices = flat([torch.full_like(p, float(p.dim() > 1)) for p in model.parameters()])
    decayed = out["momentum_out"] - out["grad"]
    np.testing.assert_allclose(decayed, 0.5 * flat(model.parameters()) * matrices, atol=1e-6)


def test_momentum_by_hand():
    # One weight w = 2, x = 1, y = 0: loss (w*x)**2 = 4, gradient 4. With momentum 3 * 0.5 = 1.5
    # the velocity is 5.5, and with lr 0.1 the weight becomes 1.45.
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    graph = export_train_step(model, torch.ones(1, 1), batch=1, loss="mse", momentum=0.5)
    feeds = step_feeds(model, torch.ones(1, 1), torch.zeros(1, 1), [1.0], lr=0.1)
    out = run_graph(graph, feeds | {"momentum": np.array([3.0], np.float32)})
    assert out["loss"] == 4.0
    assert out["momentum_out"].tolist() == [5.5]
    assert out["params_out"] == pytest.approx([1.45])


@pytest.mark.parametrize("block", BLOCKS)
def test_taylor_equals_the_gradient_of_a_gate_of_ones(block):
    torch.manual_seed(0)
    model = randomise(models.resnet8(5))
    x, y = data((3, 8, 8), 4)
    norm = "body.1.first.1"
    gates = [
        [GateMember("fc.weight", 1, 0, units=32, block=2)],
        [GateMember(f"{norm}.weight", 0, 0, 16), GateMember(f"{norm}.bias", 0, 0, 16)],
        [GateMember("fc.weight", 0, 1, units=3)],
    ]
    graph = sgd_graph(model, x, block, gates=gates)
    assert (graph.meta.units, graph.meta.criterion) == (32 + 16 + 3, "taylor")
    taylor = run_graph(graph, step_feeds(model, x, y, np.ones(4)))["scores"]

    exact = copy.deepcopy(model).double().train()
    ones = torch.ones(3, 64, dtype=torch.float64).unbind()
    pooled, channels, classes = (
        o[:n].clone().requires_grad_() for o, n in zip(ones, (32, 16, 3), strict=True)
    )
    exact.fc.register_forward_pre_hook(lambda _, a: (a[0] * pooled.repeat_interleave(2),))
    exact.get_submodule(norm).register_forward_hook(lambda *a: a[2] * channels[:, None, None])
    weight = exact.fc.weight * torch.cat([ones[0][:1], classes, ones[0][:1]])[:, None]
    exact.fc.register_forward_hook(lambda _, a, __: F.linear(a[0], weight, exact.fc.bias))
    F.cross_entropy(exact(x.double()), y).backward()
    want = torch.cat([pooled.grad, channels.grad, classes.grad]) ** 2
    assert relative_error(taylor, want.numpy()) < 2e-5


def narrow_mlp(indices):
    torch.manual_seed(0)
    model, small = models.mlp(6, 16, 4), models.mlp(6, len(indices), 4)
    index = {
        "0.weight": (indices, slice(0, 6)),
        "0.bias": (indices,),
        "2.weight": (slice(0, 4), indices),
        "2.bias": (slice(None),),
    }
    return model, Student(small, index, weight=0.7)


@pytest.mark.parametrize(
    "indices",
    [list(range(8)), [0, 1, 2, 8, 9], [15, 3, 11, 1, 13, 9, 5, 7, 2, 4]],
    ids=["leading", "two runs", "scattered"],
)
def test_a_student_of_slices_gets_torchs_gradient(indices):
    model, student = narrow_mlp(indices)
    x, y = data((6,), 5, classes=4)
    sw = np.array([1, 2, 0.5, 1, 0], np.float32)
    out = run_graph(sgd_graph(model, x, student=student), step_feeds(model, x, y, sw))

    exact = copy.deepcopy(model).double()
    own, weights = exact(x.double()), torch.from_numpy(sw).double()
    w1, b1, w2, b2 = exact.parameters()
    hidden = torch.relu(F.linear(x.double(), w1[indices], b1[indices]))
    guess = F.linear(hidden, w2[:, indices], b2)
    kl = F.kl_div(guess.log_softmax(-1), own.detach().softmax(-1), reduction="none").sum(-1)
    loss = ((F.cross_entropy(own, y, reduction="none") + 0.7 * kl) * weights).sum() / 4.5
    loss.backward()
    assert out["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert relative_error(out["grad"], flat(p.grad for p in exact.parameters())) < 2e-6


def test_the_model_learns_back_from_its_student():
    model, student = narrow_mlp(list(range(8)))
    student = replace(student, mutual=0.3)
    x, y = data((6,), 4, classes=4)
    out = run_graph(sgd_graph(model, x, student=student), step_feeds(model, x, y, np.ones(4)))

    exact = copy.deepcopy(model).double()
    own = exact(x.double())
    w1, b1, w2, b2 = exact.parameters()
    guess = F.linear(torch.relu(F.linear(x.double(), w1[:8], b1[:8])), w2[:, :8], b2)
    there = F.kl_div(guess.log_softmax(-1), own.detach().softmax(-1), reduction="batchmean")
    back = F.kl_div(own.log_softmax(-1), guess.detach().softmax(-1), reduction="batchmean")
    (F.cross_entropy(own, y) + 0.7 * there + 0.3 * back).backward()
    assert relative_error(out["grad"], flat(p.grad for p in exact.parameters())) < 2e-6


def test_the_student_learns_from_the_labels_too():
    model, student = narrow_mlp(list(range(8)))
    student = replace(student, task=0.5)
    x, y = data((6,), 4, classes=4)
    prior = np.log(np.float32([0.4, 0.3, 0.2, 0.1]))
    graph = sgd_graph(model, x, student=student, prior=1.0)
    out = run_graph(graph, step_feeds(model, x, y, np.ones(4)) | {"prior": prior})

    exact = copy.deepcopy(model).double()
    own = exact(x.double())
    w1, b1, w2, b2 = exact.parameters()
    guess = F.linear(torch.relu(F.linear(x.double(), w1[:8], b1[:8])), w2[:, :8], b2)
    kl = F.kl_div(guess.log_softmax(-1), own.detach().softmax(-1), reduction="batchmean")
    shift = torch.from_numpy(prior).double()
    task = F.cross_entropy(own + shift, y) + 0.5 * F.cross_entropy(guess + shift, y)
    (task + 0.7 * kl).backward()
    assert relative_error(out["grad"], flat(p.grad for p in exact.parameters())) < 2e-6


@pytest.mark.parametrize("times", [1.0, 0.5])
def test_the_prior_shifts_the_task_loss_and_nothing_else(times):
    model, student = narrow_mlp(list(range(8)))
    x, y = data((6,), 4, classes=4)
    prior = np.log(np.float32([0.7, 0.2, 0.05, 0.05]))
    graph = sgd_graph(model, x, student=student, prior=times)
    assert graph.meta.classes == 4
    out = run_graph(graph, step_feeds(model, x, y, np.ones(4)) | {"prior": prior})

    exact = copy.deepcopy(model).double()
    own = exact(x.double())
    w1, b1, w2, b2 = exact.parameters()
    guess = F.linear(torch.relu(F.linear(x.double(), w1[:8], b1[:8])), w2[:, :8], b2)
    kl = F.kl_div(guess.log_softmax(-1), own.detach().softmax(-1), reduction="batchmean")
    shift = times * torch.from_numpy(prior).double()
    (F.cross_entropy(own + shift, y) + 0.7 * kl).backward()
    assert relative_error(out["grad"], flat(p.grad for p in exact.parameters())) < 2e-6


def test_a_graph_without_a_prior_has_no_such_input():
    model = models.mlp(6, 16, 4)
    graph = export_train_step(model, torch.zeros(1, 6), batch=2)
    assert graph.meta.classes == 0


@pytest.mark.parametrize("block", BLOCKS)
def test_a_student_with_batch_norm_uses_the_batchs_statistics(block):
    torch.manual_seed(0)

    def net(width):
        return nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Tanh(), nn.Flatten(),
            nn.Linear(width * 4, 4),
        )  # fmt: skip

    model = randomise(net(24))
    cut = slice(0, 16)
    student = Student(
        net(16),
        {
            "0.weight": (cut,), "0.bias": (cut,), "1.weight": (cut,), "1.bias": (cut,),
            "4.weight": (slice(0, 4), slice(0, 64)), "4.bias": (slice(0, 4),),
        },
    )  # fmt: skip
    x, y = data((3, 4, 4), 6, classes=4)
    out = run_graph(
        sgd_graph(model, x, block, student=student), step_feeds(model, x, y, np.ones(6))
    )

    exact = copy.deepcopy(model).double().train()
    own = exact(x.double())
    w, b, gain, offset, fw, fb = exact.parameters()
    hidden = F.batch_norm(
        F.conv2d(x.double(), w[cut], b[cut]), None, None, gain[cut], offset[cut], training=True
    )
    guess = F.linear(torch.tanh(hidden).flatten(1), fw[:, :64], fb)
    loss = F.cross_entropy(own, y) + F.kl_div(
        guess.log_softmax(-1), own.detach().softmax(-1), reduction="batchmean"
    )
    loss.backward()
    # The convolution's bias has no gradient before a BatchNorm: only rounding is left of it.
    assert relative_error(out["grad"], flat(p.grad for p in exact.parameters())) < 2e-6
    assert relative_error(out["stats_out"], flat(running(exact))) < 2e-6


def test_dropout_draws_anew_in_each_run():
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    x, y = data((8,), 4, classes=4)
    graph = sgd_graph(model, x)
    feeds = step_feeds(model, x, y, np.ones(4))
    assert graph.meta.verification.expected == ()
    session = open_session(graph)
    assert session.run(["loss"], feeds) != session.run(["loss"], feeds)


def test_batch_norm_frozen_by_the_model_trains_its_scale():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x):
            return self.norm(self.conv(x)).flatten(1)

    torch.manual_seed(0)
    model = randomise(Frozen())
    x, y = data((3, 4, 4), 4)
    out = run_graph(sgd_graph(model, x), step_feeds(model, x, y, np.ones(4)))
    _, gradient, stats = torch_step(model, x, y, np.ones(4), cross_entropy)
    assert relative_error(out["grad"], gradient) < 2e-6
    assert relative_error(out["stats_out"], stats) < 1e-7


def test_buffers_that_are_no_statistics_are_constants():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("at", torch.linspace(0, 1, 6))
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(x + self.at)

    model = Positions()
    x, y = data((6,), 4, classes=3)
    graph = sgd_graph(model, x)
    assert graph.meta.statistics == 0
    out = run_graph(graph, step_feeds(model, x, y, np.ones(4)))
    assert relative_error(out["grad"], torch_step(model, x, y, np.ones(4), cross_entropy)[1]) < 2e-6


class Body(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Sequential(layer, nn.Flatten()))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            nn.Upsample(scale_factor=2),
            "layer 'body.1.0' (Upsample): aten.upsample_nearest2d has no lowering; "
            "remove or replace that layer",
        ),
        (
            nn.ReplicationPad2d(1),
            "layer 'body.1.0' (ReplicationPad2d): aten.replication_pad2d has no lowering; "
            "remove or replace that layer",
        ),
        (
            nn.ReflectionPad2d(1),
            "layer 'body.1.0' (ReflectionPad2d): aten.reflection_pad2d has no lowering; "
            "remove or replace that layer",
        ),
        (
            nn.AdaptiveAvgPool2d(3),
            "layer 'body.1.0' (AdaptiveAvgPool2d): aten._adaptive_avg_pool2d is supported only "
            "where (3, 3) divides (4, 4); remove or replace that layer",
        ),
    ],
)
def test_an_unsupported_layer_is_named(layer, message):
    with pytest.raises(GraphError) as error:
        export_train_step(Body(layer), torch.zeros(1, 1, 4, 4), batch=2)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 4}, "block 4, expected 0, 8 or 16"),
        ({"loss": "hinge"}, "loss 'hinge', expected one of ['cross_entropy', 'mse'] or a function"),
        ({"gates": [[]]}, "gates of group 0: units [], expected one count"),
        (
            {"gates": [[GateMember("x", 0, 0, 4)]]},
            "gate x: the model has no such parameter",
        ),
        (
            {"gates": [[GateMember("0.bias", 0, 1, 16)]]},
            "gate 0.bias: indices 1..17 on axis 0 do not exist in shape (16,)",
        ),
        (
            {"student": Student(models.mlp(6, 8, 4), {})},
            "student and its index differ in parameters "
            "['0.bias', '0.weight', '2.bias', '2.weight']",
        ),
        (
            {"student": Student(nn.Linear(6, 4), {"weight": (), "bias": ()})},
            "student parameter weight is none of the model's",
        ),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(GraphError) as error:
        export_train_step(models.mlp(6, 16, 4), torch.zeros(1, 6), batch=2, **options)
    assert str(error.value) == message


def test_a_student_index_of_another_shape_is_refused():
    model, student = narrow_mlp(list(range(8)))
    student.index["0.bias"] = (slice(0, 7),)
    with pytest.raises(GraphError) as error:
        export_train_step(model, torch.zeros(1, 6), batch=2, student=student)
    assert str(error.value) == "student parameter 0.bias: index gives (7,), expected (8,)"


def test_equal_models_give_equal_bytes():
    torch.manual_seed(0)
    model = models.cnn1d(3, 5)
    first, second = (sgd_graph(model, torch.zeros(4, 3, 32)) for _ in range(2))
    assert first.onnx == second.onnx
    assert first.sha256 == second.sha256


def test_the_model_is_left_as_it_was():
    model = models.cnn1d(3, 5).eval()
    before = copy.deepcopy(model.state_dict())
    sgd_graph(model, torch.randn(4, 3, 32))
    assert not model.training
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("block", BLOCKS)
def test_frozen_parameters_do_not_move_and_the_others_do_as_ever(block):
    torch.manual_seed(0)
    model = randomise(models.digits_cnn(5))
    x, y = data((1, 8, 8), 4)
    frozen = [n for n, _ in model.named_parameters() if n.startswith(("body.0", "body.1.first"))]
    gates = [[GateMember("body.0.1.weight", 0, 0, 32)]]
    options = {"momentum": 0.9, "weight_decay": 0.1, "gates": gates}
    feeds = step_feeds(model, x, y, np.ones(4, np.float32))
    free = run_graph(sgd_graph(model, x, block, **options), feeds)
    half = run_graph(sgd_graph(model, x, block, frozen=frozen, **options), feeds)
    still = flat(torch.full(p.shape, n in frozen) for n, p in model.named_parameters())
    assert 0 < still.sum() < still.size
    np.testing.assert_array_equal(half["params_out"][still], feeds["params"][still])
    assert not half["momentum_out"][still].any()
    assert relative_error(half["params_out"][~still], free["params_out"][~still]) < 1e-6
    assert relative_error(half["scores"], free["scores"]) < 1e-5
    assert relative_error(half["grad"], free["grad"]) < 1e-5


def test_what_only_frozen_weights_need_is_not_computed():
    model = models.resnet8(5)
    x, _ = data((3, 16, 16), 4)
    frozen = [n for n, _ in model.named_parameters() if n.startswith("body")]
    whole = export_train_step(model, x, batch=4)
    head = export_train_step(model, x, batch=4, frozen=frozen)
    assert len(head.onnx) < 0.5 * len(whole.onnx)


def test_a_frozen_parameter_that_is_not_there():
    with pytest.raises(GraphError) as caught:
        export_train_step(models.mlp(4, 4, 2), torch.zeros(1, 4), batch=2, frozen=["3.weight"])
    assert str(caught.value) == "frozen parameter 3.weight: the model has no such parameter"


def flat_norm():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def pooled_norm():
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("make", "shape", "layer"),
    [(flat_norm, (6,), "'1' (BatchNorm1d)"), (pooled_norm, (1, 8, 8), "'3' (BatchNorm2d)")],
)
def test_a_norm_that_a_batch_of_one_gives_one_number(make, shape, layer):
    with pytest.raises(GraphError) as caught:
        export_train_step(make(), torch.zeros(1, *shape), batch=1)
    assert str(caught.value) == (
        f"layer {layer}: a batch of 1 gives it one number per channel, which has no spread to "
        "divide by; set training.batch to at least 2"
    )


def test_a_batch_of_one_where_no_norm_minds():
    convolutional = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)
    )
    assert export_train_step(convolutional, torch.zeros(1, 1, 8, 8), batch=1).meta.batch == 1
    # By statistics that are given it needs no others.
    assert export_train_step(flat_norm(), torch.zeros(1, 6), batch=1, fixed=Fixed()).meta.batch == 1
