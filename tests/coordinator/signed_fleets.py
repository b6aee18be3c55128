"""A release repository whose keys lie where a test wants them, and a device that follows it."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fleetprune.rollout import Rollout
from fleetprune_agent.trust import FolderSource, TrustedRepository
from fleetprune_coordinator.key_files import load_key
from fleetprune_coordinator.keys import KeyPlan, Quorum, init_repository
from fleetprune_coordinator.releases import ReleaseContent, ReleaseRepository

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
PHONE = ReleaseContent(
    onnx=b"phone model", golden=b"phone golden", input_shape=(4,), accuracy=0.5, samples=20
)
TWO_OF_THREE = KeyPlan(root=Quorum(3, 2), targets=Quorum(3, 2))


class Fleet:
    """One repository, its keys here and elsewhere, and devices."""

    def __init__(self, folder: Path, plan: KeyPlan | None = None) -> None:
        self.now = NOW
        self.place, self.folder = folder, folder / "releases"
        self.public = self.folder / "public"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir(parents=True)
        init_repository(self.folder, NOW, keys=plan)
        self.repository = self.open()

    def open(self, **options) -> ReleaseRepository:
        return ReleaseRepository(self.folder, lambda: self.now, **options)

    def device(self, name: str = "device") -> TrustedRepository:
        source = FolderSource(self.public)
        folder = self.place / "devices" / name
        return TrustedRepository(folder, self.repository.root(), source, lambda: self.now)

    def advance(self, **delta: float) -> None:
        self.now += timedelta(**delta)

    def take_away(self, *names: str) -> None:
        """Move private keys off the machine."""
        for name in names:
            (self.folder / "keys" / f"{name}.pem").rename(self.elsewhere / f"{name}.pem")

    def key(self, name: str):
        """A private key, wherever it is."""
        here = self.folder / "keys" / f"{name}.pem"
        return load_key(here if here.exists() else self.elsewhere / f"{name}.pem")

    def release(self, number: int, **fields: object) -> None:
        content = replace(PHONE, onnx=b"model %d" % number, **fields)
        self.repository.publish_release(number, {"phone": content}, to_all=True)

    def stable(self, device: TrustedRepository) -> int:
        """What a device is told after looking anew."""
        device.refresh()
        told = device.rollout("phone")
        assert isinstance(told, Rollout)
        device.manifest("phone", told.stable)
        return told.stable
