"""Federated averaging and what follows from it when some devices are too small.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017. Weights are averaged by number of samples and sent as float32 both ways, momentum
and learning-rate schedule are the task's; BatchNorm statistics are recalibrated at the end for
every method alike (the paper has no BatchNorm).
"""

from collections.abc import Mapping

from fleetprune_coordinator.config import ClassConfig, FleetConfig
from fleetprune_sim.methods.method import Method, Plan, with_classes, with_training

PLAIN = {
    "adjust_logits": 0.0,
    "proximal": 0.0,
    "distill_weight": 0.0,
    "first_criterion": "none",
    "refit": False,
    "remask_every": 0,
    "codec": "fp32",
    "down_codec": "fp32",
    "top_k": 1.0,
    "stratified": False,
    "outlier": 0.0,
    "fixed_statistics": 1.0,
}
"""Training settings without anything that the original methods do not have."""


def smallest(config: FleetConfig, macs: Mapping[str, int] | None = None) -> str:
    """The class with the tightest budget: the last in `fleet.toml` with the least MACs share."""
    return min(reversed(config.classes), key=lambda name: _size(config.classes[name]))


def strongest(config: FleetConfig) -> list[str]:
    """The classes that can hold the dense model."""
    return [name for name, c in config.classes.items() if _size(c) == _size(ClassConfig())]


def _size(budget: ClassConfig) -> tuple[float, ...]:
    """Budgets in an order: shares and figures, none being the largest."""
    limits = (
        budget.macs_share, budget.macs, budget.flash_share,
        budget.flash_bytes, budget.ram_share, budget.ram_bytes,
    )  # fmt: skip
    full = {0: 1.0, 2: 1.0, 4: 1.0}
    return tuple(
        float("inf") if limit is None or limit == full.get(i) else float(limit)
        for i, limit in enumerate(limits)
    )


class Dense(Method):
    """Every device trains the whole model, whatever its budget: the bound that budgets cost."""

    name = "dense"
    title = "FedAvg, dense"
    paper = "McMahan et al. 2017"

    def plan(self, config: FleetConfig, devices: Mapping[str, int]) -> Plan:
        """One model without limits for all."""
        free = ClassConfig(trains=True)
        config = with_training(config, **PLAIN).model_copy(update={"classes": {self.name: free}})
        return Plan(config, dict.fromkeys(devices, self.name))


class Small(Method):
    """Every device trains one plain small model, cut evenly to the tightest budget."""

    name = "small"
    title = "FedAvg, small"
    paper = "McMahan et al. 2017"

    def plan(self, config: FleetConfig, devices: Mapping[str, int]) -> Plan:
        """The smallest class's model for all."""
        least = smallest(config)
        own = with_classes(with_training(config, **PLAIN), {self.name: least})
        return Plan(own, dict.fromkeys(devices, self.name))


class Exclude(Method):
    """Only devices that hold the dense model take part; the others are left without one.

    Equal participation: as many of them are asked in a round as would be asked of the whole
    fleet, so that no device works more than with the other methods.
    """

    name = "exclude"
    title = "FedAvg, strong devices alone"
    paper = "McMahan et al. 2017"

    def plan(self, config: FleetConfig, devices: Mapping[str, int]) -> Plan:
        """The dense model for the strong classes, nothing for the others."""
        strong = strongest(config) or [max(config.classes, key=lambda n: _size(config.classes[n]))]
        share = sum(devices[name] for name in strong) / max(1, sum(devices.values()))
        asked = max(1, round(share * config.training.devices_per_round))
        least = min(config.training.min_devices, asked)
        plain = with_training(config, **PLAIN, devices_per_round=asked, min_devices=least)
        own = with_classes(plain, {self.name: strong[0]})
        return Plan(own, {n: self.name if n in strong else None for n in devices})
