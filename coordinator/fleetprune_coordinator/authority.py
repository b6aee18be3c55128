"""The fleet's certificate authority: who may speak, as whom, and until when.

    folder/ca.key, ca.crt                      signs everything below; like all here ECDSA P-256
    folder/broker.key, broker.crt              the MQTT broker, a TLS server
    folder/join.key, join.crt                  the endpoint where devices join, a TLS server
    folder/coordinator.key, coordinator.crt    a client: "fleetprune-coordinator"
    folder/blocks.key, blocks.crt              a client: "fleetprune-blocks", the block servers

Keys have mode 0600 in a folder of mode 0700 and are never overwritten. A device's key is made on
the device; what comes here is a request that proves its possession. Of a request nothing is taken
over but the public key: name, purpose and lifetime are ours.
"""

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleetprune.errors import ConfigError, TrustError
from fleetprune.files import write_atomic
from fleetprune_coordinator.new_folder import new_folder

RESERVED: Final = "fleetprune-"
"""No device's name begins so: these are ours."""
COORDINATOR: Final = "fleetprune-coordinator"
BLOCKS: Final = "fleetprune-blocks"
CLIENTS: Final = {"coordinator": COORDINATOR, "blocks": BLOCKS}
SERVERS: Final = ("broker", "join")
MAX_REQUEST: Final = 8 * 1024  # bytes; ours have 400
SKEW: Final = timedelta(hours=1)  # by which a device's clock may be behind
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
_CURVES: Final = (ec.SECP256R1, ec.SECP384R1)


@dataclass(frozen=True, slots=True)
class Lives:
    """How long certificates are valid."""

    ca: timedelta = timedelta(days=7300)
    own: timedelta = timedelta(days=730)
    """Of broker, join endpoint, coordinator and block servers; `fleetprune access reissue`."""
    device: timedelta = timedelta(days=180)
    """Devices renew in the last third: they may be away for two months."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A certificate request that holds: somebody has this key and wants to be called so."""

    device: str
    key: PublicKey
    digest: str
    """SHA-256 of the public key, in hex."""


def init_authority(
    folder: Path, fleet: str, servers: Mapping[str, Sequence[str]], now: datetime, lives: Lives
) -> None:
    """Make an authority and the certificates that are not devices'.

    Everything is made in a temporary folder and renamed: a kill leaves nothing half-made.

    Args:
        folder: To be made; may exist if it is empty.
        fleet: For the authority's own name.
        servers: Per name in `SERVERS` the host names and addresses that clients know it by.
        now: UTC.
        lives: Lifetimes.

    Raises:
        ConfigError: `folder` already holds something, or a host name is none.
        InstallError: The disk is full or refuses.
    """
    with new_folder(folder) as staging:
        key = _make_key(staging / "ca.key")
        _write(staging / "ca.crt", _root(key, fleet, now, lives.ca))
        authority = Authority(staging)
        for name in SERVERS:
            _make_key(staging / f"{name}.key")
            authority.certify_server(name, servers[name], now, lives.own)
        for name in CLIENTS:
            _make_key(staging / f"{name}.key")
            authority.certify_client(name, now, lives.own)


