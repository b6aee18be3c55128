"""Torch models to simulate with: small networks of the kind that runs on devices.

Channel counts are multiples of 8, which is what processors' vector units like.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn


def mlp(inputs: int = 64, hidden: int = 128, classes: int = 10) -> nn.Module:
    """One hidden layer; input (inputs,)."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def digits_cnn(classes: int = 10) -> nn.Module:
    """A two-block ResNet for 8x8 digits; input (1, 8, 8).

    After He et al., "Deep Residual Learning for Image Recognition", 2016.
    """
    return Classifier(
        nn.Sequential(conv2d(1, 32), ResidualBlock(32, 32, 1), ResidualBlock(32, 64, 2)),
        nn.AdaptiveAvgPool2d(1),
        64,
        classes,
    )


def cnn1d(channels: int = 6, classes: int = 5) -> nn.Module:
    """A one-dimensional CNN for windows of sensor data; input (channels, 8 or more).

    Four convolutions, as is usual for human activity recognition: Ordóñez and Roggen, "Deep
    Convolutional and LSTM Recurrent Neural Networks for Multimodal Wearable Activity
    Recognition", 2016.
    """

    def layer(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm1d(outputs),
            nn.ReLU(),
        )

    body = nn.Sequential(
        layer(channels, 32, 5, 1), layer(32, 64, 5, 2), layer(64, 64, 5, 2), layer(64, 128, 3, 2)
    )
    return Classifier(body, nn.AdaptiveAvgPool1d(1), 128, classes)


def ds_cnn(classes: int = 10, channels: int = 3, stride: int = 2) -> nn.Module:
    """Depthwise separable CNN; input (channels, h, w), `stride` is the first layer's.

    Zhang et al., "Hello Edge: Keyword Spotting on Microcontrollers", 2017; also in MLPerf Tiny.
    """
    layers = [conv2d(channels, 64, stride=stride)]
    for _ in range(4):
        layers += [conv2d(64, 64, groups=64), conv2d(64, 64, kernel=1)]
    return Classifier(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), 64, classes)


def resnet8(classes: int = 10, channels: int = 3, stride: int = 1) -> nn.Module:
    """ResNet with three blocks; input (channels, h, w), `stride` is the first layer's.

    The image classifier of Banbury et al., "MLPerf Tiny Benchmark", 2021, which has 3 channels of
    32x32.
    """
    body = nn.Sequential(
        conv2d(channels, 16, stride=stride),
        ResidualBlock(16, 16, 1),
        ResidualBlock(16, 32, 2),
        ResidualBlock(32, 64, 2),
    )
    return Classifier(body, nn.AdaptiveAvgPool2d(1), 64, classes)


