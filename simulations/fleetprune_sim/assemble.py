"""From a task, a `fleet.toml` and options to the description of a run."""

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fleetprune.config_file import GUIDE, explain, read_toml
from fleetprune.errors import ConfigError
from fleetprune_coordinator.config import FleetConfig, load_fleet_config
from fleetprune_sim.auto.asked import put_asked, take_asked
from fleetprune_sim.data.corpus import Corpus
from fleetprune_sim.methods import find_method
from fleetprune_sim.settings import simulation_of
from fleetprune_sim.tasks import SimTask, find_task
from fleetprune_sim.wanted import Wanted


def cache_folder() -> Path:
    """Where parsed data sets are kept: `FLEETPRUNE_CACHE`, or the user's cache folder."""
    if chosen := os.environ.get("FLEETPRUNE_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fleetprune"


def assemble(
    fleet: Path | None,
    task: str,
    method: str,
    seed: int,
    changes: Mapping[str, Any],
    *,
    engine: str = "loop",
    workers: int = 1,
) -> Wanted:
    """The description of a run.

    Args:
        fleet: A `fleet.toml`; None: the task's own fleet.
        task: Name of a task or `module:factory`; "": the one that `fleet` names.
        method: By name.
        seed: Of everything.
        changes: Values by dotted key, such as `training.rounds`, over all else; some may be "auto"
            (`auto.asked.KEYS`), which stays open.
        engine: What does the devices' work.
        workers: Processes that do it.

    Raises:
        ConfigError: Something is unknown, or does not fit together.
        DataError: The task's data are missing.
    """
    if fleet is not None and not fleet.exists():
        raise ConfigError(
            f"{fleet}: no such file; {GUIDE} has examples, and fleetprune simulate --task digits "
            "needs none"
        )
    data = {} if fleet is None else read_toml(fleet)
    asked = take_asked(data)
    given = None if fleet is None else load_fleet_config(fleet, data)
    name = task or (simulation_of(given).task if given is not None else "")
    if not name:
        raise ConfigError(
            f"{fleet} names no task: give --task, or simulation.task in the file"
            if fleet
            else "nothing to learn: give --task NAME, or a fleet.toml that names one"
        )
    folder = Path.cwd() if given is None else given.folder
    found = find_task(name, folder)
    corpus = found.load(seed, cache_folder())
    raw = _described(found, corpus) if given is None else given.model_dump(mode="json")
    put_asked(raw, asked)
    _check_classes(raw, changes)
    for key, value in {"training.seed": seed, "simulation.task": name, **changes}.items():
        _put(raw, key, value)
    asked = take_asked(raw)
    config = _validated(raw, folder)
    _check_fits(config, corpus, name)
    simulation_of(config)
    tries = find_method(method).tries
    return Wanted(found.name, corpus, method, config, engine, workers, asked if tries else ())


def with_values(wanted: Wanted, values: Mapping[str, Any]) -> Wanted:
    """The same run with other settings, by dotted key; ConfigError if they do not fit together."""
    raw = wanted.config.model_dump(mode="json")
    for key, value in values.items():
        _put(raw, key, value)
    return replace(wanted, config=_validated(raw, wanted.config.folder))


def _validated(raw: Mapping[str, Any], folder: Path) -> FleetConfig:
    try:
        config = FleetConfig.model_validate(raw, context={"base": Path.cwd()})
    except ValidationError as e:
        raise ConfigError(explain(e, FleetConfig)) from e
    config._folder = folder
    return config


def _described(task: SimTask, corpus: Corpus) -> dict[str, Any]:
    """A task's own fleet, as `fleet.toml` would have it."""
    raw: dict[str, Any] = {
        "fleet": task.name if task.name.isidentifier() else "simulated",
        "model": {
            "factory": task.model,
            "arguments": dict(task.arguments),
            "input_shape": list(corpus.input_shape),
            "labels": list(corpus.labels),
        },
    }
    for table, values in task.fleet.items():
        raw[table] = _copy(values)
    return raw


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _put(raw: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    at = raw
    for part in path:
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            raise ConfigError(f"{key}: {part} is no table")
    at[last] = value


def _check_classes(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """ConfigError for a setting of a class that is not there: a slip would make a new one."""
    known = raw.get("classes", {})
    for key in changes:
        table, _, rest = key.partition(".")
        name = rest.partition(".")[0]
        if table == "classes" and name not in known:
            raise ConfigError(f"{key}: no class {name!r}, expected one of {', '.join(known)}")


def _check_fits(config: FleetConfig, corpus: Corpus, task: str) -> None:
    if config.model.input_shape != corpus.input_shape:
        raise ConfigError(
            f"model.input_shape {list(config.model.input_shape)}, but the samples of task "
            f"{task} have {list(corpus.input_shape)}"
        )
    if config.model.outputs != len(corpus.labels):
        raise ConfigError(
            f"the model tells {config.model.outputs} classes apart, "
            f"but task {task} has {len(corpus.labels)} labels"
        )


def parse_changes(assignments: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` or `METHOD:KEY=VALUE`, the value as in TOML; a bare word is a string.

    Raises:
        ConfigError: There is no `=`, or no key.
    """
    changes: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text!r}: expected KEY=VALUE, such as training.batch=16")
        try:
            parsed = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            parsed = value.strip()
        changes[key.strip()] = parsed
    return changes


def changes_of(method: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What one method's runs change: the keys for all, and over them those that begin `METHOD:`."""
    own = {key: value for key, value in changes.items() if ":" not in key}
    prefix = f"{method}:"
    return own | {k.removeprefix(prefix): v for k, v in changes.items() if k.startswith(prefix)}


def parse_seeds(text: str) -> list[int]:
    """`3`, `0,2,5` or `0-4`.

    Raises:
        ConfigError: It is none of these.
    """
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            seeds.extend(range(int(first), int(last if dash else first) + 1))
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"--seed {text!r}: expected a number, a list 0,2,5 or a range 0-4")
    return seeds
