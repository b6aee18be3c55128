"""The configuration in deploy/mosquitto, run as it is but for paths and port."""

import queue
import shutil
import subprocess

import pytest

from fleetprune.errors import TransportError
from fleetprune.mqtt import BrokerSettings, Connection
from fleetprune_sim.broker import EmbeddedBroker, find_mosquitto

pytestmark = pytest.mark.skipif(
    find_mosquitto() is None or shutil.which("openssl") is None,
    reason="needs mosquitto and openssl: the embedded broker has no access lists",
)
UP, DOWN = "fleetprune/fleet1/up", "fleetprune/fleet1/down"


def certify(folder, name, *, ca="ca", extension=None):
    run = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    run += ["-nodes", "-days", "2", "-subj", f"/CN={name}"]
    run += ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.crt")]
    if name != ca:
        run += ["-CA", str(folder / f"{ca}.crt"), "-CAkey", str(folder / f"{ca}.key")]
    if extension:
        run += ["-addext", extension]
    return subprocess.run(run, check=False, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("mosquitto")
    made = certify(folder, "ca")
    made = certify(folder, "broker", extension="subjectAltName=IP:127.0.0.1")
    if made.returncode:
        pytest.skip(f"this openssl cannot sign in one step: {made.stderr[:80]}")
    for name in ("d1", "d2", "fleetprune-coordinator"):
        certify(folder, name)
    deploy = request.config.rootpath / "deploy" / "mosquitto"
    broker = EmbeddedBroker(folder)
    text = (deploy / "mosquitto.conf").read_text()
    for old, new in (
        ("8883", f"{broker.settings.port} 127.0.0.1"),
        ("/etc/mosquitto/certs", str(folder)),
        ("/etc/mosquitto/fleetprune.acl", str(folder / "fleetprune.acl")),
        ("/var/lib/mosquitto/", f"{folder}/"),
        ("log_dest syslog", f"log_dest file {broker.log}\nuser root"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "fleetprune.acl").write_text((deploy / "fleetprune.acl").read_text())
    (folder / "real.conf").write_text(text)
    broker._command = lambda: [find_mosquitto(), "-c", str(folder / "real.conf")]
    broker.start()
    yield folder, broker.settings
    broker.kill()


class Client:
    def __init__(self, installed, name, filters):
        folder, settings = installed
        files = {"ca_file": folder / "ca.crt"}
        if name:
            files |= {"cert_file": folder / f"{name}.crt", "key_file": folder / f"{name}.key"}
        self.got = queue.Queue()
        self.connection = Connection(
            BrokerSettings(port=settings.port, **files),
            f"client-{name}",
            on_message=lambda topic, payload: self.got.put((topic, payload)),
        )
        self.connection.subscribe(filters)

    def __enter__(self):
        self.connection.start()
        self.connection.wait_connected(10)
        return self

    def __exit__(self, *exc):
        self.connection.stop()


def test_a_device_writes_and_reads_below_its_own_name_only(installed):
    with (
        Client(installed, "fleetprune-coordinator", [f"{UP}/+/#"]) as coordinator,
        Client(installed, "d1", [f"{DOWN}/d1/+", "fleetprune/fleet1/release"]) as d1,
        Client(installed, "d2", [f"{DOWN}/#", "#"]) as d2,
    ):
        d2.connection.publish(f"{UP}/d1/enrol", b"forged")
        d2.connection.publish(f"{DOWN}/d1/task", b"forged")
        d2.connection.publish("fleetprune/fleet1/release", b"forged")
        d2.connection.publish("fleetprune/fleet2/up/d2/enrol", b"another fleet")
        d2.connection.publish(f"{UP}/d2/enrol", b"own")
        assert coordinator.got.get(timeout=10) == (f"{UP}/d2/enrol", b"own")
        coordinator.connection.publish(f"{DOWN}/d1/block", bytes(70_000))
        coordinator.connection.publish(f"{DOWN}/d2/task", b"yours")
        assert d1.got.get(timeout=10) == (f"{DOWN}/d1/block", bytes(70_000))
        assert d2.got.get(timeout=10) == (f"{DOWN}/d2/task", b"yours")
        assert coordinator.got.empty()
        assert d1.got.empty()
        assert d2.got.empty()


def test_without_a_certificate_nobody_comes_in(installed):
    client = Client(installed, None, [])
    client.connection.start()
    with pytest.raises(TransportError, match=r"^broker 127.0.0.1:\d+ "):
        client.connection.wait_connected(1)
    client.connection.stop()


def test_a_broker_with_another_ca_is_not_trusted(installed, tmp_path):
    _, settings = installed
    certify(tmp_path, "ca")
    connection = Connection(
        BrokerSettings(port=settings.port, ca_file=tmp_path / "ca.crt"),
        "x",
        on_message=lambda *m: None,
    )
    connection.start()
    with pytest.raises(TransportError) as e:
        connection.wait_connected(1)
    assert str(e.value).startswith(
        f"broker 127.0.0.1:{settings.port} is unreachable: its certificate does not verify: "
    )
    connection.stop()
