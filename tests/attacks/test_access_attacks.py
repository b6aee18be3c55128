"""A real mosquitto with the files that `fleetprune deploy mosquitto` writes, and who tries what.

Nobody is trusted here but the certificate: each attack is shown to fail where an honest client
beside it succeeds.
"""

import os
import queue
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from fleetprune.blocks import NotFoundError
from fleetprune.errors import ConfigError, TransportError, TrustError
from fleetprune.local_port import free_port
from fleetprune.messages import Certificate, Enrol, Renew, Task
from fleetprune.mqtt import BrokerSettings, Connection, Phase
from fleetprune.topics import Topics
from fleetprune_agent.transfer import BlobClient
from fleetprune_coordinator.access import DeniedError
from fleetprune_coordinator.authority import Authority, Lives, init_authority, read_request
from fleetprune_coordinator.deployment import deploy, update
from fleetprune_coordinator.doorman import Doorman
from fleetprune_coordinator.hub import Hub
from fleetprune_coordinator.mosquitto import DATA, Place, access_list
from fleetprune_coordinator.trial import local
from fleetprune_sim.broker import find_mosquitto
from tests.access_fleet import (
    FLEET_TOML,
    Key,
    admit,
    client_settings,
    make_fleet,
    opened,
)
from tests.coordinator.fleet_fakes import MODEL, FakeDevice, MemoryStore, task

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")
TOPICS = Topics("f1")
WAIT_S = 60.0
QUIET_S = 0.4  # after which what has not come does not come; an honest message came before


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(condition, seconds=WAIT_S):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


class Site:
    """A fleet, its authority, and mosquitto as deployed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.out = folder / "mosquitto"
        text = FLEET_TOML.replace("[access]", f'[access]\ndeployed = "{self.out}"')
        self.fleet = make_fleet(folder, text)
        self.access = opened(self.fleet)
        deploy(self.fleet, self.access, self.out, Place(self.out, DATA))
        self.port = free_port()
        self.settings = {}
        for name in ("d1", "d2"):
            self.settings[name] = self.admitted(name)
        for name in ("coordinator", "blocks"):
            own = self.access.authority.folder
            self.settings[name] = BrokerSettings(
                host="127.0.0.1",
                port=self.port,
                ca_file=own / "ca.crt",
                cert_file=own / f"{name}.crt",
                key_file=own / f"{name}.key",
            )
        self.config = folder / "trial.conf"
        self.config.write_text(local(self.out, self.port, folder))
        self.log = (folder / "log").open("ab")
        self.process = None
        self.start()

    def admitted(self, name, device_class="phone"):
        key, certificate = admit(self.access, name, device_class)
        return client_settings(self.fleet, self.folder, name, key, certificate, self.port)

    def start(self):
        self.process = subprocess.Popen(
            [find_mosquitto(), "-c", str(self.config)], stdout=self.log, stderr=self.log
        )
        until(lambda: listens(self.port) or self.process.poll() is not None)
        assert self.process.poll() is None

    def reload(self):
        update(self.fleet, self.access)
        self.process.send_signal(signal.SIGHUP)
        time.sleep(QUIET_S)
        with Client(self.settings["coordinator"], "witness"):
            pass  # who comes later is let in after the files have been read

    def stop(self):
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.stop()
    site.log.close()
    site.access.close()


@pytest.fixture
def own_site(tmp_path):
    """For tests that revoke: they change the broker's files."""
    site = Site(tmp_path)
    yield site
    site.stop()
    site.log.close()
    site.access.close()


class Client:
    def __init__(self, settings, name, filters=()):
        self.got = queue.Queue()
        self.connection = Connection(
            settings, name, on_message=lambda topic, payload: self.got.put((topic, payload))
        )
        self.connection.subscribe(filters)

    def __enter__(self):
        self.connection.start()
        self.connection.wait_connected(WAIT_S)
        return self

    def __exit__(self, *exc):
        self.connection.stop()

    def say(self, topic, payload, **options):
        assert self.connection.publish(topic, payload, **options)

    def next(self):
        return self.got.get(timeout=WAIT_S)

    def quiet(self):
        time.sleep(QUIET_S)
        return self.got.empty()


