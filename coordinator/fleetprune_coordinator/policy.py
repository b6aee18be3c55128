"""What one way of federated pruning decides and another decides otherwise.

`Rounds` asks; what it does around the answers (tasks, aggregation, resuming) is the same for all.
"""

import logging
from collections.abc import Mapping

from fleetprune.criteria import MEASURED, Scores
from fleetprune.layout import KeepCounts
from fleetprune_coordinator.config import TrainingConfig
from fleetprune_coordinator.fleet_model import FleetModel
from fleetprune_coordinator.graph_library import narrower
from fleetprune_coordinator.ledger import Ledger

log = logging.getLogger(__name__)


class Policy:
    """Ours: units in the order of their importance, and every class teaches a narrower one."""

    def partners(
        self, settings: TrainingConfig, shapes: Mapping[str, KeepCounts], name: str
    ) -> list[dict[str, int] | None]:
        """What a device of a class teaches beside its own model.

        Args:
            settings: The training's.
            shapes: Keep counts of all classes.
            name: The device's class.

        Returns:
            At least one; each step of a device draws one of them. A shape that lies within the
            class's own is trained by distillation; None is the class's model alone.
        """
        students = narrower(shapes, name) if settings.distill_weight > 0 else []
        return list(students) or [None]

    def listens(self, settings: TrainingConfig, number: int) -> bool:
        """Whether a later order of units depends on what devices report in a training round."""
        every = settings.remask_every
        wanted = settings.criterion in MEASURED and every > 0
        return wanted and number <= settings.final_remask // every * every

    def scores(
        self, settings: TrainingConfig, number: int, ledger: Ledger, model: FleetModel
    ) -> Scores | None:
        """The order of units from the next round on.

        Args:
            settings: The training's.
            number: The training round that has just been closed.
            ledger: What devices have reported.
            model: The state that the round led to.

        Returns:
            Per group (units,) in the present order, the high ones come first; None: no new order.
        """
        every = settings.remask_every
        due = every > 0 and number % every == 0 and number <= settings.final_remask
        if not due:
            return None
        if not ledger.ready(settings.criterion):
            log.warning(
                "round %d: no device has reported %s yet; the order of units stays",
                number,
                settings.criterion,
            )
            return None
        return ledger.scores(settings.criterion, model.params)
