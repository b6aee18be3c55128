"""Hosts of their own on one machine: network namespaces, with weather and partitions between them.

Packets are lost, late, doubled and out of order for the kernels' TCP, as on a bad line; a cut host
hears nothing any more and nobody tells it so, as when a cable is drawn at the far end. Needs root.
The line is `switch.py`.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fleetprune.mqtt import BrokerSettings
from fleetprune_sim.broker import EmbeddedBroker, find_mosquitto
from tests.e2e.fleet import COORDINATOR, DEVICES, Fleet

BROKER = "broker"
PORT = 1883
PATIENCE_S = 180.0  # seconds; a lost packet costs TCP a second or more where lines are long
KEEPALIVE_S = 5  # seconds; the shortest that is accepted, so that a partition is noticed soon
_ONE_MORE = itertools.count()


def missing():
    """Why there can be no namespaces here; empty: there can."""
    if shutil.which("ip") is None:
        return "no program ip: install iproute2"
    if find_mosquitto() is None:
        return "no mosquitto"
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root"
    if not Path("/dev/net/tun").exists():
        return "no /dev/net/tun"
    name = f"fp{os.getpid()}probe"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "this kernel or container allows no network namespaces"
    _remove(name)
    return ""


def _remove(name):
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


class Network:
    """A switch and its hosts; leaving the context removes them."""

    def __init__(self, *hosts, seed=0):
        self._hosts = {host: f"10.77.0.{n}" for n, host in enumerate(hosts, 2)}
        self._prefix = f"fp{os.getpid()}n{next(_ONE_MORE)}"
        self._seed, self._switch = seed, None

    def __enter__(self):
        try:
            for host in self._hosts:
                subprocess.run(["ip", "netns", "add", self.namespace(host)], check=True)
            places = [f"{self.namespace(h)}={address}" for h, address in self._hosts.items()]
            self._switch = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("switch.py"), str(self._seed), *places],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error):
        if self._switch is not None:
            self._switch.stdin.close()
            self._switch.wait(10)
            self._switch.stdout.close()
        for host in self._hosts:
            _remove(self.namespace(host))

    def namespace(self, host):
        return f"{self._prefix}{host}"

    def address(self, host):
        return self._hosts[host]

    def on(self, host):
        """What a command begins with to run on a host."""
        return ("ip", "netns", "exec", self.namespace(host))

    def weather(self, **weather):
        """The same weather at every host; `switch.Weather` has the words."""
        for host in self._hosts:
            self._set(host, **weather)

    def cut(self, host):
        """Nothing passes any more, and neither side is told."""
        self._set(host, loss=1.0)

    def mend(self, host):
        """A good line."""
        self._set(host)

    def _set(self, host, **weather):
        line = json.dumps({"address": self._hosts[host], **weather})
        self._switch.stdin.write(f"{line}\n")
        self._switch.stdin.flush()
        self._answer()

    def _answer(self):
        assert self._switch.stdout.readline() == "\n", "the switch has ended"


class HostedBroker(EmbeddedBroker):
    """mosquitto on a host of its own."""

    def __init__(self, folder, network):
        super().__init__(folder)
        self._network = network
        address = network.address(BROKER)
        self.settings = BrokerSettings(host=address, port=PORT, keepalive_s=KEEPALIVE_S)

    def _command(self):
        program, *options = super()._command()
        config = self._folder / "mosquitto.conf"
        text = config.read_text().replace("127.0.0.1", self.settings.host)
        config.write_text(text)
        return [*self._network.on(BROKER), program, *options]

    def _accepts(self):
        look = "import socket; socket.create_connection(({!r}, {}), 1).close()"
        command = [sys.executable, "-c", look.format(self.settings.host, self.settings.port)]
        done = subprocess.run(
            [*self._network.on(BROKER), *command], capture_output=True, check=False
        )
        return done.returncode == 0


class HostedFleet(Fleet):
    """A fleet in which everybody is a host."""

    def __init__(self, root, network, **options):
        self.network = network
        super().__init__(root, round_timeout_s=PATIENCE_S, **options)
        self.patience_s = PATIENCE_S

    def _make_broker(self):
        return HostedBroker(self.root / "broker", self.network)

    def _address(self):
        return {**super()._address(), "keepalive_s": KEEPALIVE_S}

    def _on(self, name):
        return self.network.on(name)


@pytest.fixture
def network():
    """Hosts for a broker, a coordinator and the devices."""
    why_not = missing()
    if why_not:
        pytest.skip(why_not)
    with Network(BROKER, COORDINATOR, *DEVICES) as made:
        yield made
