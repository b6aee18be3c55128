"""Every layer family's gradient against torch in float64, on plain and on blocked tensors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fleetprune_coordinator.graphs import export_train_step

from .graph_cases import (
    BLOCKS,
    Scaled,
    randomise,
    relative_error,
    run_graph,
    step_feeds,
    torch_step,
)

ROUNDING = 2e-6
"""Float32 against float64, in the norm of the whole gradient."""


def mse(output, y):
    return ((output - y) ** 2).flatten(1).mean(1)


class Concat(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, 16, 1)

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x), x], 1)


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.a = nn.Conv2d(channels, 4, 1)
        self.b = nn.Conv2d(4, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.b(F.silu(self.a(F.adaptive_avg_pool2d(x, 1)))))


class SqueezeLinear(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.a = nn.Linear(channels, 8)
        self.b = nn.Linear(8, channels)

    def forward(self, x):
        return x * F.hardsigmoid(self.b(F.silu(self.a(x.mean((2, 3))))))[:, :, None, None]


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=False)[0]


class ScaledDotProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class First(nn.Module):
    """The first of a layer's outputs."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def between(layer):
    """The layer between two convolutions, so that it sees blocked tensors."""
    return nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), layer, nn.Conv2d(16, 8, 1))


def normed(activation, channels=24):
    return nn.Sequential(
        nn.Conv2d(16, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        activation,
        nn.Conv2d(channels, 8, 1),
    )


def halves(x):
    return x[:, 2:10] * x[:, 6:14, :, 3:4]


IMAGE = (4, 8, 7, 7)
CASES = {
    "linear": (nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 5)), (8, 12)),
    "linear no bias, 3 axes": (nn.Linear(12, 20, bias=False), (4, 3, 12)),
    "conv 1x1 stride 2": (nn.Conv2d(16, 24, 1, 2), (4, 16, 9, 9)),
    "conv 1x1 padded": (nn.Conv2d(16, 24, 1, 1, 1), (4, 16, 9, 9)),
    "conv stride 3, kernel 2": (nn.Conv2d(16, 24, 2, 3), (4, 16, 9, 9)),
    "conv stride (1, 2)": (nn.Conv2d(16, 24, 3, (1, 2), 1), (4, 16, 8, 9)),
    "conv stride (2, 1)": (nn.Conv2d(3, 20, 3, (2, 1), 1), (4, 3, 8, 9)),
    "transposed": (nn.ConvTranspose2d(6, 8, 3, 2, 1, 1), (4, 6, 5, 4)),
    "transposed, dilated": (nn.ConvTranspose2d(6, 8, 3, 3, 0, 1, dilation=2), (4, 6, 5, 4)),
    "transposed, grouped": (nn.ConvTranspose2d(6, 9, 2, 2, groups=3), (4, 6, 5, 4)),
    "transposed 1d": (nn.ConvTranspose1d(6, 8, 4, 2, 1, bias=False), (4, 6, 9)),
    "depthwise": (nn.Conv2d(24, 24, 3, 1, 1, groups=24), (4, 24, 7, 9)),
    "depthwise stride 2": (nn.Conv2d(16, 16, 3, 2, 1, groups=16), (4, 16, 8, 8)),
    "depthwise wide": (nn.Conv2d(16, 16, 3, 1, 1, groups=16), (2, 16, 4, 20)),
    "conv 1d depthwise": (nn.Conv1d(16, 16, 5, 1, 2, groups=16), (4, 16, 17)),
    "batch norm": (nn.BatchNorm2d(24), (8, 24, 7, 9)),
    "batch norm, relu": (normed(nn.ReLU()), (8, 16, 9, 9)),
    "batch norm, relu6": (normed(nn.ReLU6()), (8, 16, 9, 9)),
    "batch norm, half block": (normed(nn.ReLU(), 20), (8, 16, 9, 9)),
    "batch norm (n, c)": (
        nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 4)),
        (16, 12),
    ),
    "batch norm (n, c, l)": (
        nn.Sequential(nn.Conv1d(6, 16, 3), nn.BatchNorm1d(16), nn.Tanh()), (8, 6, 20)),
    "batch norm, no affine": (
        nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16, affine=False), nn.Tanh()), IMAGE),
    "instance norm": (between(nn.InstanceNorm2d(16, affine=True)), IMAGE),
    "layer norm": (nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20)), (8, 5, 12)),
    "group norm": (nn.Sequential(nn.Conv2d(8, 16, 3), nn.GroupNorm(4, 16)), (4, 8, 9, 9)),
    "max pool": (nn.Sequential(nn.Conv2d(8, 16, 3), nn.MaxPool2d(2)), (4, 8, 10, 11)),
    "max pool 3/2/1": (
        nn.Sequential(nn.Conv2d(8, 16, 3), nn.MaxPool2d(3, 2, 1), nn.ReLU()), (4, 8, 10, 11)),
    "max pool 1d": (nn.Sequential(nn.Conv1d(8, 16, 3), nn.MaxPool1d(2)), (4, 8, 20)),
    "avg pool": (nn.Sequential(nn.Conv2d(8, 16, 3), nn.AvgPool2d(2)), (4, 8, 10, 11)),
    "avg pool 3/2/1": (nn.Sequential(nn.Conv2d(8, 16, 3), nn.AvgPool2d(3, 2, 1)), (4, 8, 10, 11)),
    "avg pool, pad not counted": (
        nn.Sequential(nn.Conv2d(8, 16, 3), nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        (4, 8, 10, 11),
    ),
    "avg pool 1d": (nn.Sequential(nn.Conv1d(8, 16, 3), nn.AvgPool1d(2)), (4, 8, 20)),
    "global avg pool": (between(nn.AdaptiveAvgPool2d(1)), IMAGE),
    "global avg pool 1d": (
        nn.Sequential(nn.Conv1d(8, 16, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()), (4, 8, 20)),
    "adaptive avg pool 2": (between(nn.AdaptiveAvgPool2d(2)), (4, 8, 8, 8)),
    "adaptive max pool": (between(nn.AdaptiveMaxPool2d(1)), (4, 8, 8, 8)),
    "global max": (nn.Sequential(nn.Conv2d(8, 16, 3), Function(lambda x: x.amax((2, 3)))), IMAGE),
    "residual": (nn.Sequential(nn.Conv2d(8, 16, 3), Residual(16), Residual(16)), (4, 8, 9, 9)),
    "concat 8": (nn.Sequential(nn.Conv2d(3, 8, 3), Concat(8), nn.Conv2d(32, 8, 1)), (4, 3, 9, 9)),
    "concat 16": (
        nn.Sequential(nn.Conv2d(3, 16, 3), Concat(16), nn.Conv2d(48, 8, 1)), (4, 3, 9, 9)),
    "squeeze-excite": (
        nn.Sequential(nn.Conv2d(3, 16, 3), SqueezeExcite(16), nn.Conv2d(16, 8, 1)), (4, 3, 9, 9)),
    "squeeze-excite linear": (
        nn.Sequential(nn.Conv2d(3, 24, 3), SqueezeLinear(24), nn.Conv2d(24, 8, 1)), (4, 3, 9, 9)),
    "attention": (Attention(), (4, 6, 16)),
    "scaled dot product": (ScaledDotProduct(), (4, 6, 16)),
    "transformer layer": (
        nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), (4, 6, 16)),
    "lstm": (First(nn.LSTM(8, 12, batch_first=True)), (4, 5, 8)),
    "pixel shuffle": (nn.Sequential(nn.Conv2d(8, 16, 3), nn.PixelShuffle(2)), IMAGE),
    "channel shuffle": (nn.Sequential(nn.Conv2d(8, 16, 3), nn.ChannelShuffle(4)), IMAGE),
    "prelu": (between(nn.PReLU(16)), IMAGE),
    "zero pad": (nn.Sequential(nn.ZeroPad2d((1, 2, 0, 1)), nn.Conv2d(8, 16, 3)), IMAGE),
    "division": (between(Function(lambda x: x / (1.5 + x.abs()))), IMAGE),
    "slices": (nn.Sequential(nn.Conv2d(8, 16, 3), Function(halves)), IMAGE),
    "every other": (between(Function(lambda x: x[:, 1::3, ::2].repeat(1, 4, 1, 1)[:, :16])), IMAGE),
    "flip": (between(Function(lambda x: x * x.flip((1, -1)))), IMAGE),
    "roll": (between(Function(lambda x: x * x.roll((1, -2), (1, 3)))), IMAGE),
    "gated linear": (nn.Sequential(nn.Linear(12, 20), nn.GLU(-1)), (8, 12)),
    "gated channels": (nn.Sequential(nn.Conv2d(8, 32, 3), nn.GLU(1)), IMAGE),
} | {
    a: (between(getattr(nn, a)()), IMAGE)
    for a in ("ReLU", "ReLU6", "Hardswish", "GELU", "Sigmoid", "Tanh", "SiLU", "Hardsigmoid",
              "LeakyReLU", "ELU", "Softplus", "Mish")
}  # fmt: skip


