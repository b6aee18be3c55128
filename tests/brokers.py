"""The `broker` fixtures: mosquitto where it is installed, else iotcore from its wheel.

`broker` runs each test against every broker that is here; `restartable` against the best one.
"""

import importlib.util

import pytest

from fleetprune.mqtt import CONNECT_S, RECONNECT
from fleetprune_sim.broker import BrokerKind, EmbeddedBroker, find_mosquitto

KINDS = [
    *([BrokerKind.MOSQUITTO] if find_mosquitto() else []),
    *([BrokerKind.IOTCORE] if importlib.util.find_spec("iotcore") else []),
]

BACK_S = RECONNECT.most_s + 4 * CONNECT_S
"""Patience with connections to a broker that was away. The back-off is what takes long: after five
seconds' absence, which a loaded machine makes of an instant's, one pair of connections in 25 needs
more than 20 s; none needs more than its longest wait and the handshakes."""


def _run(folder, kind):
    running = EmbeddedBroker(folder, kind=kind)
    running.start()
    yield running
    running.kill()


@pytest.fixture(scope="module", params=KINDS or [None], ids=str)
def broker(request, tmp_path_factory):
    if request.param is None:
        pytest.skip("no MQTT broker: install mosquitto or iotcore")
    yield from _run(tmp_path_factory.mktemp("broker"), request.param)


@pytest.fixture
def restartable(tmp_path):
    if not KINDS:
        pytest.skip("no MQTT broker: install mosquitto or iotcore")
    yield from _run(tmp_path / "broker", KINDS[0])