def se_resnet8(
    classes: int = 10, channels: int = 3, stride: int = 1, reduction: int = 4
) -> nn.Module:
    """`resnet8` with squeeze and excitation in its blocks; input (channels, h, w).

    Hu, Shen and Sun, "Squeeze-and-Excitation Networks", 2018: SE-ResNet, figure 3.

    Args:
        classes: Outputs.
        channels: Of the input.
        stride: Of the first layer.
        reduction: A block's channels per unit of its squeezed layer.
    """
    body = nn.Sequential(
        conv2d(channels, 16, stride=stride),
        *(
            ResidualBlock(i, o, step, SqueezeExcite(o, o // reduction))
            for i, o, step in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        ),
    )
    return Classifier(body, nn.AdaptiveAvgPool2d(1), 64, classes)


def transformer(
    channels: int = 6,
    length: int = 128,
    classes: int = 5,
    *,
    width: int = 64,
    heads: int = 4,
    layers: int = 2,
    hidden: int = 128,
    patch: int = 8,
) -> nn.Module:
    """A small transformer encoder for windows of sensor data; input (channels, length).

    The encoder of Vaswani et al., "Attention Is All You Need", 2017, with the norms before its
    layers and patches as tokens, as in Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021;
    for sensor windows as in Dirgová Luptáková, Kubovčík and Pospíchal, "Wearable Sensor-Based
    Human Activity Recognition with Transformer Model", 2022. Heads and hidden units can be cut;
    the tokens' width cannot, since every layer normalises over it.

    Args:
        channels: Of the input.
        length: Samples of a window, a multiple of `patch`.
        classes: Outputs.
        width: Of a token; a multiple of `heads`.
        heads: Of attention, per layer.
        layers: Of the encoder.
        hidden: Units of each layer's perceptron.
        patch: Samples per token.

    Raises:
        ValueError: `length` is no multiple of `patch`.
    """
    if length % patch:
        raise ValueError(f"windows of {length} samples, expected a multiple of the patch, {patch}")
    return Transformer(
        nn.Conv1d(channels, width, patch, patch),
        length // patch,
        nn.Sequential(*(EncoderLayer(width, heads, hidden) for _ in range(layers))),
        classes,
    )


def mobilenet_v2(
    width: float = 0.35, classes: int = 10, channels: int = 3, stride: int = 1
) -> nn.Module:
    """MobileNetV2; input (channels, h, w).

    Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, table 2.

    Args:
        width: Factor of every layer's channels but the last convolution's.
        classes: Outputs.
        channels: Of the input.
        stride: Of the first layer: 1 suits images of 32x32, the paper's 224x224 have 2.
    """
    rows = (  # expansion, channels, blocks, stride of the first, kernel
        (1, 16, 1, 1, 3), (6, 24, 2, 1, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3),
        (6, 96, 3, 1, 3), (6, 160, 3, 2, 3), (6, 320, 1, 1, 3),
    )  # fmt: skip
    stem = _scaled(32, width)
    return _mobile(rows, width, channels=channels, stem=stem, stride=stride, classes=classes)


def efficientnet_lite0(
    width: float = 1.0, classes: int = 10, channels: int = 3, stride: int = 1
) -> nn.Module:
    """EfficientNet-Lite0; input (channels, h, w).

    The table of Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural
    Networks", 2019, as Google's EfficientNet-Lite (2020) has it for devices: without
    squeeze-and-excitation, with ReLU6 instead of Swish, first and last convolution as wide in
    every size. Dropout belongs to their training, not to the network, and is left out.

    Args:
        width: Factor of every block's channels.
        classes: Outputs.
        channels: Of the input.
        stride: Of the first layer: 1 suits images of 32x32, the original's 224x224 have 2.
    """
    rows = (  # expansion, channels, blocks, stride of the first, kernel
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
    )  # fmt: skip
    return _mobile(rows, width, channels=channels, stem=32, stride=stride, classes=classes)


def _scaled(channels: int, width: float) -> int:
    return max(8, int(channels * width + 4) // 8 * 8)


def _mobile(
    rows: Sequence[tuple[int, int, int, int, int]],
    width: float,
    *,
    channels: int,
    stem: int,
    stride: int,
    classes: int,
) -> nn.Module:
    """Stem, blocks by a table as the two above, a wide 1x1 convolution, the classifier."""
    layers: list[nn.Module] = [conv2d(channels, stem, stride=stride, activation=nn.ReLU6)]
    inputs = stem
    for expansion, outputs, blocks, first, kernel in rows:
        for number in range(blocks):
            scaled, step = _scaled(outputs, width), first if number == 0 else 1
            layers.append(InvertedResidual(inputs, scaled, step, expansion, kernel))
            inputs = scaled
    layers.append(conv2d(inputs, 1280, kernel=1, activation=nn.ReLU6))
    return Classifier(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), 1280, classes)


def conv2d(
    inputs: int,
    outputs: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    activation: Callable[[], nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """Convolution, BatchNorm and, unless None, an activation."""
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    if activation is not None:
        layers.append(activation())
    return nn.Sequential(*layers)


class Classifier(nn.Module):
    """A body, a global pool and a linear layer."""

    def __init__(self, body: nn.Module, pool: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.pool = pool
        self.fc = nn.Linear(features, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, channels, ...) -> (n, classes)."""
        logits: torch.Tensor = self.fc(self.pool(self.body(x)).flatten(1))
        return logits


class ResidualBlock(nn.Module):
    """relu(conv(relu(conv(x))) + shortcut(x)), with something behind the second convolution."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, behind: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.first = conv2d(inputs, outputs, stride=stride)
        self.second = conv2d(outputs, outputs, activation=None)
        if behind is not None:
            self.second.append(behind)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = conv2d(inputs, outputs, kernel=1, stride=stride, activation=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, inputs, h, w) -> (n, outputs, h / stride, w / stride)."""
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


class SqueezeExcite(nn.Module):
    """Each channel times a factor between 0 and 1 that follows from the means of all."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, squeezed)
        self.up = nn.Linear(squeezed, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, channels, h, w) -> the same shape."""
        factors = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
        return x * factors[:, :, None, None]


class Transformer(nn.Module):
    """Patches of a window as tokens with places, an encoder, the mean token, a linear layer."""

    def __init__(self, patches: nn.Conv1d, tokens: int, body: nn.Module, classes: int) -> None:
        super().__init__()
        width = patches.out_channels
        self.patches = patches
        self.places = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.body = body
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, channels, length) -> (n, classes)."""
        tokens = self.patches(x).transpose(1, 2) + self.places
        logits: torch.Tensor = self.fc(self.norm(self.body(tokens)).mean(1))
        return logits


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + perceptron(norm(x))."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.second = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, tokens, width) -> the same shape."""
        y = self.first(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        z: torch.Tensor = x + self.perceptron(self.second(x))
        return z


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; added to the input where the shapes agree."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, expansion: int, kernel: int = 3
    ) -> None:
        super().__init__()
        wide = inputs * expansion
        layers = [] if expansion == 1 else [conv2d(inputs, wide, kernel=1, activation=nn.ReLU6)]
        layers += [
            conv2d(wide, wide, kernel=kernel, stride=stride, groups=wide, activation=nn.ReLU6),
            conv2d(wide, outputs, kernel=1, activation=None),
        ]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, inputs, h, w) -> (n, outputs, h / stride, w / stride)."""
        y: torch.Tensor = self.layers(x)
        return x + y if self.residual else y
