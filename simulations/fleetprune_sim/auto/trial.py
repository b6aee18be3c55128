"""One candidate on few rounds: a short training of its own, judged on the validation set alone."""

import json
import shutil
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from fleetprune.errors import ConfigError, FleetpruneError, UsageError
from fleetprune.files import write_atomic
from fleetprune_coordinator.config import FleetConfig
from fleetprune_sim.history import EvaluationRow, RoundRow
from fleetprune_sim.run import Simulation
from fleetprune_sim.wanted import RUN, Wanted, claim, give_up

RESULT = "trial.json"


@dataclass(frozen=True)
class Result:
    """What became of it."""

    classes: Mapping[str, float] = field(default_factory=dict)
    """accuracy of each class's model on the validation set"""
    wall_s: float = 0.0
    failed: str = ""
    """why there are no accuracies"""

    @property
    def score(self) -> float:
        """Mean over the classes; below all accuracies if it has failed."""
        # Accuracies are float32: what they have in common must not differ in the eighth digit.
        return -1.0 if self.failed else round(fmean(self.classes.values()), 6)


def shortened(config: FleetConfig, rounds: int) -> dict[str, Any]:
    """Settings, by dotted key, of a training in few rounds in which all comes in proportion.

    Learning rate, regrowth and the last new masks follow from the number of rounds by themselves.

    Args:
        config: Of the whole training.
        rounds: Of the short one, at most as many.
    """
    training, schedule = config.training, config.schedule

    def scaled(of: int) -> int:
        return round(of * rounds / training.rounds)

    changes: dict[str, Any] = {
        "training.rounds": rounds,
        "training.remask_every": max(1, scaled(training.remask_every))
        if training.remask_every
        else 0,
        "schedule.begin": scaled(schedule.begin),
        "schedule.end": scaled(schedule.end),
        "schedule.frequency": max(1, scaled(schedule.frequency)),
        "schedule.window": max(1, scaled(schedule.window)),
        "simulation.evaluate_every": 0,  # at the end alone
    }
    if training.last_remask is not None:
        changes["training.last_remask"] = scaled(training.last_remask)
    if training.fixed_statistics >= 1:
        # An evaluation measures statistics for itself; only a release needs the fleet's.
        changes["training.calibration_passes"] = 0
    if config.pruning.int8 == "auto":
        changes["pruning.int8"] = False
    return changes


def run_trial(
    wanted: Wanted,
    folder: Path,
    closed: Callable[[int], None],
    exported: MutableMapping[str, bytes],
) -> Result:
    """Do a short training, or what is left of it; the test set is not looked at.

    Args:
        wanted: The short training.
        folder: Keeps its result, and until then what it needs to be taken up again.
        closed: Told the number of each training round that is done.
        exported: Graphs of this process's runs.

    Raises:
        ConfigError: The folder holds something else, or is damaged.
    """
    fresh = claim(folder, wanted, resume=True)
    path = folder / RESULT
    if path.exists():
        result = _read(path)
        _clear(folder)
        return result

    def on_round(metrics: Mapping[str, Any]) -> None:
        closed(metrics["round"])

    try:
        simulation = Simulation(wanted, folder, on_round, exported)
    except UsageError as e:
        if not fresh:
            raise
        result = Result(failed=str(e))
    else:
        with simulation:
            result = _trained(simulation)
    write_atomic(path, json.dumps(asdict(result), indent=1).encode())
    _clear(folder)
    return result


def _trained(simulation: Simulation) -> Result:
    try:
        simulation.train()
    except FleetpruneError as e:
        return Result(failed=str(e))
    last = simulation.wanted.config.training.rounds
    rows = simulation.history.read(RoundRow)
    wall_s = sum({(r.number, r.phase, r.step): r.wall_s for r in rows}.values())
    found = [e for e in simulation.history.read(EvaluationRow) if e.round == last]
    return Result({e.device_class: e.accuracy for e in found}, round(wall_s, 3))


def _read(path: Path) -> Result:
    try:
        return Result(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as e:
        give_up(path.parent)
        raise ConfigError(f"{path} cannot be read ({e}): --resume makes it anew") from e


def _clear(folder: Path) -> None:
    """Remove all but what the result is of, and the result: there may be many such folders."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (RUN, RESULT):
            path.unlink()
