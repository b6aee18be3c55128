"""Who may take part: tokens are made and used, certificates issued, renewed and revoked.

A device joins once, with a token, and renews by itself with the certificate that it has. The
token, not the device, says which class it is of. What a token did is decided in one transaction
before the certificate is handed out; a device that did not get it asks again with the same key and
the same token, as long as the token lives, and gets the same certificate. Any other key is late.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import TypeAdapter, ValidationError

from fleetprune.errors import ConfigError, FleetpruneError
from fleetprune.join_token import Token
from fleetprune.messages import Name
from fleetprune_coordinator.access_book import (
    AccessBook,
    Certified,
    DeviceAccess,
    TokenRecord,
)
from fleetprune_coordinator.authority import RESERVED, Asked, Authority, read_request
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.gate import Gate, why_not
from fleetprune_coordinator.tokens import Kept, matches, new_token

ACCESS: Final = "access"  # folder in the fleet's state folder
BOOK: Final = "access.db"
RENEWALS_A_DAY: Final = 8  # per device: what a looping agent may cost us
_DAY_S: Final = 24 * 3600.0
_FRESH: Final = 2 / 3  # share of a certificate's life in which the same key gets the same one again
_NAMES: Final = TypeAdapter(Name)


class DeniedError(FleetpruneError):
    """A device may not have what it asks for; says why, and nothing that it does not know."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A device that was let in."""

    device: str
    device_class: str
    certificate: str
    """PEM."""


