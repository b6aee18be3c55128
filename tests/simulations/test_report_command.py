"""The commands that make runs again, as they are worked out from the runs' own folders."""

import json
import shlex
from pathlib import Path

import pytest

from fleetprune_coordinator.config import FleetConfig
from fleetprune_sim.assemble import parse_changes, parse_seeds
from fleetprune_sim.report.command import Command, commands
from fleetprune_sim.report.comparison import compare
from fleetprune_sim.report.finding import find_runs
from fleetprune_sim.report.runs import read_run
from fleetprune_sim.report.variants import group
from fleetprune_sim.tasks import TASKS
from tests.simulations.report_runs import Synthetic

DIGITS = TASKS["digits"]


def config(changes: dict | None = None, name: str = "digits") -> dict:
    """A fleet's description as a run's folder keeps it: the task's own, and what was changed."""
    raw = {
        **json.loads(json.dumps(DIGITS.fleet)),
        "fleet": "digits",
        "model": {"factory": DIGITS.model, "input_shape": [1, 8, 8], "classes": 10},
    }
    for key, value in {"simulation.task": name, **(changes or {})}.items():
        *path, last = key.split(".")
        at = raw
        for part in path:
            at = at[part]
        at[last] = value
    return FleetConfig.model_validate(raw).model_dump(mode="json")


def write(root: Path, method: str = "nested", seed: int = 0, changes: dict | None = None, **more):
    folder = root / f"{method}-{seed}"
    Synthetic(task="digits", method=method, seed=seed, **more).write(folder)
    described = config({"training.seed": seed, **(changes or {})})
    (folder / "run.json").write_text(json.dumps({"config": described}))
    return folder


def found(root: Path) -> list[Command]:
    ((task, variants),) = group(find_runs([root]).runs).items()
    return commands(compare(task, variants))


def text(command: Command) -> str:
    return " ".join(command.parts)


def test_methods_and_seeds_are_put_together(tmp_path):
    for method in ("nested", "small"):
        for seed in (0, 1, 2):
            write(tmp_path, method, seed, {"training.rounds": 12})
    (command,) = found(tmp_path)
    assert text(command) == (
        "fleetprune simulate --task digits --rounds 12 --method nested,small --seed 0-2 --out DIR"
    )
    assert command.complete


def test_what_was_changed_is_an_option_for_all_or_for_one(tmp_path):
    both = {"simulation.devices": 10, "classes.sensor.latency_ms": 1e-6, "training.quorum": 0.9}
    write(tmp_path, "nested", 3, both)
    write(tmp_path, "fjord", 3, {**both, "training.learning_rate": 0.4, "training.codec": "int8"})
    (command,) = found(tmp_path)
    words = shlex.split(text(command))
    assert words[:10] == [
        "fleetprune", "simulate", "--task", "digits", "--clients", "10", "--method",
        "fjord,nested", "--seed", "3",
    ]  # fmt: skip
    assert parse_seeds(words[9]) == [3]
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert parse_changes(sets) == {
        "classes.sensor.latency_ms": 1e-6,
        "training.quorum": 0.9,
        "fjord:training.codec": "int8",
        "fjord:training.learning_rate": 0.4,
    }


def test_runs_that_no_single_command_makes_have_several(tmp_path):
    write(tmp_path / "a", seed=0)
    write(tmp_path / "a", seed=2)
    write(tmp_path / "b", "small", seed=1)
    write(tmp_path / "c", seed=5, changes={"training.rounds": 3}, rounds=3)
    seen = {text(command) for command in found(tmp_path)}
    start = "fleetprune simulate --task digits"
    assert seen == {
        f"{start} --method nested --seed 0,2 --out DIR",
        f"{start} --method small --seed 1 --out DIR",
        f"{start} --rounds 3 --method nested --seed 5 --out DIR",
    }


def test_a_method_with_two_settings_takes_two_commands(tmp_path):
    for rate in (0.2, 0.4):
        changes = {"training.learning_rate": rate}
        write(tmp_path / str(rate), changes=changes, settings={"learning_rate": rate})
    assert [command.parts[-2] for command in found(tmp_path)] == [
        "--set training.learning_rate=0.2",
        "--set training.learning_rate=0.4",
    ]


@pytest.mark.parametrize(
    ("initial", "option"),
    [
        ("/work/warm-20-seed-0/dense.pt", "--warm-rounds 20"),
        ("/models/a b.pt", "--init '/models/a b.pt'"),
    ],
)
def test_a_run_that_began_with_a_trained_model_says_so(tmp_path, initial, option):
    write(tmp_path, changes={"model.initial": initial})
    (command,) = found(tmp_path)
    assert option in command.parts
    assert command.complete


def test_a_fleet_of_the_users_own_is_not_made_up(tmp_path):
    folder = write(tmp_path)
    described = json.loads((folder / "run.json").read_text())
    del described["config"]["classes"]["sensor"]
    (folder / "run.json").write_text(json.dumps(described))
    (command,) = found(tmp_path)
    assert not command.complete
    assert "--set" not in text(command)
    described["config"] = config(name="pumps:task")
    (folder / "run.json").write_text(json.dumps(described))
    (command,) = found(tmp_path)
    assert text(command).startswith("fleetprune simulate --task pumps:task --rounds ")
    assert not command.complete


def test_a_setting_that_is_newer_than_the_run_was_not_changed(tmp_path):
    folder = write(tmp_path)
    described = json.loads((folder / "run.json").read_text())
    del described["config"]["training"]["quorum"]
    (folder / "run.json").write_text(json.dumps(described))
    (command,) = found(tmp_path)
    assert text(command) == "fleetprune simulate --task digits --method nested --seed 0 --out DIR"
    assert command.complete


@pytest.mark.parametrize("content", [None, "{", "[]", '{"config": 3}', "{}"])
def test_a_folder_that_says_nothing_of_its_run_is_no_error(tmp_path, content):
    folder = Synthetic(seed=4).write(tmp_path / "run")
    if content is not None:
        (folder / "run.json").write_text(content)
    assert read_run(folder).described.get("config") in (None, 3)
    (command,) = found(tmp_path)
    assert text(command) == (
        "fleetprune simulate --task fashion --rounds 4 --method nested --seed 4 --out DIR"
    )
    assert not command.complete
