"""When the fleet's model is cut anew, and how: order of units, keep counts, single weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetprune.criteria import Criterion, Scores
from fleetprune.layout import Architecture, Order
from fleetprune.schedule import regrowth
from fleetprune_coordinator.config import TrainingConfig
from fleetprune_coordinator.fleet_model import FleetModel, Tensors, remask
from fleetprune_coordinator.ledger import Flow, Ledger
from fleetprune_coordinator.plan import Planner
from fleetprune_coordinator.policy import Policy
from fleetprune_coordinator.tightening import Tightening, Watch
from fleetprune_coordinator.weight_scores import Changes, weight_scores


class Cutting:
    """Decides on the masks of all classes; what devices report of importance is its `ledger`."""

    ledger: Ledger

    def __init__(
        self,
        settings: TrainingConfig,
        architecture: Architecture,
        planner: Planner,
        policy: Policy,
        *,
        watch: Watch | None,
        flow: Flow,
    ) -> None:
        """Prepare; call `start` next.

        Args:
            settings: Criteria, and when masks change.
            architecture: The model's description.
            planner: Keep counts and single weights per class.
            policy: Whose order of units it is.
            watch: The accuracy that a dynamic schedule must not lose; None: it goes by loss alone.
            flow: For `synflow`.
        """
        self._settings, self._architecture, self._planner = settings, architecture, planner
        self._policy, self._flow = policy, flow
        self.tightening = Tightening(planner.schedule, watch)
        self._changes = Changes(settings.criterion, planner.weights.names)

    def start(
        self, model: FleetModel | None, arrays: Mapping[str, NDArray[np.float64]] | None = None
    ) -> None:
        """Begin with what `arrays` of a ledger say, or with nothing.

        Args:
            model: Whose units they are; None: not cut yet.
            arrays: See `Ledger.arrays`.
        """
        groups = self._architecture.groups
        self.ledger = Ledger.from_arrays(
            self._architecture,
            groups if model is None else self._smallest(model),
            arrays or {},
            merge=self._settings.score_merge,
            flow=self._flow,
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Where it stands beside the ledger, for a snapshot."""
        return self.tightening.arrays() | self._changes.arrays()

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take up what `arrays` gave."""
        self.tightening.restore(arrays)
        self._changes.restore(arrays)

    def trained(self, before: Tensors, after: Tensors, coverage: Tensors) -> None:
        """Take in what a training round changed: dense parameters, and who trained which."""
        self._changes.add(before, after, coverage)

    # ---- new masks

    def after_round(self, number: int, loss: float | None, model: FleetModel) -> FleetModel:
        """The model as the next round has it.

        Args:
            number: The training round that has been closed.
            loss: Its mean; None: nobody reported one.
            model: The state that it led to.

        Returns:
            That state itself where no mask changes.
        """
        scores = self._new_scores(number, loss, model)
        return model if scores is None else self.by_scores(scores, number, model)

    def _new_scores(self, number: int, loss: float | None, model: FleetModel) -> Scores | None:
        """What units are worth, if masks change after a training round; else None."""
        settings = self._settings
        scores = None
        if self.tightening.remasks(number):
            scores = self._policy.scores(settings, number, self.ledger, model)
        tighter = self.tightening.closed(number, loss, model)
        if scores is not None or not tighter:
            return scores
        if self.ledger.ready(settings.criterion):
            return self.ledger.scores(settings.criterion, model.params)
        return self.ledger.scores(Criterion.NONE, model.params)

    def to_limits(self, model: FleetModel) -> FleetModel:
        """The model before the first round, cut to what is known of latency by now."""
        return self.by_scores(self.ledger.scores(Criterion.NONE, model.params), 0, model)

    def by_scores(
        self, scores: Scores, number: int, model: FleetModel, *, weights: Criterion | None = None
    ) -> FleetModel:
        """Put the units in a new order, and cut.

        Args:
            scores: Per group (units,) in the present order.
            number: The round that has been closed; 0: none.
            model: The present state.
            weights: Criterion for single weights; None: that of training.

        Returns:
            The new state; the present one if nothing changes.
        """
        after, _ = self.by_units(scores, number, model)
        return self.prune_weights(after, number, before=model, criterion=weights)

    def by_units(self, scores: Scores, number: int, model: FleetModel) -> tuple[FleetModel, Order]:
        """As `by_scores`, with all weights of the units that stay; and the new order."""
        shapes = self._planner.shapes(number + 1, scores, self.tightening.slack)
        share = 1.0
        if self._settings.regrow < 1 and number > 0:
            share = regrowth(number, self._settings.final_remask, self._settings.regrow)
        after, order = remask(self._architecture, model, scores, shapes, share)
        if after is not model:
            self.ledger.reorder(order, self._smallest(after))
            self._changes.reorder(self._architecture, order)
        return after, order

    def prune_weights(
        self,
        model: FleetModel,
        number: int,
        *,
        before: FleetModel,
        criterion: Criterion | None = None,
    ) -> FleetModel:
        """Choose single weights anew, where they are pruned.

        Args:
            model: Whose units stand already.
            number: The round that has been closed; 0: none.
            before: The state that devices know.
            criterion: See `by_scores`.
        """
        if not self._planner.weights.names:
            return model
        scores = weight_scores(
            criterion or self._settings.criterion,
            model.params,
            self._changes,
            norms=self.ledger.norms(),
            flow=self._flow,
        )
        slack = self.tightening.slack
        supports = self._planner.masks(number + 1, model.shapes, scores, slack)
        if model is before and _same(supports, before.supports):
            return model
        return replace(model, supports=supports, mask_version=before.mask_version + 1)

    def _smallest(self, model: FleetModel) -> dict[str, int]:
        shapes = model.shapes.values()
        return {g: min(keep[g] for keep in shapes) for g in self._architecture.groups}


def _same(
    one: Mapping[str, Mapping[str, NDArray[np.bool_]]],
    other: Mapping[str, Mapping[str, NDArray[np.bool_]]],
) -> bool:
    return one.keys() == other.keys() and all(
        one[name].keys() == other[name].keys()
        and all(np.array_equal(kept, other[name][tensor]) for tensor, kept in one[name].items())
        for name in one
    )
