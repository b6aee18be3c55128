"""Private keys as files: `keys/<role>-*.pem`, ed25519, encrypted where there is a passphrase.

Which role a key has is what the signed metadata says of its id; the names of files are for
people. So a key that no role names (yet, or no longer) does no harm where it lies.

A passphrase comes from a file that an environment variable names, or from a prompt: arguments are
read by every user of the machine.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]

from fleetprune.errors import ConfigError
from fleetprune.files import storage_errors, sync_folder, write_atomic

KEYS = "keys"
PASSPHRASE_FILE = "FLEETPRUNE_PASSPHRASE_FILE"  # noqa: S105  (the name of the variable)
MAX_PEM = 16 * 1024  # bytes
Passphrase = Callable[[Path], bytes | None]
"""The passphrase of a key file; None: there is none."""


def passphrase_from_environment(_key: Path | None = None) -> bytes | None:
    """First line of the file that `FLEETPRUNE_PASSPHRASE_FILE` names; None: it is not set.

    Raises:
        ConfigError: The file is unreadable or empty.
    """
    name = os.environ.get(PASSPHRASE_FILE)
    if not name:
        return None
    try:
        phrase = Path(name).read_bytes().partition(b"\n")[0].strip()
    except OSError as e:
        raise ConfigError(f"cannot read the passphrase file {name}: {e.strerror}") from e
    if not phrase:
        raise ConfigError(f"the passphrase file {name} is empty")
    return phrase


class LockedKeyError(ConfigError):
    """A key is encrypted and there is no passphrase."""


@dataclass(frozen=True)
class KeyRing:
    """The private keys that are at hand."""

    keys: dict[str, CryptoSigner] = field(default_factory=dict)
    """By key id."""
    locked: tuple[Path, ...] = ()
    """Encrypted, without a passphrase: as good as not there."""

    def of(self, key_ids: Iterable[str]) -> list[CryptoSigner]:
        """Those of some keys that are here."""
        return [self.keys[k] for k in key_ids if k in self.keys]

    def require(self, role: str, key_ids: Sequence[str]) -> list[CryptoSigner]:
        """`of`; ConfigError if there is none."""
        found = self.of(key_ids)
        if not found:
            named = ", ".join(k[:8] for k in key_ids)
            hint = ""
            if self.locked:
                names = ", ".join(path.name for path in self.locked)
                hint = f"; {names} are encrypted: name a file with the passphrase in "
                hint += PASSPHRASE_FILE
            raise ConfigError(
                f"no private key of role {role} in keys/, expected one of: {named}{hint}"
            )
        return found


def load_keys(folder: Path, passphrase: Passphrase = passphrase_from_environment) -> KeyRing:
    """Read the private keys of a repository.

    Args:
        folder: The repository.
        passphrase: Of encrypted keys.

    Raises:
        ConfigError: There is no repository, a key is unreadable, or the passphrase is wrong.
    """
    if not (folder / KEYS).is_dir():
        raise ConfigError(
            f"no release repository in {folder}: {folder / KEYS} is missing; "
            "`fleetprune coordinator init` makes one"
        )
    keys, locked = {}, []
    for path in sorted((folder / KEYS).glob("*.pem")):
        try:
            signer = load_key(path, passphrase)
        except LockedKeyError:
            locked.append(path)
        else:
            keys[signer.public_key.keyid] = signer
    return KeyRing(keys, tuple(locked))


def load_key(path: Path, passphrase: Passphrase = passphrase_from_environment) -> CryptoSigner:
    """Read one private key.

    Raises:
        LockedKeyError: It is encrypted and there is no passphrase.
        ConfigError: It is missing, unreadable, no ed25519 key, or the passphrase is wrong.
    """
    data = _read_pem(path, "private")
    phrase = passphrase(path) if b"ENCRYPTED" in data else None
    if phrase is None and b"ENCRYPTED" in data:
        raise LockedKeyError(
            f"{path} is encrypted: name a file with the passphrase in {PASSPHRASE_FILE}"
        )
    try:
        key = load_pem_private_key(data, password=phrase)
    except (ValueError, TypeError) as e:
        reason = "its passphrase is another one" if phrase else str(e)
        raise ConfigError(f"cannot read the private key {path}: {reason}") from e
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"cannot read the private key {path}: expected an ed25519 key")
    return CryptoSigner(key)


def load_public_key(path: Path) -> SSlibKey:
    """Read a public key as `write_key` leaves it; ConfigError if it is anything else."""
    data = _read_pem(path, "public")
    try:
        key = load_pem_public_key(data)
    except ValueError as e:
        raise ConfigError(f"cannot read the public key {path}: {e}") from e
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"cannot read the public key {path}: expected an ed25519 key")
    return SSlibKey.from_crypto(key)


def _read_pem(path: Path, kind: str) -> bytes:
    try:
        with path.open("rb") as f:
            return f.read(MAX_PEM)
    except OSError as e:
        raise ConfigError(f"cannot read the {kind} key {path}: {e.strerror}") from e


def encoded(signer: CryptoSigner, phrase: bytes | None = None) -> bytes:
    """A private key as PEM (PKCS #8), encrypted if there is a passphrase."""
    if phrase is None:
        plain: bytes = signer.private_bytes
        return plain
    key = load_pem_private_key(signer.private_bytes, password=None)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(phrase))


def write_key(path: Path, phrase: bytes | None = None) -> CryptoSigner:
    """Make a key: `path` (private, mode 0600) and `path`.pub.

    Raises:
        ConfigError: There is a file of that name: keys are never overwritten.
        InstallError: The disk is full or refuses.
    """
    public = path.with_name(f"{path.name}.pub")
    for file in (path, public):
        if file.exists():
            raise ConfigError(f"{file} exists: keys are never overwritten")
    key = Ed25519PrivateKey.generate()
    signer = CryptoSigner(key)
    write_atomic(path, encoded(signer, phrase), mode=0o600)
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    write_atomic(public, pem)
    return signer


def add_key(folder: Path, role: str, phrase: bytes | None = None) -> CryptoSigner:
    """Make one more key of a role in a repository's `keys/`, in a file named after its id."""
    signer = CryptoSigner.generate_ed25519()
    path = folder / KEYS / f"{role}-{signer.public_key.keyid[:8]}.pem"
    write_atomic(path, encoded(signer, phrase), mode=0o600)
    return signer


def remove_keys(folder: Path, key_ids: Sequence[str], passphrase: Passphrase) -> None:
    """Delete the private keys with some ids, durably; those that are not here are not missed."""
    with storage_errors("remove a key in", folder / KEYS):
        for path in (folder / KEYS).glob("*.pem"):
            try:
                found = load_key(path, passphrase).public_key.keyid
            except ConfigError:
                continue
            if found in key_ids:
                path.unlink(missing_ok=True)
        sync_folder(folder / KEYS)
