"""What can be tried on a fleet, the most promising first, and what cannot, with the reason."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from fleetprune.criteria import CATALOGUE, Criterion, Needs, needs
from fleetprune.errors import ConfigError, UsageError
from fleetprune.patterns import Granularity, Pattern
from fleetprune_coordinator.coordinator import load_model
from fleetprune_coordinator.describe import counted, describe
from fleetprune_coordinator.ledger import Ledger
from fleetprune_coordinator.plan import Planner
from fleetprune_coordinator.resize import read
from fleetprune_sim.assemble import with_values
from fleetprune_sim.auto.asked import CRITERION, FIRST_CRITERION, GRANULARITY
from fleetprune_sim.wanted import Wanted

_BY_PROMISE = (
    Criterion.TAYLOR,
    Criterion.MAGNITUDE,
    Criterion.WANDA,
    Criterion.FISHER,
    Criterion.MOVEMENT,
    Criterion.SYNFLOW,
    Criterion.FPGM,
    Criterion.SNIP,
    Criterion.APOZ,
    Criterion.GAMMA,
    Criterion.SENSITIVITY,
    Criterion.TAYLOR_ABS,
    Criterion.L1,
    Criterion.THRESHOLD,
    Criterion.NONE,
)
"""One criterion of every kind, then their relatives, and last the control."""
SHOWN = 3  # reasons that a refusal of all of them names
_FIRST = (Criterion.RECONSTRUCTION, *_BY_PROMISE)


@dataclass(frozen=True)
class Candidate:
    """Values for the settings that are to be found out."""

    settings: Mapping[str, str]
    """by key; a setting that is not here may have any value"""
    reason: str = ""
    """why it is not tried"""

    @property
    def name(self) -> str:
        """Also of its folder."""
        return "-".join(self.settings.values())


@dataclass(frozen=True)
class Candidates:
    """All that there are."""

    possible: tuple[Candidate, ...]
    """the most promising first, which wins ties"""
    refused: tuple[Candidate, ...]


def find_candidates(wanted: Wanted) -> Candidates:
    """The candidates for a run.

    Args:
        wanted: The run; what it asks for is in `asked`.

    Raises:
        ConfigError: Nothing is possible, or a setting that is asked for has no effect.
    """
    _check_matters(wanted)
    fleet = _Fleet(wanted)
    options: list[list[tuple[int, str]]] = []
    refused: list[Candidate] = []
    for key in wanted.asked:
        fit: list[tuple[int, str]] = []
        for rank, value in enumerate(_values(key)):
            if reason := fleet.refuses(key, value):
                refused.append(Candidate({key: value}, reason))
            else:
                fit.append((rank, value))
        options.append(fit)
    possible: list[Candidate] = []
    for _, settings in sorted(_combined(wanted.asked, options), key=lambda pair: pair[0]):
        if reason := _reason(wanted, settings):
            # A first criterion goes with anything: said once is enough.
            settings.pop(FIRST_CRITERION, None)
            if (again := Candidate(settings, reason)) not in refused:
                refused.append(again)
        else:
            possible.append(Candidate(settings))
    if not possible:
        reasons = "; ".join(f"{c.name}: {c.reason}" for c in refused[:SHOWN])
        raise ConfigError(f'{" and ".join(wanted.asked)} "auto": nothing can be chosen; {reasons}')
    return Candidates(tuple(possible), tuple(refused))


def _values(key: str) -> list[str]:
    if key == GRANULARITY:
        return [g.value for g in (Granularity.CHANNEL, Granularity.HYBRID, Granularity.WEIGHT)]
    if key == FIRST_CRITERION:
        return [c.value for c in _FIRST if CATALOGUE[c].first]
    return [c.value for c in _BY_PROMISE if CATALOGUE[c].later]


def _combined(
    asked: Sequence[str], options: Sequence[Sequence[tuple[int, str]]]
) -> list[tuple[int, dict[str, str]]]:
    """Every combination with its rank: of each criterion, all granularities come together."""
    found = []
    for chosen in product(*options):
        ranks = dict(zip(asked, (rank for rank, _ in chosen), strict=True))
        settings = dict(zip(asked, (value for _, value in chosen), strict=True))
        found.append((ranks.get(CRITERION, 0) + ranks.get(FIRST_CRITERION, 0), settings))
    return found


def _reason(wanted: Wanted, settings: Mapping[str, Any]) -> str:
    """Why a fleet's description does not allow settings; "": it does."""
    try:
        with_values(wanted, settings)
    except ConfigError as e:
        return str(e)
    return ""


def _check_matters(wanted: Wanted) -> None:
    """Refuse to try what would make no difference; ConfigError if so."""
    config = wanted.config
    if FIRST_CRITERION in wanted.asked and config.model.initial is None:
        raise ConfigError(
            f'{FIRST_CRITERION} "auto": it only matters where the model comes trained: give '
            "--init or --warm-rounds, or leave it out"
        )
    training = config.training
    changes = 0 < training.remask_every <= training.final_remask or config.schedule.settled > 0
    if CRITERION in wanted.asked and not changes:
        last = training.final_remask
        raise ConfigError(
            f'{CRITERION} "auto": masks never change, so no criterion is asked: '
            f"training.remask_every is {training.remask_every}, and no new masks come after round "
            f"{last}; {'let it be at most that, and not 0' if last else 'raise last_remask'}"
        )


class _Fleet:
    """A fleet's model and budgets, as far as they decide what can be tried."""

    def __init__(self, wanted: Wanted) -> None:
        config = wanted.config
        torch.manual_seed(config.training.seed)
        network = load_model(config)
        self._wanted = wanted
        self._architecture = describe(network, torch.zeros(1, *config.model.input_shape), config)
        self._counted = counted(network, self._architecture, config)
        self._params = read(network)[0]

    def refuses(self, key: str, value: str) -> str:
        """Why a value is not for this fleet; "": it is."""
        return self.granularity(value) if key == GRANULARITY else self.criterion(value)

    def granularity(self, value: str) -> str:
        """The same of a granularity."""
        if reason := _reason(self._wanted, {GRANULARITY: value}):
            return reason
        config = with_values(self._wanted, {GRANULARITY: value}).config
        try:
            planner = Planner.of(config, self._architecture, counted=self._counted)
        except UsageError as e:
            return str(e)
        if value != Granularity.HYBRID:
            return ""
        flat = {g: np.zeros(n, np.float32) for g, n in self._architecture.groups.items()}
        shapes = planner.shapes(config.training.rounds + 1, flat)
        whole = all(dict(keep) == dict(self._architecture.groups) for keep in shapes.values())
        if whole and not self.granularity(Granularity.WEIGHT):
            return "no limit but of bytes cuts any unit: the same as weight"
        if Pattern.parse(config.pruning.pattern).m:
            return ""
        limits = {name: budget.flash_bytes for name, budget in planner.budgets.items()}
        if all(
            limit is None or planner.costs(shapes[name]).artifact_bytes <= limit
            for name, limit in limits.items()
        ):
            return "where all other limits hold, so do those of bytes: the same as channel"
        return ""

    def criterion(self, value: str) -> str:
        """The same of a criterion; one that needs nothing of devices can be asked at once."""
        criterion = Criterion(value)
        if needs(criterion) is not Needs.NOTHING or criterion is Criterion.SYNFLOW:
            return ""
        groups = self._architecture.groups
        try:
            Ledger(self._architecture, groups).scores(criterion, self._params)
        except UsageError as e:
            return str(e)
        return ""
