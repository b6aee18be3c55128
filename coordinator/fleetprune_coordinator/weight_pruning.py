"""Which single weights each class keeps: within the bytes that its file may have."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetprune.budgets import Allocation, Budget, Grid
from fleetprune.costs import CostModel
from fleetprune.errors import BudgetError
from fleetprune.layout import Architecture, KeepCounts, Role, TensorSpec, tensor_index
from fleetprune.patterns import SINGLE, Granularity, Pattern
from fleetprune.protection import layers_called
from fleetprune.weight_masks import Layer, Masks, packed_bytes, pattern_masks, solve_masks


@dataclass(frozen=True)
class WeightRule:
    """How single weights are pruned."""

    granularity: Granularity = Granularity.CHANNEL
    pattern: Pattern = SINGLE
    allocation: Allocation = Allocation.GLOBAL
    exclude: tuple[str, ...] = ()
    """Layers that stay whole, units and weights."""
    dense_layers: tuple[str, ...] = ()
    """Layers whose weights all stay."""


class WeightPruning:
    """The prunable weights of an architecture, and what a class may keep of them."""

    def __init__(
        self, architecture: Architecture, rule: WeightRule, counted: Architecture | None = None
    ) -> None:
        """Find the weights; BudgetError if a layer that is named is not there.

        Args:
            architecture: The model.
            rule: How they are pruned.
            counted: Whose bytes the file has, where that is not `architecture` (`int8.planned`).
        """
        self.rule = rule
        self._architecture, self._counted = architecture, counted or architecture
        self._costs = CostModel(self._counted)
        dense = architecture.groups
        candidates = [
            spec
            for spec in architecture.role(Role.PARAMETER)
            if rule.granularity.weights
            and spec.positions
            and spec.artifact_bytes
            and rule.pattern.concerns(spec.shape(dense))
        ]
        spared = layers_called(architecture, rule.exclude, "exclude")
        spared |= layers_called(architecture, rule.dense_layers, "dense_layers")
        self._specs = [spec for spec in candidates if not spared & _layer_names(spec)]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the weights that may be pruned."""
        return tuple(spec.name for spec in self._specs)

    def check(self, name: str, budget: Budget, keep: KeepCounts, grid: Grid) -> None:
        """Refuse what cannot be done for a class.

        Args:
            name: Of the class.
            budget: Of the class.
            keep: Its units at the end.
            grid: All the counts that it may have on the way there.

        Raises:
            BudgetError: The pattern does not divide a layer, or the class's bytes do not suffice.
        """
        if not self._specs:
            return
        self._check_pattern(name, grid)
        if budget.flash_bytes is None:
            return
        pattern = self.rule.pattern
        least = self._other_bytes(keep) + sum(
            packed_bytes(pattern, self._fewest(layer), layer.item)
            for layer in self._layers(keep).values()
        )
        if least > budget.flash_bytes:
            raise BudgetError(
                f"class {name}: flash_bytes {budget.flash_bytes} cannot be met, the smallest "
                f"achievable with pattern {pattern} is {least}; raise the budget"
                + (" or choose a pattern that leaves less" if pattern.m else "")
                + (
                    ", or limit macs as well: units are not cut for bytes"
                    if self.rule.granularity is Granularity.HYBRID
                    else ""
                )
            )

    def bytes(self, keep: KeepCounts, masks: Masks) -> int:
        """Bytes of a class's file at most.

        Args:
            keep: The class's units.
            masks: Which of its weights stay; of a layer that is not named, all.
        """
        if not masks:
            return self._costs.costs(keep).artifact_bytes
        pattern = self.rule.pattern
        return self._other_bytes(keep) + sum(
            packed_bytes(pattern, pattern.marks(masks[n]), layer.item) if n in masks else layer.size
            for n, layer in self._layers(keep).items()
        )

    def masks(
        self,
        keep: KeepCounts,
        limit: int | None,
        scores: Mapping[str, NDArray[np.float32]],
        slack: float,
    ) -> Masks:
        """What a class keeps.

        Args:
            keep: The class's units.
            limit: Bytes of its file; None: no limit, and nothing is pruned unless the pattern says
                how much.
            scores: By name, dense, in the present order of units.
            slack: What a schedule leaves of the way to the budget, 0..1.

        Returns:
            By name, of the class's shapes; empty if nothing is pruned.
        """
        layers = self._layers(keep)
        if not layers:
            return {}
        dense = self._architecture.groups
        mine = {
            spec.name: scores[spec.name][tensor_index(spec, dense, keep)] for spec in self._specs
        }
        if self.rule.pattern.m:
            return pattern_masks(layers, mine, self.rule.pattern, slack)
        if limit is None or self._costs.costs(keep).artifact_bytes <= limit:
            return {}
        return solve_masks(
            layers,
            mine,
            limit - self._other_bytes(keep),
            pattern=self.rule.pattern,
            allocation=self.rule.allocation,
        )

    def _fewest(self, layer: Layer) -> NDArray[np.bool_]:
        """Marks of a layer of which as little stays as the pattern allows, where it takes most."""
        pattern = self.rule.pattern
        if pattern.m:
            return pattern.best_of_each(np.zeros(layer.shape), pattern.n)
        marks = np.zeros(pattern.grid(layer.shape), np.bool_)
        marks.flat[-1] = True
        return marks

    def _layers(self, keep: KeepCounts) -> dict[str, Layer]:
        return {
            spec.name: Layer(spec.shape(keep), self._counted.tensor(spec.name).artifact_bytes)
            for spec in self._specs
        }

    def _other_bytes(self, keep: KeepCounts) -> int:
        """Bytes of a class's file beside its prunable weights."""
        whole = sum(layer.size for layer in self._layers(keep).values())
        return self._costs.costs(keep).artifact_bytes - whole + SHARED_BYTES

    def _check_pattern(self, name: str, grid: Grid) -> None:
        pattern, levels = self.rule.pattern, grid.levels
        whole = {group: counts[-1] for group, counts in levels.items()}
        for spec in self._specs:
            # A size is a sum over groups: what divides it for each group alone divides it for all.
            cut = [whole | {g: count} for g in sorted(spec.groups()) for count in levels[g][:-1]]
            for keep in (whole, *cut):
                if (why := pattern.misfit(spec.shape(keep))) is not None:
                    layer = spec.name.rpartition(".")[0]
                    # What is wrong with the uncut layer, no multiple can mend.
                    mended = (
                        "" if keep is whole else ", or set channel_multiple to a multiple of it"
                    )
                    raise BudgetError(
                        f"class {name}: layer {layer} {'has' if keep is whole else 'may have'} "
                        f"{why} (pattern {pattern}); name it in pruning.dense_layers{mended}"
                    )


SHARED_BYTES = 150
"""Most bytes of a file that all its packed weights share."""


def _layer_names(spec: TensorSpec) -> set[str | None]:
    """A weight's layer, and the groups of its outputs."""
    return {spec.name.rpartition(".")[0], *(s.group for s in spec.axes[0])}
