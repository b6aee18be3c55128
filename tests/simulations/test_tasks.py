"""Every task's own fleet is a valid description whose budgets can be met."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fleetprune.errors import ConfigError, DataError
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.imports import import_object
from fleetprune_coordinator.plan import Planner
from fleetprune_coordinator.tracing import trace
from fleetprune_sim.settings import simulation_of
from fleetprune_sim.tasks import MACS_SHARES, TASKS, SimTask, find_task

torch.set_num_threads(1)  # on a busy machine, threads that wait for each other take minutes

SHAPES = {
    "digits": (1, 8, 8),
    "fashion": (1, 28, 28),
    "har": (6, 192),
    "speech": (1, 40, 63),
    "cifar10": (3, 32, 32),
}
LABELS = {"har": 5}


def described(name):
    task = TASKS[name]
    model = {
        "factory": task.model,
        "arguments": task.arguments,
        "input_shape": list(SHAPES[name]),
        "classes": LABELS.get(name, 10),
    }
    return FleetConfig.model_validate({"fleet": name, "model": model, **task.fleet})


def test_the_tasks_are_these():
    assert TASKS.keys() == SHAPES.keys()
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("name", TASKS)
def test_a_tasks_fleet_is_valid_and_its_budgets_can_be_met(name):
    config = described(name)
    simulation = simulation_of(config)
    assert config.training.devices_per_round == 10
    assert simulation.devices >= 10
    assert len(config.classes) == 4
    model = import_object(config.model.factory, "model")(**config.model.arguments)
    architecture = trace(model, torch.zeros(1, *SHAPES[name]))
    assert architecture.classes == config.model.outputs
    dense = Planner(architecture, {}, schedule=config.schedule).dense
    budgets = {name: c.budget(dense) for name, c in config.classes.items()}
    multiple = config.pruning.channel_multiple
    planner = Planner(architecture, budgets, schedule=config.schedule, multiple=multiple)
    scores = {group: np.ones(units, np.float32) for group, units in architecture.groups.items()}
    shapes = planner.shapes(1, scores)
    for share, keep in zip(MACS_SHARES, shapes.values(), strict=True):
        assert 0.85 * share < planner.costs(keep).macs / dense.macs <= share
        assert all(n % 4 == 0 for n in keep.values())
    speeds = [simulation.classes[c].macs_per_s for c in config.classes]
    assert speeds == sorted(speeds, reverse=True)


def test_only_activities_know_hardware():
    kinds = {
        name: [p.kind for p in simulation_of(described(name)).classes.values()] for name in TASKS
    }
    assert kinds.pop("har") == ["phone", "phone", "watch", "watch"]
    assert set(map(tuple, kinds.values())) == {("",) * 4}


def test_known_tasks_are_found_by_name():
    assert find_task("digits", None) is TASKS["digits"]


def test_loading_the_tasks_imports_nothing_heavy():
    heavy = "{'sklearn', 'librosa', 'datasets', 'flwr_datasets', 'PIL', 'torch'}"
    code = f"import sys, fleetprune_sim.tasks; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


MODULE = """
import numpy as np

from fleetprune.errors import DataError
from fleetprune_sim.data.corpus import Corpus
from fleetprune_sim.tasks import SimTask


def load(seed, cache):
    x, y = np.zeros((6, 4), np.float32), np.arange(6) % 2
    return Corpus(x, y, x, y, x, y, ("off", "on"))


def pumps():
    return SimTask("pumps", load, "fleetprune_sim.models:mlp", {"inputs": 4, "classes": 2})


def text():
    return "pumps"


def broken():
    return 1 / 0


def needs(more):
    return pumps()


def poor():
    raise DataError("the pumps are not here")


number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_pumps.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("my_pumps", None)


def test_a_users_own_task(own):
    task = find_task("my_pumps:pumps", own)
    assert isinstance(task, SimTask)
    assert task.load(0, own).input_shape == (4,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fashon",
            "task 'fashon' is unknown, expected one of digits, fashion, har, speech, cifar10, or "
            "module:factory of your own",
        ),
        ("no_such_module:x", "task: no module no_such_module in FOLDER or among the installed "),
        ("my_pumps:pump", "task: my_pumps has no pump, did you mean pumps?"),
        (
            "my_pumps:text",
            "task: my_pumps:text() returned a str, expected a fleetprune_sim.tasks.SimTask",
        ),
        ("my_pumps:broken", "task: my_pumps:broken() fails: ZeroDivisionError: division by zero"),
        ("my_pumps:needs", "task: my_pumps:needs() fails: TypeError: needs() missing 1 required"),
        ("my_pumps:number", "task: my_pumps:number() fails: TypeError: 'int' object is not call"),
    ],
)
def test_a_task_that_is_none_says_why(own, name, message):
    with pytest.raises(ConfigError) as caught:
        find_task(name, own)
    assert str(caught.value).startswith(message.replace("FOLDER", str(own)))
    assert "\n" not in str(caught.value)


def test_an_error_that_a_users_task_explains_is_left_as_it_is(own):
    with pytest.raises(DataError, match=r"^the pumps are not here$"):
        find_task("my_pumps:poor", own)


DOCUMENT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_document_has_every_task_and_its_devices():
    rows = re.findall(r"^\| \[`(\w+)`\]\(#\w+\) \|.*\| (\d+), by [a-z ]+ \|$", DOCUMENT, re.M)
    wanted = {name: simulation_of(described(name)).devices for name in TASKS}
    assert {name: int(devices) for name, devices in rows} == wanted
