"""`fleetprune rollout` and `fleetprune device`, with and without a running coordinator."""

import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial

import pytest
from typer.testing import CliRunner

from fleetprune.errors import ConfigError, RegistryError, RolloutError, UsageError
from fleetprune_coordinator import device_command, rollout_command
from fleetprune_coordinator.control import ControlServer, user_name
from fleetprune_coordinator.orders import make_order, obey
from fleetprune_coordinator.rollout_config import RolloutConfig
from tests.coordinator.rollout_fleets import Fleet

FLEET = """\
fleet = "f"

[model]
factory = "nets:mlp"
input_shape = [4]
classes = 3

[rollout]
stages = [0.5, 1.0]
canary_count = 1

[classes.phone]

[classes.watch]
"""
RULES = RolloutConfig(stages=(0.5, 1.0), canary_count=1)
ME = user_name(os.geteuid())
NAMES = ("p1", "p2", "p3", "p4")


@pytest.fixture
def config(tmp_path):
    (tmp_path / "fleet.toml").write_text(FLEET)
    (tmp_path / "state").mkdir()
    return tmp_path / "fleet.toml"


def fleet_of(config):
    return Fleet(config.parent / "state", RULES, now=time.time())


@pytest.fixture
def begun(config):
    """Release 1 runs everywhere but on the watch; 2 is with a canary."""
    with fleet_of(config) as fleet:
        fleet.enrol(*NAMES)
        fleet.publish(1)
        fleet.rollouts.start(1, ["phone"], who="test")
        fleet.rollouts.promote(["phone"], who="test", to_all=True)
        fleet.obey()
        fleet.rollouts.promote(["phone"], who="test")
        fleet.publish(2)
        fleet.rollouts.start(2, ["phone"], who="test")
    return config