def gradient_error(layer, shape, block, loss=mse, x=None, y=None):
    """Relative errors of the gradient and of the BatchNorm statistics."""
    torch.manual_seed(1)
    model = layer if x is not None else Scaled(randomise(layer))
    x = torch.randn(shape) if x is None else x
    sw = torch.rand(len(x)) + 0.1
    with torch.no_grad():
        y = torch.randn_like(model(x)) if y is None else y
    graph = export_train_step(
        model, x, batch=len(x), loss=loss, target=y, block=block, gradient=True
    )
    value, gradient, stats = torch_step(model, x, y, sw, loss)
    out = run_graph(graph, step_feeds(model, x, y, sw))
    assert out["loss"] == pytest.approx(value, rel=1e-5)
    if len(stats):
        assert relative_error(out["stats_out"], stats) < ROUNDING
    return relative_error(out["grad"], gradient)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", CASES)
def test_gradient_equals_float64(name, block):
    layer, shape = CASES[name]
    assert gradient_error(layer, shape, block) < ROUNDING


@pytest.mark.parametrize("block", BLOCKS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_gradient_of_random_convolutions(block, data):
    draw = data.draw
    kind = draw(st.sampled_from(["dense", "dense", "depthwise", "grouped"]))
    channels = draw(st.sampled_from([8, 16, 24] if kind != "dense" else [3, 8, 16, 24, 32]))
    outputs = channels if kind == "depthwise" else draw(st.sampled_from([8, 16, 20, 32]))
    groups = {"dense": 1, "depthwise": channels, "grouped": 2}[kind]
    axes = draw(st.sampled_from([1, 2, 2]))
    kernel = draw(st.sampled_from([1, 2, 3, 5]))
    layer = (nn.Conv1d if axes == 1 else nn.Conv2d)(
        channels, outputs, kernel,
        stride=draw(st.integers(1, 3)),
        padding=draw(st.integers(0, kernel // 2)),
        dilation=draw(st.sampled_from([1, 1, 2])) if kernel == 3 else 1,
        groups=groups,
        bias=draw(st.booleans()),
    )  # fmt: skip
    sizes = [draw(st.sampled_from([7, 8, 12, 17])) for _ in range(axes)]
    batch = draw(st.sampled_from([3, 4, 16]))
    assert gradient_error(layer, (batch, channels, *sizes), block) < ROUNDING


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: F.smooth_l1_loss(o, y, reduction="none").flatten(1).mean(1),
        lambda o, y: F.binary_cross_entropy_with_logits(
            o, y.sigmoid(), reduction="none"
        ).flatten(1).mean(1),
        lambda o, y: F.huber_loss(o, y, reduction="none").flatten(1).mean(1),
    ],
    ids=["smooth l1", "bce with logits", "huber"],
)  # fmt: skip
def test_gradient_of_regression_losses(loss):
    assert gradient_error(nn.Linear(12, 5), (8, 12), 0, loss) < ROUNDING


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_of_torchs_own_cross_entropy(smoothing):
    def loss(o, y):
        return F.cross_entropy(o, y, reduction="none", label_smoothing=smoothing)

    x, y = torch.randn(8, 12), torch.arange(8) % 5
    assert gradient_error(nn.Linear(12, 5), None, 0, loss, x=x, y=y) < ROUNDING


def test_gradient_of_embedding():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 16, padding_idx=3)
            self.fc = nn.Linear(16, 5)

        def forward(self, x):
            return self.fc(self.table(x).mean(1))

    torch.manual_seed(0)
    x = torch.randint(0, 20, (6, 7))
    x[0, :2] = torch.tensor([3, 19])
    y = torch.arange(6) % 5
    error = gradient_error(
        Words(), None, 0, lambda o, y: F.cross_entropy(o, y, reduction="none"), x=x, y=y
    )
    assert error < ROUNDING