class Authority:
    """An authority's folder."""

    def __init__(self, folder: Path) -> None:
        """Read it.

        Raises:
            ConfigError: There is none, or it cannot be read.
        """
        self.folder = folder
        try:
            self._key = load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
            self.certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        except FileNotFoundError as e:
            raise ConfigError(
                f"no authority in {folder}: {Path(e.filename).name} is missing; "
                "`fleetprune access init` makes one"
            ) from e
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as e:
            raise ConfigError(f"the authority in {folder} cannot be read: {e}") from e

    @property
    def pem(self) -> bytes:
        """The authority's certificate, by which clients know our servers."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, in hex: short enough to be read out to a device's owner."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def certify(self, asked: Asked, now: datetime, life: timedelta) -> x509.Certificate:
        """A device's certificate: a TLS client of this name, and nothing else.

        Args:
            asked: As `read_request` has checked it.
            now: UTC.
            life: From now; ends with the authority's own at the latest.
        """
        return self._sign(asked.key, asked.device, now, life, ExtendedKeyUsageOID.CLIENT_AUTH)

    def certify_client(self, file: str, now: datetime, life: timedelta) -> x509.Certificate:
        """A new certificate for the key `<file>.key` of one of `CLIENTS`, in `<file>.crt`."""
        made = self._sign(
            self._public(file), CLIENTS[file], now, life, ExtendedKeyUsageOID.CLIENT_AUTH
        )
        _write(self.folder / f"{file}.crt", made)
        return made

    def certify_server(
        self, file: str, names: Sequence[str], now: datetime, life: timedelta
    ) -> x509.Certificate:
        """A new certificate for the key `<file>.key` of one of `SERVERS`, in `<file>.crt`.

        Args:
            file: Which.
            names: Host names and addresses, as clients have them in their configuration.
            now: UTC.
            life: As in `certify`.

        Raises:
            ConfigError: There are no names, or one cannot be in a certificate.
        """
        if not names:
            raise ConfigError(f"the certificate of {file} needs a host name or an address")
        made = self._sign(
            self._public(file),
            f"{RESERVED}{file}",
            now,
            life,
            ExtendedKeyUsageOID.SERVER_AUTH,
            x509.SubjectAlternativeName([_host(name) for name in names]),
        )
        _write(self.folder / f"{file}.crt", made)
        return made

    def own_names(self, file: str) -> list[str]:
        """Host names and addresses in the certificate of one of `SERVERS`."""
        data = (self.folder / f"{file}.crt").read_bytes()
        names = x509.load_pem_x509_certificate(data).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
        return [str(name.value) for name in names.value]

    def revocations(self, revoked: Iterable[tuple[int, datetime]], now: datetime) -> bytes:
        """A revocation list in PEM.

        It is valid as long as the authority: an expired list would lock out everybody, and a
        broker reads it from a file that only we replace.

        Args:
            revoked: Serial numbers, and since when.
            now: UTC.
        """
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - SKEW)
            .next_update(self.certificate.not_valid_after_utc)
            .add_extension(x509.CRLNumber(int(now.timestamp())), critical=False)
            .add_extension(self._issuer(), critical=False)
        )
        for serial, since in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(serial)
                .revocation_date(since)
                .build()
            )
        return builder.sign(self._signer(), hashes.SHA256()).public_bytes(Encoding.PEM)

    def _sign(
        self,
        key: PublicKey,
        name: str,
        now: datetime,
        life: timedelta,
        purpose: x509.ObjectIdentifier,
        *more: x509.ExtensionType,
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - SKEW)
            .not_valid_after(min(now + life, self.certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(self._issuer(), critical=False)
        )
        for extension in more:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self._signer(), hashes.SHA256())

    def _issuer(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self._signer().public_key())

    def _signer(self) -> ec.EllipticCurvePrivateKey:
        if not isinstance(self._key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{self.folder / 'ca.key'} is not an elliptic curve's key")
        return self._key

    def _public(self, file: str) -> ec.EllipticCurvePublicKey:
        try:
            key = load_pem_private_key((self.folder / f"{file}.key").read_bytes(), password=None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as e:
            raise ConfigError(f"{self.folder / file}.key cannot be read: {e}") from e
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{self.folder / file}.key is not an elliptic curve's key")
        return key.public_key()


def read_request(pem: str, device: str) -> Asked:
    """Check a certificate request (PKCS #10, PEM) from the network.

    Args:
        pem: Unverified.
        device: Whose it must be.

    Raises:
        TrustError: It is malformed, not signed by its own key, for another name, or its key is of
            a kind that we do not use.
    """
    if len(pem) > MAX_REQUEST:
        raise TrustError(f"certificate request of {len(pem)} bytes, expected at most {MAX_REQUEST}")
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        subject = [(a.oid, a.value) for a in request.subject]
        key = request.public_key()
        signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as e:
        raise TrustError(f"certificate request cannot be read: {e}") from e
    if not (
        isinstance(key, ed25519.Ed25519PublicKey)
        or (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES))
    ):
        raise TrustError("certificate request with a key that is neither P-256, P-384 nor Ed25519")
    if not signed:
        raise TrustError("certificate request is not signed with its own key")
    if subject != [(NameOID.COMMON_NAME, device)]:
        raise TrustError(
            f"certificate request for {request.subject.rfc4514_string()[:100]!r}, "
            f"expected 'CN={device}'"
        )
    encoded = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return Asked(device, key, hashlib.sha256(encoded).hexdigest())


def _make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_atomic(path, data, mode=0o600)
    return key


def _root(
    key: ec.EllipticCurvePrivateKey, fleet: str, now: datetime, life: timedelta
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Fleetprune fleet {fleet}"[:64])])
    public = key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + life)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as e:
        raise ConfigError(f"{name!r} is no host name: write international names in ASCII") from e


def _write(path: Path, certificate: x509.Certificate) -> None:
    write_atomic(path, certificate.public_bytes(Encoding.PEM))
