"""Making and checking one-time tokens; what is kept of one is the salted hash of its secret.

The secret has 192 bits from the system's generator, so a plain SHA-256 is enough: nobody can try
secrets one by one, however fast the hash.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field

from fleetprune.join_token import Token

_SALT_BYTES = 16
_DUMMY_SALT = secrets.token_bytes(_SALT_BYTES)


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of a secret."""

    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)

    @classmethod
    def of(cls, token: Token) -> "Kept":
        """To be stored."""
        salt = secrets.token_bytes(_SALT_BYTES)
        return cls(salt, _digest(salt, token.secret))


def new_token(device: str) -> Token:
    """One that never was."""
    return Token(secrets.token_hex(6), secrets.token_urlsafe(24), device)


def matches(token: Token, kept: Kept | None) -> bool:
    """Whether a token's secret is the one that was kept, in a time that does not depend on it.

    Args:
        token: Unverified.
        kept: None: there is no such token; takes as long as if there were one.
    """
    known = kept or Kept(_DUMMY_SALT, bytes(hashlib.sha256().digest_size))
    same = hmac.compare_digest(_digest(known.salt, token.secret), known.digest)
    return same and kept is not None


def _digest(salt: bytes, secret: str) -> bytes:
    return hashlib.sha256(salt + secret.encode()).digest()