class Access:
    """The authority with its memory; threads may share it, and processes the folder."""

    def __init__(self, folder: Path, now: Callable[[], float], life: timedelta) -> None:
        """Open.

        Args:
            folder: As `init_authority` made it.
            now: Seconds since 1970.
            life: Of devices' certificates.

        Raises:
            ConfigError: There is no authority.
            RegistryError: Its memory cannot be opened.
        """
        self.authority = Authority(folder)
        self._book = AccessBook(folder / BOOK)
        self._now, self._life = now, life
        self.gate = Gate(self._book)

    def close(self) -> None:
        """Close the file."""
        self._book.close()

    # ---- what the operator does

    def make_token(self, device: str, device_class: str, life_s: float) -> str:
        """A new token for a device, shown once; earlier ones for it are void.

        Raises:
            ConfigError: No device may be called so.
        """
        check_name(device)
        token, now = new_token(device), self._now()
        with self._book.transaction():
            self._book.forget_before(now - 7 * _DAY_S)
            self._book.add_token(
                TokenRecord(token.id, device, device_class, Kept.of(token), now + life_s, None)
            )
        return token.text()

    def revoke(self, device: str, reason: str) -> None:
        """Shut a device out until a new token lets it in; harmless when repeated.

        Raises:
            ConfigError: It has never joined, and has no token.
        """
        with self._book.transaction():
            known = next((d for d in self._book.devices(0.0) if d.name == device), None)
            if known is None and not self._book.certificates(device=device):
                raise ConfigError(f"no device {device} has joined: `fleetprune access list`")
            self._book.revoke(device, reason, self._now())

    def devices(self) -> list[DeviceAccess]:
        """All that have joined, by name."""
        return self._book.devices(self._now())

    def revocations(self) -> bytes:
        """The list of revoked certificates for a broker, PEM."""
        now = self._now()
        revoked = [
            (int(serial, 16), datetime.fromtimestamp(since, UTC))
            for serial, since in self._book.revoked(now)
        ]
        return self.authority.revocations(revoked, datetime.fromtimestamp(now, UTC))

    def shut_out(self) -> list[str]:
        """Revoked devices that no token lets in again: a broker must not carry their messages."""
        return [
            d.name for d in self.devices() if d.revoked_at is not None and d.token_until is None
        ]

    # ---- what devices ask for

    def join(self, text: str, request: str) -> Admitted:
        """Let a device in.

        Args:
            text: Its token, unverified.
            request: Its certificate request, PEM, unverified.

        Raises:
            DeniedError: The token or the request does not hold.
            TrustError: The request is malformed or for another name.
        """
        token, now = Token.parse(text), self._now()
        with self._book.transaction():
            record = self._valid(token, now)
            asked = read_request(request, record.device)
            key = asked.digest
            if record.used_by not in {None, key}:
                raise DeniedError(
                    f"the token has been used by another key: if that was not {record.device}, "
                    "revoke it"
                )
            if record.used_by is None:
                self._check_key(key)
                self._book.use_token(record.id, key, now)
                self._book.admit(record.device, record.device_class)
            pem = self._fresh(record.device, key, now) or self._issue(asked, now)
        return Admitted(record.device, record.device_class, pem)

    def renew(self, device: str, request: str) -> str:
        """A new certificate for a device that has one, PEM.

        Args:
            device: Whom the transport knows the sender to be.
            request: Unverified.

        Raises:
            DeniedError: It has never joined, or is revoked, or asks all the time.
            TrustError: The request is malformed or for another name.
        """
        asked = read_request(request, device)
        key, now = asked.digest, self._now()
        with self._book.transaction():
            known = self._book.device(device)
            if (why := why_not(device, known)) is not None:
                raise DeniedError(why)
            if (pem := self._fresh(device, key, now)) is not None:
                return pem
            issued = self._book.certificates(device=device)
            if sum(c.issued_at > now - _DAY_S for c in issued) >= RENEWALS_A_DAY:
                raise DeniedError(f"more than {RENEWALS_A_DAY} certificates a day for {device}")
            self._check_key(key, device)
            return self._issue(asked, now)

    def _valid(self, token: Token | None, now: float) -> TokenRecord:
        """What is known of a token that holds; DeniedError says no more than that it does not."""
        record = None if token is None else self._book.token(token.id)
        holds = token is not None and matches(token, None if record is None else record.kept)
        if (
            not holds
            or record is None
            or token is None
            or record.expires_at <= now
            or record.device != token.device
        ):
            raise DeniedError(
                "the token is not valid (any more): `fleetprune access token` makes a new one"
            )
        return record

    def _check_key(self, key: str, device: str | None = None) -> None:
        """A key that was another device's, or is revoked, is nobody's any more."""
        for earlier in self._book.certificates(key=key):
            if earlier.revoked_at is not None or earlier.device != (device or earlier.device):
                raise DeniedError("this key was revoked or is another device's: make a new one")

    def _fresh(self, device: str, key: str, now: float) -> str | None:
        """The certificate that this key has already got, if it is a new one."""
        for c in self._book.certificates(key=key):
            left = (c.not_after - now) / (c.not_after - c.not_before)
            if c.device == device and c.revoked_at is None and left > _FRESH:
                return c.pem
        return None

    def _issue(self, asked: Asked, now: float) -> str:
        made = self.authority.certify(asked, datetime.fromtimestamp(now, UTC), self._life)
        pem = made.public_bytes(Encoding.PEM).decode()
        self._book.add_certificate(
            Certified(
                serial=f"{made.serial_number:x}",
                device=asked.device,
                key=asked.digest,
                pem=pem,
                issued_at=now,
                not_before=made.not_valid_before_utc.timestamp(),
                not_after=made.not_valid_after_utc.timestamp(),
            )
        )
        return pem


def open_access(config: FleetConfig, now: Callable[[], float]) -> Access | None:
    """The fleet's authority; None: none was made, and whoever the broker lets in takes part."""
    folder = config.state / ACCESS
    if not folder.exists():
        return None
    return Access(folder, now, timedelta(days=config.access.device_days))


def check_name(device: str) -> None:
    """ConfigError unless a device may be called so."""
    try:
        _NAMES.validate_python(device)
    except ValidationError as e:
        raise ConfigError(
            f"device name {device!r}, expected at most 64 letters, digits, '.', '_' and '-'"
        ) from e
    if device.lower().startswith(RESERVED):
        raise ConfigError(f"device name {device!r}: names that begin with {RESERVED} are ours")
