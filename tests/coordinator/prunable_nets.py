"""Small nets with every coupling that the tracer knows, and some that it must refuse."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from fleetprune.layout import axis_indices
from fleetprune_coordinator.attention import with_cuttable_heads
from fleetprune_coordinator.resize import statistics_of
from fleetprune_sim import models


class Wired(nn.Module):
    """Named layers and a function that says how they are wired."""

    def __init__(self, wiring: Callable[["Wired", torch.Tensor], torch.Tensor], **layers):
        super().__init__()
        self.wiring = wiring
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.wiring(self, x)


class Scale(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.scale = nn.Parameter(torch.full(shape, 2.0))

    def forward(self, x):
        return x * self.scale


def conv(i, o, kernel=3, stride=1, groups=1, bias=True):
    return nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=bias)


def block(i, o, kernel=3, stride=1, groups=1, act=nn.ReLU):
    layers = [conv(i, o, kernel, stride, groups, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([act()] if act else []))


def head(channels, classes=5):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def tiny():
    """288 + 96 MACs, 119 weights; input 64 B, convolution 128 B, logits 12 B."""
    return nn.Sequential(conv(1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)), (1, 4, 4)


def plain_cnn():
    return nn.Sequential(block(3, 4), nn.MaxPool2d(2), block(4, 6), head(6)), (3, 8, 8)


def flatten_cnn():
    layers = [conv(3, 6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 7), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(7, 4)), (3, 8, 8)


def residual(i, o, stride):
    shortcut = block(i, o, 1, stride, act=None) if stride > 1 else nn.Identity()
    return Wired(
        lambda m, x: torch.relu(m.b(m.a(x)) + m.shortcut(x)),
        a=block(i, o, stride=stride),
        b=block(o, o, act=None),
        shortcut=shortcut,
    )


def resnet():
    layers = [block(3, 4), residual(4, 4, 1), residual(4, 6, 2), head(6)]
    return nn.Sequential(*layers), (3, 8, 8)


def separable():
    layers = [block(3, 4), block(4, 4, groups=4), block(4, 6, 1), block(6, 6, groups=6)]
    return nn.Sequential(*layers, head(6)), (3, 8, 8)


def inverted(i, o, expand):
    body = nn.Sequential(
        block(i, i * expand, 1, act=nn.ReLU6),
        block(i * expand, i * expand, groups=i * expand, act=nn.ReLU6),
        block(i * expand, o, 1, act=None),
    )
    return Wired(lambda m, x: x + m.body(x) if i == o else m.body(x), body=body)


def mobilenet():
    layers = [block(3, 4, act=nn.ReLU6), inverted(4, 6, 2), inverted(6, 6, 2), head(6)]
    return nn.Sequential(*layers), (3, 8, 8)


def concat():
    def wiring(m, x):
        x = m.stem(x)
        return m.head(m.mix(torch.cat([m.left(x), m.right(x)], 1)))

    mix = nn.Sequential(nn.BatchNorm2d(14), nn.ReLU(), conv(14, 5))
    net = Wired(wiring, stem=conv(3, 4), left=block(4, 6), right=conv(4, 8), mix=mix, head=head(5))
    return net, (3, 8, 8)


def concat_then_add():
    def wiring(m, x):
        return m.head(torch.cat([m.left(x), m.right(x)], 1) + m.both(x))

    net = Wired(wiring, left=conv(3, 4), right=conv(3, 6), both=conv(3, 10), head=head(10))
    return net, (3, 8, 8)


def squeeze_excite():
    def wiring(m, x):
        x = m.stem(x)
        gate = m.up(torch.relu(m.down(x.mean((2, 3)))))
        return m.head(x * torch.sigmoid(gate)[:, :, None, None])

    layers = {"stem": block(3, 8), "down": nn.Linear(8, 3), "up": nn.Linear(3, 8)}
    return Wired(wiring, **layers, head=head(8)), (3, 8, 8)


def cnn1d():
    layers = [nn.Conv1d(3, 4, 5, 2, 2, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 3)), (3, 16)


def mlp():
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)), (10,)


def norm_mlp():
    layers = [nn.Linear(10, 8, bias=False), nn.BatchNorm1d(8, affine=False), nn.ReLU()]
    layers += [nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(6, 3)), (10,)


def layer_norm_mlp():
    layers = [nn.Linear(10, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 6), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(6, 3)), (10,)


def scaled():
    layers = [conv(3, 4), Scale(4, 1, 1), nn.PReLU(4), Scale(1), conv(4, 6), nn.PReLU()]
    return nn.Sequential(*layers, head(6)), (3, 8, 8)


def gated_activations():
    layers = [block(3, 4, act=nn.SiLU), block(4, 6, act=nn.Hardswish), head(6)]
    return nn.Sequential(*layers), (3, 8, 8)


def into_the_input():
    """A residual around the first layer: its channels are the input's and stay."""
    net = Wired(lambda m, x: m.head(m.b(x + m.a(x))), a=conv(3, 3), b=conv(3, 6), head=head(6))
    return net, (3, 8, 8)


