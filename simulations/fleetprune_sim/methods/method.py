"""The one interface of all methods: what is sent, what is trained, how it is merged.

A method is a way to share one training between device classes of different budgets. `plan` says
whose model each class works on and under what settings; `policy` which units that model has and
what a step teaches; `worker` what a device does with a task; `rounds` may replace the whole
exchange for methods whose updates are not parts of the dense tensors. Everything else
(transport, codecs, registry, statistics, release) is the real coordinator's and the real agent's.
"""

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fleetprune_agent.worker import Worker
from fleetprune_coordinator.config import FleetConfig, TrainingConfig
from fleetprune_coordinator.policy import Policy
from fleetprune_coordinator.rounds import Rounds


@dataclass(frozen=True)
class Plan:
    """What a method makes of a fleet."""

    config: FleetConfig
    """Its `classes` are the models that are trained."""
    serves: Mapping[str, str | None]
    """Per device class of the fleet the model it trains and is given; None: it is left out."""


class Method(ABC):
    """A way of federated pruning."""

    name: ClassVar[str]
    """As on the command line."""
    title: ClassVar[str]
    """For people."""
    paper: ClassVar[str]
    """Where it was described."""
    tries: ClassVar[bool] = False
    """Whether settings that are "auto" are found out; the others train as their papers say, and
    take the default."""

    def plan(self, config: FleetConfig, devices: Mapping[str, int]) -> Plan:
        """The models that are trained and with what settings.

        Args:
            config: The fleet as described by the user.
            devices: Number of devices per class.
        """
        return Plan(config, {name: name for name in config.classes})

    def policy(self) -> Policy:
        """Which units a class's model has, and what a step teaches."""
        return Policy()

    def worker(self) -> type[Worker]:
        """What a device does with a task."""
        return Worker

    def rounds(self, config: FleetConfig) -> Callable[..., Rounds]:
        """The exchange between coordinator and devices: makes one from the arguments of `Rounds`.

        Args:
            config: The fleet as described by the user.
        """
        return Rounds


def with_training(config: FleetConfig, **values: Any) -> FleetConfig:
    """A fleet's description with other values in the table `training`."""
    training = TrainingConfig.model_validate(config.training.model_dump() | values)
    return config.model_copy(update={"training": training})


def with_classes(config: FleetConfig, names: Mapping[str, str]) -> FleetConfig:
    """A fleet's description with some of its classes, under new names: `{new: old}`."""
    classes = {new: config.classes[old] for new, old in names.items()}
    return config.model_copy(update={"classes": classes})
