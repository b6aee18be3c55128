"""What is fuzzed of HTTPS: whole answers and requests, from the status line to the body's end.

The standard library parses the head, so what it makes of any bytes has to stay within our errors,
too. Sockets are replaced by bytes; what comes before them, TLS, is not ours.
"""

import datetime as dt
import io
import ssl
from contextlib import suppress
from functools import cache
from hashlib import sha256
from http.client import HTTPSConnection
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from target import Target, chosen, scratch

from fleetprune.errors import HostileInputError, TransportError, TrustError
from fleetprune.join_token import Token
from fleetprune.messages import Join, Joined
from fleetprune.partfile import PartFile
from fleetprune_agent import join as agent_join
from fleetprune_agent.http_source import HttpSource, HttpsSettings
from fleetprune_agent.parts import Parts
from fleetprune_agent.renewal import install
from fleetprune_coordinator.access import Access
from fleetprune_coordinator.access_book import TokenRecord
from fleetprune_coordinator.authority import Lives, init_authority, read_request
from fleetprune_coordinator.join_server import MAX_BODY, Welcome, _Answers, _Handler
from fleetprune_coordinator.tokens import Kept

WHOLE = bytes(range(250))
SHA = sha256(WHOLE).hexdigest()
NAME = "targets/releases/phone/1/model.onnx"
MAX_ANSWER = 4096  # bytes
SMALL = 120  # bytes that the small file may have
DEVICE = "d1"
TOKEN = Token("0123456789ab", "s" * 32, DEVICE)
KEY = ec.derive_private_key(7, ec.SECP256R1())
NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
DEVICE_SIDE = (HostileInputError, TransportError)


class Wire:
    """A socket that has received some bytes, after which the peer closed it."""

    def __init__(self, received: bytes) -> None:
        self.received, self.sent = io.BytesIO(received), bytearray()

    def makefile(self, mode: str, *_: object, **__: object) -> io.BytesIO:
        assert "r" in mode
        return io.BytesIO(self.received.getvalue())

    def sendall(self, data: bytes) -> None:
        self.sent += data

    def settimeout(self, seconds: float) -> None: ...

    def setsockopt(self, *_: object) -> None: ...

    def do_handshake(self) -> None: ...

    def close(self) -> None: ...


class WiredSource(HttpSource):
    """Every connection of it is a `Wire` that brings the same bytes."""

    answer = b""

    def _open(self) -> Any:
        return Wire(self.answer)


# ---- releases over HTTPS


def http_answer(data: bytes) -> None:
    """A file's bytes, or an error; and never more than was asked for.

    The first byte says what is asked: a small file, a large one, or the rest of one that came in
    parts.
    """
    way, answer = chosen(data, ("small", "whole", "rest"))
    source = _source()
    source.answer, before = answer, source.bytes_received
    into = scratch() / "pulled"
    try:
        if way == "small":
            assert len(source.read(NAME, SMALL)) <= SMALL
            return
        if way == "rest":
            with PartFile(_part(), len(WHOLE), bytes.fromhex(SHA), 100) as part:
                part.write(0, WHOLE[:100])
                part.write(2, WHOLE[200:])
        source.pull(NAME, len(WHOLE), SHA, into)
        assert into.read_bytes() == WHOLE
    finally:
        source.close()
        assert source.bytes_received - before <= 2 * len(WHOLE)  # a lie is asked for once more
        for left in (into, _part(), _part().with_name(f"{SHA}.part.map")):
            left.unlink(missing_ok=True)


def _part() -> Path:
    return scratch() / "parts" / f"{SHA}.part"


@cache
def _source() -> WiredSource:
    settings = HttpsSettings(url="https://releases.example/fleet")
    return WiredSource(settings, Parts(scratch() / "parts", 100))


def _answers() -> tuple[bytes, ...]:
    def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
        return "\r\n".join([*lines, "", ""]).encode() + body

    middle = answer("206 Partial Content", WHOLE[100:200], "Content-Range: bytes 100-199/250")
    return (
        b"\0" + answer("200 OK", b"{}"),
        b"\1" + answer("200 OK", WHOLE),
        b"\2" + middle,
        b"\2" + answer("200 OK", WHOLE),
    )


# ---- joining, on the device


def join_answer(data: bytes) -> None:
    """What a device is answered when it asks to be let in."""
    connection = _connection(data)
    asked = Join(token=TOKEN.text(), request=_request())
    told = agent_join._ask(connection, asked)
    agent_join.configuration(told)


def ca_answer(data: bytes) -> None:
    """What a device is told of the authority before it trusts anybody."""
    with patch.object(agent_join, "_connection", lambda *_: _connection(data)):
        pem = agent_join._fetch_ca("join.example", 8443, _access().authority.fingerprint)
    # To the byte: what else a decoder overlooks, TLS would read.
    assert pem.decode() == ssl.DER_cert_to_PEM_cert(_authority())


