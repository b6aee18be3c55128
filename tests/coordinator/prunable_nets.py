"""Small nets with every coupling that the tracer knows, and some that it must refuse."""

from collections.abc import Callable

import torch
from torch import nn

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
    layer_norm_mlp: {"0": 8, "3": 6},
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


def make(net):
    """A net with weights that are neither 0 nor 1, and an input for it."""
    torch.manual_seed(0)
    model, shape = net()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_(0.1, 0.5)
    return model.eval(), torch.randn(1, *shape)
