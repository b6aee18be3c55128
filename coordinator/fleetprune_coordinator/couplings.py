"""The one door to torch-pruning: which channels of which layers go together.

Its dependency graph (Fang et al., DepGraph, CVPR 2023) takes operators that it does not know for
elementwise ones, so what comes out of here is a claim, to be proved by `selfcheck`.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch_pruning
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fleetprune.errors import TraceError
from fleetprune_coordinator.recording import SUPPORTED, describe
from fleetprune_coordinator.resize import is_depthwise

Slot = tuple[str, int]
"""A tensor's name and one of its axes."""


@dataclass(frozen=True)
class Member:
    """Indices of some axes, and the unit of the asked layer that each of them goes with."""

    slots: tuple[Slot, ...]
    producer: str | None
    """Path of the layer, if the indices are outputs of a convolution or linear layer."""
    indices: NDArray[np.intp]
    units: NDArray[np.intp]


class Couplings:
    """Asks which indices of which axes must be cut together with given outputs of a layer."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model = copy.deepcopy(model).cpu().eval().requires_grad_(True)
        self._paths = {layer: path for path, layer in self.model.named_modules()}
        self._names = {id(p): name for name, p in self.model.named_parameters()}
        # torch-pruning does not see the model's input: a factor on its channels stands for it.
        # Never of three axes: for those it would drop the offsets of concatenations.
        channels = example.shape[1] if example.dim() > 1 else 1
        lead = (1,) if example.dim() > 3 else ()
        self._input = nn.Parameter(torch.ones(*lead, channels, *(1,) * (example.dim() - 2)))
        self._graph = torch_pruning.DependencyGraph()
        try:
            self._graph.build_dependency(
                self.model,
                example.cpu(),
                forward_fn=lambda m, x: m(x * self._input),
                unwrapped_parameters=[(self._input, len(lead))],
                verbose=False,
            )
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise TraceError(
                f"{describe('', model)} cannot be traced, supported are {SUPPORTED}: {reason}"
            ) from error
        for node in self._graph.module2node.values():
            node.enable_index_mapping = True

    def outputs_of(self, path: str) -> int:
        """Output channels of a convolution or linear layer; 0 if it does not reach the output."""
        layer = self.model.get_submodule(path)
        return len(weight_of(layer)) if layer in self._graph.module2node else 0

    def of(self, path: str, units: NDArray[np.intp]) -> tuple[list[Member], bool]:
        """What must be cut together with some outputs of a layer.

        Returns:
            The coupled indices; and whether the model's input or output is among them.
        """
        layer = self.model.get_submodule(path)
        prune = self._graph.get_pruner_of_module(layer).prune_out_channels
        try:
            group = self._graph.get_pruning_group(layer, prune, [int(u) for u in units])
        except Exception as error:
            raise TraceError(
                f"{describe(path, layer)}: its couplings cannot be traced, supported are "
                f"{SUPPORTED}: {error}"
            ) from error
        members, boundary = [], False
        for item in group.items:
            node = item.dep.target
            reads = isinstance(node.module, nn.Linear | _ConvNd) and not (
                is_depthwise(node.module) or self._graph.is_out_channel_pruning_fn(item.dep.handler)
            )
            boundary |= node.module is self._input or (not node.outputs and not reads)
            slots = tuple(self._slots(node.module, node.pruning_dim, reads))
            if slots:
                writes = node.module in self._paths and not reads
                makes = writes and isinstance(node.module, nn.Linear | _ConvNd)
                makes = makes and not is_depthwise(node.module)
                members.append(
                    Member(
                        slots,
                        self._paths[node.module] if makes else None,
                        np.asarray(item.idxs, np.intp),
                        np.asarray(item.root_idxs, np.intp),
                    )
                )
        return members, boundary

    def _slots(self, target: nn.Module | nn.Parameter, dim: int, reads: bool) -> Iterator[Slot]:
        """The axes that one member's indices count on."""
        if isinstance(target, nn.Parameter):
            if target is not self._input:
                yield self._names[id(target)], dim % target.dim()
            return
        if target not in self._paths:
            return  # a stand-in for an operator without weights
        path = self._paths[target]
        if isinstance(target, nn.LayerNorm) and target.weight is None:
            raise TraceError(
                f"{describe(path, target)} has no weights, expected elementwise_affine=True"
            )
        tensors = dict(target.named_parameters(recurse=False)) | dict(
            target.named_buffers(recurse=False)
        )
        for leaf, tensor in tensors.items():
            name = f"{path}.{leaf}" if path else leaf
            if reads and leaf == "weight":
                yield name, 1
            elif (
                not reads
                and tensor.dim()
                and not (isinstance(target, nn.PReLU) and tensor.numel() == 1)
            ):
                yield name, 0


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a convolution or linear layer."""
    return layer.get_parameter("weight")
