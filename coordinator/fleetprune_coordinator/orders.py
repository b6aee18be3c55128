"""What a person may order, as one message, whoever carries it out.

The coordinator has the only right to write the registry. Where it runs, an order goes to it through
its control socket; where none runs, the command takes that right and acts by itself.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError

from fleetprune.errors import ConfigError, UsageError
from fleetprune.messages import Count, Line, Message, Name
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.control import call, user_name
from fleetprune_coordinator.events import EventLog
from fleetprune_coordinator.keys import RELEASES
from fleetprune_coordinator.registry import Registry
from fleetprune_coordinator.releases import ReleaseRepository
from fleetprune_coordinator.rollout_ledger import RolloutLedger
from fleetprune_coordinator.rollouts import Changed, Rollouts
from fleetprune_coordinator.store import DATABASE

Action = Literal["start", "pause", "resume", "abort", "rollback", "promote"]
Reason = Annotated[Line, StringConstraints(max_length=500)]


class Order(Message):
    """One action on the rollouts of some classes."""

    action: Action
    classes: tuple[Name, ...] = Field(default=(), max_length=64)
    """Empty: all."""
    release: Count = 0
    """Of `start` and `rollback`."""
    reason: Reason = ""
    to_all: bool = False
    """Of `promote`."""
    seen: dict[Name, Count] = Field(default_factory=dict, max_length=64)
    """Of `promote`: the stages that the person has seen."""


def make_order(action: Action, classes: Sequence[str], **more: Any) -> Order:
    """An order; UsageError if a word in it cannot be."""
    try:
        return Order.model_validate({"action": action, "classes": classes, **more})
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"{where}: {first['msg']}, got {first['input']!r}") from e


def obey(rollouts: Rollouts, line: bytes, who: str) -> list[dict[str, Any]]:
    """Carry an order out; returns what came of it for each class.

    Args:
        rollouts: Of the fleet.
        line: An `Order`, unverified.
        who: Gives it.

    Raises:
        RolloutError: It cannot be done, and nothing was.
        UsageError: There is no such class.
        MessageError: It is no order.
    """
    order = Order.from_bytes(line)
    done: list[Changed]
    match order.action:
        case "start":
            done = rollouts.start(order.release, order.classes, who=who, reason=order.reason)
        case "rollback":
            done = rollouts.rollback(order.release, order.classes, who=who, reason=order.reason)
        case "promote":
            done = rollouts.promote(
                order.classes, who=who, reason=order.reason, to_all=order.to_all, seen=order.seen
            )
        case "pause":
            done = rollouts.pause(order.classes, who=who, reason=order.reason)
        case "resume":
            done = rollouts.resume(order.classes, who=who, reason=order.reason)
        case "abort":
            done = rollouts.abort(order.classes, who=who, reason=order.reason)
    return [asdict(changed) for changed in done]


def require_registry(fleet: FleetConfig) -> None:
    """ConfigError where no coordinator has run yet."""
    if not (fleet.state / DATABASE).exists():
        raise ConfigError(
            f"{fleet.state} holds no registry yet: `fleetprune coordinator serve` makes it"
        )


def give(fleet: FleetConfig, order: Order) -> list[dict[str, Any]]:
    """Have an order carried out by the running coordinator, or here where none runs.

    Raises:
        RolloutError, UsageError: See `obey`.
        TransportError: The coordinator does not answer.
        RegistryError: Another process that has no control socket holds the registry.
    """
    line = order.to_bytes()
    answer = call(fleet.state, line)
    if answer is not None:
        return list(answer)
    require_registry(fleet)
    owner = fleet.state.stat().st_uid
    if owner != os.geteuid():  # files of another user would stop the next coordinator
        raise UsageError(
            f"{fleet.state} belongs to {user_name(owner)} and no coordinator runs: "
            "give the order as that user"
        )
    with (
        EventLog(None, time.time) as events,
        Registry.open(fleet.state, time.time) as registry,
    ):
        repository = ReleaseRepository(fleet.state / RELEASES, lambda: datetime.now(UTC))
        rollouts = Rollouts(RolloutLedger(registry, repository, fleet.rollout, events, time.time))
        rollouts.ledger.reconcile()
        return obey(rollouts, line, user_name(os.geteuid()))
