"""Releases that must not reach a fleet of real agents over a real broker, and do not stay on it."""

import io
import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import onnx
import pytest

from fleetprune.errors import RolloutError
from fleetprune_coordinator.config import load_fleet_config
from fleetprune_coordinator.coordinator import Coordinator
from fleetprune_coordinator.events import EventLog
from fleetprune_coordinator.releases import ReleaseContent
from fleetprune_coordinator.rollout_state import Status
from fleetprune_coordinator.serve import Server, serving
from tests.e2e.fleet import DEVICES, INPUTS, WAIT_S, Fleet

pytestmark = pytest.mark.timeout(240)
DEADLINE_S = 30.0  # seconds; a device installs in less, on a machine that is slow and busy too
SILENCE_S = 20.0  # where it is waited for


class Served:
    """A coordinator in this process that trains nothing; the devices are processes."""

    def __init__(self, fleet, log):
        self.fleet = fleet
        config = load_fleet_config(fleet.root / "fleet.toml")
        self.coordinator = Coordinator(config, time.time, log)
        self.server = Server(self.coordinator, threading.Event())
        self.state = config.state

    @property
    def registry(self):
        return self.coordinator.registry

    def publish(self, number, *, wrong=0.0):
        """A release with other bytes for every class; its golden outputs are off by `wrong`."""
        contents = {}
        for name in self.coordinator.config.classes:
            made = self.coordinator.artifact(name)
            model = onnx.load_from_string(made.onnx)
            model.metadata_props.add(key="release", value=str(number))
            with np.load(io.BytesIO(made.golden)) as golden:
                x, y = golden["x"], golden["y"]
            file = io.BytesIO()
            np.savez(file, x=x, y=y + np.float32(wrong))
            contents[name] = ReleaseContent(
                onnx=model.SerializeToString(),
                golden=file.getvalue(),
                input_shape=(INPUTS,),
                tolerance=made.tolerance,
            )
        self.coordinator.repository.publish_release(number, contents)

    def order(self, *words):
        """`fleetprune rollout ...` in a process of its own."""
        done = subprocess.run(
            [sys.executable, "-m", "fleetprune", "rollout", *words, "--json"],
            cwd=self.fleet.root,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def status(self, device_class, release):
        found = [r for r in self.registry.rollouts(device_class) if r.candidate == release]
        return found[0].status if found else None

    def wait_status(self, device_class, release, status):
        self.fleet.wait(
            f"release {release} to be {status}",
            lambda: self.status(device_class, release) is status,
        )

    def running(self, *devices):
        """What is installed, read from the devices' own disks."""
        slots = [self.fleet.slots(device).active() for device in devices]
        return [0 if slot is None else slot.release for slot in slots]

    def wait_running(self, release, *devices):
        self.fleet.wait(
            f"release {release} on {', '.join(devices)}",
            lambda: self.running(*devices) == [release] * len(devices),
        )


@contextmanager
def served(tmp_path, **rules):
    with Fleet(tmp_path, starts=0) as fleet:
        fleet.rollout = {"stages": [0.5, 1.0], "soak_s": 0.5, "deadline_s": DEADLINE_S, **rules}
        fleet.configure()
        log = EventLog(tmp_path / "events.jsonl", time.time)
        found = Served(fleet, log)
        with log, found.coordinator, serving(found.server, found.state):
            fleet.start_agents()
            found.server.wait_for_devices()
            fleet.wait("three devices", lambda: len(found.registry.devices(online=True)) == 3)
            number = next(iter(found.coordinator.release().values())).manifest.release
            assert number == 1
            found.coordinator.rollouts.promote(who="test", to_all=True)
            found.wait_running(1, *DEVICES)
            with suppress(RolloutError):  # complete already, where all were canaries
                found.coordinator.rollouts.promote(who="test")
            found.server.wait_until_released(1)
            yield found


def test_a_canary_that_refuses_a_release_spares_the_others(tmp_path):
    with served(tmp_path, canaries=["d1", "d3"]) as fleet:
        fleet.publish(2, wrong=1.0)
        fleet.order("start", "2", "--class", "large", "--reason", "a test")
        fleet.wait_status("large", 2, Status.ABORTED)
        reason = fleet.registry.rollouts("large")[0].reason
        assert reason.startswith("1 of 1 devices failed (d1 ")
        assert "golden samples: outputs differ by up to 1" in reason
        with pytest.raises(
            RolloutError, match=r"^the rollout of release 2 to class large was abort"
        ):
            fleet.server.wait_until_released(2)
        assert fleet.running(*DEVICES) == [1, 1, 1]
        assert "release 2" not in (tmp_path / "d2.log").read_text()
        entries = [e for e in fleet.order("log") if e["release"] == 2]
        assert [e["action"] for e in entries] == ["start", "abort"]
        assert entries[0]["reason"] == "a test; begins with the canaries d1"
        assert entries[1]["evidence"]["reasons"].keys() == {"d1"}

        fleet.publish(3)  # a better one, by the same way
        fleet.order("start", "3")
        fleet.wait_status("large", 3, Status.COMPLETE)
        fleet.wait_running(3, *DEVICES)


def test_a_canary_that_falls_silent_brings_the_others_back(tmp_path):
    with served(tmp_path, canaries=["d1", "d2"], deadline_s=SILENCE_S) as fleet:
        fleet.publish(2)
        fleet.fleet["d1"].freeze()  # as if the release had bricked it
        fleet.order("start", "2", "--class", "large")
        fleet.wait_running(2, "d2")
        fleet.wait_status("large", 2, Status.ABORTED)
        reason = fleet.registry.rollouts("large")[0].reason
        assert reason.startswith("1 of 2 devices failed (d1 ")
        fleet.wait_running(1, "d2")
        fleet.fleet["d1"].thaw()
        time.sleep(2 * 0.5)
        assert fleet.running(*DEVICES) == [1, 1, 1]


def test_orders_of_a_person_reach_the_devices(tmp_path):
    with served(tmp_path, canaries=["d1"], soak_s=7.0, auto=False) as fleet:
        fleet.publish(2)
        fleet.order("start", "2", "--class", "large")
        fleet.wait_running(2, "d1")
        assert fleet.running("d2") == [1]
        fleet.order("promote", "--all", "--class", "large")
        fleet.wait_running(2, "d2")
        fleet.order("promote", "--class", "large")
        fleet.wait_status("large", 2, Status.COMPLETE)
        (done,) = fleet.order("rollback", "1", "--class", "large", "--reason", "drift")
        assert (done["changed"], done["reason"]) == (True, "drift")
        fleet.wait_running(1, "d1", "d2")
        assert fleet.running("d3") == [1]


def test_a_server_that_waits_for_a_release_ends_when_a_person_aborts_it(tmp_path):
    with Fleet(tmp_path, starts=1, rounds=1) as fleet:
        fleet.rollout = {"stages": [0.5, 1.0], "canaries": ["d1", "d3"], "soak_s": 600.0}
        fleet.configure()
        fleet.start_agents()
        coordinator = fleet.start_coordinator()
        fleet.wait("a release on its way", lambda: fleet.events("rollout"))
        order = ("rollout", "abort", "--class", "large", "--reason", "a recall", "--json")
        done = subprocess.run(
            [sys.executable, "-m", "fleetprune", *order],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert coordinator.popen.wait(WAIT_S) == 1
        said = (tmp_path / "coordinator.log").read_text().splitlines()[-1]
        assert said == (
            "fleetprune: the rollout of release 1 to class large was aborted: a recall; "
            "there is no release to go back to: devices that have it keep it"
        )
        assert fleet.slots("d2").active() is None
