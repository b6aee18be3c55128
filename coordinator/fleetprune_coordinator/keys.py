"""Making a release repository: its keys and the first signed metadata.

    folder/keys/<role>.pem           private keys (ed25519), mode 0600 in a folder of mode 0700
    folder/public/metadata/          what devices read: 1.root.json, N.targets.json, ...
    folder/public/targets/           the files themselves

The four TUF roles have a key each. `root.pem` signs nothing but the list of keys and may be
moved off the machine; it is asked for once a year (see `ReleaseRepository.refresh_timestamp`).
Devices are provisioned with `1.root.json`.
"""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.metadata import (  # type: ignore[attr-defined]  # tuf re-exports without saying so
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)

from fleetprune.errors import ConfigError
from fleetprune.files import storage_errors, sync_folder, write_atomic

Payload = TypeVar("Payload", Root, Targets, Snapshot, Timestamp)
ROLES = (Root.type, Targets.type, Snapshot.type, Timestamp.type)


@dataclass(frozen=True, slots=True)
class Expiry:
    """How long signed metadata of each role is believed by devices."""

    root: timedelta = timedelta(days=365)
    targets: timedelta = timedelta(days=90)
    snapshot: timedelta = timedelta(days=7)
    timestamp: timedelta = timedelta(days=1)  # bounds how long a device can be kept from an update

    def of(self, role: str) -> timedelta:
        """Life of one role's metadata."""
        lives = {
            Root.type: self.root,
            Targets.type: self.targets,
            Snapshot.type: self.snapshot,
            Timestamp.type: self.timestamp,
        }
        return lives[role]


def sign(signed: Payload, signer: CryptoSigner) -> bytes:
    """Serialised metadata with one signature."""
    metadata = Metadata(signed)
    metadata.sign(signer)
    return metadata.to_bytes()


def meta_file(version: int, data: bytes) -> MetaFile:
    """How one metadata file names another: version, length and hash, so nothing can be mixed."""
    return MetaFile.from_data(version, data, ["sha256"])


def load_signers(folder: Path) -> dict[str, CryptoSigner]:
    """Read the private keys of a repository.

    Args:
        folder: The repository.

    Returns:
        Role to signer; without `root` where that key was moved off the machine.

    Raises:
        ConfigError: There is no repository, or a key is missing or unreadable.
    """
    signers = {}
    for role in ROLES:
        path = folder / "keys" / f"{role}.pem"
        try:
            signers[role] = CryptoSigner(load_pem_private_key(path.read_bytes(), password=None))
        except FileNotFoundError as e:
            if role == Root.type and (folder / "keys").is_dir():
                continue
            raise ConfigError(
                f"no release repository in {folder}: {path} is missing; "
                "`fleetprune coordinator init` makes one"
            ) from e
        except (OSError, ValueError, TypeError) as e:
            raise ConfigError(f"cannot read the private key {path}: {e}") from e
    return signers


def init_repository(folder: Path, now: datetime, expiry: Expiry | None = None) -> None:
    """Make a release repository: keys and signed, empty metadata.

    Everything is made in a temporary folder beside `folder` and renamed, so a kill leaves no
    half-made repository.

    Args:
        folder: To be made; may exist if it is empty.
        now: UTC; lives of the metadata count from here.
        expiry: Lives; the default of each role where None.

    Raises:
        ConfigError: `folder` already holds something.
        InstallError: The disk is full or refuses.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} already holds keys or files, expected a new or empty folder: "
            "keys are never overwritten"
        )
    with storage_errors("make", folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            _fill(staging, now, expiry or Expiry())
            staging.chmod(0o755)
            staging.rename(folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _fill(folder: Path, now: datetime, expiry: Expiry) -> None:
    keys, public = folder / "keys", folder / "public"
    keys.mkdir(mode=0o700)
    (public / "metadata").mkdir(parents=True)
    (public / "targets").mkdir()
    signers = {role: CryptoSigner.generate_ed25519() for role in ROLES}
    for role, signer in signers.items():
        write_atomic(keys / f"{role}.pem", signer.private_bytes, mode=0o600)
    for name, data in _first_metadata(signers, now, expiry).items():
        write_atomic(public / "metadata" / name, data)
    for path in (public, folder):
        sync_folder(path)


def _first_metadata(
    signers: Mapping[str, CryptoSigner], now: datetime, expiry: Expiry
) -> dict[str, bytes]:
    root = Root(expires=now + expiry.root, consistent_snapshot=True)
    for role, signer in signers.items():
        root.add_key(signer.public_key, role)
    targets = sign(Targets(expires=now + expiry.targets), signers[Targets.type])
    snapshot = sign(
        Snapshot(expires=now + expiry.snapshot, meta={"targets.json": meta_file(1, targets)}),
        signers[Snapshot.type],
    )
    timestamp = sign(
        Timestamp(expires=now + expiry.timestamp, snapshot_meta=meta_file(1, snapshot)),
        signers[Timestamp.type],
    )
    return {
        "1.root.json": sign(root, signers[Root.type]),
        "1.targets.json": targets,
        "1.snapshot.json": snapshot,
        "timestamp.json": timestamp,
    }
