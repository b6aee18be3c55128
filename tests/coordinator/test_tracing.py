import prunable_nets as nets
import pytest
import torch
from prunable_nets import Wired, conv, head
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fleetprune.costs import Costs, costs, parameters
from fleetprune.errors import TraceError
from fleetprune.layout import Activation, Gate, Multiplication, Role, Segment
from fleetprune_coordinator.costing import check
from fleetprune_coordinator.graphs.trace import torch_alike
from fleetprune_coordinator.resize import resize
from fleetprune_coordinator.selfcheck import disproved
from fleetprune_coordinator.supported import SUPPORTED
from fleetprune_coordinator.tracing import trace


def traced(net):
    model, example = nets.make(net)
    return model, example, trace(model, example)


def half(architecture):
    return {g: max(1, n // 2) for g, n in architecture.groups.items()}


def counted_macs(model, example):
    """As torch counts them: independent of the tracer."""
    with torch.no_grad(), torch_alike(), FlopCounterMode(display=False) as counter:
        model(example)
    return counter.get_total_flops() // 2


UNCOUNTED = {nets.low_rank, nets.dead_ends}  # torch computes what a shipped file does not


@pytest.mark.parametrize("net", nets.ALL, ids=lambda f: f.__name__)
def test_groups_and_costs(net):
    model, example, architecture = traced(net)
    assert architecture.groups == nets.ALL[net]
    assert list(architecture.groups) == list(nets.ALL[net])
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
        if net not in UNCOUNTED:
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


def test_whole_groups_of_a_grouped_convolution_go():
    _, _, architecture = traced(nets.grouped)
    own = (Segment(group="0.0", units=4, block=3),)
    assert architecture.tensor("0.0.weight").axes[0] == (Segment(group="0.0", units=4, block=2),)
    assert architecture.tensor("1.0.weight").axes[:2] == (own, (Segment(units=2),))
    assert architecture.tensor("1.1.running_mean").axes == (own,)
    assert architecture.tensor("2.0.weight").axes[1] == own
    assert architecture.observed == ("2.0.weight", "3.2.weight")


def test_groupings_of_one_stream_agree_on_the_coarsest():
    _, _, architecture = traced(nets.two_groupings)

    def blocks(name, axis):
        return [s.block for s in architecture.tensor(name).axes[axis] if s.group == "stem"]

    assert blocks("stem.weight", 0) == [4]
    assert blocks("pairs.weight", 0) == [4]
    assert blocks("fours.weight", 0) == [2]
    assert blocks("head.2.weight", 1) == [4, 2]


def test_heads_are_blocks_of_queries_keys_and_values():
    _, _, architecture = traced(nets.attention_of_torch)
    heads = Segment(group="2.attention", units=4, block=2)
    assert architecture.tensor("2.attention.in_proj_weight").axes[0] == (heads, heads, heads)
    assert architecture.tensor("2.attention.in_proj_bias").axes == ((heads, heads, heads),)
    assert architecture.tensor("2.attention.out_proj.weight").axes[1] == (heads,)
    assert architecture.channels == {"0": 1, "2.attention": 2}


def test_attention_multiplies_activations():
    """Queries with keys and weights with values: 6 x 6 positions, 2 wide, both, per head."""
    _, _, architecture = traced(nets.attention_of_torch)
    heads = (Segment(group="2.attention", units=4),)
    assert architecture.products == (Multiplication(axes=(heads,), times=2 * 6 * 6 * 2),)


def test_heads_are_judged_where_their_output_is_read():
    """A head is its queries times its keys times its values: only their product is one factor."""
    for net in (nets.attention_of_torch, nets.attention_one_layer, nets.attention_three_layers):
        _, _, architecture = traced(net)
        name, out = next((g, g) for g in architecture.groups if g not in ("0", "2.out"))
        reader = {"2.attention": "2.attention.out_proj.weight"}.get(name, "2.out.weight")
        assert architecture.gates[out] == (Gate(tensor=reader, axis=1),)


def test_halves_that_are_multiplied_are_judged_where_the_product_is_read():
    _, _, architecture = traced(nets.gated_linear)
    half = Segment(group="0", units=6)
    assert architecture.tensor("0.weight").axes[0] == (half, half)
    assert architecture.gates["0"] == (Gate(tensor="2.weight", axis=1),)


def test_numbers_that_the_code_remembers_are_found():
    """`heads` and `inner` are what the views are made of; `head_width` is not cut."""
    _, _, architecture = traced(nets.attention_chunks)
    assert architecture.sizes == {
        "2.heads": (Segment(group="2.qkv", units=2),),
        "2.inner": (Segment(group="2.qkv", units=2, block=3),),
    }
    assert traced(nets.attention_three_layers)[2].sizes == {}


def test_why_layers_stay_is_told():
    _, _, architecture = traced(nets.transformer)
    assert list(architecture.uncut) == [
        "patches",
        "body.0.attention.out_proj",
        "body.0.perceptron.2",
        "body.1.attention.out_proj",
        "body.1.perceptron.2",
        "fc",
    ]
    assert (
        architecture.uncut["patches"]
        == "body.0.first (LayerNorm) calls layer_norm across its units"
    )
    assert architecture.uncut["body.0.perceptron.2"] == (
        "body.0 (EncoderLayer) combines its units with what is never cut (add)"
    )
    assert architecture.uncut["fc"] == "it makes the model's output"
    assert traced(nets.plain_cnn)[2].uncut == {"3.2": "it makes the model's output"}


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


NOTHING = "has no layer whose outputs can be cut:"
REFUSED = {
    "tied": (
        tied,
        (4,),
        "2 (Linear) shares a weight with 0 (Linear), expected its own; to keep both whole, "
        "exclude '0' and '2'",
    ),
    "unsupported": (
        lambda: nets.Wired(
            lambda m, x: m.b(m.a(x)[0][:, -1]), a=nn.LSTM(5, 4, batch_first=True), b=nn.Linear(4, 2)
        ),
        (6, 5),
        f"a (LSTM) is not supported, supported are {SUPPORTED}; to keep it whole, exclude 'a'",
    ),
    "no running statistics": (
        lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, track_running_stats=False), head(4)),
        (3, 8, 8),
        "1 (BatchNorm2d) keeps no running statistics, expected that it does",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)),
        (7,),
        "0 (LazyLinear) has no shape yet, expected a model that has run once",
    ),
    "nothing to cut": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 3)),
        (3, 2, 2),
        f"the model (Sequential) {NOTHING} 1 (Linear): it makes the model's output",
    ),
    "many layers, nothing to cut": (
        lambda: nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(4, 4), nn.Softmax(1)))),
        (4,),
        f"the model (Sequential) {NOTHING} 0 (Linear): 1 (Softmax) calls softmax across its "
        "units; 2 (Linear): 3 (Softmax) calls softmax across its units; 4 (Linear): 5 (Softmax) "
        "calls softmax across its units; and 1 more",
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
        "the model (Wired): does not run on shapes alone, expected no branch on values (compute "
        "both, choose with torch.where): Tensor.item() cannot be called on meta tensors",
    ),
    "branch on width": (
        lambda: Wired(
            lambda m, x: m.b(torch.relu(y) if (y := m.a(x)).shape[1] > 5 else y),
            a=conv(3, 6),
            b=head(6),
        ),
        (3, 8, 8),
        f"the model (Wired) {NOTHING} a (Conv2d): without some units it is not the dense model "
        "with them zeroed: ",
    ),
    "another layer for some widths": (
        lambda: Wired(
            lambda m, x: m.c(y + m.b(y) if (y := m.a(x)).shape[1] == 6 else y),
            a=nn.Linear(4, 6),
            b=nn.Linear(6, 6),
            c=nn.Linear(6, 2),
        ),
        (4,),
        f"the model (Wired) {NOTHING} a (Linear): with 3 of 6 units of a it takes 18 "
        "multiplications and 28 bytes, expected 27 and 36: its control flow depends on widths; ",
    ),
    "width in the code": (
        lambda: Wired(lambda m, x: m.b(m.a(x).view(-1, 384)), a=conv(3, 6), b=nn.Linear(384, 2)),
        (3, 8, 8),
        f"the model (Wired) {NOTHING} a (Conv2d): the model (Wired): does not run: shape "
        "'[-1, 384]' is invalid for input of size 192; b (Linear): it makes the model's output",
    ),
    "parts are written": (
        lambda: Wired(written_in_parts, a=nn.Linear(4, 3), b=nn.Linear(6, 2)),
        (4,),
        "b (Linear): copy_ writes into a part of a tensor, expected one that is made at once "
        "(torch.cat, torch.where)",
    ),
    "products that are not counted": (
        lambda: Wired(
            lambda m, x: m.b(torch.cdist(m.a(x)[:, None], x[:, None])[:, 0]),
            a=nn.Linear(4, 4),
            b=nn.Linear(1, 2),
        ),
        (4,),
        "the model (Wired): products of _cdist_forward are not counted, expected matrix products "
        "and convolutions",
    ),
    "two outputs": (
        lambda: Wired(lambda m, x: (m.a(x), x), a=nn.Linear(4, 3)),
        (4,),
        "the model (Wired): output tuple, expected a tensor (1, classes) that is computed from "
        "the input",
    ),
}


