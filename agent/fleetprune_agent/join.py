"""How a device becomes one of a fleet: a key made here, a token shown once, a certificate back.

    <token's id>.key    made first; kept until the certificate has come, so that a device that was
                        killed, or did not get the answer, asks again with the same key and token
    ca.pem              the authority
    root.json           the root of trust for releases
    agent.toml          unless there is one
    device.pem          certificate and key, 0600, put there in one step at the end

Nothing is sent before the endpoint has shown a certificate of the authority whose file or
fingerprint the device's owner has given.
"""

import hashlib
import http.client
import json
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from fleetprune.errors import ConfigError, HostileInputError, TransportError, TrustError
from fleetprune.files import make_folder, storage_errors, write_atomic
from fleetprune.join_token import MAX_TOKEN, Token
from fleetprune.messages import MAX_MESSAGE, MAX_PEM, MAX_REASON, Join, Joined, printable
from fleetprune_agent.device_key import make_key, make_request
from fleetprune_agent.identity import Identity
from fleetprune_agent.renewal import install

PORT: Final = 8443
WAIT_S: Final = 20.0
CA: Final = "ca.pem"
DEVICE: Final = "device.pem"
ROOT: Final = "root.json"
CONFIG: Final = "agent.toml"
_BEGIN: Final = b"-----BEGIN CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class Done:
    """A device that has joined."""

    told: Joined
    identity: Identity
    config: Path
    kept_config: bool
    """It was there already, and was left alone."""


def join(url: str, token: str, out: Path, *, ca_file: Path | None, fingerprint: str | None) -> Done:
    """Join a fleet; repeated after any failure, it goes on where it was.

    Args:
        url: `https://host[:port]` of the endpoint.
        token: As `fleetprune access token` has printed it.
        out: Folder to write.
        ca_file: The authority's certificate; or else
        fingerprint: its SHA-256 in hex, with or without colons.

    Raises:
        ConfigError: The URL, the token, the file or the fingerprint is none.
        TrustError: The endpoint is not of that authority, or what it sent does not fit.
        TransportError: It cannot be reached, or refuses.
        InstallError: The disk refuses, or the key cannot be made.
    """
    known = Token.parse(token[: 2 * MAX_TOKEN])
    if known is None:
        raise ConfigError("the token does not look like one: copy it whole, in one line")
    host, port = _address(url)
    if ca_file is not None:
        try:
            ca = ca_file.read_bytes()
        except OSError as e:
            raise ConfigError(f"--ca {ca_file} cannot be read: {e.strerror}") from e
    else:
        ca = _fetch_ca(host, port, fingerprint or "")
    make_folder(out)
    pending = out / f"{known.id}.key"
    with storage_errors("read", pending):
        key = pending.read_bytes() if pending.is_file() else b""
    if not key:
        key = make_key()
        write_atomic(pending, key, mode=0o600)
    asked = Join(token=known.text(), request=make_request(key, known.device).decode())
    told = _ask(_connection(host, port, _context(ca)), asked)
    if told.device != known.device:
        raise TrustError(f"certificate for {told.device!r}, expected {known.device!r}")
    # Not `told.ca`: the authority is the one that the owner named, and no other.
    write_atomic(out / CA, ca)
    write_atomic(out / ROOT, told.root.encode())
    config = out / CONFIG
    kept = config.exists()
    if not kept:
        write_atomic(config, configuration(told).encode())
    identity = install(told.certificate, pending, out / DEVICE, out / CA, told.device)
    return Done(told, identity, config, kept)


def configuration(told: Joined) -> str:
    """An `agent.toml` that lacks nothing but what data the device has."""

    def text(value: str) -> str:
        return json.dumps(value)  # JSON's strings are TOML's

    return f"""\
# Written by `fleetprune agent join`. What is missing is [data]: what this device learns from.
device = {text(told.device)}
device_class = {text(told.device_class)}
fleet = {text(told.fleet)}
root = "{ROOT}"
state = "/var/lib/fleetprune"

[broker]
host = {text(told.broker_host)}
port = {told.broker_port}
ca_file = "{CA}"
cert_file = "{DEVICE}"
key_file = "{DEVICE}"

# [data]
# kind = "npz"
# path = "/var/lib/sensors/samples"
"""


def _address(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        port = parts.port or PORT
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme != "https" or not parts.hostname or parts.path not in {"", "/", "/join"}:
        raise ConfigError(f"{url!r} is not where devices join, expected https://host:port")
    return parts.hostname, port


def _context(ca: bytes) -> ssl.SSLContext:
    try:
        # Not create_default_context: given an empty file, that trusts whom the system trusts.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=ca.decode())
    except (ssl.SSLError, ValueError) as e:
        raise ConfigError("the authority's file holds no certificate (PEM)") from e
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _fetch_ca(host: str, port: int, fingerprint: str) -> bytes:
    """The certificate with this fingerprint, over a connection that proves nothing."""
    wanted = fingerprint.replace(":", "").strip().lower()
    if len(wanted) != 64 or set(wanted) - set("0123456789abcdef"):
        raise ConfigError(f"fingerprint {fingerprint!r}, expected a SHA-256: 64 hex digits")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    _, data = _request(_connection(host, port, context), "GET", "/ca", None)
    if (count := data.count(_BEGIN)) > 1:
        raise TrustError(
            f"{host}:{port} names {count} authorities, expected the one of its fleet: "
            "somebody may be in between"
        )
    try:
        certificate = ssl.PEM_cert_to_DER_cert(data[:MAX_PEM].decode("ascii"))
    except ValueError as e:
        raise TrustError(f"{host}:{port} does not say who its authority is: {e}") from e
    got = hashlib.sha256(certificate).hexdigest()
    if got != wanted:
        raise TrustError(
            f"the authority of {host}:{port} has fingerprint {got}, expected {wanted}: "
            "somebody may be in between"
        )
    # Not what came: TLS may read more in it than the decoder here has done.
    return ssl.DER_cert_to_PEM_cert(certificate).encode()


def _ask(connection: http.client.HTTPSConnection, asked: Join) -> Joined:
    status, data = _request(connection, "POST", "/join", asked.to_bytes())
    if status == http.client.OK:
        return Joined.from_bytes(data)
    try:
        reason = printable(str(json.loads(data)["reason"]))[:MAX_REASON]
    except (ValueError, KeyError, TypeError):
        reason = f"status {status}"
    raise TransportError(f"{connection.host}:{connection.port} does not let us in: {reason}")


def _connection(host: str, port: int, context: ssl.SSLContext) -> http.client.HTTPSConnection:
    return http.client.HTTPSConnection(host, port, timeout=WAIT_S, context=context)


def _request(
    connection: http.client.HTTPSConnection, method: str, path: str, body: bytes | None
) -> tuple[int, bytes]:
    """Status and body, no longer than a message may be."""
    where = f"{connection.host}:{connection.port}"
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        data = answer.read(MAX_MESSAGE + 1)
    except ssl.SSLCertVerificationError as e:
        raise TrustError(f"{where} is not of the fleet's authority: {e.verify_message}") from e
    except (OSError, http.client.HTTPException) as e:
        why = (e.strerror if isinstance(e, OSError) else None) or str(e)
        raise TransportError(
            f"{where} cannot be reached: {why}; is it where `fleetprune access serve`, or the "
            "coordinator with a table [join], listens?"
        ) from e
    finally:
        connection.close()
    if len(data) > MAX_MESSAGE:
        raise HostileInputError(f"{where} sent more than {MAX_MESSAGE} bytes")
    return answer.status, data