def refused(settings):
    """Why a client does not come in; fails if it does."""
    connection = Connection(settings, "stranger", on_message=lambda *m: None)
    connection._rng.uniform = lambda low, high: 60.0
    connection.start()
    try:
        until(lambda: connection.phase in {Phase.WAITING, Phase.UP})
        with pytest.raises(TransportError) as e:
            connection.wait_connected(0)
    finally:
        connection.stop()
    return str(e.value)


# ---- what a device may say and hear


def test_a_device_writes_and_reads_below_its_own_name_only(site):
    up, down = TOPICS.up, TOPICS.down
    with (
        Client(site.settings["coordinator"], "co", [up("+", "#")]) as coordinator,
        Client(site.settings["d1"], "d1", [down("d1", "+"), TOPICS.release]) as d1,
        Client(site.settings["d2"], "d2", [down("d1", "#"), down("+", "+"), "#", "$SYS/#"]) as d2,
    ):
        for topic in (
            up("d1", "enrol"),  # as another device
            up("d1", "renew"),
            down("d1", "task"),  # as the coordinator
            down("d2", "task"),
            TOPICS.release,
            TOPICS.coordinator,
            "fleetprune/f1/blocks/d2",  # as a block server
            "fleetprune/f2/up/d2/enrol",  # in another fleet
            "fleetprune/f1/up",
            "elsewhere",
        ):
            d2.say(topic, b"forged")
            d2.say(topic, b"forged", retain=True)
        d2.say(up("d2", "enrol"), b"own")
        assert coordinator.next() == (up("d2", "enrol"), b"own")
        coordinator.say(down("d1", "block"), bytes(70_000))
        coordinator.say(down("d2", "task"), b"yours")
        assert d1.next() == (down("d1", "block"), bytes(70_000))
        assert d2.next() == (down("d2", "task"), b"yours")
        assert d1.quiet()
        assert coordinator.got.empty()
        assert d2.got.empty()  # nothing of d1's, although it subscribed to everything


def test_a_wildcard_as_a_name_is_no_way_around(site):
    """The pattern's %u is the certificate's name, which the authority has let in as a name only."""
    for name in ("+", "#", "a/b"):
        with pytest.raises(ConfigError):
            site.access.make_token(name, "phone", 60.0)
    lines = access_list("f1").splitlines()
    assert [x for x in lines if "%u" in x and not x.startswith("#")] == [
        "pattern write fleetprune/f1/up/%u/#",
        "pattern read fleetprune/f1/down/%u/#",
    ]


def test_block_servers_answer_requests_and_no_more(site):
    up, down = TOPICS.up, TOPICS.down
    shared = f"$share/blocks/{up('+', 'get')}"
    with (
        Client(site.settings["coordinator"], "co", ["fleetprune/f1/#"]) as coordinator,
        Client(site.settings["blocks"], "b1", [shared, up("+", "put"), "#"]) as one,
        Client(site.settings["blocks"], "b2", [shared]) as two,
        Client(site.settings["d1"], "d1", [down("d1", "+")]) as d1,
    ):
        for i in range(10):
            d1.say(up("d1", "get"), b"%d" % i)
        d1.say(up("d1", "put"), b"secret")
        seen = [coordinator.next()[1] for _ in range(11)]
        assert sorted(seen) == sorted([*(b"%d" % i for i in range(10)), b"secret"])
        until(lambda: two.got.qsize() > 0)
        assert b"secret" not in [m for _, m in list(one.got.queue)]
        for topic in (down("d1", "task"), TOPICS.release, TOPICS.coordinator, up("d1", "ack")):
            one.say(topic, b"forged")
        one.say("fleetprune/f1/blocks/b1", b"online")
        assert coordinator.next() == ("fleetprune/f1/blocks/b1", b"online")
        one.say(down("d1", "block"), b"block")
        assert d1.next() == (down("d1", "block"), b"block")
        assert d1.quiet()
        assert coordinator.got.empty()


