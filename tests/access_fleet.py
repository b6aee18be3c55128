"""A fleet with an authority in a folder, and devices of it, for tests."""

import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from fleetprune.mqtt import BrokerSettings
from fleetprune_coordinator.access import Access, open_access
from fleetprune_coordinator.authority import Lives, init_authority
from fleetprune_coordinator.config import FleetConfig, load_fleet_config
from fleetprune_coordinator.join_server import JoinServer, welcome
from fleetprune_coordinator.keys import init_repository

FLEET_TOML = """
fleet = "f1"
[broker]
host = "127.0.0.1"
port = 8883
[access]
device_days = 180
[join]
host = "127.0.0.1"
port = 0
[model]
factory = "model:make"
input_shape = [2]
classes = 2
[classes.phone]
[classes.tablet]
"""


def make_fleet(folder: Path, text: str = FLEET_TOML) -> FleetConfig:
    """A fleet with an authority and a release repository."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fleet.toml").write_text(text)
    fleet = load_fleet_config(folder / "fleet.toml")
    now = datetime.now(UTC)
    names = {"broker": ["127.0.0.1"], "join": ["127.0.0.1"]}
    init_authority(fleet.state / "access", "f1", names, now, Lives())
    init_repository(fleet.state / "releases", now)
    return fleet


def opened(fleet: FleetConfig, now=time.time) -> Access:
    access = open_access(fleet, now)
    assert access is not None
    return access


@contextmanager
def join_site(folder: Path):
    """A fleet whose endpoint runs: its access, the endpoint's URL and the authority's file."""
    fleet = make_fleet(folder)
    access = opened(fleet)
    server = JoinServer(access, welcome(fleet, fleet.join), fleet.join)
    server.start()
    try:
        yield access, f"https://127.0.0.1:{server.port}", fleet.state / "access" / "ca.crt"
    finally:
        server.stop()
        access.close()


@dataclass
class Key:
    """A key and requests made with it."""

    key: ec.EllipticCurvePrivateKey

    @classmethod
    def new(cls):
        return cls(ec.generate_private_key(ec.SECP256R1()))

    def pem(self) -> str:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()

    def request(self, name: str) -> str:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def admit(access: Access, device: str, device_class: str = "phone") -> tuple[Key, str]:
    """A device that has joined: its key and certificate (PEM)."""
    key = Key.new()
    token = access.make_token(device, device_class, 3600.0)
    return key, access.join(token, key.request(device)).certificate


def client_settings(
    fleet: FleetConfig, folder: Path, device: str, key: Key, certificate: str, port: int
) -> BrokerSettings:
    """How a device connects; its files are written to `folder`."""
    file = folder / f"{device}.pem"
    file.touch(mode=0o600)
    file.write_text(certificate + key.pem())
    ca = fleet.state / "access" / "ca.crt"
    return BrokerSettings(host="127.0.0.1", port=port, ca_file=ca, cert_file=file, key_file=file)


def long_ago(days: float) -> datetime:
    return datetime.now(UTC) - timedelta(days=days)
