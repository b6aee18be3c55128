"""A new certificate before the old one ends, over the connection that the old one opened.

    pending.key    made first, and kept until a certificate for it has come
    device.pem     certificate and key, replaced in one step; then the connection is made anew

Killed in between, the agent still has the certificate that it showed, and asks again with the same
key. The coordinator answers the same key with the same certificate, so nothing is lost if its
answer is.
"""

import logging
import random
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fleetprune.errors import InstallError, TrustError
from fleetprune.files import storage_errors, sync_folder, write_atomic
from fleetprune.messages import Certificate, Renew
from fleetprune.mqtt import BrokerSettings
from fleetprune.retry import Backoff
from fleetprune_agent.device_key import make_key, make_request
from fleetprune_agent.identity import RENEWED, Identity, current, examine, shown

log = logging.getLogger(__name__)

ASK: Final = Backoff(first_s=60.0, most_s=6 * 3600.0)
PENDING: Final = "pending.key"


class Renewal:
    """Keeps one device's certificate valid. Used by one thread."""

    def __init__(
        self,
        device: str,
        broker: BrokerSettings,
        state: Path,
        *,
        now: Callable[[], float],
        rng: random.Random,
        send: Callable[[bytes], bool],
        use: Callable[[Path], None],
    ) -> None:
        """Find the certificate to show.

        Args:
            device: Our name.
            broker: As configured.
            state: Folder that the agent owns; exists.
            now: Seconds since 1970: whether a certificate ends soon is judged by it.
            rng: Spreads retries.
            send: Hands a `Renew` to the broker; False: not connected.
            use: Told of a new certificate with its key, to connect with from now on.
        """
        self._device, self._broker, self._state = device, broker, state
        self._now, self._rng, self._send, self._use = now, rng, send, use
        self._identity = current(broker, state, now())
        self._attempt, self._ask_at = 0, 0.0
        self._drop_installed()

    @property
    def identity(self) -> Identity | None:
        """What is shown now; None: no certificate that we could renew."""
        return self._identity

    @property
    def settings(self) -> BrokerSettings:
        """The broker's settings with the certificate that is shown."""
        return shown(self._broker, self._identity)

    def keep(self, at: float) -> None:
        """Ask for a new certificate if it is time.

        Args:
            at: Seconds of a clock that is never set, for waits.
        """
        identity = self._identity
        if identity is None or at < self._ask_at or not identity.due(self._now()):
            return
        try:
            request = make_request(self._pending_key(), self._device)
            if not self._send(Renew(request=request.decode()).to_bytes()):
                return
        except InstallError as e:
            log.warning("the certificate cannot be renewed now: %s", e)
        self._ask_at = at + ASK.half_jitter(self._attempt, self._rng)
        self._attempt += 1

    def take(self, payload: bytes) -> None:
        """Act on an unverified `Certificate`.

        Raises:
            MessageError: It is malformed.
            TrustError: It is not ours; the old one stays.
            InstallError: The disk refuses; the old one stays.
        """
        answer = Certificate.from_bytes(payload)
        pending = self._state / PENDING
        if not answer.certificate:
            log.warning("no new certificate from the coordinator: %s", answer.reason)
            return
        if not pending.is_file():
            return  # it came twice
        made = install(
            answer.certificate, pending, self._state / RENEWED, self._broker.ca_file, self._device
        )
        self._identity, self._attempt, self._ask_at = made, 0, 0.0
        self._use(made.cert_file)
        log.info("a new certificate is valid until %s", _day(made.not_after))

    def _drop_installed(self) -> None:
        """Forget a pending key that we were killed after putting in place."""
        pending, renewed = self._state / PENDING, self._state / RENEWED
        with storage_errors("read", pending):
            if (
                pending.is_file()
                and renewed.is_file()
                and pending.read_bytes() in renewed.read_bytes()
            ):
                pending.unlink()

    def _pending_key(self) -> bytes:
        pending = self._state / PENDING
        with storage_errors("read", pending):
            if pending.is_file():
                return pending.read_bytes()
        key = make_key()
        write_atomic(pending, key, mode=0o600)
        return key


def install(
    certificate: str, pending: Path, into: Path, ca_file: Path | None, device: str
) -> Identity:
    """Check a certificate that came for a pending key, and put both in place in one step.

    Args:
        certificate: PEM, unverified.
        pending: The key; removed at the end.
        into: The file to replace.
        ca_file: The authority's certificate.
        device: The name it must have.

    Raises:
        TrustError: The certificate is for another key or name, or another authority's.
        InstallError: The disk refuses.
    """
    if ca_file is None:
        raise TrustError("a certificate came, but there is no ca_file to check it by")
    try:  # nothing but one certificate: a key that came with it would be taken for ours
        alone = ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(certificate.strip()))
    except ValueError as e:
        raise TrustError("what came is no certificate (PEM)") from e
    trial = into.with_name(f"{into.name}.new")
    with storage_errors("write", into):
        write_atomic(trial, alone.encode() + pending.read_bytes(), mode=0o600)
        try:
            made = examine(trial, trial, ca_file)
            if made.name != device:
                raise TrustError(f"certificate for {made.name!r}, expected {device!r}")  # noqa: TRY301
        except TrustError:
            trial.unlink()
            raise
        trial.replace(into)
        sync_folder(into.parent)
        pending.unlink()
    return Identity(into, into, made.name, made.not_before, made.not_after)


def _day(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d}"
