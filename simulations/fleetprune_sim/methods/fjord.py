"""FjORD: ordered dropout. In each step a device trains a width drawn among those it can hold.

Horváth et al., "FjORD: Fair and Accurate Federated Learning under heterogeneous targets with
Ordered Dropout", NeurIPS 2021, with the paper's self-distillation, which is its better variant: a
step trains the device's widest model on its labels, and the width drawn on what the widest says.

Left open by the paper or chosen here: the widths are those of the fleet's classes, each drawn
equally often; when the widest itself is drawn, the step trains on the labels alone; the
distillation's temperature is 1 and its weight that of the labels.
"""

from collections.abc import Mapping

from fleetprune.layout import KeepCounts
from fleetprune_coordinator.config import FleetConfig, TrainingConfig
from fleetprune_coordinator.graph_library import narrower
from fleetprune_coordinator.policy import Policy
from fleetprune_sim.methods.fedavg import PLAIN
from fleetprune_sim.methods.method import Method, Plan, with_training


class OrderedDropout(Policy):
    """Each of a device's widths in turn, by chance; the order of units never changes."""

    def partners(
        self, settings: TrainingConfig, shapes: Mapping[str, KeepCounts], name: str
    ) -> list[dict[str, int] | None]:
        """The widest alone, or with any narrower one."""
        return [None, *narrower(shapes, name)]


class Fjord(Method):
    """Ordered dropout with self-distillation."""

    name = "fjord"
    title = "FjORD"
    paper = "Horváth et al. 2021"

    def plan(self, config: FleetConfig, devices: Mapping[str, int]) -> Plan:
        """Every class its own width."""
        teach = {"distill_weight": 1.0, "student_task_weight": 0.0, "mutual_weight": 0.0}
        return Plan(with_training(config, **PLAIN | teach), {name: name for name in config.classes})

    def policy(self) -> Policy:
        """Draws widths."""
        return OrderedDropout()
