"""Masks of `torch.nn.utils.prune`, in and out.

There a pruned weight is kept as `weight_orig` beside a `weight_mask`, and their product is made
before each call. Here a weight is plain, with zeros where the mask has them, and masks are a
dictionary by the weights' names.
"""

import copy
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import prune

from fleetprune.errors import UsageError

Masks = dict[str, NDArray[np.bool_]]
"""Per weight's name, of its shape: true where it stays."""
ORIGINAL, MASK = "_orig", "_mask"


def _pruned(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Full name, layer and own name of every weight that has a mask."""
    for path, layer in model.named_modules():
        for leaf in [n.removesuffix(MASK) for n in layer._buffers if n.endswith(MASK)]:
            if layer._parameters.get(leaf + ORIGINAL) is not None:
                yield f"{path}.{leaf}" if path else leaf, layer, leaf


def without_masks(model: nn.Module) -> tuple[nn.Module, Masks]:
    """A model with plain weights, and the masks that `torch.nn.utils.prune` put on it.

    Args:
        model: It is not changed; a weight may have been masked several times.

    Returns:
        A copy in which every masked weight is a parameter again, zero where it was cut, before
        the layer's other parameters; and the masks.
    """
    found = list(_pruned(model))
    # The products are no leaves of autograd, which deepcopy refuses: these stand for them.
    products = {
        id(value): value.detach()
        for _, layer, leaf in found
        if isinstance(value := getattr(layer, leaf, None), Tensor)
    }
    plain = copy.deepcopy(model, dict(products))
    masks: Masks = {}
    for name, layer, leaf in list(_pruned(plain)):
        masks[name] = layer.get_buffer(leaf + MASK).bool().cpu().numpy()
        prune.remove(layer, leaf)  # type: ignore[no-untyped-call]
        others = {n: p for n, p in layer._parameters.items() if n != leaf}
        layer._parameters = {leaf: layer._parameters[leaf], **others}
    return plain, masks


def with_masks(model: nn.Module, masks: Mapping[str, NDArray[np.bool_]]) -> nn.Module:
    """A model on which `torch.nn.utils.prune` holds masks, ready to be trained on there.

    Args:
        model: With plain weights; it is not changed.
        masks: By the weights' names; weights without one stay plain.

    Returns:
        A copy with `weight_orig` and `weight_mask` for each mask.

    Raises:
        UsageError: The model has no such weight, or a mask has another shape.
    """
    masked = copy.deepcopy(model)
    weights = dict(masked.named_parameters())
    for name, mask in masks.items():
        if name not in weights:
            raise UsageError(f"mask of {name}: the model has no such weight")
        if mask.shape != tuple(weights[name].shape):
            raise UsageError(
                f"mask of {name}: shape {mask.shape}, expected {tuple(weights[name].shape)}"
            )
    for name, mask in masks.items():
        path, _, leaf = name.rpartition(".")
        layer = masked.get_submodule(path)
        prune.custom_from_mask(layer, leaf, torch.from_numpy(mask))  # type: ignore[no-untyped-call]
    return masked


def plain_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Masks]:
    """The same for a state_dict: plain weights with zeros, and the masks.

    Args:
        state: As `state_dict()` of a masked model gives it, or of any other.

    Raises:
        UsageError: A mask has no weight, or another shape than it.
    """
    masks: Masks = {}
    plain = dict(state)
    for key in [k for k in state if k.endswith(MASK) and k.removesuffix(MASK) + ORIGINAL in state]:
        name = key.removesuffix(MASK)
        weight, mask = plain.pop(name + ORIGINAL), plain.pop(key)
        if weight.shape != mask.shape:
            raise UsageError(
                f"mask of {name}: shape {tuple(mask.shape)}, expected {tuple(weight.shape)}"
            )
        masks[name] = mask.bool().cpu().numpy()
        plain[name] = weight * mask.to(weight.dtype)
    return plain, masks


def masked_state(
    state: Mapping[str, Tensor], masks: Mapping[str, NDArray[np.bool_]]
) -> dict[str, Tensor]:
    """A state_dict as a model with these masks takes it (`torch.nn.utils.prune`).

    Raises:
        UsageError: There is no such weight, or a mask has another shape.
    """
    masked = dict(state)
    for name, mask in masks.items():
        if (weight := masked.pop(name, None)) is None:
            raise UsageError(f"mask of {name}: the state_dict has no such weight")
        if mask.shape != tuple(weight.shape):
            raise UsageError(f"mask of {name}: shape {mask.shape}, expected {tuple(weight.shape)}")
        masked[name + ORIGINAL] = weight
        masked[name + MASK] = torch.from_numpy(mask).to(weight.dtype)
    return masked