def written_in_parts(m, x):
    y = torch.zeros(1, 6)
    y[:, :3] = m.a(x)
    return m.b(y)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, shape, message = REFUSED[case]
    with pytest.raises(TraceError) as caught:
        trace(make(), torch.zeros(1, *shape))
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(message) if message.endswith((": ", "; ")) else text == message


ACROSS = {
    "softmax": (nn.Softmax(1), "1 (Softmax) calls softmax across its units"),
    "mean": (
        Wired(lambda m, x: x * x.mean(1, keepdim=True)),
        "1 (Wired) calls mean across its units",
    ),
    "flip": (Wired(lambda m, x: x.flip(1)), "1 (Wired) calls flip across its units"),
    "roll": (Wired(lambda m, x: x.roll(1, 1)), "1 (Wired) calls roll across its units"),
    "cumulative": (
        Wired(lambda m, x: x.cumsum(1) / x.shape[1]),
        "1 (Wired) calls cumsum across its units",
    ),
    "unknown": (
        nn.PixelShuffle(2),
        "1 (PixelShuffle) calls pixel_shuffle, through which units are not followed",
    ),
    "layer norm over everything": (
        nn.LayerNorm((8, 8, 8)),
        "1 (LayerNorm) calls layer_norm across its units",
    ),
    "norm without weights": (
        nn.GroupNorm(2, 8, affine=False),
        "1 (GroupNorm) calls group_norm across its units",
    ),
    "every other channel": (
        Wired(lambda m, x: torch.cat([x[:, 0::2], x[:, 1::2]], 1)),
        "its units lie scattered, expected whole, contiguous blocks of channels",
    ),
    "a constant per channel": (
        Wired(lambda m, x: x * torch.arange(1.0, 9.0)[:, None, None]),
        "1 (Wired): does not run: The size of tensor a (4) must match the size of tensor b (8) at",
    ),
    "channels by number": (
        Wired(lambda m, x: x.index_select(1, torch.tensor([7, 0, 1, 2, 3, 4, 5, 5]))),
        "1 (Wired) picks single units by their place",
    ),
}


