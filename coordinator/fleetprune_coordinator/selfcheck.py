"""Proof by computing: a model with units cut out equals the dense one with the same units zeroed.

Whatever the tracer misread (a softmax over channels, a shuffle, a mean over units) shows here as a
difference, long before any device sees the model.
"""

import copy
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fleetprune.errors import TraceError
from fleetprune.layout import Architecture, KeepCounts, Order, TensorSpec, axis_indices
from fleetprune_coordinator.resize import resize, statistics_of

TOLERANCE = 1e-8  # of the largest output, in float64: rounding stays below 1e-11
TRIALS = 2
SEED = 20230618


def check_cut_equals_zeroed(model: nn.Module, architecture: Architecture) -> None:
    """Hold cut models against zeroed ones, with random weights, counts and orders of units.

    Args:
        model: The dense model; it is not changed.
        architecture: What is to be proved of it.

    Raises:
        TraceError: They differ, or the cut model does not run; names a group.
    """
    rng = np.random.default_rng(SEED)
    dense = randomised(model, torch.float64)
    example = torch.from_numpy(rng.normal(size=(1, *architecture.input_shape)))

    def draw(groups: list[str]) -> tuple[dict[str, int], dict[str, NDArray[np.intp]]]:
        chosen = set(groups)
        keep = {
            g: int(rng.integers(1, n)) if g in chosen else n for g, n in architecture.groups.items()
        }
        order = architecture.identity() | {
            g: rng.permutation(architecture.groups[g]).astype(np.intp) for g in groups
        }
        return keep, order

    everything = list(architecture.groups)
    for _ in range(TRIALS):
        if _difference(dense, architecture, *draw(everything), example) is None:
            continue
        for group in everything:
            reason = _difference(dense, architecture, *draw([group]), example)
            if reason is not None:
                raise TraceError(_message(f"group {group}", reason))
        raise TraceError(_message(f"groups {', '.join(everything)} together", "they differ"))


def _message(what: str, reason: str) -> str:
    return (
        f"{what}: the model without some units is not the dense model with them zeroed, expected "
        f"channels that meet only in convolutions, linear layers and norms: {reason}"
    )


def randomised(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in evaluation mode with weights in which no difference hides: no two are alike."""
    generator = torch.Generator().manual_seed(SEED)
    dense = copy.deepcopy(model).eval().to("cpu", dtype).requires_grad_(False)
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
    _mask_layer_norms(zeroed, architecture, keep, order)
    try:
        with torch.no_grad():
            got, expected = small(example), zeroed(example)
    except Exception as error:  # whatever a user's forward may raise on a wrong shape
        return (str(error) or type(error).__name__).splitlines()[0]
    if got.shape != expected.shape:
        return f"output {tuple(got.shape)}, expected {tuple(expected.shape)}"
    worst = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return None if worst <= TOLERANCE else f"outputs differ by {worst:.1e} of the largest"


def _tensors(model: nn.Module) -> Mapping[str, Tensor]:
    return dict([*model.named_parameters(), *statistics_of(model)])


def _kept(
    spec: TensorSpec, architecture: Architecture, keep: KeepCounts, order: Order
) -> tuple[Tensor, ...]:
    """An open mesh of the elements that the cut model has."""
    mesh = np.ix_(*(axis_indices(axis, architecture.groups, keep, order) for axis in spec.axes))
    return tuple(torch.from_numpy(np.ascontiguousarray(i)) for i in mesh)


def _mask_layer_norms(
    model: nn.Module, architecture: Architecture, keep: KeepCounts, order: Order
) -> None:
    """Let LayerNorm take mean and variance over the kept units only, as the cut model's does."""
    specs = {spec.name: spec for spec in architecture.tensors}
    for path, layer in model.named_modules():
        spec = specs.get(f"{path}.weight" if path else "weight")
        if isinstance(layer, nn.LayerNorm) and spec is not None and spec.groups():
            indices = axis_indices(spec.axes[0], architecture.groups, keep, order)
            masked = partial(_norm_over, layer, torch.from_numpy(indices))
            layer.forward = masked  # type: ignore[method-assign]


def _norm_over(layer: nn.LayerNorm, kept: Tensor, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    bias = None if layer.bias is None else layer.bias[kept]
    out[..., kept] = functional.layer_norm(
        x[..., kept], (kept.numel(),), layer.weight[kept], bias, layer.eps
    )
    return out
