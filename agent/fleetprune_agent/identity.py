"""Which certificate this device shows: the one it was given, or one it has got since.

    device.pem     beside `agent.toml`, written once by `fleetprune agent join`
    <state>/device.pem     written by the agent when it renews (`renewal`)

Each holds certificate and key in one file, so that replacing them is one step. The one that was
issued last is shown. A certificate is read by using it: a TLS handshake in memory, after which the
standard library tells what it says, and whether key and authority fit.
"""

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleetprune.errors import ConfigError, TrustError
from fleetprune.mqtt import BrokerSettings

log = logging.getLogger(__name__)

RENEWED: Final = "device.pem"  # in the state folder
_ANY_TIME: Final = 0x200000  # X509_V_FLAG_NO_CHECK_TIME: whether it is valid now is our question
_STEPS: Final = 10  # of a handshake; it takes 3


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate with its key."""

    cert_file: Path
    key_file: Path
    """The same file, if it was made here."""
    name: str
    """The common name."""
    not_before: float
    """Seconds since 1970."""
    not_after: float

    def due(self, now: float) -> bool:
        """Whether less than a third of its life is left."""
        return self.not_after - now < (self.not_after - self.not_before) / 3


def examine(cert_file: Path, key_file: Path, ca_file: Path) -> Identity:
    """Read a certificate, whether it is still valid or not.

    Raises:
        TrustError: The files do not fit together, are no certificates, or the authority did not
            issue this one for a client.
    """
    try:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(cert_file, key_file)
        server.load_verify_locations(ca_file)
        server.verify_mode = ssl.CERT_REQUIRED
        server.verify_flags |= ssl.VerifyFlags(_ANY_TIME)
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_mode = ssl.CERT_NONE
        client.load_cert_chain(cert_file, key_file)
        said = _handshake(client, server)
    except (OSError, ValueError) as e:  # ssl.SSLError is an OSError
        why = getattr(e, "verify_message", "") or getattr(e, "reason", "") or str(e)
        raise TrustError(f"certificate {cert_file}: {why}") from e
    names = [
        value for part in said.get("subject", ()) for key, value in part if key == "commonName"
    ]
    return Identity(
        cert_file,
        key_file,
        names[0] if names else "",
        float(ssl.cert_time_to_seconds(str(said["notBefore"]))),
        float(ssl.cert_time_to_seconds(str(said["notAfter"]))),
    )


def _handshake(
    client: ssl.SSLContext, server: ssl.SSLContext
) -> dict[str, tuple[tuple[tuple[str, str], ...], ...]]:
    """What the server learns of the client's certificate."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(down, up)
    far = server.wrap_bio(up, down, server_side=True)
    for _ in range(_STEPS):
        done = 0
        for side in (near, far):
            try:
                side.do_handshake()
                done += 1
            except ssl.SSLWantReadError:
                continue
        if done == 2:  # both
            break
    return far.getpeercert() or {}  # type: ignore[return-value]  # typeshed: a union of all values


def current(settings: BrokerSettings, state: Path, now: float) -> Identity | None:
    """The certificate to show.

    Args:
        settings: Names the one that the device was given.
        state: The agent's folder, with one that it got since, if it did.
        now: Seconds since 1970.

    Returns:
        Of those that fit the authority the one that was issued last; rather one that is valid
        than one that is not. None: there is none, or it cannot be read; then the connection says
        what is wrong.
    """
    if settings.ca_file is None or settings.cert_file is None or settings.key_file is None:
        return None
    renewed = state / RENEWED
    found = []
    for cert_file, key_file in ((settings.cert_file, settings.key_file), (renewed, renewed)):
        if not cert_file.exists():
            continue
        try:
            found.append(examine(cert_file, key_file, settings.ca_file))
        except (TrustError, ConfigError) as e:
            log.warning("%s", e)
    return max(found, key=lambda i: (i.not_after > now, i.not_before), default=None)


def shown(settings: BrokerSettings, identity: Identity | None) -> BrokerSettings:
    """The settings with the certificate that is shown."""
    if identity is None:
        return settings
    return settings.model_copy(
        update={"cert_file": identity.cert_file, "key_file": identity.key_file}
    )