# ---- who comes in


def test_without_a_certificate_nobody_comes_in(site):
    ca = site.access.authority.folder / "ca.crt"
    assert refused(BrokerSettings(host="127.0.0.1", port=site.port, ca_file=ca)).startswith(
        f"broker 127.0.0.1:{site.port} "
    )
    assert refused(BrokerSettings(host="127.0.0.1", port=site.port)).startswith("broker ")


def test_a_certificate_of_another_authority(site, tmp_path):
    names = {"broker": ["x"], "join": ["x"]}
    init_authority(tmp_path / "other", "f1", names, datetime.now(UTC), Lives())
    other, key = Authority(tmp_path / "other"), Key.new()
    asked = read_request(key.request("d1"), "d1")
    pem = other.certify(asked, datetime.now(UTC), timedelta(days=2)).public_bytes(Encoding.PEM)
    refused(client_settings(site.fleet, tmp_path, "d1", key, pem.decode(), site.port))


def test_an_expired_certificate(site, tmp_path):
    key = Key.new()
    asked = read_request(key.request("d1"), "d1")
    then = datetime.now(UTC) - timedelta(days=10)
    pem = site.access.authority.certify(asked, then, timedelta(days=9)).public_bytes(Encoding.PEM)
    refused(client_settings(site.fleet, tmp_path, "d1", key, pem.decode(), site.port))


