"""Weights that a model starts from, out of a file, and those that stay as they are."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from fleetprune.errors import ConfigError

log = logging.getLogger(__name__)

SHOWN = 3  # names that an error tells of many
NEAR = 3  # names that a refusal offers

State = Mapping[str, Tensor]


def load_initial(model: nn.Module, path: Path, *, factory: str, head: str | None = None) -> None:
    """Give a model its initial weights.

    Args:
        model: As its factory made it.
        path: A state_dict that torch saved, or a safetensors file.
        factory: What made the model, for messages.
        head: A layer that keeps the factory's weights where the file has none for it, or of other
            shapes: new labels. All else must match by name and shape.

    Raises:
        ConfigError: There are no weights in the file, or they do not fit; or there is no such
            layer.
    """
    state = _read(path)
    own = model.state_dict()
    if head is not None:
        state = _without_head(own, state, head, path)
    try:
        model.load_state_dict(state)
    except Exception as e:
        difference = _difference(own, state) or f"it fails: {e}"
        raise ConfigError(
            f"model.initial {path} does not fit the model: {difference}; "
            f"expected a state_dict of {factory} with these arguments"
        ) from e


def starts_anew(model: nn.Module, path: Path, head: str) -> bool:
    """Whether `load_initial` leaves the head as the factory made it.

    Args:
        model: Has the factory's shapes.
        path: As for `load_initial`.
        head: As for `load_initial`.

    Raises:
        ConfigError: There are no weights in the file, or there is no such layer.
    """
    return not _head_fits(model.state_dict(), _read(path), head)


def frozen_parameters(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The parameters that layers' names stand for.

    Args:
        model: The user's.
        names: A layer's path or the beginning of one (`body.0` is also `body.0.1`, not `body.01`),
            or a pattern with `*`, `?` or `[...]`.

    Returns:
        Names of parameters, in the model's order.

    Raises:
        ConfigError: A name stands for no parameter, or they leave nothing to train.
    """
    paths = {name: _beginnings(name) for name, _ in model.named_parameters()}
    found: set[str] = set()
    for name in names:
        meant = {p for p, parts in paths.items() if any(fnmatchcase(part, name) for part in parts)}
        if not meant:
            raise ConfigError(f"model.freeze: {_unknown(model, name)}")
        found |= meant
    if paths and found >= paths.keys():
        raise ConfigError("model.freeze: every layer is frozen, expected one that trains")
    return tuple(name for name in paths if name in found)


def _beginnings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _unknown(model: nn.Module, name: str) -> str:
    """What is wrong with a name that stands for no parameter."""
    layers = [path for path, _ in model.named_modules() if path]
    if name in layers:
        return f"layer {name!r} has no weights"
    near = difflib.get_close_matches(name, layers, n=NEAR, cutoff=0.5)
    offer = f"; near are {', '.join(near)}" if near else f"; it has {_first(layers)}"
    return f"the model has no layer {name!r}{offer}"


def _read(path: Path) -> State:
    """The tensors of a file; ConfigError if it is not one of tensors alone."""
    data = path.read_bytes()
    # Behind 8 bytes of its length, a safetensors file begins with a JSON object.
    if path.suffix == ".safetensors" or data[8:9] == b"{":
        try:
            return load_safetensors(data)
        except SafetensorError as e:
            raise ConfigError(f"model.initial {path} is no whole safetensors file: {e}") from e
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # of any other file, torch raises whatever its bytes lead to
        raise _no_weights(path) from e
    if not isinstance(state, Mapping):
        raise _no_weights(path)
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise _no_weights(path)
    return state


def _no_weights(path: Path) -> ConfigError:
    return ConfigError(
        f"model.initial {path} is no state_dict of tensors alone: save it with "
        "torch.save(model.state_dict(), path)"
    )


def _without_head(own: State, state: State, head: str, path: Path) -> State:
    """The file's weights, with the model's own for the head unless the file's fit."""
    if _head_fits(own, state, head):
        return state
    log.info("layer %s starts anew: %s has other weights for it, or none", head, path)
    rest = {name: value for name, value in state.items() if not _is_in(name, head)}
    return rest | {name: value for name, value in own.items() if _is_in(name, head)}


def _head_fits(own: State, state: State, head: str) -> bool:
    """Whether a file's weights of a layer have the model's names and shapes."""
    wanted, got = ({n: t.shape for n, t in s.items() if _is_in(n, head)} for s in (own, state))
    if not wanted:
        layers = sorted({part for name in own for part in _beginnings(name)[:-1]})
        near = difflib.get_close_matches(head, layers, n=NEAR, cutoff=0.5)
        offer = f"; near are {', '.join(near)}" if near else f"; it has {_first(layers)}"
        raise ConfigError(f"model.head: the model has no layer {head!r} with weights{offer}")
    return wanted == got


def _is_in(name: str, layer: str) -> bool:
    return name.startswith(f"{layer}.")


def _difference(wanted: State, got: State) -> str:
    """How a state_dict differs from a model's own, in a few words; "" if in no name or shape."""
    shapes = [
        f"{name} {tuple(got[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in got and got[name].shape != value.shape
    ]
    parts = []
    if lacking := [name for name in wanted if name not in got]:
        parts.append(f"lacks {_first(lacking)}")
    if others := [name for name in got if name not in wanted]:
        parts.append(f"has {_first(others)} besides")
    if shapes:
        parts.append(f"has {_first(shapes)}")
    return f"it {', and '.join(parts)}" if parts else ""


def _first(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
