"""What the server does between rounds."""

import threading
import time

from fleetprune_coordinator.coordinator import Coordinator
from fleetprune_coordinator.events import EventLog
from fleetprune_coordinator.serve import Server
from fleetprune_sim.loop import open_coordinator
from tests.simulations.fleets import tiny_config, tiny_devices


def test_a_closed_round_s_binaries_do_not_pile_up(tmp_path):
    config, start = tiny_config(tmp_path), time.time()
    with open_coordinator(config, tiny_devices()):
        pass
    moment = [start]
    log = EventLog(None, time.time)
    with Coordinator(config, lambda: moment[0], log) as coordinator:
        server = Server(coordinator, threading.Event())
        left = coordinator.registry.put_blob(b"an answer to a round that is closed")
        closed = {"phase": "train", "round": 1, "answers": 1}
        server._closed(closed)
        assert coordinator.read(f"blobs/{left.sha256}") is not None  # somebody may be reading it
        moment[0] += 3601
        server._closed(closed)
        assert coordinator.read(f"blobs/{left.sha256}") is None
        assert coordinator.registry.latest_snapshot() is not None
