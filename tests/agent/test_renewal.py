"""Renewal: step by step, killed everywhere, and of a whole agent on a real broker."""

import logging
import random
import shutil
import subprocess
import threading
import time
from datetime import timedelta

import numpy as np
import pytest
from hub import _listens, wait_until
from repositories import MemoryRepository
from test_join import Killed, killed_at

from fleetprune.errors import MessageError, TrustError
from fleetprune.local_port import free_port
from fleetprune.messages import Certificate, Renew
from fleetprune.mqtt import BrokerSettings
from fleetprune_agent.agent import Agent
from fleetprune_agent.config import AgentConfig, NpzData
from fleetprune_agent.identity import current, examine
from fleetprune_agent.renewal import ASK, Renewal
from fleetprune_coordinator.access import Access
from fleetprune_coordinator.authority import read_request
from fleetprune_coordinator.deployment import deploy
from fleetprune_coordinator.doorman import Doorman
from fleetprune_coordinator.hub import Hub
from fleetprune_coordinator.mosquitto import DATA, Place
from fleetprune_coordinator.trial import local
from tests.access_fleet import admit, client_settings, long_ago, make_fleet, opened
from tests.brokers import BACK_S
from tests.coordinator.fleet_fakes import MemoryStore

DAY = 86400.0


class World:
    """One device and its authority, with a clock that both read."""

    def __init__(self, folder):
        self.now = time.time()
        self.fleet = make_fleet(folder)
        self.access = opened(self.fleet, lambda: self.now)
        self.state = folder / "device"
        self.state.mkdir()
        key, pem = admit(self.access, "d1")
        self.broker = client_settings(self.fleet, folder, "d1", key, pem, 8883)
        self.sent, self.used = [], []
        self.online = True

    def renewal(self):
        return Renewal(
            "d1",
            self.broker,
            self.state,
            now=lambda: self.now,
            rng=random.Random(1),
            send=self.send,
            use=self.used.append,
        )

    def send(self, data):
        if self.online:
            self.sent.append(Renew.from_bytes(data))
        return self.online

    def answer(self):
        """The coordinator's, to the last request."""
        pem = self.access.renew("d1", self.sent[-1].request)
        return Certificate(certificate=pem).to_bytes()


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.access.close()


def test_in_the_last_third(world):
    renewal = world.renewal()
    assert renewal.settings == world.broker
    renewal.keep(0.0)
    assert world.sent == []
    assert list(world.state.iterdir()) == []
    world.now += 121 * DAY
    renewal.keep(1.0)
    assert len(world.sent) == 1
    pending = (world.state / "pending.key").read_bytes()
    renewal.take(world.answer())
    made = world.state / "device.pem"
    assert world.used == [made]
    assert pending in made.read_bytes()
    assert [p.name for p in world.state.iterdir()] == ["device.pem"]
    assert renewal.settings.cert_file == renewal.settings.key_file == made
    assert renewal.identity.not_after == pytest.approx(world.now + 180 * DAY, abs=2)
    renewal.keep(2.0)
    assert len(world.sent) == 1
    assert world.renewal().settings == renewal.settings  # after a restart, too


def test_it_asks_again_later_and_later(world):
    world.now += 130 * DAY
    renewal = world.renewal()
    world.online = False
    renewal.keep(0.0)
    world.online = True
    times = []
    for second in range(0, 4 * 3600, 5):
        before = len(world.sent)
        renewal.keep(float(second))
        times += [second] * (len(world.sent) - before)
    waits = np.diff(times)
    assert times[0] == 0  # offline was no attempt
    for i, wait in enumerate(waits):
        assert ASK.limit(i) / 2 <= wait <= ASK.limit(i) + 5
    keys = {read_request(s.request, "d1").digest for s in world.sent}
    assert len(keys) == 1  # however often it asks


def test_answers_that_are_not_for_us(world, tmp_path, caplog):
    world.now += 130 * DAY
    renewal = world.renewal()
    renewal.keep(0.0)
    before = renewal.settings
    with pytest.raises(MessageError):
        renewal.take(b"{")
    _, other = admit(world.access, "d2")
    mine = (tmp_path / "d1.pem").read_text()
    certificate = mine[: mine.index("-----BEGIN PRIVATE")]
    for pem in (other, "nonsense", mine, mine + certificate, other + other):
        with pytest.raises(TrustError):
            renewal.take(Certificate(certificate=pem).to_bytes())
    renewal.take(Certificate(reason="device d1 is revoked: stolen").to_bytes())
    assert "no new certificate from the coordinator: device d1 is revoked: stolen" in caplog.text
    assert renewal.settings == before
    assert world.used == []
    assert [p.name for p in world.state.iterdir()] == ["pending.key"]
    good = world.answer()
    renewal.take(good)
    renewal.take(good)  # twice
    assert len(world.used) == 1


