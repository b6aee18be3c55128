"""Making a release repository: its keys and the first signed metadata.

    folder/keys/<role>-*.pem         private keys, mode 0600 in a folder of mode 0700
    folder/public/metadata/          what devices read: 1.root.json, N.targets.json, ...
    folder/public/targets/           the files themselves

The keys of `root` and `targets` may be moved off the machine: the first are asked for once a year
and when a key is replaced, the others once per release. Devices are provisioned with
`1.root.json`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.metadata import (  # type: ignore[attr-defined]  # tuf re-exports without saying so
    Delegations,
    Metadata,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)

from fleetprune.errors import ConfigError
from fleetprune.files import sync_folder, write_atomic
from fleetprune_coordinator.key_files import KEYS, encoded
from fleetprune_coordinator.new_folder import new_folder
from fleetprune_coordinator.roles import (
    DELEGATED,
    ROLES,
    TOP,
    Expiry,
    Payload,
    delegated_role,
    meta_file,
)

RELEASES = "releases"
"""Folder of the release repository below a fleet's state folder."""
MAX_KEYS = 16  # per role; every signature costs a device 8 ms
Signers = Mapping[str, Sequence[CryptoSigner]]


@dataclass(frozen=True, slots=True)
class Quorum:
    """How many keys a role has, and how many must sign."""

    keys: int = 1
    threshold: int = 1


@dataclass(frozen=True, slots=True)
class KeyPlan:
    """The quorum of each role whose keys may be offline; all others have one key."""

    root: Quorum = Quorum()
    targets: Quorum = Quorum()

    def of(self, role: str) -> Quorum:
        """The quorum of one role."""
        return {Root.type: self.root, Targets.type: self.targets}.get(role, Quorum())

    def check(self) -> None:
        """ConfigError if a threshold cannot be met."""
        for role in (Root.type, Targets.type):
            of = self.of(role)
            if not 1 <= of.threshold <= of.keys <= MAX_KEYS:
                raise ConfigError(
                    f"{of.threshold} of {of.keys} keys for role {role}: expected at least 1 of at "
                    f"most {MAX_KEYS}, and no more than there are"
                )


def sign(signed: Payload, signers: Sequence[CryptoSigner]) -> bytes:
    """Serialised metadata with a signature of each signer."""
    metadata = Metadata(signed)
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()


def init_repository(
    folder: Path,
    now: datetime,
    expiry: Expiry | None = None,
    keys: KeyPlan | None = None,
    passphrase: bytes | None = None,
) -> None:
    """Make a release repository: keys and signed, empty metadata.

    Everything is made in a temporary folder beside `folder` and renamed, so a kill leaves no
    half-made repository.

    Args:
        folder: To be made; may exist if it is empty.
        now: UTC; lives of the metadata count from here.
        expiry: Lives; the default of each role where None.
        keys: How many keys; one of each where None.
        passphrase: Of the private keys' files; None: they are not encrypted.

    Raises:
        ConfigError: `folder` already holds something, or a threshold cannot be met.
        InstallError: The disk is full or refuses.
    """
    keys = keys or KeyPlan()
    keys.check()
    with new_folder(folder, mode=0o755) as staging:
        _fill(staging, now, expiry or Expiry(), keys, passphrase)


def _fill(
    folder: Path, now: datetime, expiry: Expiry, plan: KeyPlan, passphrase: bytes | None
) -> None:
    keys, public = folder / KEYS, folder / "public"
    keys.mkdir(mode=0o700)
    (public / "metadata").mkdir(parents=True)
    (public / "targets").mkdir()
    signers = {
        role: [CryptoSigner.generate_ed25519() for _ in range(plan.of(role).keys)] for role in ROLES
    }
    for role, of_role in signers.items():
        for number, signer in enumerate(of_role, start=1):
            write_atomic(keys / f"{role}-{number}.pem", encoded(signer, passphrase), mode=0o600)
    for name, data in _first_metadata(signers, plan, now, expiry).items():
        write_atomic(public / "metadata" / name, data)
    for path in (public, folder):
        sync_folder(path)


def _first_metadata(
    signers: Signers, plan: KeyPlan, now: datetime, expiry: Expiry
) -> dict[str, bytes]:
    root = Root(expires=now + expiry.root, consistent_snapshot=True)
    for role in TOP:
        for signer in signers[role]:
            root.add_key(signer.public_key, role)
        root.roles[role].threshold = plan.of(role).threshold
    public = {role: [s.public_key for s in signers[role]] for role in DELEGATED}
    delegations = Delegations(
        {key.keyid: key for keys in public.values() for key in keys},
        {role: delegated_role(role, [key.keyid for key in keys]) for role, keys in public.items()},
    )
    content = {
        Targets.type: Targets(expires=now + expiry.targets, delegations=delegations),
        **{role: Targets(expires=now + expiry.of(role)) for role in DELEGATED},
    }
    signed = {role: sign(targets, signers[role]) for role, targets in content.items()}
    snapshot = sign(
        Snapshot(
            expires=now + expiry.snapshot,
            meta={f"{role}.json": meta_file(1, data) for role, data in signed.items()},
        ),
        signers[Snapshot.type],
    )
    timestamp = sign(
        Timestamp(expires=now + expiry.timestamp, snapshot_meta=meta_file(1, snapshot)),
        signers[Timestamp.type],
    )
    return {
        "1.root.json": sign(root, signers[Root.type]),
        **{f"1.{role}.json": data for role, data in signed.items()},
        "1.snapshot.json": snapshot,
        "timestamp.json": timestamp,
    }
