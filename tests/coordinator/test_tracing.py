import prunable_nets as nets
import pytest
import torch
from prunable_nets import Scale, Wired, conv, head
from torch import nn

from fleetprune.costs import Costs, costs, parameters
from fleetprune.errors import TraceError
from fleetprune.layout import Activation, Gate, Role, Segment
from fleetprune_coordinator.recording import SUPPORTED
from fleetprune_coordinator.resize import resize
from fleetprune_coordinator.selfcheck import check_cut_equals_zeroed
from fleetprune_coordinator.tracing import trace


def traced(net):
    model, example = nets.make(net)
    return model, example, trace(model, example)


def half(architecture):
    return {g: max(1, n // 2) for g, n in architecture.groups.items()}


def counted_macs(model, example):
    """MACs by hooks on the layers: independent of the tracer."""
    total = []

    def count(layer, _, out):
        rows = layer.weight.shape[0]
        total.append(layer.weight.numel() * (out.numel() // rows))

    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(example)
    return sum(total)


@pytest.mark.parametrize("net", nets.GROUPS, ids=lambda f: f.__name__)
def test_groups_and_costs(net):
    model, example, architecture = traced(net)
    assert architecture.groups == nets.GROUPS[net]
    assert list(architecture.groups) == list(nets.GROUPS[net])
    assert architecture.input_shape == tuple(example.shape[1:])
    assert architecture.classes == model(example).shape[-1]
    assert [t.name for t in architecture.role(Role.PARAMETER)] == [
        name for name, _ in model.named_parameters()
    ]
    assert parameters(architecture, architecture.dense) == sum(
        p.numel() for p in model.parameters()
    )
    for keep in (architecture.dense, half(architecture), dict.fromkeys(architecture.groups, 1)):
        small = resize(model, architecture, keep)
        assert costs(architecture, keep).macs == counted_macs(small, example)
        for spec in architecture.role(Role.PARAMETER):
            assert tuple(small.get_parameter(spec.name).shape) == spec.shape(keep)


def test_golden_numbers():
    _, _, architecture = traced(nets.tiny)
    # 2*9*16 + 96*1 MACs; 18 + 2 + 96 + 3 weights; the input and the convolution's output at once.
    assert costs(architecture, {"0": 2}) == Costs(4 * 119, 288 + 96, 64 + 128)
    assert costs(architecture, {"0": 1}) == Costs(4 * 61, 144 + 48, 64 + 64)
    assert architecture.activations == (
        Activation(fixed=64),
        Activation(per_unit={"0": 64}),
        Activation(fixed=12),
    )
    assert architecture.live == ((0, 1), (1,), (1, 2))  # ReLU in place, Flatten a view
    assert [t.positions for t in architecture.tensors] == [16, 0, 1, 0]
    assert architecture.observed == ("3.weight",)
    assert architecture.overhead_bytes == 0


def test_residual_holds_three_buffers():
    _, _, architecture = traced(nets.resnet)
    # At the addition: the stream, the branch and the sum, 4 channels of 8x8 each.
    assert costs(architecture, architecture.dense).peak_activation_bytes == 3 * 4 * 64 * 4


def test_a_gated_activation_holds_three_buffers():
    _, _, architecture = traced(nets.gated_activations)
    assert costs(architecture, architecture.dense).peak_activation_bytes == 3 * 6 * 64 * 4


def test_flatten_gives_blocks():
    _, _, architecture = traced(nets.flatten_cnn)
    assert architecture.tensor("4.weight").axes == (
        (Segment(group="4", units=7),),
        (Segment(group="0", units=6, block=16),),
    )


def test_concat_gives_several_segments():
    _, _, architecture = traced(nets.concat)
    both = (Segment(group="left.0", units=6), Segment(group="right", units=8))
    assert architecture.tensor("mix.2.weight").axes[1] == both
    assert architecture.tensor("mix.0.weight").axes == (both,)
    assert architecture.tensor("mix.0.running_var").axes == (both,)
    assert architecture.observed == (
        "left.0.weight",
        "right.weight",
        "mix.2.weight",
        "head.2.weight",
    )
    assert architecture.gates["left.0"] == (
        Gate(tensor="left.1.weight", axis=0),
        Gate(tensor="left.1.bias", axis=0),
        Gate(tensor="mix.0.weight", axis=0),
        Gate(tensor="mix.0.bias", axis=0),
    )
    assert architecture.gates["right"] == (
        Gate(tensor="mix.0.weight", axis=0, start=6),
        Gate(tensor="mix.0.bias", axis=0, start=6),
    )
    assert architecture.gates["stem"] == (
        Gate(tensor="stem.weight", axis=0),
        Gate(tensor="stem.bias", axis=0),
    )


def test_an_addition_to_a_concat_splits_the_other_side():
    _, _, architecture = traced(nets.concat_then_add)
    both = (Segment(group="left", units=4), Segment(group="right", units=6))
    assert architecture.tensor("both.weight").axes[0] == both
    assert architecture.gates["right"][-1] == Gate(tensor="both.bias", axis=0, start=4)


def test_depthwise_follows_its_input_and_is_not_observed():
    _, _, architecture = traced(nets.separable)
    spec = architecture.tensor("1.0.weight")
    assert spec.axes[0] == (Segment(group="0.0", units=4),)
    assert spec.groups() == {"0.0"}
    assert spec.positions == 64
    assert architecture.observed == ("2.0.weight", "4.2.weight")
    assert {g.tensor for g in architecture.gates["0.0"]} == {
        "0.1.weight",
        "0.1.bias",
        "1.1.weight",
        "1.1.bias",
    }


def test_layer_norm_is_the_gate():
    _, _, architecture = traced(nets.layer_norm_mlp)
    assert architecture.gates["0"] == (
        Gate(tensor="1.weight", axis=0),
        Gate(tensor="1.bias", axis=0),
    )


def test_folded_norms_cost_one_bias():
    _, _, architecture = traced(nets.norm_mlp)
    shipped = {t.name: t.artifact_bytes for t in architecture.tensors}
    assert shipped == {
        "0.weight": 4,  # without a bias: one value per unit is left of its norm
        "1.running_mean": 4,
        "1.running_var": 0,
        "3.weight": 4,  # with a bias: the norm goes into it
        "3.bias": 4,
        "4.weight": 0,
        "4.bias": 0,
        "4.running_mean": 0,
        "4.running_var": 0,
        "7.weight": 4,
        "7.bias": 4,
    }


def test_a_layer_folded_twice_is_shipped_twice():
    _, _, architecture = traced(nets.shared_block)
    shipped = {t.name: t.artifact_bytes for t in architecture.tensors}
    assert shipped["conv.weight"] == 8
    assert [shipped[f"{norm}.bias"] for norm in ("first", "second")] == [4, 4]
    assert [shipped[f"{norm}.weight"] for norm in ("first", "second")] == [0, 0]


def test_a_norm_that_cannot_be_folded_is_shipped():
    _, _, architecture = traced(nets.concat)
    shipped = {t.name: t.artifact_bytes for t in architecture.tensors}
    leaves = ("weight", "bias", "running_mean", "running_var")
    assert [shipped[f"mix.0.{leaf}"] for leaf in leaves] == [4, 4, 4, 4]
    assert [shipped[f"left.1.{leaf}"] for leaf in leaves] == [0, 4, 0, 0]


def test_a_layer_called_twice_counts_twice():
    _, _, architecture = traced(nets.called_twice)
    assert architecture.tensor("b.weight").positions == 128
    assert architecture.tensor("a.weight").positions == 64


def test_per_channel_parameters_are_cut_and_scalars_are_not():
    _, _, architecture = traced(nets.scaled)
    cut = {t.name for t in architecture.tensors if t.groups()}
    assert {"1.scale", "2.weight"} <= cut
    assert not {"3.scale", "5.weight"} & cut
    assert architecture.tensor("1.scale").axes[0] == (Segment(group="0", units=4),)


def test_the_model_is_left_alone():
    model, example = nets.make(nets.plain_cnn)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trace(model, example)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_same_model_gives_the_same_description():
    assert (
        traced(nets.mobilenet)[2].model_dump_json() == traced(nets.mobilenet)[2].model_dump_json()
    )


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    return net


REFUSED = {
    "tied": (tied, (4,), "2 (Linear) shares a weight with 0 (Linear), expected its own"),
    "grouped": (
        lambda: nn.Sequential(conv(4, 8), conv(8, 8, groups=2), head(8)),
        (4, 8, 8),
        f"1 (Conv2d): groups=2 with 8 to 8 channels, supported are {SUPPORTED}",
    ),
    "depthwise multiplier": (
        lambda: nn.Sequential(conv(3, 4), conv(4, 8, groups=4), head(8)),
        (3, 8, 8),
        f"1 (Conv2d): groups=4 with 4 to 8 channels, supported are {SUPPORTED}",
    ),
    "transposed": (
        lambda: nn.Sequential(conv(3, 4), nn.ConvTranspose2d(4, 4, 2), head(4)),
        (3, 8, 8),
        f"1 (ConvTranspose2d) is not supported, supported are {SUPPORTED}",
    ),
    "group norm": (
        lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), head(8)),
        (3, 8, 8),
        f"1 (GroupNorm) is not supported, supported are {SUPPORTED}",
    ),
    "no running statistics": (
        lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, track_running_stats=False), head(4)),
        (3, 8, 8),
        "1 (BatchNorm2d) keeps no running statistics, expected that it does",
    ),
    "norm over several axes": (
        lambda: nn.Sequential(conv(3, 4), nn.LayerNorm((4, 8, 8)), head(4)),
        (3, 8, 8),
        "1 (LayerNorm) normalises over (4, 8, 8), expected one axis",
    ),
    "norm without weights": (
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2)
        ),
        (4,),
        "1 (LayerNorm) has no weights, expected elementwise_affine=True",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)),
        (7,),
        "0 (LazyLinear) has no shape yet, expected a model that has run once",
    ),
    "nothing to cut": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 3)),
        (3, 2, 2),
        "the model (Sequential) has no layer whose outputs can be cut, expected at least one Conv "
        "or Linear layer besides the output",
    ),
    "wrong input shape": (
        lambda: nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 3)),
        (11,),
        "0 (Linear): does not run on an input of shape (1, 11): a and b must have same reduction "
        "dim, but got [1, 11] X [12, 4].",
    ),
    "branch on values": (
        lambda: Wired(lambda m, x: m.b(m.a(x)) if x.sum() > 0 else m.b(x), a=conv(3, 3), b=head(3)),
        (3, 8, 8),
        "the model (Wired): does not run on shapes alone, expected no branch on values: "
        "Tensor.item() cannot be called on meta tensors",
    ),
    "branch on width": (
        lambda: Wired(
            lambda m, x: m.b(torch.relu(y) if (y := m.a(x)).shape[1] > 5 else y),
            a=conv(3, 6),
            b=head(6),
        ),
        (3, 8, 8),
        "group a: a narrower model executes other operators, expected control flow that does not "
        "depend on channel counts",
    ),
    "width in the code": (
        lambda: Wired(lambda m, x: m.b(m.a(x).view(-1, 384)), a=conv(3, 6), b=nn.Linear(384, 2)),
        (3, 8, 8),
        "group a, with fewer units: the model (Wired): does not run: shape '[-1, 384]' is invalid "
        "for input of size 320",
    ),
    "product outside a layer": (
        lambda: Wired(
            lambda m, x: nn.functional.linear(torch.relu(m.a(x)), m.b.scale),
            a=nn.Linear(4, 6),
            b=Scale(3, 6),
        ),
        (4,),
        f"the model (Wired): a product (mm) outside a layer, supported are {SUPPORTED}",
    ),
    "attention": (
        lambda: Wired(
            lambda m, x: m.c((m.a(x) @ m.b(x).transpose(1, 2) @ x).mean(1)),
            a=nn.Linear(4, 6),
            b=nn.Linear(4, 6),
            c=nn.Linear(4, 3),
        ),
        (7, 4),
        f"the model (Wired): a product of activations (bmm), supported are {SUPPORTED}",
    ),
    "two outputs": (
        lambda: Wired(lambda m, x: (m.a(x), x), a=nn.Linear(4, 3)),
        (4,),
        "the model (Wired): output tuple, expected a tensor (1, classes) that is computed from "
        "the input",
    ),
    "halves that meet": (
        lambda: Wired(
            lambda m, x: m.b(torch.mul(*m.a(x).chunk(2, 1))), a=nn.Linear(4, 6), b=nn.Linear(3, 2)
        ),
        (4,),
        None,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, shape, message = REFUSED[case]
    with pytest.raises(TraceError) as caught:
        trace(make(), torch.zeros(1, *shape))
    text = str(caught.value)
    assert "\n" not in text
    if message is None:
        assert text.startswith("group a")
        assert "expected whole, contiguous blocks of channels" in text
    else:
        assert text == message


DIFFERENT = (
    "the model without some units is not the dense model with them zeroed, expected channels that "
    "meet only in convolutions, linear layers and norms: outputs differ by "
)


MISREAD = {
    "softmax": lambda: nn.Softmax(1),
    "mean": lambda: Wired(lambda m, x: x * x.mean(1, keepdim=True)),
    "flip": lambda: Wired(lambda m, x: x.flip(1)),
    "roll": lambda: Wired(lambda m, x: x.roll(1, 1)),
    "cumulative": lambda: Wired(lambda m, x: x.cumsum(1) / x.shape[1]),
}


@pytest.mark.parametrize("case", MISREAD)
def test_operators_that_mix_channels_are_found_by_computing(case):
    model = nn.Sequential(conv(3, 8), MISREAD[case](), conv(8, 6), head(6))
    with pytest.raises(TraceError) as caught:
        trace(model, torch.zeros(1, 3, 8, 8))
    assert str(caught.value).startswith(f"group 0: {DIFFERENT}")


@pytest.mark.parametrize(
    "mix",
    [
        nn.ChannelShuffle(2),
        Wired(lambda m, x: x.view(len(x), 2, -1, 8, 8).transpose(1, 2).reshape(x.shape)),
    ],
)
def test_channel_shuffle_is_refused(mix):
    with pytest.raises(TraceError, match=r"^group 0"):
        trace(nn.Sequential(conv(3, 8), mix, conv(8, 8), head(8)), torch.zeros(1, 3, 8, 8))


def test_interleaved_units_are_left_whole():
    """Every other channel goes another way: there are no runs of units to cut."""
    mix = Wired(lambda m, x: torch.cat([x[:, 0::2], x[:, 1::2]], 1))
    net = nn.Sequential(conv(3, 8), mix, conv(8, 6), head(6))
    assert trace(net, torch.zeros(1, 3, 8, 8)).groups == {"2": 6}


def test_the_self_check_can_fail():
    """A description whose channels are coupled the wrong way round does not pass."""
    model, _, architecture = traced(nets.concat)
    spec = architecture.tensor("mix.2.weight")
    swapped = spec.model_copy(
        update={"axes": (spec.axes[0], tuple(reversed(spec.axes[1])), *spec.axes[2:])}
    )
    wrong = architecture.model_copy(
        update={"tensors": tuple(swapped if t is spec else t for t in architecture.tensors)}
    )
    with pytest.raises(TraceError, match=r"^group left.0: .* outputs differ by "):
        check_cut_equals_zeroed(model, wrong)


def test_the_example_is_one_sample():
    with pytest.raises(TraceError) as caught:
        trace(nn.Linear(3, 3), torch.zeros(2, 3))
    assert str(caught.value) == "example of shape (2, 3), expected (1, ...)"