def conv_head():
    layers = [conv(3, 4), nn.ReLU(inplace=True), conv(4, 5, 1), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten()), (3, 8, 8)


def called_twice():
    net = Wired(lambda m, x: m.head(m.b(m.b(m.a(x)))), a=conv(3, 4), b=conv(4, 4), head=head(4))
    return net, (3, 8, 8)


def shared_block():
    """One convolution with two norms: it is shipped folded with each."""

    def wiring(m, x):
        return m.head(m.second(m.conv(torch.relu(m.first(m.conv(m.stem(x)))))))

    layers = {"stem": conv(3, 4), "conv": conv(4, 4, bias=False)}
    layers |= {"first": nn.BatchNorm2d(4), "second": nn.BatchNorm2d(4), "head": head(4)}
    return Wired(wiring, **layers), (3, 8, 8)


def grouped():
    """Whole groups go: the second layer's three outputs with the two inputs that they read."""
    layers = [block(3, 8), block(8, 12, groups=4), block(12, 5, 1), head(5)]
    return nn.Sequential(*layers), (3, 8, 8)


def two_groupings():
    """One stream read in groups of 2 and of 4: it goes in steps of 4 channels."""

    def wiring(m, x):
        x = m.stem(x)
        return m.head(torch.cat([m.pairs(x), m.fours(x)], 1))

    layers = {"stem": conv(3, 8), "pairs": conv(8, 8, groups=4), "fours": conv(8, 4, groups=2)}
    return Wired(wiring, **layers, head=head(12)), (3, 8, 8)


def multiplied():
    """Depthwise with three filters per channel."""
    return nn.Sequential(block(3, 4), block(4, 12, groups=4), head(12)), (3, 8, 8)


def transposed():
    layers = [conv(3, 4), nn.ConvTranspose2d(4, 6, 2, 2), nn.BatchNorm2d(6), nn.ReLU()]
    layers += [nn.ConvTranspose2d(6, 12, 3, 2, 1, 1, groups=3), nn.ReLU(), head(12)]
    return nn.Sequential(*layers), (3, 4, 4)


def group_norm():
    return nn.Sequential(conv(3, 8), nn.GroupNorm(4, 8), nn.ReLU(), head(8)), (3, 8, 8)


def instance_norm():
    layers = [conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), conv(8, 4, 1), nn.ReLU()]
    return nn.Sequential(*layers, head(4)), (3, 8, 8)


def volume():
    layers = [nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 6, 3)]
    layers += [nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 3)]
    return nn.Sequential(*layers), (2, 5, 5, 5)


def gated_linear():
    return nn.Sequential(nn.Linear(5, 12), nn.GLU(1), nn.Linear(6, 3)), (5,)


def halves():
    """Half of the channels is convolved, then all go on: both halves are cut alike."""

    def wiring(m, x):
        a, b = m.stem(x).chunk(2, 1)
        return m.head(torch.relu(torch.cat([a, m.side(b)], 1)))

    return Wired(wiring, stem=conv(3, 8), side=conv(4, 6), head=head(10)), (3, 8, 8)


