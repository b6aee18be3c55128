"""A fleet whose hosts are connected by bad lines, or not at all for a while.

`make network` cuts every host off in turn, and draws several weathers.
"""

import os

import pytest

from tests.e2e.fleet import COORDINATOR, DEVICES
from tests.e2e.network import BROKER, HostedFleet, network

__all__ = ["network"]  # a fixture
pytestmark = pytest.mark.timeout(300)
LONG = "NETWORK" in os.environ
LINES = {
    "radio": {"delay": 0.03, "jitter": 0.015, "loss": 0.02, "double": 0.02, "early": 0.05},
    "satellite": {"delay": 0.3, "jitter": 0.05, "loss": 0.01},
    "cellar": {"delay": 0.05, "jitter": 0.05, "loss": 0.08, "double": 0.05},
}


@pytest.mark.parametrize("line", LINES if LONG else ["radio"])
def test_packets_that_are_lost_late_doubled_and_out_of_order(tmp_path, network, line):
    network.weather(**LINES[line])
    with HostedFleet(tmp_path, network) as fleet:
        fleet.start_agents()
        fleet.start_coordinator()
        fleet.finish()
        fleet.check_rounds()
        fleet.check_installed(1)
        _nothing_twice(fleet)


@pytest.mark.parametrize("host", [COORDINATOR, BROKER, *DEVICES] if LONG else [COORDINATOR])
def test_a_partition_in_mid_training(tmp_path, network, host):
    """For so long that everybody notices, and in the middle of a round."""
    with HostedFleet(tmp_path, network, rounds=3, hidden=512) as fleet:
        fleet.start_agents()
        fleet.start_coordinator()
        fleet.wait("the second round", lambda: (fleet.open_tasks() or (0,))[0] == 2)
        fleet["d1"].freeze()  # its answer has to come after the partition
        network.cut(host)
        fleet["d1"].thaw()
        lonely = DEVICES if host == BROKER else [host]
        before = {name: fleet.dropped(name) for name in lonely}
        fleet.wait(
            "the loss to be noticed",
            lambda: all(fleet.dropped(name) > before[name] for name in lonely),
        )
        network.mend(host)
        fleet.finish()
        fleet.check_rounds()
        fleet.check_installed(1)
        _nothing_twice(fleet)


def _nothing_twice(fleet):
    """Each answered task was worked on once by its device, however often its answer travelled."""
    for round_ in fleet.registry.rounds():
        for t in fleet.registry.tasks(round_.number, round_.phase, step=round_.step):
            assert fleet.times_done(t.task.device, t.task.task) == 1, t.task.task
