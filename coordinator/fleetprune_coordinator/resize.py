"""A torch model with fewer units, and its weights in and out as arrays.

`resize` rebuilds the layers physically smaller: nothing is masked, every tensor has exactly the
shape that the architecture gives it.
"""

import copy
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fleetprune.errors import UsageError
from fleetprune.layout import Architecture, KeepCounts, Role, TensorSpec, axis_indices, cut
from fleetprune_coordinator.attention import HeadAttention, with_cuttable_heads

Arrays = dict[str, NDArray[np.float32]]


def statistics_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the BatchNorm running means and variances, in `named_buffers()` order.

    `num_batches_tracked` is left out: inference does not read it.
    """
    norms = {name for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if owner in norms and leaf in ("running_mean", "running_var"):
            yield name, buffer


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a convolution has one filter per channel."""
    return (
        isinstance(layer, _ConvNd)
        and layer.groups == layer.in_channels == layer.out_channels
        and layer.groups > 1
    )


def resize(model: nn.Module, architecture: Architecture, keep: KeepCounts) -> nn.Module:
    """A copy of the dense model that has only the leading `keep` units of each group.

    Args:
        model: The dense model; it is not changed.
        architecture: Its description.
        keep: Units to keep per group.

    Returns:
        A model of `TensorSpec.shape(keep)`, with the leading units' values. Its attention layers
        are `HeadAttention`s.

    Raises:
        BudgetError: `keep` is out of range.
        UsageError: The model is not the dense model that `architecture` describes.
    """
    architecture.check_keep(keep)
    small = with_cuttable_heads(copy.deepcopy(model))
    specs = {spec.name: spec for spec in architecture.tensors}
    parts: dict[int, Tensor] = {}  # shared tensors stay shared
    for path, layer in small.named_modules():
        widths = _widths(layer)
        for slots in (layer._parameters, layer._buffers):
            for leaf, tensor in slots.items():
                spec = specs.get(f"{path}.{leaf}" if path else leaf)
                if tensor is None or (spec is None and id(tensor) not in parts):
                    continue
                if id(tensor) not in parts and spec is not None:
                    parts[id(tensor)] = _leading(tensor, spec, architecture, keep)
                slots[leaf] = parts[id(tensor)]
        _fix_attributes(layer, widths)
    for name, axis in architecture.sizes.items():
        path, _, attribute = name.rpartition(".")
        size = sum(s.kept(keep) * s.block for s in axis)
        setattr(small.get_submodule(path), attribute, size)
    return small


def _leading(
    tensor: Tensor, spec: TensorSpec, architecture: Architecture, keep: KeepCounts
) -> Tensor:
    """The leading part of a dense tensor, as a parameter if it was one."""
    _check_shape(spec.name, tensor.shape, spec.shape(architecture.groups))
    part = tensor.detach()
    for i, axis in enumerate(spec.axes):
        if any(s.group is not None for s in axis):
            indices = axis_indices(axis, architecture.groups, keep)
            part = part.index_select(i, torch.from_numpy(indices).to(part.device))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(part.clone(), requires_grad=tensor.requires_grad)
    return part.clone()


def _widths(layer: nn.Module) -> tuple[int, int]:
    """Channels in and out of one group of a dense convolution or GroupNorm; else 0."""
    if isinstance(layer, _ConvNd):
        return layer.in_channels // layer.groups, layer.out_channels // layer.groups
    if isinstance(layer, nn.GroupNorm):
        width = layer.num_channels // layer.num_groups
        return width, width
    return 0, 0


def _fix_attributes(layer: nn.Module, widths: tuple[int, int]) -> None:
    """Make the sizes that a layer remembers those of its tensors.

    Of layers in groups whole groups are cut, so that a group is as wide as it was.
    """
    if isinstance(layer, _ConvNd):
        inputs, outputs = layer.weight.shape[1], layer.weight.shape[0]
        turned = isinstance(layer, _ConvTransposeNd)
        if layer.groups > 1:
            layer.groups = outputs // widths[0 if turned else 1]
        inputs *= layer.groups
        layer.in_channels, layer.out_channels = (outputs, inputs) if turned else (inputs, outputs)
    elif isinstance(layer, nn.GroupNorm):
        if layer.weight is not None:
            layer.num_channels = layer.weight.shape[0]
            layer.num_groups = layer.num_channels // widths[0]
    elif isinstance(layer, HeadAttention):
        packed = layer.in_proj_weight is not None
        rows = layer.in_proj_weight.shape[0] // 3 if packed else layer.q_proj_weight.shape[0]
        layer.num_heads = rows // layer.head_dim
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, _NormBase):
        sized = layer.weight if layer.weight is not None else layer.running_mean
        if sized is not None:
            layer.num_features = sized.shape[0]
    elif isinstance(layer, nn.LayerNorm) and layer.weight is not None:
        layer.normalized_shape = tuple(layer.weight.shape)
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = layer.weight.shape[0]


def _check_shape(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(got) != tuple(expected):
        raise UsageError(f"{name}: shape {tuple(got)}, expected {tuple(expected)}")


@torch.no_grad()
def load(
    model: nn.Module,
    parameters: Mapping[str, NDArray[np.float32]],
    statistics: Mapping[str, NDArray[np.float32]],
) -> None:
    """Copy arrays into the model's tensors of the same names; nothing is broadcast.

    Raises:
        UsageError: A name is missing or too many, or a shape differs.
    """
    for what, tensors, arrays in (
        ("parameters", dict(model.named_parameters()), parameters),
        ("statistics", dict(statistics_of(model)), statistics),
    ):
        if differing := sorted(set(tensors) ^ set(arrays)):
            raise UsageError(f"{what}: {differing[0]} is only in the model or only in the arrays")
        for name, tensor in tensors.items():
            _check_shape(name, arrays[name].shape, tuple(tensor.shape))
            tensor.copy_(torch.from_numpy(np.array(arrays[name])))


def read(model: nn.Module) -> tuple[Arrays, Arrays]:
    """Copies of the model's parameters and statistics, float32, by name."""
    return (
        {name: _array(tensor) for name, tensor in model.named_parameters()},
        {name: _array(tensor) for name, tensor in statistics_of(model)},
    )


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return np.array(tensor.detach().to("cpu", torch.float32).numpy())


def extract(
    model: nn.Module,
    architecture: Architecture,
    parameters: Mapping[str, NDArray[np.float32]],
    statistics: Mapping[str, NDArray[np.float32]],
    keep: KeepCounts,
) -> nn.Module:
    """The model of one device class, physically small, ready to run.

    Args:
        model: The dense model: its structure is used, its values are not.
        architecture: Its description.
        parameters: Dense, by name; the units stand in the order in which they are kept.
        statistics: The class's own BatchNorm statistics, already of its shape.
        keep: The class's keep counts.

    Returns:
        A new model in evaluation mode.

    Raises:
        BudgetError: `keep` is out of range.
        UsageError: An array is missing or has another shape than the architecture says.
    """
    for spec in architecture.role(Role.PARAMETER):
        if spec.name not in parameters:
            raise UsageError(f"parameters: {spec.name} is missing")
        _check_shape(spec.name, parameters[spec.name].shape, spec.shape(architecture.groups))
    small = resize(model, architecture, keep)
    load(small, cut(architecture, parameters, keep, Role.PARAMETER), statistics)
    return small.eval()
