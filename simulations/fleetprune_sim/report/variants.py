"""Which runs belong together: the same task, method and settings, with different seeds."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fleetprune.errors import DataError
from fleetprune_sim.report.runs import Run
from fleetprune_sim.report.setting_words import OF_RUNS

AUTO = "auto"
"""Name of the settings that were found out, and the value of one that seeds disagree on."""
FLEET = ("rounds", "engine", "input_shape", "dense", "partition", "devices", "budgets")
"""First words of settings that say what was learned where, whatever the method."""

Settings = dict[str, str]
"""Names with dots, and values as JSON."""


@dataclass(frozen=True)
class Variant:
    """A method with its settings."""

    task: str
    method: str
    label: str
    """The method's name, with the settings that tell it from others of the same method."""
    runs: tuple[Run, ...]
    """by seed"""
    settings: Mapping[str, str]
    own: Mapping[str, str]
    """Those that are in the label."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """One per run."""
        return tuple(run.summary.seed for run in self.runs)


def settings_of(run: Run) -> Settings:
    """All that must be equal for two runs to differ by chance alone."""
    s = run.summary
    everything: dict[str, Any] = {
        "rounds": s.rounds,
        "engine": s.engine,
        "input_shape": list(s.input_shape),
        "dense": {"params": s.dense.params, "macs": s.dense.macs},
        "partition": dict(s.partition),
        # In all: how many a class has may follow from the seed.
        "devices": sum(c.devices for c in s.classes.values()),
        "budgets": {n: c.budget.model_dump(exclude_none=True) for n, c in s.classes.items()},
        "settings": s.settings,
        AUTO: None if s.auto is None else ", ".join(s.auto.asked),
    }
    flat = dict(_flatten(everything, ()))
    # Some settings repeat the seed; the run's own is what tells its runs apart.
    return {k: v for k, v in flat.items() if k.rpartition(".")[2] != "seed" or v != str(s.seed)}


def group(runs: Sequence[Run]) -> dict[str, list[Variant]]:
    """Variants per task, in the order in which the runs come.

    Raises:
        DataError: Two runs have the same task, method, settings and seed.
    """
    found: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for run in runs:
        # Seeds may choose differently: that is chance, as all that they do not have in common.
        found_out = _found_out(run)
        told = {k: v for k, v in settings_of(run).items() if k not in found_out}
        key = json.dumps(told, sort_keys=True)
        same = found.setdefault((run.summary.task, run.summary.method), {})
        same.setdefault(key, []).append(run)
    tasks: dict[str, list[Variant]] = {}
    for (task, method), by_settings in found.items():
        all_settings = [_in_common(together) for together in by_settings.values()]
        telling = differing(all_settings)
        for settings, together in zip(all_settings, by_settings.values(), strict=True):
            own = {key: settings.get(key, "-") for key in telling}
            ordered = _by_seed(together)
            variant = Variant(task, method, _label(method, own), ordered, settings, own)
            tasks.setdefault(task, []).append(variant)
    return tasks


def _found_out(run: Run) -> set[str]:
    """Names of the settings that a run did not begin with."""
    auto = run.summary.auto
    return set() if auto is None else {f"{OF_RUNS}{key}" for key in auto.asked}


def _in_common(runs: Sequence[Run]) -> Settings:
    """Of runs that were told the same; where they chose differently, that they chose."""
    each = [settings_of(run) for run in runs]
    agreed = {k: v for k, v in each[0].items() if all(other.get(k) == v for other in each)}
    return agreed | {k: json.dumps(AUTO) for k in _found_out(runs[0]) - agreed.keys()}


def differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Names whose values are not all the same, or that some lack."""
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if len({one.get(name) for one in settings}) > 1]


def fleet_differences(variants: Sequence[Variant]) -> list[str]:
    """What makes variants hard to compare: settings of the fleet that differ between them."""
    return [
        name
        for name in differing([v.settings for v in variants])
        if name.partition(".")[0] in FLEET and name != "engine"
    ]


def _label(method: str, own: Mapping[str, str]) -> str:
    short = {name: name.rpartition(".")[2] for name in own}
    if len(set(short.values())) < len(short):
        short = {name: name.removeprefix(OF_RUNS) for name in own}
    inner = ", ".join(f"{short[name]}={value.strip(chr(34))}" for name, value in own.items())
    return f"{method} ({inner})" if inner else method


def _by_seed(runs: Sequence[Run]) -> tuple[Run, ...]:
    ordered = sorted(runs, key=lambda run: run.summary.seed)
    for one, other in pairwise(ordered):
        if one.summary.seed == other.summary.seed:
            s = one.summary
            raise DataError(
                f"{one.folder} and {other.folder} are both {s.task}, {s.method}, seed {s.seed} "
                "with the same settings: leave one of them out"
            )
    return tuple(ordered)


def _flatten(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, (*path, str(key)))
    elif value is not None:
        yield ".".join(path), json.dumps(value)