def padded_shortcut():
    """ResNet's shortcut without weights: the new channels are zeros, and stay."""

    def wiring(m, x):
        x = m.stem(x)
        y = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return m.head(torch.relu(y + m.body(x)))

    return Wired(wiring, stem=conv(3, 4), body=conv(4, 8, stride=2), head=head(8)), (3, 8, 8)


def low_rank():
    """A weight that is a product of two."""
    wiring = functional.linear
    layer = Wired(
        lambda m, x: wiring(x, m.left @ m.right),
        left=nn.Parameter(torch.zeros(8, 4)),
        right=nn.Parameter(torch.zeros(4, 6)),
    )
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), layer, nn.ReLU(), nn.Linear(8, 3)), (5,)


def embedded():
    """Indices of words in, as far as anything here is one."""
    net = Wired(
        lambda m, x: m.fc(torch.relu(m.table(x.abs().clamp(0, 4).long())).mean(1)),
        table=nn.Embedding(5, 8),
        fc=nn.Linear(8, 3),
    )
    return net, (7,)


class Attention(nn.Module):
    """Attention as people write it: one layer for queries, keys and values, or three."""

    def __init__(self, width, heads, head_width, view):
        super().__init__()
        self.heads, self.head_width, self.inner = heads, head_width, heads * head_width
        self.view = view
        if view == "three":
            self.q, self.k, self.v = (nn.Linear(width, self.inner) for _ in range(3))
        else:
            self.qkv = nn.Linear(width, 3 * self.inner)
        self.out = nn.Linear(self.inner, width)

    def forward(self, x):
        n, length, _ = x.shape
        if self.view == "three":  # the number of heads follows from what is there
            q, k, v = (
                layer(x).view(n, length, -1, self.head_width).transpose(1, 2)
                for layer in (self.q, self.k, self.v)
            )
        elif self.view == "chunks":  # it is remembered, and so is the width of all heads
            q, k, v = (
                part.view(n, length, self.heads, self.head_width).transpose(1, 2)
                for part in self.qkv(x).split(self.inner, -1)
            )
        else:
            whole = self.qkv(x).view(n, length, 3, self.heads, self.head_width)
            q, k, v = whole.permute(2, 0, 3, 1, 4)
        scores = torch.einsum("nhld,nhmd->nhlm", q, k) / self.head_width**0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2)
        return self.out(mixed.reshape(n, length, self.inner if self.view == "chunks" else -1))


def tokens(*layers, width=8):
    """Windows (length, 5) through layers that take (n, length, width)."""
    embed = [nn.Linear(5, width), nn.ReLU()]
    mean = Wired(lambda m, x: m.fc(torch.relu(x).mean(1)), fc=nn.Linear(width, 3))
    return nn.Sequential(*embed, *layers, mean), (6, 5)


def attention_one_layer():
    return tokens(Attention(8, 4, 2, "one"))


def attention_three_layers():
    return tokens(Attention(8, 4, 3, "three"))


def attention_chunks():
    return tokens(Attention(8, 2, 3, "chunks"))


def attention_one_head():
    """The only head stays, and with it its width, by which the scores are divided."""
    return tokens(Attention(8, 1, 6, "three"))


