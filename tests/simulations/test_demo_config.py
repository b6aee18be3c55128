import tomllib

import numpy as np
import pytest

from fleetprune.errors import ConfigError
from fleetprune_sim.demo_config import (
    CLASSES,
    DEVICES,
    MARK,
    TASKS,
    DemoFolder,
    claim,
    to_toml,
    write_agents,
    write_fleet,
)


def test_toml_is_read_back_as_it_was():
    table = {
        "name": 'a "quoted" ü',
        "on": True,
        "rate": 0.1,
        "shape": [1, 8, 8],
        "outer": {"inner": {"x": 1}, "y": "z"},
        "empty": {},
        "deep": {"er": {"est": {"n": 3}}},
    }
    read = tomllib.loads(to_toml(table))
    assert read == {k: v for k, v in table.items() if k != "empty"}


def test_an_earlier_demos_files_are_replaced_and_others_are_kept(tmp_path):
    folder = tmp_path / "out"
    claim(folder)
    (folder / "summary.json").write_text("{}")
    (folder / "devices" / "phone-1").mkdir(parents=True)
    (folder / "cache").mkdir()
    (folder / "notes.txt").write_text("mine")
    claim(folder)
    assert sorted(p.name for p in folder.iterdir()) == [MARK, "cache", "notes.txt"]


def test_a_folder_of_someone_else_is_refused(tmp_path):
    (tmp_path / "summary.json").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and not from a demo: name another folder"):
        claim(tmp_path)
    assert (tmp_path / "summary.json").read_text() == "mine"
    with pytest.raises(ConfigError, match="is a file, expected a folder"):
        claim(tmp_path / "summary.json")


def test_the_fleet_on_disk(tmp_path):
    folder = DemoFolder(tmp_path)
    task = TASKS["digits"]
    data = task.load(0, folder.cache)
    write_fleet(folder, task, data, classes=CLASSES, training={"rounds": 3, "seed": 7}, port=1234)
    fleet = tomllib.loads(folder.fleet_toml.read_text())
    assert fleet["broker"] == {"host": "127.0.0.1", "port": 1234}
    assert fleet["training"]["rounds"] == 3
    assert fleet["classes"]["sensor"] == {"macs_share": 0.25, "trains": False}
    assert fleet["model"]["input_shape"] == [1, 8, 8]
    with np.load(tmp_path / fleet["data"]["test"]) as test:
        assert test["x"].shape == data.x_test.shape
    samples = 0
    for device in DEVICES:
        with np.load(folder.device(device) / "data.npz") as own:
            assert own["x"].dtype == np.float32
            assert len(own["x"]) == len(own["y"])
            samples += len(own["y"])
    assert samples + len(data.y_test) == 1797

    with pytest.raises(ConfigError, match=r"has no 1\.root\.json"):
        write_agents(folder, task, classes=CLASSES, port=1234)
    root = folder.state / "releases" / "1.root.json"
    root.parent.mkdir(parents=True)
    root.write_text("root")
    write_agents(folder, task, classes=CLASSES, port=1234)
    for group in CLASSES:
        for device in group.devices:
            agent = tomllib.loads(folder.agent_toml(device).read_text())
            assert (agent["device"], agent["device_class"]) == (device, group.name)
            assert agent["trains"] is group.trains
            assert (folder.device(device) / agent["root"]).read_text() == "root"


def test_both_sides_accept_their_files(tmp_path):
    from fleetprune_agent.config import load_config  # noqa: PLC0415
    from fleetprune_coordinator.config import load_fleet_config  # noqa: PLC0415

    folder = DemoFolder(tmp_path)
    task = TASKS["digits"]
    data = task.load(0, folder.cache)
    write_fleet(folder, task, data, classes=CLASSES, training={"rounds": 2}, port=1234)
    (folder.state).mkdir()
    (folder.state / "1.root.json").write_text("root")
    write_agents(folder, task, classes=CLASSES, port=1234)
    assert load_fleet_config(folder.fleet_toml).training.rounds == 2
    for device in DEVICES:
        config = load_config(folder.agent_toml(device))
        assert config.root.read_text() == "root"
        assert config.state == folder.device(device) / "state"
