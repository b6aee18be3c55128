"""A release repository in memory that can be made to lie.

After python-tuf's `repository_simulator`: it implements the production interface (`BlobSource`)
and signs what its fields say at the moment it is asked, so a test edits a field and lets the
agent look. It is written from the TUF specification and shares no code with the coordinator.
"""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from models import INPUTS, gemm, golden
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from fleetprune.blocks import NotFoundError
from fleetprune.errors import TrustError
from fleetprune.manifest import Manifest, manifest_path
from fleetprune.rollout import Rollout, rollout_path

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
ROLES = (Root.type, Targets.type, Snapshot.type, Timestamp.type)
DELEGATED = ("rollouts", "graphs")


class Clock:
    """The time, as told by the test."""

    def __init__(self, now: datetime = NOW) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **delta: float) -> None:
        self.now += timedelta(**delta)


class MemoryRepository:
    """Honest until a test edits it."""

    def __init__(self, now: datetime = NOW) -> None:
        self.signers = {role: CryptoSigner.generate_ed25519() for role in ROLES + DELEGATED}
        self.root = Root(expires=now + timedelta(days=365), consistent_snapshot=True)
        for role in ROLES:
            self.root.add_key(self.signers[role].public_key, role)
        keys = {role: self.signers[role].public_key for role in DELEGATED}
        delegations = Delegations(
            {key.keyid: key for key in keys.values()},
            {
                role: DelegatedRole(role, [key.keyid], 1, terminating=True, paths=[f"{role}/*"])
                for role, key in keys.items()
            },
        )
        self.targets = Targets(expires=now + timedelta(days=90), delegations=delegations)
        self.delegated = {role: Targets(expires=now + timedelta(days=7)) for role in DELEGATED}
        meta = {f"{role}.json": MetaFile(1) for role in ("targets", *DELEGATED)}
        self.snapshot = Snapshot(expires=now + timedelta(days=7), meta=meta)
        self.timestamp = Timestamp(expires=now + timedelta(days=1), snapshot_meta=MetaFile(1))
        self.bootstrap = self.signed(self.root)
        self.blobs: dict[str, bytes] = {}
        """By name at the source: what is served for targets."""
        self.overrides: dict[str, bytes] = {}
        """By name at the source: served instead of anything else."""
        self.asked: list[str] = []
        self.serials: dict[str, int] = {}
        """By class, of the last rollout."""

    def signed(self, payload, role: str | None = None) -> bytes:
        metadata = Metadata(payload)
        metadata.sign(self.signers[role or payload.type])
        return metadata.to_bytes()

    def add(self, path: str, data: bytes, role: str | None = None) -> str:
        """Sign a target, by the role that may or by another; returns its name at the source."""
        role = role or path.partition("/")[0]
        targets = self.delegated.get(role, self.targets)
        targets.targets[path] = TargetFile.from_data(path, data, ["sha256"])
        folder, _, name = path.rpartition("/")
        blob = f"targets/{folder}/{hashlib.sha256(data).hexdigest()}.{name}"
        self.blobs[blob] = data
        return blob

    def content(self) -> dict[str, Targets]:
        """What signs targets, by role."""
        return {"targets": self.targets, **self.delegated}

    def bump(self) -> None:
        """A new version of everything but root."""
        for role, targets in self.content().items():
            targets.version += 1
            self.snapshot.meta[f"{role}.json"].version = targets.version
        self.snapshot.version += 1
        self.timestamp.version += 1
        self.timestamp.snapshot_meta.version = self.snapshot.version

    def replace_key(self, role: str) -> CryptoSigner:
        """A new key for a role other than root; returns the retired one."""
        retired, self.signers[role] = self.signers[role], CryptoSigner.generate_ed25519()
        of = self.targets if role in DELEGATED else self.root
        of.revoke_key(retired.public_key.keyid, role)
        of.add_key(self.signers[role].public_key, role)
        if of is self.root:
            self.root.version += 1
            self.blobs[f"metadata/{self.root.version}.root.json"] = self.signed(self.root)
        self.bump()
        return retired

    def release(
        self,
        number: int,
        device_class: str = "phone",
        *,
        model: bytes | None = None,
        samples: bytes | None = None,
        fields: Mapping[str, object] | None = None,
        to_all: bool = True,
    ) -> Manifest:
        """Publish a model that answers zeros with its release number, and tell all to run it."""
        model = gemm(number) if model is None else model
        base = f"releases/{device_class}/{number}"
        manifest = Manifest.model_validate(
            {
                "release": number,
                "device_class": device_class,
                "model": f"{base}/model.onnx",
                "sha256": hashlib.sha256(model).hexdigest(),
                "size": len(model),
                "golden": f"{base}/golden.npz",
                "input_shape": (INPUTS,),
                **(fields or {}),
            }
        )
        self.add(f"{base}/model.onnx", model)
        self.add(f"{base}/golden.npz", golden(number) if samples is None else samples)
        self.add(manifest_path(device_class, number), manifest.to_bytes())
        if to_all:
            self.roll_out(device_class, stable=number)
        else:
            self.bump()
        return manifest

    def roll_out(self, device_class: str = "phone", **fields: object) -> Rollout:
        """Tell devices of a class what to run, under the next serial unless `fields` names one."""
        self.serials[device_class] = self.serials.get(device_class, 0) + 1
        rollout = Rollout.model_validate(
            {"device_class": device_class, "serial": self.serials[device_class], **fields}
        )
        self.add(rollout_path(device_class), rollout.to_bytes())
        self.bump()
        return rollout

    def read(self, name: str, max_bytes: int) -> bytes:
        self.asked.append(name)
        data = self._find(name)
        if len(data) > max_bytes:
            raise TrustError(f"{name} is longer than {max_bytes} bytes")
        return data

    def pull(self, name: str, size: int, sha256: str, into: Path) -> None:
        self.asked.append(name)
        into.write_bytes(self._find(name)[:size])

    def _find(self, name: str) -> bytes:
        if name in self.overrides:
            return self.overrides[name]
        if name in self.blobs:
            return self.blobs[name]
        served = {
            f"metadata/{self.root.version}.root.json": self.root,
            f"metadata/{self.snapshot.version}.snapshot.json": self.snapshot,
            "metadata/timestamp.json": self.timestamp,
        }
        for role, targets in self.content().items():
            if name == f"metadata/{targets.version}.{role}.json":
                return self.signed(targets, role)
        if name not in served:
            raise NotFoundError(f"{name} not found")
        return self.signed(served[name])
