"""Torch models to simulate with: small networks of the kind that runs on devices.

Channel counts are multiples of 8, which is what processors' vector units like.
"""

from collections.abc import Callable

import torch
from torch import nn

CIFAR_SHAPE = (3, 32, 32)


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
    """A one-dimensional CNN for windows of sensor data; input (channels, 128).

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


def ds_cnn(classes: int = 10, shape: tuple[int, int, int] = CIFAR_SHAPE) -> nn.Module:
    """Depthwise separable CNN; input `shape`, its first entry the channels.

    Zhang et al., "Hello Edge: Keyword Spotting on Microcontrollers", 2017; also in MLPerf Tiny.
    """
    layers = [conv2d(shape[0], 64, stride=2)]
    for _ in range(4):
        layers += [conv2d(64, 64, groups=64), conv2d(64, 64, kernel=1)]
    return Classifier(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), 64, classes)


def resnet8(classes: int = 10) -> nn.Module:
    """ResNet with three blocks; input (3, 32, 32).

    The image classifier of Banbury et al., "MLPerf Tiny Benchmark", 2021.
    """
    body = nn.Sequential(
        conv2d(3, 16),
        ResidualBlock(16, 16, 1),
        ResidualBlock(16, 32, 2),
        ResidualBlock(32, 64, 2),
    )
    return Classifier(body, nn.AdaptiveAvgPool2d(1), 64, classes)


def mobilenet_v2(width: float = 0.35, classes: int = 10) -> nn.Module:
    """MobileNetV2 with a stem of stride 1 for small images; input (3, 32, 32).

    Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, table 2.
    """

    def scaled(channels: int) -> int:
        return max(8, int(channels * width + 4) // 8 * 8)

    rows = (  # expansion, channels, blocks, stride of the first
        (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2),
        (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    )  # fmt: skip
    channels = scaled(32)
    layers: list[nn.Module] = [conv2d(3, channels, activation=nn.ReLU6)]
    for expansion, outputs, blocks, stride in rows:
        for number in range(blocks):
            layers.append(
                InvertedResidual(channels, scaled(outputs), stride if number == 0 else 1, expansion)
            )
            channels = scaled(outputs)
    layers.append(conv2d(channels, 1280, kernel=1, activation=nn.ReLU6))
    return Classifier(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), 1280, classes)


def conv2d(
    inputs: int,
    outputs: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    activation: Callable[[], nn.Module] | None = nn.ReLU,
) -> nn.Module:
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
    """relu(conv(relu(conv(x))) + shortcut(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = conv2d(inputs, outputs, stride=stride)
        self.second = conv2d(outputs, outputs, activation=None)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = conv2d(inputs, outputs, kernel=1, stride=stride, activation=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, inputs, h, w) -> (n, outputs, h / stride, w / stride)."""
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; added to the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        layers = [] if expansion == 1 else [conv2d(inputs, wide, kernel=1, activation=nn.ReLU6)]
        layers += [
            conv2d(wide, wide, stride=stride, groups=wide, activation=nn.ReLU6),
            conv2d(wide, outputs, kernel=1, activation=None),
        ]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, inputs, h, w) -> (n, outputs, h / stride, w / stride)."""
        y: torch.Tensor = self.layers(x)
        return x + y if self.residual else y
