"""Which groups are spared: by the names of layers, as the user's model has them.

A layer's units are its outputs, so a name stands for the group that its outputs belong to, and
with it for every layer that is coupled to them.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from fleetprune.errors import BudgetError
from fleetprune.layout import Architecture

NEAR = 3  # names that a refusal offers


@dataclass(frozen=True)
class Protection:
    """What is known of groups beside their width; those that are not named are free."""

    whole: frozenset[str] = frozenset()
    """Never cut."""
    least: Mapping[str, int] = field(default_factory=dict)
    """Units that are left at least."""
    multiple: Mapping[str, int] = field(default_factory=dict)
    """What counts are multiples of."""

    def levels(self, group: str, units: int, multiple: int) -> tuple[int, ...]:
        """The rising counts that a group may have; its full width is always one.

        Args:
            group: Its name.
            units: Its full width.
            multiple: What counts are multiples of unless `multiple` has the group.
        """
        if group in self.whole:
            return (units,)
        step, least = self.multiple.get(group, multiple), self.least.get(group, 1)
        first = max(step, -(-least // step) * step)
        return (*range(first, units, step), units)


UNPROTECTED = Protection()


def protect(
    architecture: Architecture,
    *,
    exclude: Sequence[str] = (),
    minimum: Mapping[str, float] | None = None,
    multiple: Mapping[str, int] | None = None,
) -> Protection:
    """Find the groups that layers' names stand for.

    A name is a layer's path or the beginning of one (`body.0` is also `body.0.1`, not `body.01`),
    a pattern with `*`, `?` or `[...]`, or a group as `fleetprune plan` calls it. Where several
    names stand for a group, the last one counts.

    Args:
        architecture: The model.
        exclude: Layers whose outputs are never cut; the model's own outputs never are.
        minimum: Units that are left at least: a whole number, or a share (a float up to 1.0).
        multiple: What counts are multiples of.

    Raises:
        BudgetError: A name stands for no layer, or for none that can be cut, or a minimum is
            more than a group has; one line.
    """
    layers = _layers(architecture)
    whole = {g for name in exclude for g in _find(layers, name, "exclude")}
    least: dict[str, int] = {}
    for name, value in (minimum or {}).items():
        least |= _units(
            value, name, {g: architecture.groups[g] for g in _found(layers, name, "minimum")}
        )
    steps: dict[str, int] = {}
    for name, step in (multiple or {}).items():
        steps |= dict.fromkeys(_found(layers, name, "multiple"), step)
    return Protection(frozenset(whole), least, steps)


def _layers(architecture: Architecture) -> dict[str, set[str]]:
    """Per layer path, and per group by its own name, the groups that its outputs belong to."""
    layers: dict[str, set[str]] = {}
    for spec in architecture.tensors:
        path = spec.name.rpartition(".")[0]
        outputs = spec.axes[0] if spec.axes else ()
        cut = {s.group for s in outputs if s.group is not None}
        layers.setdefault(path, set()).update(cut)
    for group in architecture.groups:
        layers.setdefault(group, set()).add(group)
    return layers


def layers_called(architecture: Architecture, names: Sequence[str], key: str) -> set[str]:
    """Layers, and groups by their own names, that names stand for (see `protect`).

    Args:
        architecture: The model.
        names: As in the fleet's description.
        key: Of the table `pruning`, for refusals.

    Raises:
        BudgetError: A name stands for nothing.
    """
    layers = _layers(architecture)
    return {path for name in names for path in _match(layers, name, key)}


def _match(layers: Mapping[str, set[str]], name: str, key: str) -> list[str]:
    """The layers that a name stands for; BudgetError if there is none."""
    matches = [p for p in layers if fnmatchcase(p, name) or fnmatchcase(p, f"{name}.*")]
    if not matches:
        paths = {".".join(p.split(".")[: i + 1]) for p in layers for i in range(p.count(".") + 1)}
        near = difflib.get_close_matches(name, sorted(paths), n=NEAR, cutoff=0.5)
        known = [p for p in layers if p]
        more = f" and {len(known) - NEAR} more" if len(known) > NEAR else ""
        hint = (
            f"did you mean {', '.join(near)}?"
            if near
            else f"expected one of {', '.join(known[:NEAR])}{more}"
        )
        raise BudgetError(f"pruning.{key}: no layer {name!r}, {hint}")
    return matches


def _find(layers: Mapping[str, set[str]], name: str, key: str) -> list[str]:
    """The groups that a name stands for, in order; BudgetError if there is no such layer."""
    return list(dict.fromkeys(g for p in _match(layers, name, key) for g in sorted(layers[p])))


def _found(layers: Mapping[str, set[str]], name: str, key: str) -> list[str]:
    """As `_find`; BudgetError also if the layer has no outputs that can be cut."""
    groups = _find(layers, name, key)
    if not groups:
        raise BudgetError(
            f"pruning.{key}: the outputs of {name!r} are never cut, name a layer that can be"
        )
    return groups


def _units(value: float, name: str, groups: Mapping[str, int]) -> dict[str, int]:
    """A minimum in units of each group; a narrower one than asked for is left whole."""
    if isinstance(value, int):
        if value > (widest := max(groups.values())):
            raise BudgetError(f"pruning.minimum: {name!r} has {widest} units, got {value}")
        return {g: min(value, units) for g, units in groups.items()}
    return {g: math.ceil(value * units - 1e-9) for g, units in groups.items()}