def call(app, *words, config):
    done = CliRunner().invoke(app, [*words, "--config", str(config)], env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


rollout = partial(call, rollout_command.app)
device = partial(call, device_command.app)


def told(config):
    with fleet_of(config) as fleet:
        return fleet.repository.rollout("phone")


def test_orders_are_carried_out_where_no_coordinator_runs(begun):
    assert rollout("pause", "--reason", "night", config=begun) == (
        "phone: release 2 is paused: night\n"
    )
    assert told(begun).paused
    assert rollout("pause", config=begun) == "phone: nothing to do: release 2 is paused already\n"
    rollout("resume", config=begun)
    assert json.loads(rollout("promote", "--json", config=begun))[0]["changed"]
    assert told(begun).share == 5000
    rollout("promote", "--all", "--class", "phone", config=begun)
    assert told(begun).share == 10_000
    rollout("abort", config=begun)
    assert (told(begun).stable, told(begun).candidate) == (1, 0)
    rollout("start", "2", "--class", "phone", config=begun)
    assert told(begun).candidate == 2
    rollout("rollback", "1", "--class", "phone", config=begun)
    assert (told(begun).stable, told(begun).candidate) == (1, 0)
    entries = json.loads(rollout("log", "--json", config=begun))
    assert [e["action"] for e in entries[4:]] == [
        "pause", "resume", "promote", "promote", "abort", "start", "replace", "rollback"
    ]  # fmt: skip
    assert {e["who"] for e in entries[4:]} == {ME}
    assert entries[4]["reason"] == "night"
    assert entries[4]["evidence"]["waiting"] == 1


def test_a_running_coordinator_carries_orders_out(begun):
    with fleet_of(begun) as fleet:
        with pytest.raises(RegistryError, match="is in use by process"):
            rollout("pause", config=begun)
        with ControlServer(begun.parent / "state", partial(obey, fleet.rollouts)):
            rollout("pause", "--class", "phone", config=begun)
            assert fleet.repository.rollout("phone").paused
            assert fleet.announced == [2]
            with pytest.raises(RolloutError, match=r"^class watch has no rollout under way to"):
                rollout("pause", "--class", "watch", config=begun)
            with pytest.raises(UsageError, match=r"^class tv: this fleet has phone, watch$"):
                rollout("abort", "--class", "tv", config=begun)
            assert (
                json.loads(rollout("status", "--json", config=begun))["classes"][0]["rollout"][
                    "status"
                ]
                == "paused"
            )
    assert json.loads(rollout("log", "--json", config=begun))[-1]["who"] == ME


def test_status_says_how_far_and_why_no_further(begun):
    with fleet_of(begun) as fleet:
        (canary,) = fleet.registry.open_rollouts()["phone"].canaries
        fleet.report(canary, 1, postponed="quiet hours until 06:00 [UTC]")
    shown = rollout("status", config=begun)
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert "phone 1 2 running canaries (1 of 3) 0 0 1 4" in rows
    assert "watch - - none yet - - - - 0" in rows
    assert "phone: running: 0 of 1 devices run it well, 1 awaited until " in shown
    assert f"phone: canaries {canary}" in shown
    assert f"phone: {canary} quiet hours until 06:00 [UTC]" in shown
    assert "watch: no release has been rolled out" in shown
    phone = json.loads(rollout("status", "--json", config=begun))["classes"][0]
    assert (phone["runs"], phone["stable"], phone["rollout"]["cohort"]) == ({"1": 4}, 1, 1)
    assert phone["rollout"]["stages"] == ["canaries", "50 %", "100 %"]


def test_status_of_a_rollout_that_has_ended_is_that_of_its_end(begun):
    with fleet_of(begun) as fleet:
        (canary,) = fleet.registry.open_rollouts()["phone"].canaries
        fleet.report(canary, 1, failed=2, state="rolled_back", error="release 2: too slow")
        fleet.tick()
        fleet.report(canary, 1)
    shown = rollout("status", config=begun)
    assert f"phone: aborted: 1 of 1 devices failed ({canary} rolled back: release 2: too" in shown
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert "phone 1 2 aborted canaries (1 of 3) 0 1 0 4" in rows


def test_the_log_says_who_decided_what_when_and_why(begun):
    lines = rollout("log", "--class", "phone", config=begun).splitlines()
    assert len(lines) == 4
    assert "UTC  phone 1  start by test: drawn as canaries: " in lines[0]
    assert lines[2].endswith("phone 1  promote by test: promoted by a person")
    assert len(rollout("log", "--limit", "2", config=begun).splitlines()) == 2
    assert rollout("log", "--class", "watch", config=begun) == ""


def test_canaries_that_nobody_knows_are_named(begun):
    begun.write_text(FLEET.replace("canary_count = 1", 'canaries = ["p9"]'))
    assert "rollout.canaries: p9 is not enrolled" in rollout("status", config=begun)


def test_devices_say_why_they_run_what_they_run(begun):
    with fleet_of(begun) as fleet:
        (canary,) = fleet.registry.open_rollouts()["phone"].canaries
        other, third, fourth = (n for n in NAMES if n != canary)
        fleet.report(canary, 1, failed=2, error="release 2: too slow")
        fleet.report(third, 0, state="empty")
        fleet.registry.set_online(third, False)
        fleet.enrol("p5")
    rows = {r["device"]: r for r in json.loads(device("list", "--json", config=begun))}
    assert rows[canary]["reason"] == "runs 1, since 2 failed: release 2: too slow"
    assert (rows[canary]["wanted"], rows[canary]["fate"], rows[canary]["stage"]) == (
        2, "failed", "canaries"
    )  # fmt: skip
    assert rows[other]["reason"].startswith("runs 1: its turn for 2 is ")
    assert rows[third]["reason"].startswith("runs nothing; 1 is wanted; not seen since 20")
    assert rows["p5"]["reason"] == "has not reported yet"
    assert device("list", "--class", "watch", "--json", config=begun) == "[]\n"
    assert "runs 1, since 2 failed: release 2: too slow" in device("list", config=begun)
    shown = device("show", canary, config=begun)
    assert "reason  runs 1, since 2 failed: release 2: too slow" in shown
    assert "last_seen  20" in shown
    assert "%" in shown.partition("cohort  ")[2].splitlines()[0]
    assert json.loads(device("show", fourth, "--json", config=begun))["device"] == fourth
    with pytest.raises(
        UsageError,
        match=r"^no device p9 has enrolled in this fleet: `fleetprune device list` shows all$",
    ):
        device("show", "p9", config=begun)


def test_before_the_first_start(config):
    shutil.rmtree(config.parent / "state")
    for words in (("status",), ("pause",), ("promote",), ("log",), ("start", "1")):
        with pytest.raises(ConfigError, match="holds no registry yet: `fleetprune coordinator"):
            rollout(*words, config=config)
    with pytest.raises(ConfigError, match="holds no registry yet"):
        device("list", config=config)


def test_orders_are_checked_before_they_are_sent():
    with pytest.raises(UsageError, match=r"^classes.0: String should match pattern .*, got 'a/b'$"):
        make_order("pause", ["a/b"])
    assert make_order("pause", [], reason="a\nb").reason == "a b"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_does_not_write_into_the_coordinator_s_folder(begun):
    os.chown(begun.parent / "state", 65534, 65534)
    with pytest.raises(
        UsageError,
        match=r"state belongs to nobody \(uid 65534\) and no coordinator runs: give the order as",
    ):
        rollout("pause", config=begun)


def test_the_commands_need_no_torch(begun):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['flwr'] = None;"
        "from fleetprune.cli import main; main()"
    )
    words = ["rollout", "pause", "--config", str(begun)]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
