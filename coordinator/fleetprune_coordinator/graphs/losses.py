"""Losses per sample."""

from collections.abc import Callable

import torch

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(output, y) -> (batch,)."""


def cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[y]; logits (batch, classes), y (batch,) int64."""
    classes = torch.arange(logits.shape[-1], device=logits.device)
    hot = (y.unsqueeze(-1) == classes).to(logits.dtype)
    return -(torch.log_softmax(logits, -1) * hot).sum(-1)


def mean_squared_error(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean over the sample's elements of (output - y)**2; y of the output's shape."""
    return ((output - y) ** 2).flatten(1).mean(1)


def distillation(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(softmax(teacher) || softmax(student)) per sample; no gradient to the teacher."""
    target = torch.log_softmax(teacher.detach(), -1)
    return (target.exp() * (target - torch.log_softmax(student, -1))).sum(-1)


def weighted_mean(losses: torch.Tensor, sw: torch.Tensor) -> torch.Tensor:
    """sum(losses * sw) / sum(sw)."""
    return (losses * sw).sum() / sw.sum()


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mean_squared_error}