class Rotated(nn.Module):
    """Queries and keys normalised per head, turned by their places; a trained bias per head."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.norm, self.gain = nn.LayerNorm(3), nn.Parameter(torch.ones(3))
        self.places = nn.Parameter(torch.zeros(4, 6, 6))
        self.out = nn.Linear(12, 8)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        angle = torch.arange(x.shape[1])[:, None] / 3.0
        q, k = self.norm(q) * self.gain, self.norm(k)
        q = q * torch.cos(angle) + q.roll(1, -1) * torch.sin(angle)
        mixed = functional.scaled_dot_product_attention(q, k, v, self.places)
        return self.out(mixed.transpose(1, 2).flatten(2))


def attention_rotated():
    return tokens(Rotated())


def attention_of_torch():
    attention = nn.MultiheadAttention(8, 4, batch_first=True)
    return tokens(Wired(lambda m, x: x + m.attention(x, x, x)[0], attention=attention))


def attention_across():
    """Queries from the window; keys and values from its first samples, as wide as they like."""

    def wiring(m, x):
        queries, others = torch.relu(m.embed(x)), torch.relu(m.other(x[:, :4]))
        mixed, _ = m.attention(queries, others, others, attn_mask=torch.zeros(6, 4))
        return m.fc(torch.relu(mixed).mean(1))

    layers = {"embed": nn.Linear(5, 8), "other": nn.Linear(5, 6), "fc": nn.Linear(8, 3)}
    attention = nn.MultiheadAttention(8, 4, kdim=6, vdim=6, batch_first=True)
    return Wired(wiring, attention=attention, **layers), (6, 5)


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, "gelu", batch_first=True, norm_first=True)
    return tokens(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def class_token():
    """A trained token before the others and a place for each, all as wide as the stream."""
    net = Wired(
        lambda m, x: m.fc(
            torch.relu(torch.cat([m.token.expand(len(x), -1, -1), m.embed(x)], 1) + m.places)[:, 0]
        ),
        token=nn.Parameter(torch.zeros(1, 1, 8)),
        places=nn.Parameter(torch.zeros(1, 7, 8)),
        embed=nn.Linear(5, 8),
        fc=nn.Linear(8, 3),
    )
    return net, (6, 5)


def mixer():
    """A perceptron over the tokens and one over the channels (Tolstikhin et al. 2021)."""

    def wiring(m, x):
        x = x + m.t2(torch.relu(m.t1(m.norm(x).transpose(1, 2)))).transpose(1, 2)
        return x + m.c2(torch.relu(m.c1(m.norm(x))))

    layers = {"t1": nn.Linear(6, 10), "t2": nn.Linear(10, 6), "norm": nn.LayerNorm(8)}
    return tokens(Wired(wiring, c1=nn.Linear(8, 12), c2=nn.Linear(12, 8), **layers))


def dead_ends():
    """A branch that reaches no output, so that what it reads stays, and a layer that never runs."""

    def wiring(m, x):
        x = torch.relu(m.a(x))
        m.branch(x)
        return m.head(torch.relu(m.b(x)))

    layers = {"a": conv(3, 4), "b": conv(4, 6), "branch": conv(4, 5), "idle": nn.Linear(2, 7)}
    return Wired(wiring, head=head(6), **layers), (3, 8, 8)


def transformer():
    return models.transformer(3, 24, 4, width=16, heads=2, layers=2, hidden=12), (3, 24)


def efficientnet_lite0():
    return models.efficientnet_lite0(width=0.25, classes=5), (3, 16, 16)


GROUPS = {
    tiny: {"0": 2},
    plain_cnn: {"0.0": 4, "2.0": 6},
    flatten_cnn: {"0": 6, "4": 7},
    resnet: {"0.0": 4, "1.a.0": 4, "2.a.0": 6, "2.b.0": 6},
    separable: {"0.0": 4, "2.0": 6},
    mobilenet: {"0.0": 4, "1.body.0.0": 8, "1.body.2.0": 6, "2.body.0.0": 12},
    concat: {"stem": 4, "left.0": 6, "right": 8, "mix.2": 5},
    concat_then_add: {"left": 4, "right": 6},
    squeeze_excite: {"stem.0": 8, "down": 3},
    cnn1d: {"0": 4},
    mlp: {"0": 8},
    norm_mlp: {"0": 8, "3": 6},
    layer_norm_mlp: {"3": 6},
    scaled: {"0": 4, "4": 6},
    gated_activations: {"0.0": 4, "1.0": 6},
    into_the_input: {"b": 6},
    conv_head: {"0": 4},
    called_twice: {"a": 4},
    shared_block: {"stem": 4},
    efficientnet_lite0: {
        "body.0.0": 32,
        "body.1.layers.1.0": 8,
        **{"body.2.layers.0.0": 48, "body.2.layers.2.0": 8, "body.3.layers.0.0": 48},
        **{"body.4.layers.0.0": 48, "body.4.layers.2.0": 8, "body.5.layers.0.0": 48},
        **{"body.6.layers.0.0": 48, "body.6.layers.2.0": 24, "body.7.layers.0.0": 144},
        "body.8.layers.0.0": 144,
        **{"body.9.layers.0.0": 144, "body.9.layers.2.0": 32, "body.10.layers.0.0": 192},
        "body.11.layers.0.0": 192,
        **{"body.12.layers.0.0": 192, "body.12.layers.2.0": 48, "body.13.layers.0.0": 288},
        **{f"body.{block}.layers.0.0": 288 for block in (14, 15, 16)},
        "body.16.layers.2.0": 80,
        "body.17.0": 1280,
    },
}
"""Nets that can be traced, and the groups that they have."""

OTHERS = {
    grouped: {"0.0": 4, "2.0": 5},
    two_groupings: {"stem": 2},
    multiplied: {"0.0": 4},
    transposed: {"0": 4, "1": 3},
    group_norm: {"0": 4},
    instance_norm: {"0": 8, "3": 4},
    volume: {"0": 4, "3": 6},
    gated_linear: {"0": 6},
    halves: {"stem": 4, "side": 6},
    padded_shortcut: {"stem": 4},
    low_rank: {"2.left": 8, "2.left:2": 4},
    embedded: {"table": 8},
    attention_one_layer: {"0": 8, "2.qkv": 4, "2.out": 8},
    attention_three_layers: {"0": 8, "2.q": 4, "2.out": 8},
    attention_chunks: {"0": 8, "2.qkv": 2, "2.out": 8},
    attention_one_head: {"0": 8, "2.out": 8},
    attention_rotated: {"0": 8, "2.q": 4, "2.out": 8},
    attention_of_torch: {"0": 8, "2.attention": 4},
    attention_across: {"embed": 8, "other": 6, "attention": 4, "attention.out_proj": 8},
    encoder: {
        **{"2.layers.0.self_attn": 2, "2.layers.0.linear1": 12},
        **{"2.layers.1.self_attn": 2, "2.layers.1.linear1": 12},
    },
    class_token: {"embed": 8},
    mixer: {"2.t1": 10, "2.c1": 12},
    dead_ends: {"b": 6},
    transformer: {
        **{"body.0.attention": 2, "body.0.perceptron.0": 12},
        **{"body.1.attention": 2, "body.1.perceptron.0": 12},
    },
}
"""The same, with operators whose memory is bounded, not counted, or that leave the integers."""

ALL = GROUPS | OTHERS


def make(net):
    """A net with weights that are neither 0 nor 1, and an input for it."""
    torch.manual_seed(0)
    model, shape = net()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_(0.1, 0.5)
    return model.eval(), torch.randn(1, *shape)


def zeroed(model, architecture, keep):
    """The dense model in evaluation mode with the weights of units behind `keep` set to zero."""
    twin = with_cuttable_heads(copy.deepcopy(model)).eval()
    tensors = dict([*twin.named_parameters(), *statistics_of(twin)])
    with torch.no_grad():
        for spec in architecture.tensors:
            kept = axis_indices_of(spec, architecture, keep)
            rest = torch.ones(tensors[spec.name].shape, dtype=torch.bool)
            rest[kept] = False
            tensors[spec.name][rest] = 0
    return twin


def axis_indices_of(spec, architecture, keep):
    """An open mesh of what a cut model has of a tensor."""
    dense = architecture.groups
    axes = [torch.from_numpy(axis_indices(axis, dense, keep)) for axis in spec.axes]
    return tuple(
        a.reshape([-1 if i == axis else 1 for i in range(len(axes))]) for axis, a in enumerate(axes)
    )
