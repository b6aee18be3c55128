"""What the server does between rounds."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from typer.testing import CliRunner

from fleetprune_coordinator.coordinator import Coordinator
from fleetprune_coordinator.events import EventLog
from fleetprune_coordinator.release_command import app as release_app
from fleetprune_coordinator.releases import ReleaseRepository
from fleetprune_coordinator.serve import Server
from fleetprune_sim.loop import open_coordinator
from tests.simulations.fleets import tiny_config, tiny_devices


def test_it_serves_on_while_a_release_waits_for_its_signatures(tmp_path):
    """The key of `targets` is elsewhere; somebody signs and publishes while the server waits."""
    config = tiny_config(tmp_path)
    with open_coordinator(config, tiny_devices()):
        pass
    releases = config.state / "releases"
    (key,) = (releases / "keys").glob("targets-*.pem")
    elsewhere = key.rename(tmp_path / "elsewhere.pem")
    events = tmp_path / "events.jsonl"
    with (
        EventLog(events, time.time) as log,
        Coordinator(config, time.time, log) as coordinator,
        ThreadPoolExecutor(1) as pool,
    ):
        server = Server(coordinator, threading.Event())
        waiting = pool.submit(server.release)
        try:
            while not events.exists() or "unsigned" not in events.read_text():
                time.sleep(0.02)
                assert not waiting.done(), waiting.result()
            (proposal,) = (releases / "pending").glob("targets-*")
            words = ["sign", str(proposal), "--key", str(elsewhere), "--yes"]
            done = CliRunner().invoke(release_app, words)
            assert done.exit_code == 0, done.output
            another = ReleaseRepository(releases, lambda: datetime.now(UTC))
            another.publish_pending(proposal)
            released = waiting.result(60)
        finally:
            server._stop.set()
        assert {r.manifest.release for r in released.values()} == {1}
        assert coordinator.repository.rollout("large").candidate == 1
    told = [json.loads(line)["event"] for line in events.read_text().splitlines()]
    assert told.count("unsigned") == 1
    assert "release" in told


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
