"""Settings that say "auto": who takes them out, and who refuses them."""

import re

import pytest

from fleetprune.errors import ConfigError
from fleetprune_coordinator.config import load_fleet_config
from fleetprune_sim.assemble import assemble
from fleetprune_sim.auto.asked import KEYS, put_asked, take_asked

TASK = "tests.simulations.tiny_task:task"
FLEET = """
fleet = "tiny"
[model]
factory = "fleetprune_sim.models:mlp"
arguments = { inputs = 6, hidden = 16, classes = 3 }
input_shape = [6]
labels = ["a", "b", "c"]
[training]
criterion = "auto"
[pruning]
granularity = "auto"
channel_multiple = 4
[classes.large]
[classes.small]
macs_share = 0.5
[simulation]
task = "tests.simulations.tiny_task:task"
devices = 8
"""


@pytest.fixture
def fleet(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET)
    return path


def test_what_is_taken_out_can_be_put_back():
    raw = {"training": {"criterion": "auto", "rounds": 3}, "pruning": {"granularity": "channel"}}
    assert take_asked(raw) == ("training.criterion",)
    assert raw == {"training": {"rounds": 3}, "pruning": {"granularity": "channel"}}
    put_asked(raw, ("training.criterion", "training.first_criterion"))
    assert raw["training"] == {"criterion": "auto", "first_criterion": "auto", "rounds": 3}
    assert take_asked({}) == ()
    assert take_asked({"training": 3}) == ()


@pytest.mark.parametrize("told", [{"pattern": "2:4"}, {"dense_layers": ["head"]}])
def test_what_stands_for_a_granularity_allows_what_is_said_of_weights(told):
    raw = {"pruning": {"granularity": "auto", **told}}
    assert take_asked(raw) == ("pruning.granularity",)
    assert raw == {"pruning": {"granularity": "hybrid", **told}}


@pytest.mark.parametrize("key", KEYS)
def test_a_coordinator_cannot_find_out(fleet, key):
    table, _, name = key.partition(".")
    others = re.sub('^.*= "auto"\n', "", FLEET, flags=re.MULTILINE)
    fleet.write_text(others.replace("[classes.large]", f'[{table}]\n{name} = "auto"\n[classes.x]'))
    if table == "pruning":
        fleet.write_text(fleet.read_text().replace("[pruning]\nchannel_multiple = 4\n", "", 1))
    if table == "training":
        fleet.write_text(fleet.read_text().replace("[training]\n", "", 1))
    with pytest.raises(ConfigError) as caught:
        load_fleet_config(fleet)
    assert str(caught.value) == (
        f"{fleet}: {key}: only a simulation can find this out: run fleetprune simulate with this "
        'file first, and write what it has chosen here, got "auto"'
    )


def test_a_simulation_reads_the_file_and_its_options(fleet):
    wanted = assemble(fleet, "", "nested", 0, {})
    assert wanted.asked == ("pruning.granularity", "training.criterion")
    assert wanted.config.training.criterion == "taylor"  # stands for it until it is found out
    told = {"training.criterion": "wanda", "training.first_criterion": "auto"}
    wanted = assemble(fleet, "", "nested", 0, told)
    assert wanted.asked == ("pruning.granularity", "training.first_criterion")
    assert wanted.config.training.criterion == "wanda"


def test_methods_of_the_literature_take_the_defaults(fleet):
    wanted = assemble(fleet, "", "heterofl", 0, {})
    assert wanted.asked == ()
    assert (wanted.config.training.criterion, wanted.config.pruning.granularity) == (
        "taylor",
        "channel",
    )


def test_only_some_settings_can_be_found_out():
    with pytest.raises(ConfigError, match=r'^training\.codec: input should be .*, got "auto"$'):
        assemble(None, TASK, "nested", 0, {"training.codec": "auto"})
