"""Block servers as real processes on a real mosquitto."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from fleetprune.blocks import NotFoundError
from fleetprune.errors import ConfigError
from fleetprune.mqtt import BrokerSettings, Connection
from fleetprune.retry import RoundTrip
from fleetprune.topics import Topics
from fleetprune_agent.transfer import BlobClient
from fleetprune_coordinator import hub as hub_module
from fleetprune_coordinator.block_process import BlockProcess
from fleetprune_coordinator.hub import Hub
from fleetprune_sim.broker import BrokerKind, EmbeddedBroker, find_mosquitto
from tests.coordinator.fleet_fakes import MemoryStore

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")
WAIT_S = 20.0
DATA = random.Random(7).randbytes(4_000_000)
SHA = hashlib.sha256(DATA).hexdigest()
NAME = f"targets/releases/phone/1/{SHA}.model.onnx"
FLEET_TOML = """
fleet = "f"
[broker]
port = {port}
protocol = {protocol}
username = "blocks"
[model]
factory = "nowhere:none"
input_shape = [4]
classes = 2
[classes.phone]
"""


def until(condition, seconds=WAIT_S):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def broker(tmp_path):
    running = EmbeddedBroker(tmp_path / "broker", kind=BrokerKind.MOSQUITTO)
    running.start()
    yield running
    running.kill()


@pytest.fixture
def public(tmp_path):
    folder = tmp_path / "state" / "releases" / "public"
    (folder / "metadata").mkdir(parents=True)
    (folder / "metadata" / "timestamp.json").write_bytes(b"{}")
    (folder / NAME).parent.mkdir(parents=True)
    (folder / NAME).write_bytes(DATA)
    (folder.parent / "secret").write_bytes(b"key")
    (folder / "targets" / "link").symlink_to(folder.parent / "secret")
    return folder


class Presence:
    """Who says that it is there, and who was sent blocks."""

    def __init__(self, settings, topics):
        self.online, self._topics = set(), topics
        self.connection = Connection(settings, "presence", on_message=self._take)
        self.connection.subscribe([topics.blocks("+")])
        self.connection.start()

    def _take(self, topic, payload):
        server = self._topics.parse_blocks(topic)
        (self.online.add if payload == b"online" else self.online.discard)(server)


class Device:
    """A connection with a `BlobClient`; counts the blocks that come."""

    def __init__(self, settings, folder, name="d1"):
        self.topics, self.blocks = Topics("f"), 0
        self.connection = Connection(settings, name, on_message=self._take)
        self.connection.subscribe([self.topics.down(name, "+")])
        self.client = BlobClient(
            lambda kind, data: self.connection.publish(self.topics.up(name, kind), data),
            name,
            folder / "parts",
        )
        self.slow = 0.0

    def _take(self, topic, payload):
        self.blocks += len(payload) > 1000
        time.sleep(self.slow)
        self.client.feed(topic.rsplit("/", 1)[1], payload)

    def __enter__(self):
        self.connection.start()
        self.connection.wait_connected(WAIT_S)
        return self

    def __exit__(self, *exc):
        self.connection.stop()


@contextmanager
def servers(folder, settings, names, *, protocol='"3.1.1"', options=()):
    """`fleetprune coordinator blocks`, once per name; they are there when this begins."""
    config = folder / "fleet.toml"
    config.write_text(FLEET_TOML.format(port=settings.port, protocol=protocol))
    presence = Presence(settings, Topics("f"))
    command = [sys.executable, "-m", "fleetprune", "coordinator", "blocks", "-c", str(config)]
    started = {n: subprocess.Popen([*command, "--name", n, *options]) for n in names}
    try:
        until(lambda: presence.online == set(names) or any(p.poll() for p in started.values()))
        assert presence.online == set(names)
        yield started, presence
    finally:
        for process in started.values():
            process.terminate()
        try:
            codes = [process.wait(WAIT_S) for process in started.values()]
        finally:
            for process in started.values():
                process.kill()
                process.wait()
            presence.connection.stop()
    assert set(codes) <= {0, -signal.SIGKILL}


@pytest.mark.parametrize("protocol", ['"3.1.1"', "5"])
def test_two_servers_share_the_load_and_one_may_die(tmp_path, broker, public, protocol):
    settings = broker.settings
    with (
        servers(tmp_path, settings, ["s1", "s2"], protocol=protocol) as (started, presence),
        Device(settings, tmp_path) as device,
    ):
        device.client.pull(NAME, len(DATA), SHA, tmp_path / "out")
        assert device.blocks == 62  # two that both served everything would send twice as many
        (tmp_path / "out").unlink()
        device.slow = 0.01
        killer = threading.Timer(0.2, started["s1"].kill)
        killer.start()
        device.client.pull(NAME, len(DATA), SHA, tmp_path / "out")
        killer.join()
        assert (tmp_path / "out").read_bytes() == DATA
        until(lambda: presence.online == {"s2"})  # its will
        assert device.client.read("metadata/timestamp.json", 2) == b"{}"


def test_requests_go_to_both_in_turn(tmp_path, broker, public):
    """Of two requests one goes to the server that is stopped, and is asked for once more."""
    with (
        servers(tmp_path, broker.settings, ["s1", "s2"]) as (started, _),
        Device(broker.settings, tmp_path) as device,
    ):
        os.kill(started["s1"].pid, signal.SIGSTOP)
        try:
            asked = time.monotonic()
            for _ in range(2):
                assert device.client.read("metadata/timestamp.json", 2) == b"{}"
            assert time.monotonic() - asked > RoundTrip.FIRST_S - 0.1
        finally:
            os.kill(started["s1"].pid, signal.SIGCONT)


def test_one_alone_needs_no_shared_subscription(tmp_path, broker, public):
    with (
        servers(tmp_path, broker.settings, ["s1"], options=["--alone"]),
        Device(broker.settings, tmp_path) as device,
    ):
        device.client.pull(NAME, len(DATA), SHA, tmp_path / "out")
        assert device.blocks == 62
        for name in ("targets/link", "targets/none", "metadata/2.root.json"):
            with pytest.raises(NotFoundError, match=rf"^the coordinator has no {name}$"):
                device.client.read(name, 100)


@contextmanager
def running(settings, folder, read):
    hub = Hub(settings, "f", MemoryStore(), read, folder / "spool")
    hub.start()
    hub.connection.wait_connected(WAIT_S)
    try:
        yield hub
    finally:
        hub.stop()


def test_the_coordinator_leaves_releases_to_block_servers_while_there_are_any(
    tmp_path, broker, public
):
    asked = []

    def read(name):
        asked.append(name)
        return b"model" if name.startswith("blobs/") else public / name

    with (
        running(broker.settings, tmp_path, read) as hub,
        Device(broker.settings, tmp_path) as device,
    ):
        sent = []
        publish = hub.connection.publish
        hub.connection.publish = lambda topic, payload, **o: (
            sent.append(len(payload)) or publish(topic, payload, **o)
        )
        device.client.pull(NAME, len(DATA), SHA, tmp_path / "out")
        assert sum(sent) > len(DATA)
        _, before = hub.traffic("d1")
        with servers(tmp_path, broker.settings, ["s1"]) as (started, _):
            until(hub._others_serve)
            sent.clear()
            device.client.pull(NAME, len(DATA), SHA, tmp_path / "out")
            assert sent == []
            _, after = hub.traffic("d1")
            assert after - before == before  # counted all the same
            assert device.client.read("blobs/x", 5) == b"model"  # which only the coordinator has
            assert len(sent) == 1
            started["s1"].kill()
            until(lambda: not hub._others_serve())
        sent.clear()
        device.client.pull(NAME, len(DATA), SHA, tmp_path / "out")
        assert sum(sent) > len(DATA)


def test_a_server_that_left_only_its_retained_word_is_not_waited_for(
    tmp_path, broker, public, monkeypatch
):
    monkeypatch.setattr(hub_module, "SERVER_GONE_S", 0.5)
    with (
        running(broker.settings, tmp_path, lambda name: public / name) as hub,
        Device(broker.settings, tmp_path) as device,
    ):
        device.connection.publish(Topics("f").blocks("dead"), b"online", retain=True)
        until(hub._others_serve)
        assert device.client.read("metadata/timestamp.json", 2) == b"{}"
        assert not hub._others_serve()


ACL = """
pattern write fleetprune/f/up/%c/#
pattern read fleetprune/f/down/%c/#
user blocks
topic read fleetprune/f/up/+/get
topic write fleetprune/f/down/+/block
topic write fleetprune/f/blocks/+
user presence
topic read fleetprune/f/blocks/+
"""


def test_the_least_rights_are_enough(tmp_path, public):
    """Under an access list that gives a block server what `docs/roads.md` says, and no more."""
    running = EmbeddedBroker(tmp_path / "broker", kind=BrokerKind.MOSQUITTO)
    command = running._command()
    (tmp_path / "acl").write_text(ACL)
    with (tmp_path / "broker" / "mosquitto.conf").open("a") as f:
        f.write(f"\nacl_file {tmp_path / 'acl'}\n")
    running._command = lambda: command
    running.start()

    def named(name):
        return running.settings.model_copy(update={"username": name})

    with (
        servers(tmp_path, named("presence"), ["s1", "s2"]),
        Device(named("d1"), tmp_path) as device,
    ):
        device.client.pull(NAME, len(DATA), SHA, tmp_path / "out")
        assert device.blocks == 62
    running.kill()


def test_such_a_process_is_light(tmp_path, public):
    code = """
import sys, threading
from fleetprune_coordinator.commands import app, load_fleet_config
from fleetprune_coordinator.block_process import BlockProcess
from pathlib import Path
fleet = load_fleet_config(Path(sys.argv[1]))
BlockProcess(fleet.broker, fleet.fleet, fleet.state / "releases" / "public", "s1")
heavy = {"torch", "flwr", "onnx", "onnxruntime", "sqlite_utils", "tuf", "sqlite3"}
print(sorted(heavy & {m.split(".")[0] for m in sys.modules}))
"""
    config = tmp_path / "fleet.toml"
    config.write_text(FLEET_TOML.format(port=1, protocol=5))
    done = subprocess.run(
        [sys.executable, "-c", code, str(config)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_what_cannot_be_served_is_said(tmp_path, public):
    for folder, name, says in (
        (tmp_path, "s1", rf"^{tmp_path} holds no release repository: `fleetprune coordinator init"),
        (public, "a/b", r"^name 'a/b': expected 1 to 64 letters, digits, . _ -$"),
    ):
        with pytest.raises(ConfigError, match=says):
            BlockProcess(BrokerSettings(), "f", folder, name)
