"""What a run is of, and which run a folder holds."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetprune.errors import ConfigError
from fleetprune.files import write_atomic
from fleetprune_coordinator.config import FleetConfig
from fleetprune_sim.auto.asked import put_asked
from fleetprune_sim.data.corpus import Corpus

RUN = "run.json"
SHOWN = 3  # runs that an error names of many


@dataclass(frozen=True)
class Wanted:
    """What a run is of; two runs with equal ones end alike."""

    task: str
    """name of the task"""
    corpus: Corpus
    method: str
    config: FleetConfig
    """of the fleet as it is, whatever the method makes of it"""
    engine: str = "loop"
    workers: int = 1
    asked: tuple[str, ...] = ()
    """settings that are to be found out first; `config` has others in their places until then"""
    tried: Mapping[str, Any] | None = None
    """what was tried to find them, as in `summary.json`"""


def place(method: str, seed: int) -> Path:
    """Where a run is in the folder of several."""
    return Path(method) / f"seed-{seed}"


def runs_in(folder: Path) -> list[Path]:
    """Folders of the runs, begun or finished, that are in the folder of several."""
    return sorted(path.parent for path in folder.glob(f"*/seed-*/{RUN}"))


def check_for_one(folder: Path, among: Path) -> None:
    """Refuse the folder of several runs for a single one.

    Args:
        folder: Where the run is to be.
        among: `place` of the run, if it were one of several.

    Raises:
        ConfigError: There are runs in sub-folders.
    """
    if (folder / RUN).exists() or not (there := runs_in(folder)):
        return
    names = [path.relative_to(folder).as_posix() for path in there]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise ConfigError(
        f"{folder} holds several runs, each in a folder of its own "
        f"({', '.join(names[:SHOWN])}{more}): add this one with --out {folder / among}, "
        "or give it another"
    )


def check_for_several(folder: Path) -> None:
    """Refuse the folder of a single run for several; ConfigError if it is one."""
    if not (folder / RUN).exists():
        return
    there = _read(folder / RUN)
    seed = _flat(there).get("config.training.seed")
    raise ConfigError(
        f"{folder} holds a single run (method {there.get('method')}, seed {seed}): "
        "give several runs another --out"
    )


def _read(path: Path) -> dict[str, Any]:
    """The description of a run; ConfigError if it is damaged."""
    try:
        there: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read ({e}): give this one another --out") from e
    return there


def claim(folder: Path, wanted: Wanted, *, resume: bool) -> bool:
    """Make a folder this run's own, or check that it is.

    Returns:
        Whether the folder was free until now.

    Raises:
        ConfigError: It holds another run, or this one and `resume` was not asked for; or it
            cannot be written.
    """
    # Where a coordinator would keep its state follows the working directory; a run's own is in its
    # folder.
    config = wanted.config.model_dump(mode="json", exclude={"state"})
    put_asked(config, wanted.asked)
    mine = {"task": wanted.task, "method": wanted.method, "config": config}
    path = folder / RUN
    if path.exists():
        there = _read(path)
        if there != mine:
            raise ConfigError(
                f"{folder} holds another run ({_difference(there, mine)}): "
                "give this one another --out"
            )
        if not resume:
            raise ConfigError(f"{folder} holds this run already: add --resume to go on with it")
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(
                f"{folder} is not empty and holds no run: give this one another --out"
            )
    except OSError as e:
        raise ConfigError(
            f"{folder} cannot be written ({e.strerror or e}): give another --out"
        ) from e
    write_atomic(path, json.dumps(mine, indent=1, sort_keys=True).encode())
    return True


def give_up(folder: Path) -> None:
    """Remove the folder of a run that could not begin, so that the next try finds it free."""
    shutil.rmtree(folder, ignore_errors=True)


def _difference(there: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """The first setting that differs, for people."""
    a, b = _flat(there), _flat(mine)
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            return f"{key} {a.get(key)} instead of {b.get(key)}"
    return "of another version"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, part in value.items():
            found |= _flat(part, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: value}
