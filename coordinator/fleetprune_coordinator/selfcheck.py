"""Proof by computing: a model with units cut out equals the dense one with the same units zeroed.

Whatever the tracer misread (a softmax over channels, a shuffle, a mean over units) shows here as a
difference, long before any device sees the model.
"""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fleetprune.layout import Architecture, KeepCounts, Order, TensorSpec, axis_indices
from fleetprune_coordinator.attention import with_cuttable_heads
from fleetprune_coordinator.resize import resize, statistics_of

TOLERANCE = 1e-8  # of the largest output, in float64: rounding stays below 1e-11
TRIALS = 2
SEED = 20230618


def disproved(
    model: nn.Module,
    architecture: Architecture,
    example: Tensor,
    groups: Sequence[str] | None = None,
) -> dict[str, str]:
    """Hold cut models against zeroed ones, with random weights, counts and orders of units.

    Args:
        model: The dense model; it is not changed.
        architecture: What is to be proved of it.
        example: (1, ...) its input; of floats only the shape counts.
        groups: Those to cut; None: all.

    Returns:
        Groups that cannot be cut as it says, and why: the cut model does not run, or gives
        something else. Empty if all can, one by one and all together.
    """
    rng = np.random.default_rng(SEED)
    dense = randomised(model, torch.float64)
    if example.is_floating_point():
        example = torch.from_numpy(rng.normal(size=tuple(example.shape)))

    def difference(groups: Sequence[str]) -> str | None:
        chosen = set(groups)
        keep = {
            g: int(rng.integers(1, n)) if g in chosen else n for g, n in architecture.groups.items()
        }
        order = architecture.identity() | {
            g: rng.permutation(architecture.groups[g]).astype(np.intp) for g in groups
        }
        return _difference(dense, architecture, keep, order, example)

    everything = list(architecture.groups if groups is None else groups)
    if all(difference(everything) is None for _ in range(TRIALS)):
        return {}
    alone = {group: difference([group]) for group in everything}
    if wrong := {group: why for group, why in alone.items() if why is not None}:
        return wrong
    for group in everything:  # wrong only together with others: without one of them, right
        others = [g for g in everything if g != group]
        if all(difference(others) is None for _ in range(TRIALS)):
            return {group: "it can be cut alone, but not together with other groups"}
    return dict.fromkeys(everything, "groups can be cut alone, but not together")


def randomised(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in evaluation mode with weights in which no difference hides: no two are alike.

    Its attention layers are `HeadAttention`s, as those of every cut model are.
    """
    generator = torch.Generator().manual_seed(SEED)
    dense = with_cuttable_heads(copy.deepcopy(model)).eval().to("cpu", dtype).requires_grad_(False)
    for parameter in dense.parameters():
        fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() > 1:
            parameter.copy_(noise * (2.0 / fan_in) ** 0.5)
        else:
            parameter.copy_(1.0 + 0.25 * noise)
    for name, statistic in statistics_of(dense):
        noise = torch.rand(statistic.shape, generator=generator, dtype=torch.float64)
        statistic.copy_(noise + (0.5 if name.endswith("running_var") else -0.5))
    return dense


def _difference(
    dense: nn.Module,
    architecture: Architecture,
    keep: KeepCounts,
    order: Order,
    example: Tensor,
) -> str | None:
    """Why the cut and the zeroed model differ, or None."""
    small = resize(dense, architecture, keep)
    zeroed = copy.deepcopy(dense)
    dense_tensors = _tensors(dense)
    small_tensors, zeroed_tensors = _tensors(small), _tensors(zeroed)
    for spec in architecture.tensors:
        if not spec.groups():
            continue
        if tuple(small_tensors[spec.name].shape) != spec.shape(keep):
            return f"{spec.name} has shape {tuple(small_tensors[spec.name].shape)}"
        kept = _kept(spec, architecture, keep, order)
        small_tensors[spec.name].copy_(dense_tensors[spec.name][kept])
        zeros = torch.zeros_like(dense_tensors[spec.name])
        zeros[kept] = dense_tensors[spec.name][kept]
        zeroed_tensors[spec.name].copy_(zeros)
    try:
        with torch.no_grad():
            got, expected = small(example), zeroed(example)
    except Exception as error:  # whatever a user's forward may raise on a wrong shape
        return f"does not run: {(str(error) or type(error).__name__).splitlines()[0]}"
    if got.shape != expected.shape:
        return f"output {tuple(got.shape)}, expected {tuple(expected.shape)}"
    worst = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if worst <= TOLERANCE:
        return None
    return f"without some units it is not the dense model with them zeroed: {worst:.1e} off"


def _tensors(model: nn.Module) -> Mapping[str, Tensor]:
    return dict([*model.named_parameters(), *statistics_of(model)])


def _kept(
    spec: TensorSpec, architecture: Architecture, keep: KeepCounts, order: Order
) -> tuple[Tensor, ...]:
    """An open mesh of the elements that the cut model has."""
    mesh = np.ix_(*(axis_indices(axis, architecture.groups, keep, order) for axis in spec.axes))
    return tuple(torch.from_numpy(np.ascontiguousarray(i)) for i in mesh)
