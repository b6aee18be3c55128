"""SynFlow's gradient: how much flows through each weight when all weights are positive."""

import copy
from typing import Final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fleetprune.criteria import Tensors
from fleetprune.errors import BudgetError

DROP: Final = 1e-150
"""The input, in place of ones. R is proportional to it, and what is divided out again in the end
changes nothing; but no activation saturates (ReLU6, sigmoid) however many positive layers stand
before it, and float64 has room for it."""


class _Scale(nn.Module):
    """A LayerNorm as SynFlow sees it: its scale alone, since centring would cancel the flow."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.weight is None else x * self.weight


def flow_gradients(model: nn.Module, example: torch.Tensor, params: Tensors) -> Tensors:
    """The gradient of the flow by the absolute parameters, as a share of the flow.

    R is the sum of the outputs for an input of ones, in a network whose weights are replaced by
    their absolute values (Tanaka et al. 2020). Biases, and what norms subtract and divide by, are
    left out: they are no weights on a path from input to output.

    Args:
        model: The dense model; its structure is used, its values are not.
        example: (1, *shape); shape counts.
        params: Dense parameters by name.

    Returns:
        dR/d|w| / R by name, float32, in the parameters' shapes: `sum of |w| * g` over a layer that
        all paths go through is 1. 0 for biases, and where nothing flows.

    Raises:
        BudgetError: Nothing flows to the output, or more than float64 holds.
    """
    twin = _linear(model)
    values = {n: torch.tensor(array, dtype=torch.float64).abs() for n, array in params.items()}
    for name, value in values.items():
        if _is_shift(name, value):
            value.zero_()
        else:
            value.requires_grad_()
    x = torch.full(example.shape, DROP, dtype=torch.float64)
    flow = torch.func.functional_call(twin, values, (x,)).sum()
    weights = {name: value for name, value in values.items() if value.requires_grad}
    found = torch.autograd.grad(flow, list(weights.values()), allow_unused=True)
    gradients = dict(zip(weights, found, strict=True))
    total = float(flow.detach())
    if not 0 < total < float("inf"):
        raise BudgetError(
            f"synflow: a flow of {total / DROP:g} reaches the output, expected a positive number; "
            f"choose another criterion"
        )
    shares = {name: torch.zeros_like(value) for name, value in values.items()}
    shares |= {name: g / total for name, g in gradients.items() if g is not None}
    return {name: share.detach().float().numpy() for name, share in shares.items()}


def _is_shift(name: str, value: torch.Tensor) -> bool:
    return value.dim() == 1 and name.rpartition(".")[2] == "bias"


def _linear(model: nn.Module) -> nn.Module:
    """A copy in float64 and evaluation mode whose norms are their scales alone."""
    twin = copy.deepcopy(model).cpu().double().eval()
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()  # to means of 0 and variances of 1
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, _Scale(child))
    return twin
