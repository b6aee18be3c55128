"""Methods to compare: one module each, found by name."""

from collections.abc import Mapping

from fleetprune.errors import ConfigError
from fleetprune_sim.methods.fedavg import Dense, Exclude, Small
from fleetprune_sim.methods.feddst import FedDST
from fleetprune_sim.methods.fedrolex import FedRolex
from fleetprune_sim.methods.fedrts import FedRTS
from fleetprune_sim.methods.fedtiny import FedTiny
from fleetprune_sim.methods.fjord import Fjord
from fleetprune_sim.methods.heterofl import HeteroFL
from fleetprune_sim.methods.method import Method
from fleetprune_sim.methods.nested import Nested
from fleetprune_sim.methods.prunefl import PruneFL

_ALL: tuple[type[Method], ...] = (
    Dense, Small, Exclude, HeteroFL, FedRolex, Fjord, PruneFL, FedDST, FedTiny, FedRTS, Nested,
)  # fmt: skip
METHODS: Mapping[str, type[Method]] = {method.name: method for method in _ALL}


def find_method(name: str) -> Method:
    """The method of that name; ConfigError if there is none."""
    if name not in METHODS:
        raise ConfigError(f"no method {name!r}, expected one of {', '.join(METHODS)}")
    return METHODS[name]()
