import queue
import socket
import sys

import psutil
import pytest

from fleetprune.errors import TransportError
from fleetprune.local_port import free_port
from fleetprune.mqtt import Connection
from fleetprune_sim.broker import EmbeddedBroker, embedded_broker
from tests.brokers import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_runs_on_loopback_and_is_gone_afterwards(tmp_path, kind):
    with embedded_broker(tmp_path, kind=kind) as settings:
        assert settings.host == "127.0.0.1"
        got = queue.Queue()
        connection = Connection(settings, "c", on_message=lambda *m: got.put(m))
        connection.subscribe(["t"])
        connection.start()
        connection.wait_connected(10)
        payload = bytes(100 * 1024)  # more than iotcore's own default of 20 KiB
        connection.publish("t", payload)
        assert got.get(timeout=10) == ("t", payload)
        connection.stop()
        listening = [
            at.laddr.ip
            for at in psutil.net_connections("tcp")
            if at.status == psutil.CONN_LISTEN and at.laddr.port == settings.port
        ]
        assert listening == ["127.0.0.1"]
    assert not _answers(settings.port)
    assert (tmp_path / f"{kind}.log").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_starts_again_on_the_same_port(tmp_path, kind):
    broker = EmbeddedBroker(tmp_path, kind=kind)
    broker.start()
    broker.kill()
    assert not _answers(broker.settings.port)
    broker.start()
    assert _answers(broker.settings.port)
    broker.stop()
    broker.stop()


def test_a_broker_that_cannot_start_says_why(tmp_path):
    broker = EmbeddedBroker(tmp_path)
    broker._command = lambda: [sys.executable, "-c", "import sys; sys.exit('no such listener')"]
    with pytest.raises(TransportError) as e:
        broker.start()
    assert str(e.value) == (
        f"{broker.kind} does not start on port {broker.settings.port}: no such listener"
    )


def test_the_port_can_be_chosen(tmp_path):
    port = free_port()
    with embedded_broker(tmp_path, port) as settings:
        assert settings.port == port


def _answers(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True