@pytest.mark.parametrize("case", ACROSS)
def test_what_mixes_channels_leaves_them_whole_and_says_so(case):
    layer, reason = ACROSS[case]
    inputs = 2 if case == "unknown" else 8
    model = nn.Sequential(conv(3, 8), layer, conv(inputs, 6), head(6))
    architecture = trace(model, torch.zeros(1, 3, 8, 8))
    assert architecture.groups == {"2": 6}
    assert architecture.uncut["0"].startswith(reason)


@pytest.mark.parametrize(
    "mix",
    [
        nn.ChannelShuffle(2),
        Wired(lambda m, x: x.view(len(x), 2, -1, 8, 8).transpose(1, 2).reshape(x.shape)),
    ],
    ids=["by torch", "by hand"],
)
def test_both_halves_of_shuffled_channels_are_cut_alike(mix):
    model = nn.Sequential(conv(3, 8), mix, conv(8, 6), head(6))
    architecture = trace(model, torch.zeros(1, 3, 8, 8))
    assert architecture.groups == {"0": 4, "2": 6}
    four = Segment(group="0", units=4)
    assert architecture.tensor("0.weight").axes[0] == (four, four)
    assert architecture.tensor("2.weight").axes[1] == (Segment(group="0", units=4, block=2),)


def test_what_is_excluded_stays_whole():
    def net():
        layers = [conv(3, 4), nn.ReLU(), conv(4, 6), nn.ReLU(), conv(6, 5), nn.ReLU(), head(5)]
        return nn.Sequential(*layers)

    example = torch.zeros(1, 3, 8, 8)
    assert trace(net(), example).groups == {"0": 4, "2": 6, "4": 5}
    architecture = trace(net(), example, exclude=["2"])  # neither what it makes nor what it reads
    assert architecture.groups == {"4": 5}
    assert architecture.uncut["2"] == "it is excluded"
    assert trace(net(), example, exclude=["[3-6].*", "[34]"]).groups == {"0": 4}


