"""What a simulated fleet learns: a data set, a model, and a fleet to begin with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleetprune_sim.data.corpus import Corpus

Loader = Callable[[int, Path], Corpus]
"""(seed, folder for caches) to a corpus; the seed decides what is held out."""


@dataclass(frozen=True)
class SimTask:
    """A task: everything that `fleet.toml` may leave out of a simulation."""

    name: str
    load: Loader
    model: str
    """`module:factory` of a torch model"""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """of the factory"""
    fleet: Mapping[str, Any] = field(default_factory=dict)
    """tables `training`, `pruning`, `classes` and `simulation` as in `fleet.toml`"""
