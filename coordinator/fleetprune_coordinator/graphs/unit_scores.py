"""What one training step says of each unit, in ONNX nodes and, for the reference, in torch.

The formulas with their papers are those of `fleetprune.criteria.gradients`.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from fleetprune.criteria import CATALOGUE, Criterion, Needs
from fleetprune.errors import GraphError
from fleetprune_coordinator.graphs.lowering import Lowering
from fleetprune_coordinator.graphs.types import GateMember
from fleetprune_coordinator.graphs.values import Value

STEPWISE: Final = frozenset(c for c, facts in CATALOGUE.items() if facts.needs is Needs.BACKWARD)
"""Criteria that a training step can compute."""

_CANCELS: Final = frozenset({Criterion.TAYLOR, Criterion.TAYLOR_ABS})
"""Whose sums over a unit may cancel to about zero."""


def check_criterion(criterion: Criterion) -> None:
    """Refuse a criterion that is not one of a step's gradient (GraphError)."""
    if criterion not in STEPWISE:
        raise GraphError(
            f"criterion {criterion} of a training step, "
            f"expected one of {', '.join(sorted(STEPWISE))}"
        )


def lowered(
    low: Lowering,
    criterion: Criterion,
    group: Sequence[GateMember],
    tensors: Mapping[str, tuple[Value, str]],
) -> str:
    """The name of a (units,) tensor.

    Args:
        low: Where nodes are added.
        criterion: One of `STEPWISE`.
        group: Where the units' elements are.
        tensors: Per parameter its value and the name of its gradient.
    """
    total = ""
    for m in group:
        weight, gradient = tensors[m.parameter]
        part = _element(low, criterion, low.plain(weight), gradient)
        end = m.start + m.units * m.block
        if (m.start, end) != (0, weight.shape[m.axis]):
            part = low.op("Slice", part, low.ints(m.start), low.ints(end), low.ints(m.axis))
        others = [a for a in range(len(weight.shape)) if a != m.axis]
        if others:
            part = low.op("ReduceSum", part, low.ints(*others), keepdims=0)
        if m.block > 1:
            part = low.op("Reshape", part, low.ints(m.units, m.block))
            part = low.op("ReduceSum", part, low.ints(1), keepdims=0)
        total = low.op("Add", total, part) if total else part
    if criterion is Criterion.TAYLOR:
        return low.op("Mul", total, total)
    return low.op("Abs", total) if criterion is Criterion.TAYLOR_ABS else total


def _element(low: Lowering, criterion: Criterion, weight: str, gradient: str) -> str:
    if criterion is Criterion.SENSITIVITY:
        return low.op("Abs", gradient)
    product = low.op("Mul", weight, gradient)
    if criterion is Criterion.FISHER:
        return low.op("Mul", low.op("Mul", product, product), low.scalar(0.5))
    return low.op("Abs", product) if criterion is Criterion.SNIP else product


def expected(
    criterion: Criterion,
    gates: Sequence[Sequence[GateMember]],
    params: Mapping[str, torch.Tensor],
    gradients: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `lowered` computes for all groups, and tensors whose norm is the unit of its error.

    Args:
        criterion: One of `STEPWISE`.
        gates: Per group where its units' elements are.
        params: By name, float64.
        gradients: By name, float64.

    Returns:
        (U,), (U,) float64.
    """
    products = {name: params[name] * gradient for name, gradient in gradients.items()}
    if criterion is Criterion.SENSITIVITY:
        elements = {name: gradient.abs() for name, gradient in gradients.items()}
    elif criterion is Criterion.FISHER:
        elements = {name: product**2 / 2 for name, product in products.items()}
    elif criterion is Criterion.SNIP:
        elements = {name: product.abs() for name, product in products.items()}
    else:
        elements = products
    power = 2 if criterion is Criterion.TAYLOR else 1
    value = torch.cat([_summed(group, elements) for group in gates]).abs() ** power
    if criterion not in _CANCELS:
        return value, value
    absolute = {name: product.abs() for name, product in products.items()}
    return value, torch.cat([_summed(group, absolute) for group in gates]) ** power


def _summed(group: Sequence[GateMember], elements: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(units,) sums over the units' elements."""
    total = torch.zeros(group[0].units, dtype=torch.float64)
    for m in group:
        part = elements[m.parameter].narrow(m.axis, m.start, m.units * m.block)
        total += part.movedim(m.axis, 0).reshape(m.units, -1).sum(1)
    return total