@cache
def _authority() -> bytes:
    return ssl.PEM_cert_to_DER_cert(_access().authority.pem.decode())


def certificate(data: bytes) -> None:
    """The text in the place of the certificate that a device was waiting for."""
    folder = scratch() / "device"
    folder.mkdir(exist_ok=True)
    pending, into, ca = folder / "pending.key", folder / "device.pem", folder / "ca.pem"
    secret = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    pending.write_bytes(secret)
    ca.write_bytes(_access().authority.pem)
    try:
        made = install(data.decode(errors="replace"), pending, into, ca, DEVICE)
    except TrustError:
        assert pending.read_bytes() == secret and not into.exists()
        raise
    assert made.name == DEVICE and into.read_bytes().endswith(secret)
    into.unlink()


def _connection(received: bytes) -> HTTPSConnection:
    connection = HTTPSConnection("join.example", 8443, context=_context())
    connection.sock = Wire(received)
    return connection


@cache
def _context() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _joined() -> bytes:
    authority = _access().authority
    return Joined(
        fleet="f",
        device=DEVICE,
        device_class="phone",
        certificate=_certificate(),
        ca=authority.pem.decode(),
        root="{}",
        broker_host="broker",
        broker_port=8883,
    ).to_bytes()


@cache
def _certificate() -> str:
    asked = read_request(_request(), DEVICE)
    made = _access().authority.certify(asked, NOW, dt.timedelta(days=90))
    return made.public_bytes(Encoding.PEM).decode()


# ---- joining, at the coordinator


def join_request(data: bytes) -> None:
    """All that a stranger may send to the endpoint; the answer is one, and gives nothing away."""
    wire = Wire(data)
    with suppress(ConnectionError):
        _Handler(_Request(wire), ("192.0.2.1", 1), _Server())  # type: ignore[arg-type]
    assert len(wire.sent) < MAX_ANSWER
    assert TOKEN.secret.encode() not in wire.sent


def request_der(data: bytes) -> None:
    """What stands in a certificate request, from somebody who has a token."""
    pem = ssl.DER_cert_to_PEM_cert(data).replace("CERTIFICATE", "CERTIFICATE REQUEST")
    asked = read_request(pem, DEVICE)
    assert asked.device == DEVICE


class _Request:
    """What `StreamRequestHandler` asks of its connection."""

    def __init__(self, wire: Wire) -> None:
        self.makefile, self.sendall = wire.makefile, wire.sendall
        self.settimeout, self.setsockopt = wire.settimeout, wire.setsockopt


class _Server:
    @property
    def answer(self) -> _Answers:
        return _answering()


@cache
def _answering() -> _Answers:
    welcome = Welcome("f", "broker", 8883, root=lambda: "{}")
    later = count(0, 1000)  # seconds: nobody is turned away for having failed lately
    return _Answers(_access(), welcome, lambda: float(next(later)))


@cache
def _access() -> Access:
    folder = scratch() / "access"
    names = {"broker": ["127.0.0.1"], "join": ["127.0.0.1"]}
    init_authority(folder, "f", names, NOW, Lives())
    access = Access(folder, NOW.timestamp, dt.timedelta(days=90))
    with access._book.transaction():
        access._book.add_token(
            TokenRecord(
                TOKEN.id, DEVICE, "phone", Kept.of(TOKEN), NOW.timestamp() + 3600, used_by=None
            )
        )
    return access


@cache
def _request() -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, DEVICE)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def _requests() -> tuple[bytes, ...]:
    body = Join(token=TOKEN.text(), request=_request()).to_bytes()
    assert len(body) < MAX_BODY
    post = f"POST /join HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return (b"GET /ca HTTP/1.1\r\nHost: a\r\n\r\n", post + body)


def _with_head(body: bytes) -> bytes:
    return f"HTTP/1.0 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def road_targets() -> dict[str, Target]:
    """All of them, by name."""
    der = ssl.PEM_cert_to_DER_cert(_request().replace(" REQUEST", ""))
    return {
        "http_answer": Target(http_answer, _answers(), DEVICE_SIDE, max_len=1024, share=0.1),
        "join_answer": Target(
            join_answer, (_with_head(_joined()),), DEVICE_SIDE, max_len=8192, share=0.2
        ),
        "ca_answer": Target(
            ca_answer, (_with_head(_access().authority.pem),), DEVICE_SIDE, share=0.2
        ),
        "certificate": Target(certificate, (_certificate().encode(),), (TrustError,), share=0.05),
        "join_request": Target(join_request, _requests(), (), share=0.1),
        "request_der": Target(request_der, (der,), (TrustError,), max_len=1024),
    }
