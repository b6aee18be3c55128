"""One model for all classes, under a mask that meets the tightest class's budget."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

from fleetprune.criteria import Criterion
from fleetprune_agent.worker import Worker
from fleetprune_coordinator.config import ClassConfig, FleetConfig, TrainingConfig
from fleetprune_coordinator.policy import Policy
from fleetprune_coordinator.rounds import Rounds
from fleetprune_sim.methods.fedavg import PLAIN
from fleetprune_sim.methods.method import Method, Plan, with_training
from fleetprune_sim.methods.sparse.device import MaskedWorker
from fleetprune_sim.methods.sparse.rounds import SparseRounds


class Whole(Policy):
    """Units stay where they are, and nobody is asked what they are worth."""

    def listens(self, settings: TrainingConfig, number: int) -> bool:
        """No."""
        return False


class SparseMethod(Method):
    """Prunes single weights.

    Masks change every `training.remask_every` rounds, as our own do: the papers' intervals of 10
    to 50 rounds belong to trainings of hundreds to thousands of rounds. Until when they change is
    the paper's share of the rounds.
    """

    exchange: ClassVar[type[SparseRounds]] = SparseRounds
    device: ClassVar[type[MaskedWorker]] = MaskedWorker

    def plan(self, config: FleetConfig, devices: Mapping[str, int]) -> Plan:
        """One dense layout for all."""
        settings = PLAIN | {
            "remask_every": config.training.remask_every,
            "first_criterion": Criterion.NONE,
        }
        own = with_training(config, **settings).model_copy(
            update={"classes": {self.name: ClassConfig(trains=True)}}
        )
        return Plan(own, dict.fromkeys(devices, self.name))

    def policy(self) -> Policy:
        """Single weights are pruned, not units."""
        return Whole()

    def rounds(self, config: FleetConfig) -> Callable[..., Rounds]:
        """Under the tightest of the fleet's budgets."""
        return partial(self.exchange, classes=config.classes)

    def worker(self) -> type[Worker]:
        """Trains under the mask."""
        return self.device