def test_old_tls(site):
    settings = site.settings["d1"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(settings.ca_file)
    context.load_cert_chain(settings.cert_file, settings.key_file)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", site.port)) as raw,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(raw, server_hostname="127.0.0.1")


def test_a_device_is_no_broker(site, caplog):
    """A device's certificate is a client's: whoever holds one cannot pose as the broker."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(site.settings["d1"].cert_file)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def serve():
            raw, _ = listening.accept()
            listening.close()
            with raw, pytest.raises((ssl.SSLError, OSError)):
                server.wrap_socket(raw, server_side=True).recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        refused(site.settings["d2"].model_copy(update={"port": port}))
        thread.join()
    until(lambda: "its certificate does not verify: unsuitable certificate purpose" in caplog.text)


def test_a_broker_of_another_authority_is_not_trusted(site, tmp_path):
    names = {"broker": ["127.0.0.1"], "join": ["x"]}
    init_authority(tmp_path / "other", "f1", names, datetime.now(UTC), Lives())
    settings = BrokerSettings(
        host="127.0.0.1", port=site.port, ca_file=tmp_path / "other" / "ca.crt"
    )
    assert refused(settings).startswith(
        f"broker 127.0.0.1:{site.port} is unreachable: its certificate does not verify: "
    )


def test_names_that_are_not_the_device_s(site):
    token = site.access.make_token("d7", "phone", 60.0)
    for name in ("fleetprune-coordinator", "d1"):
        with pytest.raises(TrustError) as e:
            site.access.join(token, Key.new().request(name))
        assert str(e.value) == f"certificate request for 'CN={name}', expected 'CN=d7'"
        with pytest.raises(TrustError):
            site.access.renew("d1", Key.new().request("fleetprune-coordinator"))
    with pytest.raises(ConfigError, match=r"names that begin with fleetprune- are ours$"):
        site.access.make_token("fleetprune-coordinator", "phone", 60.0)
    with pytest.raises(DeniedError):
        site.access.join(token.replace(".d7", ".d1"), Key.new().request("d1"))


# ---- revocation: what SIGHUP does to a mosquitto that runs


def test_a_revoked_device_falls_silent_at_once_and_never_comes_back(own_site):
    site, up, down = own_site, TOPICS.up, TOPICS.down
    with (
        Client(site.settings["coordinator"], "co", [up("+", "#")]) as coordinator,
        Client(site.settings["d1"], "d1", [down("d1", "#")]) as d1,
        Client(site.settings["d2"], "d2", [down("d2", "#")]) as d2,
    ):
        d1.say(up("d1", "ack"), b"before")
        assert coordinator.next() == (up("d1", "ack"), b"before")
        site.access.revoke("d1", "stolen")
        site.reload()
        d1.say(up("d1", "ack"), b"after")
        coordinator.say(down("d1", "task"), b"secret")
        d2.say(up("d2", "ack"), b"honest")
        assert coordinator.next() == (up("d2", "ack"), b"honest")
        coordinator.say(down("d2", "task"), b"go on")
        assert d2.next() == (down("d2", "task"), b"go on")
        assert d1.quiet()
        assert coordinator.got.empty()
        refused(site.settings["d1"])  # new connections: the revocation list was read, too
        site.access.make_token("d1", "phone", 60.0)
        site.reload()
        refused(site.settings["d1"])  # a new token lets a new certificate in, not the old one
        again = site.admitted("d1")
        with Client(again, "d1-again", [down("d1", "#")]) as new:
            new.say(up("d1", "ack"), b"new")
            assert coordinator.next() == (up("d1", "ack"), b"new")
    site.stop()
    site.start()  # a restart ends what was open, and still knows
    with Client(again, "d1-again"):
        pass


# ---- the hub, where the broker does not help


class Recorder(Client):
    """A device with its enrolment and its transfers, for what the hub answers."""

    def __init__(self, settings, device, folder):
        self.device = device
        self.kinds: dict[str, list[bytes]] = {}
        super().__init__(settings, device, [TOPICS.down(device, "+")])
        self.connection._on_message = self._take
        self.client = BlobClient(self._send, device, folder / "parts", abort=threading.Event())

    def _take(self, topic, payload):
        kind = topic.rsplit("/", 1)[1]
        self.kinds.setdefault(kind, []).append(payload)
        if kind in {"block", "stored"}:
            self.client.feed(kind, payload)

    def _send(self, kind, payload):
        return self.connection.publish(TOPICS.up(self.device, kind), payload)

    def enrol(self, device_class="phone"):
        message = Enrol(
            device=self.device,
            device_class=device_class,
            agent_version="1",
            trains=True,
            samples=1,
        )
        self.kinds.pop("enrolled", None)
        self._send("enrol", message.to_bytes())
        until(lambda: "enrolled" in self.kinds)
        return self.kinds["enrolled"][0].decode()


H = "0123456789abcdef" * 4
ROAD = {
    "metadata/timestamp.json": b"time",
    f"targets/rollouts/{H}.phone.json": b"phones",
    f"targets/rollouts/{H}.tablet.json": b"tablets",
    f"targets/releases/phone/1/{H}.model.onnx": b"phone's",
    f"targets/releases/watch/1/{H}.model.onnx": b"watch's",
    f"targets/releases/tablet/1/{H}.model.onnx": b"tablet's",
}


@pytest.fixture
def hub(site, tmp_path):
    store = MemoryStore(task("t1", "d1"))
    blob = f"blobs/{store.tasks['t1'].model.sha256}"
    other = task("t2", "d2", model=b"for d2")
    store.tasks["t2"] = other
    road = {**ROAD, blob: MODEL, f"blobs/{other.model.sha256}": b"for d2"}
    hub = Hub(
        site.settings["coordinator"],
        "f1",
        store,
        road.get,
        tmp_path / "spool",
        doorman=Doorman(site.access.gate, lambda c: {"watch"}, site.access.renew),
    )
    hub.store, hub.road = store, road
    hub.start()
    hub.connection.wait_connected(WAIT_S)
    yield hub
    hub.stop()


def test_a_device_reads_its_own_road_only(site, hub, tmp_path):
    with Recorder(site.settings["d1"], "d1", tmp_path) as d1:
        allowed = dict.fromkeys(hub.road, True)
        allowed[f"targets/rollouts/{H}.tablet.json"] = False
        allowed[f"targets/releases/tablet/1/{H}.model.onnx"] = False
        allowed[f"blobs/{hub.store.tasks['t2'].model.sha256}"] = False
        for name, may in allowed.items():
            if may:
                assert d1.client.read(name, 10**6) == hub.road[name]
            else:
                with pytest.raises(NotFoundError):
                    d1.client.read(name, 10**6)


def test_another_class_than_the_token_s(site, hub, tmp_path):
    with Recorder(site.settings["d1"], "d1", tmp_path) as d1:
        assert '"accepted":false' in (said := d1.enrol("tablet"))
        assert "device d1 joined as class phone, its configuration says tablet" in said
        assert '"accepted":true' in d1.enrol("phone")


def test_the_hub_does_not_listen_to_the_revoked_though_the_broker_does(site, hub, tmp_path, caplog):
    """The broker has not read its files yet."""
    told = []
    settings = site.admitted("d3")
    hub.store.tasks["t3"] = task("t3", "d3")
    hub._on_telemetry = told.append
    with (
        Recorder(settings, "d3", tmp_path / "3") as d3,
        FakeDevice(site.settings["d2"], "d2", tmp_path / "2", fleet="f1") as honest,
    ):
        assert '"accepted":true' in d3.enrol()
        until(lambda: "task" in d3.kinds)
        assert Task.from_bytes(d3.kinds["task"][0]).task == "t3"
        key = Key.new()
        site.access.revoke("d3", "lost in a train")
        assert "device d3 is revoked: lost in a train" in d3.enrol()
        d3._send("renew", Renew(request=key.request("d3")).to_bytes())
        until(lambda: "certificate" in d3.kinds)
        answer = Certificate.from_bytes(d3.kinds["certificate"][0])
        assert (answer.certificate, answer.reason) == ("", "device d3 is revoked: lost in a train")
        d3.kinds.clear()
        d3._send("get", b"whatever")
        d3._send("put", b"whatever")
        d3._send("ack", b"whatever")
        d3._send("telemetry", b"whatever")
        d3._send("status", b"online")
        until(lambda: "t2" in hub.store.results)  # the honest one's answer
        assert honest.enrolled[0].accepted
        assert (d3.kinds, told, hub.online("d3")) == ({}, [], False)
    assert caplog.messages.count("messages are ignored: device d3 is revoked: lost in a train") == 1


def test_a_device_that_never_joined(site, hub, tmp_path):
    """A certificate of the authority that is in nobody's book: made by hand, or of a lost book."""
    key = Key.new()
    asked = read_request(key.request("d9"), "d9")
    made = site.access.authority.certify(asked, datetime.now(UTC), timedelta(days=2))
    pem = made.public_bytes(Encoding.PEM).decode()
    settings = client_settings(site.fleet, tmp_path, "d9", key, pem, site.port)
    with Recorder(settings, "d9", tmp_path) as d9:
        assert "device d9 has not joined this fleet" in d9.enrol()


# ---- secrets on disk


@pytest.mark.skipif(os.name != "posix", reason="modes")
def test_a_key_that_everybody_can_read_is_refused(site, tmp_path):
    for name in ("key.pem", "password"):
        shutil.copy(site.settings["d1"].key_file, tmp_path / name)
        (tmp_path / name).chmod(0o644)
    settings = site.settings["d1"].model_copy(update={"key_file": tmp_path / "key.pem"})
    with pytest.raises(ConfigError) as e:
        Connection(settings, "d1", on_message=lambda *m: None)
    assert str(e.value) == (
        f"{tmp_path / 'key.pem'} can be read by everybody on this machine: chmod 600 it"
    )
    settings = BrokerSettings(username="u", password_file=tmp_path / "password")
    with pytest.raises(ConfigError, match=r"password can be read by everybody on this machine"):
        Connection(settings, "d1", on_message=lambda *m: None)
    (tmp_path / "password").write_text("s3cret\n")
    (tmp_path / "password").chmod(0o600)
    assert settings.secret() == "s3cret"
    assert "s3cret" not in repr(settings)
    with pytest.raises(ValueError, match=r"give either password or password_file"):
        BrokerSettings(password="x", password_file=tmp_path / "password")
