"""Which layers of torch can be cut, or at least followed through."""

from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from fleetprune.errors import TraceError
from fleetprune_coordinator.program import describe

SUPPORTED = (
    "Conv and ConvTranspose, Linear, Embedding, MultiheadAttention, BatchNorm, InstanceNorm, "
    "GroupNorm, LayerNorm, RMSNorm, PReLU, and layers without weights"
)
KNOWN = (
    _ConvNd, nn.Linear, nn.Embedding, nn.MultiheadAttention, _NormBase, nn.GroupNorm, nn.LayerNorm,
    nn.RMSNorm, nn.PReLU,
)  # fmt: skip


def check_layers(model: nn.Module, excluded: Collection[str]) -> None:
    """Refuse layers whose weights cannot be cut, or not be told apart.

    Args:
        model: The dense model.
        excluded: Names of tensors that stay whole in any case.

    Raises:
        TraceError: Names the layer, and what to exclude.
    """
    for refusal, _ in _refusals(model, excluded):
        raise TraceError(refusal)


def untraceable(model: nn.Module, names: Collection[str]) -> tuple[str, ...]:
    """Of the layers that names stand for, those that `check_layers` refuses.

    `pruning.exclude` spares what a layer makes; these have to be spared already when the model is
    traced, with what they read.

    Args:
        model: The dense model.
        names: Layers' paths or beginnings of them, or patterns with `*`, `?` or `[...]`.

    Returns:
        Paths of layers, as `trace` takes them.
    """
    refused = dict.fromkeys(path for _, paths in _refusals(model, ()) for path in paths)
    return tuple(
        path
        for path in refused
        if any(fnmatchcase(path, name) or fnmatchcase(path, f"{name}.*") for name in names)
    )


def _refusals(model: nn.Module, excluded: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What is wrong with each layer that is refused, and which layers to exclude for it."""
    owners: dict[int, tuple[str, nn.Module]] = {}
    for path, layer in model.named_modules():
        named = describe(path, layer)
        own = [n for n, _ in (*layer.named_parameters(recurse=False),
                              *layer.named_buffers(recurse=False))]  # fmt: skip
        holds = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        if any(is_lazy(p) for p in holds):
            yield f"{named} has no shape yet, expected a model that has run once", ()
        if isinstance(layer, _BatchNorm) and layer.running_mean is None:
            yield f"{named} keeps no running statistics, expected that it does", ()
        if own and all(f"{path}.{name}" in excluded for name in own):
            continue
        for parameter in layer.parameters(recurse=False):
            first, owner = owners.setdefault(id(parameter), (path, layer))
            if owner is not layer:
                yield (
                    f"{named} shares a weight with {describe(first, owner)}, expected its own; to "
                    f"keep both whole, exclude {first!r} and {path!r}",
                    (first, path),
                )
        if holds and type(layer).__module__.startswith("torch.") and not isinstance(layer, KNOWN):
            yield (
                f"{named} is not supported, supported are {SUPPORTED}; to keep it whole, exclude "
                f"{path!r}",
                (path,),
            )
