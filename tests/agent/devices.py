"""A device with its slots, and a release repository in memory."""

from pathlib import Path

from models import ZEROS
from repositories import Clock, MemoryRepository

from fleetprune_agent.install import Checks, InstallOutcome, install
from fleetprune_agent.journal import Standing, standing
from fleetprune_agent.serving import Predictor
from fleetprune_agent.slots import Slots
from fleetprune_agent.trial import Evidence
from fleetprune_agent.trust import TrustedRepository


class Device:
    """Of class `phone`, which installs when it is told to."""

    def __init__(self, folder: Path, name: str = "d1") -> None:
        self.folder, self.name = folder, name
        self.clock = Clock()
        self.repository = MemoryRepository()
        self.restart()

    def restart(self) -> None:
        self.trusted = TrustedRepository(
            self.folder / "trust", self.repository.bootstrap, self.repository, self.clock
        )
        self.slots = Slots(self.folder)

    def install(
        self, checks: Checks | None = None, evidence: Evidence | None = None
    ) -> InstallOutcome:
        return install(
            self.trusted, self.slots, "phone", checks, device=self.name, evidence=evidence
        )

    def get(self, release: int) -> None:
        """Publish, install and commit a release."""
        self.repository.release(release)
        self.install()
        self.slots.commit()

    def answer(self) -> float:
        """Of the active model, without a say in its future."""
        return float(Predictor(self.slots, commit_after=1 << 30).predict(ZEROS)[0, 0])

    def stands(self) -> Standing:
        return standing(self.slots.journal.read(), self.slots.active(), self.slots.refusals())

    def downloads(self) -> list[str]:
        """Names of models, golden samples and deltas asked for; forgets them."""
        names = [
            name
            for name in self.repository.asked
            if name.startswith("targets/") and not name.endswith(".json")
        ]
        self.repository.asked.clear()
        return [name.rpartition("/")[2].partition(".")[2] for name in names]
