"""One pull, survived: the device killed, the block server and the broker restarted, then another
road; nothing is fetched twice but what was under way."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from fleetprune.errors import TransportError
from fleetprune.mqtt import Connection
from fleetprune.topics import Topics
from fleetprune.windows import WINDOW
from fleetprune_agent.fallback import FallbackSource, Road
from fleetprune_agent.http_source import HttpSource, HttpsSettings
from fleetprune_agent.transfer import BlobClient
from fleetprune_coordinator.block_process import BlockProcess
from fleetprune_sim.broker import BrokerKind, EmbeddedBroker, find_mosquitto
from tests.agent.https_server import HttpsServer, files
from tests.certificates import certify

pytestmark = pytest.mark.skipif(
    find_mosquitto() is None or shutil.which("openssl") is None, reason="needs mosquitto, openssl"
)
BS = 65536
COUNT = 90
DATA = random.Random(11).randbytes(COUNT * BS - 1)
SHA = hashlib.sha256(DATA).hexdigest()
NAME = f"targets/{SHA}.model.onnx"

CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from fleetprune.mqtt import BrokerSettings
from tests.e2e.test_roads import DATA, NAME, SHA, client
folder = Path(sys.argv[2])
with client(BrokerSettings(port=int(sys.argv[3])), folder, slow=0.02) as blobs:
    blobs.pull(NAME, len(DATA), SHA, folder / "out")
"""


@contextmanager
def client(settings, folder, slow=0.0):
    """A device's end of the MQTT road; `slow` seconds per message."""
    topics = Topics("f")

    def take(topic, payload):
        time.sleep(slow)
        blobs.feed(topic.rsplit("/", 1)[1], payload)

    connection = Connection(settings, "d1", on_message=take)
    connection.subscribe([topics.down("d1", "+")])
    blobs = BlobClient(
        lambda kind, data: connection.publish(topics.up("d1", kind), data),
        "d1",
        folder / "parts",
        patience_s=5.0,
    )
    connection.start()
    connection.wait_connected(20)
    yield blobs
    connection.stop()


@contextmanager
def serving(settings, public, served):
    """A block server that counts its blocks; a new one each time, as after a restart."""
    process = BlockProcess(settings, "f", public, "s1")
    send = process._sender._send
    process._sender._send = lambda device, block: (served.append(len(block)), send(device, block))
    stop = threading.Event()
    thread = threading.Thread(target=process.run, args=(stop,))
    thread.start()
    process.connection.wait_connected(20)
    yield
    stop.set()
    thread.join()


def kill_amid(folder, settings, root, served, more):
    """Run a device in a process of its own, and kill it when `more` blocks have been sent."""
    began = len(served)
    child = subprocess.Popen([sys.executable, "-c", CHILD, root, str(folder), str(settings.port)])
    end = time.monotonic() + 30
    while len(served) < began + more:
        assert time.monotonic() < end
        assert child.poll() is None
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()


def test_a_pull_goes_on_where_it_was(tmp_path, request):
    public, root = tmp_path / "public", str(request.config.rootpath)
    (public / "metadata").mkdir(parents=True)
    (public / NAME).parent.mkdir(parents=True)
    (public / NAME).write_bytes(DATA)
    certify(tmp_path, "ca")
    certify(tmp_path, "server", san="IP:127.0.0.1")
    broker = EmbeddedBroker(tmp_path / "broker", kind=BrokerKind.MOSQUITTO)
    served: list[int] = []
    broker.start()
    with serving(broker.settings, public, served):
        kill_amid(tmp_path, broker.settings, root, served, 20)
        kill_amid(tmp_path, broker.settings, root, served, 20)  # another session of the broker
    with serving(broker.settings, public, served):
        kill_amid(tmp_path, broker.settings, root, served, 15)
    broker.kill()
    broker.start()
    with serving(broker.settings, public, served):
        kill_amid(tmp_path, broker.settings, root, served, 15)
    by_mqtt = len(served)
    assert 70 <= by_mqtt < COUNT + 4 * 2 * WINDOW

    server = HttpsServer(tmp_path, files({NAME: DATA}))
    with client(broker.settings, tmp_path) as blobs:  # nobody serves there any more
        https = HttpSource(HttpsSettings(url=server.url, ca_file=tmp_path / "ca.crt"), blobs.parts)
        mqtt = Road("MQTT", blobs)
        roads = [mqtt, Road("HTTPS", https)]
        source = FallbackSource(roads, time.monotonic, random.Random(0), threading.Event())
        with pytest.raises(TransportError, match=r"no answer from the coordinator for 0.1 s$"):
            blobs._patience = 0.1
            blobs.pull(NAME, len(DATA), SHA, tmp_path / "out")
        source.pull(NAME, len(DATA), SHA, tmp_path / "out")
        https.close()
    server.close()
    broker.kill()
    assert (tmp_path / "out").read_bytes() == DATA
    missing = https.bytes_received // BS + 1
    assert mqtt.failures == 1
    assert COUNT - by_mqtt <= missing <= COUNT - by_mqtt + 4 * 2 * WINDOW
    assert missing < COUNT
    assert [p.name for p in (tmp_path / "parts").iterdir()] == []
