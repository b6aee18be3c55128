"""The commands that make runs again, worked out from what the runs' folders say of them."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import PurePath
from typing import Any

from fleetprune_coordinator.config import FleetConfig
from fleetprune_sim.report.comparison import Comparison
from fleetprune_sim.report.runs import Run
from fleetprune_sim.tasks import TASKS

Values = dict[str, Any]
"""By dotted key."""

_SAID_OTHERWISE = {"training.seed", "simulation.task", "model.initial"}
_OPTIONS = {"training.rounds": "--rounds", "simulation.devices": "--clients"}
_OF_THE_DATA = {"model.input_shape", "model.labels", "model.classes"}
_DECIDES = ("training", "pruning", "schedule", "classes", "simulation", "model")
_WARM = re.compile(r"warm-(\d+)-seed-\d+")


@dataclass(frozen=True)
class Command:
    """One command."""

    parts: tuple[str, ...]
    """The program, and each option with its value."""
    complete: bool
    """Whether it says all that was changed: it does not where the fleet is the user's own."""


@dataclass(frozen=True)
class _Told:
    """What a run was told, besides its method and seed."""

    words: tuple[str, ...]
    changes: tuple[tuple[str, str], ...]
    complete: bool


def commands(comparison: Comparison) -> list[Command]:
    """As few as there can be: a method's seeds together, and methods with the same seeds."""
    together: dict[tuple[Any, ...], dict[str, _Told]] = {}
    for row in comparison.rows:
        for told, seeds in _by_telling(row.variant.runs):
            method, copies = row.variant.method, 0
            key = (told.words, told.complete, seeds)
            while method in together.get((*key, copies), {}):
                copies += 1
            together.setdefault((*key, copies), {})[method] = told
    return [
        Command(_written(words, seeds, methods), complete)
        for (words, complete, seeds, _), methods in together.items()
    ]


def _by_telling(runs: Sequence[Run]) -> Iterator[tuple[_Told, tuple[int, ...]]]:
    told = {run.summary.seed: _told(run) for run in runs}
    for same in dict.fromkeys(told.values()):
        yield same, tuple(seed for seed, one in told.items() if one == same)


def _told(run: Run) -> _Told:
    config = run.described.get("config")
    given = _decisive(config) if isinstance(config, Mapping) else {}
    task = str(given.get("simulation.task", run.summary.task))
    own = _own_fleet(task)
    expressible = own is not None and not _taken(own, given)
    changed = {k: v for k, v in given.items() if v is not None and v != (own or {}).get(k)}
    known = (
        changed if own is not None and given else {"training.rounds": run.summary.rounds, **changed}
    )
    words = ["--task", task]
    for key, option in _OPTIONS.items():
        if key in known:
            words += [option, str(known[key])]
    words += _start(given.get("model.initial"))
    if run.summary.engine not in ("", "loop"):
        words += ["--engine", run.summary.engine]
    skipped = _SAID_OTHERWISE | _OPTIONS.keys()
    changes = tuple((k, _toml(v)) for k, v in sorted(changed.items()) if k not in skipped)
    return _Told(tuple(words), changes if expressible else (), bool(given) and expressible)


def _taken(own: Values, given: Values) -> bool:
    """Whether something of a task's own fleet is gone: an option can change or add, no more.

    A setting that a run knows nothing of is newer than the run.
    """
    classes = {key.split(".")[1] for key in given if key.startswith("classes.")}
    for key, value in own.items():
        table, _, rest = key.partition(".")
        there = key in given or (
            rest.partition(".")[0] in classes if table == "classes" else table != "simulation"
        )
        if value is not None and not (there and given.get(key, value) is not None):
            return True
    return False


def _start(initial: Any) -> list[str]:
    """The trained model that a run begins with."""
    if not initial:
        return []
    warm = _WARM.fullmatch(PurePath(str(initial)).parent.name)
    return ["--warm-rounds", warm[1]] if warm else ["--init", str(initial)]


def _written(
    words: Sequence[str], seeds: Sequence[int], methods: Mapping[str, _Told]
) -> tuple[str, ...]:
    changes = {method: dict(told.changes) for method, told in methods.items()}
    first = next(iter(changes.values()))
    common = {
        key: text
        for key, text in first.items()
        if all(own.get(key) == text for own in changes.values())
    }
    sets = [f"{key}={text}" for key, text in common.items()]
    sets += [
        f"{method}:{key}={text}"
        for method, own in changes.items()
        for key, text in own.items()
        if key not in common
    ]
    options = [*words, "--method", ",".join(methods), "--seed", _range(seeds)]
    for change in sets:
        options += ["--set", change]
    pairs = [shlex.join(options[i : i + 2]) for i in range(0, len(options), 2)]
    return "fleetprune simulate", *pairs, "--out DIR"


def _range(seeds: Sequence[int]) -> str:
    """`0-4` or `0,2,5`."""
    if len(seeds) > 1 and all(b == a + 1 for a, b in pairwise(seeds)):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))


@cache
def _own_fleet(task: str) -> Values | None:
    """What a task that comes with the simulator says of its fleet; None: the task is a user's."""
    found = TASKS.get(task)
    if found is None:
        return None
    model = {"factory": found.model, "arguments": dict(found.arguments)}
    of_any_data = {"input_shape": [1], "classes": 2}
    raw = {**found.fleet, "fleet": task, "model": {**model, **of_any_data}}
    return _decisive(FleetConfig.model_validate(raw).model_dump(mode="json"))


def _decisive(config: Mapping[str, Any]) -> Values:
    """Those keys of a fleet's description that decide what a simulation comes to."""
    flat = dict(_flat({table: config.get(table) for table in _DECIDES}, ""))
    return {key: value for key, value in flat.items() if key not in _OF_THE_DATA}


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(part, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _toml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
