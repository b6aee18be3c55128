"""Private keys as files: `keys/<role>-<n>.pem`, ed25519.

Which role a key has is what the signed metadata says of its id; the names of files are for
people. So a key that no role names (yet, or no longer) does no harm where it lies.
"""

from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]

from fleetprune.errors import ConfigError

KEYS = "keys"


def load_keys(folder: Path) -> dict[str, CryptoSigner]:
    """Read the private keys of a repository.

    Args:
        folder: The repository.

    Returns:
        Key id to signer.

    Raises:
        ConfigError: There is no repository, or a key is unreadable.
    """
    if not (folder / KEYS).is_dir():
        raise ConfigError(
            f"no release repository in {folder}: {folder / KEYS} is missing; "
            "`fleetprune coordinator init` makes one"
        )
    signers = (load_key(path) for path in sorted((folder / KEYS).glob("*.pem")))
    return {signer.public_key.keyid: signer for signer in signers}


def load_key(path: Path) -> CryptoSigner:
    """Read one private key; ConfigError if it is missing or unreadable."""
    try:
        return CryptoSigner(load_pem_private_key(path.read_bytes(), password=None))
    except (OSError, ValueError, TypeError) as e:
        raise ConfigError(f"cannot read the private key {path}: {e}") from e


def signers_of(
    role: str, key_ids: list[str], keys: Mapping[str, CryptoSigner]
) -> list[CryptoSigner]:
    """Those keys that count for a role.

    Args:
        role: Its name, for the message.
        key_ids: What the signed metadata names.
        keys: What there is, by key id.

    Raises:
        ConfigError: There is none.
    """
    found = [keys[k] for k in key_ids if k in keys]
    if not found:
        named = ", ".join(k[:8] for k in key_ids)
        raise ConfigError(f"no private key of role {role} in keys/, expected one of: {named}")
    return found