def test_killed_anywhere_there_is_a_certificate_that_works(tmp_path, monkeypatch):
    """At each change of the disk, of the request and of the answer."""
    kills = 0
    for step in range(1, 40):
        world = World(tmp_path / str(step))
        world.now += 130 * DAY
        renewal = world.renewal()
        with monkeypatch.context() as patch:
            killed_at(patch, step)
            try:
                renewal.keep(0.0)
                renewal.take(world.answer())
                finished = True
            except Killed:
                finished = False
                kills += 1
        shown = world.renewal().settings  # after the restart
        assert examine(shown.cert_file, shown.key_file, shown.ca_file).name == "d1"
        again = world.renewal()
        again.keep(0.0)
        if world.sent and again.identity.due(world.now):
            again.take(world.answer())
        assert not again.identity.due(world.now)
        assert len(world.access._book.certificates(device="d1")) == 2
        again.keep(1e9)
        assert [p.name for p in world.state.iterdir() if p.name[0] != "."] == ["device.pem"]
        world.access.close()
        if finished:
            break
    assert kills == 6


def test_of_several_certificates_the_last_issued_is_shown(world, tmp_path):
    """After a revocation and a new token the one that was given counts, not the renewed one."""
    world.now += 130 * DAY
    renewal = world.renewal()
    renewal.keep(0.0)
    renewal.take(world.answer())
    world.access.revoke("d1", "")
    world.now += 3600
    key, pem = admit(world.access, "d1")
    given = client_settings(world.fleet, tmp_path, "d1", key, pem, 8883)
    shown = current(given, world.state, world.now)
    assert shown.cert_file == given.cert_file
    (world.state / "device.pem").write_text("damaged")
    assert current(given, world.state, world.now) == shown
    assert current(BrokerSettings(), world.state, world.now) is None


@pytest.mark.skipif(shutil.which("mosquitto") is None, reason="needs mosquitto")
def test_an_agent_renews_and_connects_anew(tmp_path, caplog):
    """Its certificate of 20 minutes is due at once; nothing of key or certificate is logged."""
    caplog.set_level(logging.DEBUG)
    fleet = make_fleet(tmp_path)
    access = opened(fleet)
    short = Access(fleet.state / "access", time.time, timedelta(minutes=20))
    key, pem = admit(short, "d1")
    short.close()
    port = free_port()
    deploy(fleet, access, tmp_path / "m", Place(tmp_path / "m", DATA))
    (tmp_path / "trial.conf").write_text(local(tmp_path / "m", port, tmp_path))
    broker = subprocess.Popen(
        ["mosquitto", "-c", str(tmp_path / "trial.conf")], stdout=subprocess.DEVNULL
    )
    own = fleet.state / "access"
    hub = Hub(
        BrokerSettings(
            host="127.0.0.1",
            port=port,
            ca_file=own / "ca.crt",
            cert_file=own / "coordinator.crt",
            key_file=own / "coordinator.key",
        ),
        "f1",
        MemoryStore(),
        lambda name: None,
        tmp_path / "spool",
        doorman=Doorman(access.gate, renew=access.renew),
    )
    repository = MemoryRepository(long_ago(0))
    (tmp_path / "root.json").write_bytes(repository.bootstrap)
    np.savez(tmp_path / "s.npz", x=np.eye(4), y=np.arange(4))
    config = AgentConfig(
        device="d1",
        device_class="phone",
        fleet="f1",
        broker=client_settings(fleet, tmp_path, "d1", key, pem, port),
        root=tmp_path / "root.json",
        state=tmp_path / "state",
        data=NpzData(kind="npz", path=tmp_path / "s.npz", held_out=0),
    )
    stop = threading.Event()
    agent = Agent(config)
    thread = threading.Thread(target=agent.run, args=(stop,))
    try:
        wait_until(lambda: _listens(port), "the broker")
        hub.start()
        thread.start()
        renewed = tmp_path / "state" / "device.pem"
        wait_until(renewed.exists, "a new certificate", BACK_S)
        wait_until(
            lambda: caplog.text.count("with a new certificate") and hub.online("d1"),
            "the connection",
            BACK_S,
        )
        agent._connection.wait_connected(BACK_S)
        wait_until(lambda: agent._enrolled, "an enrolment", BACK_S)
    finally:
        stop.set()
        thread.join()
        hub.stop()
        broker.terminate()
        broker.wait()
        access.close()
    read = examine(renewed, renewed, own / "ca.crt")
    assert read.not_after == pytest.approx(time.time() + 180 * DAY, abs=300)
    secrets = [*key.pem().split("\n")[1:-2], *renewed.read_text().split("KEY-----")[1].split()]
    assert not any(s in caplog.text for s in secrets if len(s) > 20)
    assert not [t for t in threading.enumerate() if t.name.startswith("mqtt")]