def test_an_unsupported_layer_can_be_excluded():
    def wiring(m, x):
        return m.fc(torch.relu(m.after(m.rnn(torch.relu(m.before(x)))[0][:, -1])))

    layers = {"before": nn.Linear(5, 6), "rnn": nn.LSTM(6, 4, batch_first=True)}
    net = Wired(wiring, after=nn.Linear(4, 8), fc=nn.Linear(8, 3), **layers)
    architecture = trace(net, torch.zeros(1, 7, 5), exclude=["rnn"])
    assert architecture.groups == {"after": 8}
    assert architecture.uncut["rnn.weight_ih_l0"] == "it is excluded"
    assert resize(net, architecture, {"after": 3})(torch.zeros(1, 7, 5)).shape == (1, 3)


def test_shared_weights_can_be_excluded_and_stay_shared():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 6), nn.ReLU())
    net.append(nn.Linear(6, 2))
    net[2].weight = net[0].weight
    architecture = trace(net, torch.zeros(1, 4), exclude=["0", "2"])
    assert architecture.groups == {"3": 6}
    small = resize(net, architecture, {"3": 2})
    assert small[2].weight is small[0].weight


def test_exclude_names_layers():
    with pytest.raises(TraceError) as caught:
        trace(nets.mlp()[0], torch.zeros(1, 10), exclude=["3*"])
    assert str(caught.value) == "exclude '3*': the model has no such layer"


def test_the_self_check_can_fail():
    """A description whose channels are coupled the wrong way round does not pass."""
    model, example, architecture = traced(nets.concat)
    assert disproved(model, architecture, example) == {}
    spec = architecture.tensor("mix.2.weight")
    swapped = spec.model_copy(
        update={"axes": (spec.axes[0], tuple(reversed(spec.axes[1])), *spec.axes[2:])}
    )
    wrong = architecture.model_copy(
        update={"tensors": tuple(swapped if t is spec else t for t in architecture.tensors)}
    )
    found = disproved(model, wrong, example)
    assert list(found) == ["left.0", "right"]
    assert all("it is not the dense model with them zeroed" in why for why in found.values())
    assert list(disproved(model, wrong, example, ["right"])) == ["right"]


def test_the_check_of_costs_can_fail():
    model, example, architecture = traced(nets.attention_of_torch)
    assert check(model, architecture, example) == {}
    wrong = architecture.model_copy(update={"products": ()})
    found = check(model, wrong, example)
    assert found["2.attention"] == (
        "with 2 of 4 units of 2.attention it takes 1320 multiplications and 1440 bytes, expected "
        "1032 and 1440: its control flow depends on widths"
    )


def test_the_example_is_one_sample():
    with pytest.raises(TraceError) as caught:
        trace(nn.Linear(3, 3), torch.zeros(2, 3))
    assert str(caught.value) == "example of shape (2, 3), expected (1, ...)"
