"""The small form of `benchmarks/load.py`: many devices at once, for correctness alone."""

import pytest

from benchmarks.load import Fleet, block_servers, publish_blob
from fleetprune_sim.broker import BrokerKind, EmbeddedBroker, find_mosquitto


@pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")
def test_fifty_devices_at_once_get_a_release_from_two_servers(tmp_path):
    devices, size = 50, 256_000
    blob = publish_blob(tmp_path, size)
    broker = EmbeddedBroker(tmp_path / "broker", kind=BrokerKind.MOSQUITTO)
    broker.start()
    try:
        fleet = Fleet(broker.settings, devices, blob, processes=1)
        with block_servers(broker.settings, tmp_path, 2):
            _, [arrived] = fleet.run("release", None, blob)
        fleet.end()
    finally:
        broker.kill()
    assert len(arrived.at) == devices  # each has verified the hash of what it got
    assert devices * size < arrived.bytes_received < 2 * devices * size  # not all from both
    assert arrived.requests >= devices
