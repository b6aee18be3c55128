"""Who signs what in a release repository, and for how long that is believed.

    root        the list of keys                       may be offline
    targets     releases: models, manifests, deltas    may be offline
    ├── rollouts    which of them devices run          online
    └── graphs      what devices train with            online
    snapshot    a consistent set of the three          online
    timestamp   that this set is the newest            online

`rollouts` and `graphs` are delegated by `targets`: their keys count for paths below `rollouts/`
and `graphs/` and nowhere else, so whoever steals them cannot make a device run an unsigned model.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from tuf.api.metadata import (  # type: ignore[attr-defined]  # tuf re-exports without saying so
    DelegatedRole,
    MetaFile,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)

Payload = TypeVar("Payload", Root, Targets, Snapshot, Timestamp)

ROLLOUTS, GRAPHS = "rollouts", "graphs"
DELEGATED = (ROLLOUTS, GRAPHS)
OFFLINE = (Root.type, Targets.type)
"""Roles whose keys may be moved off the machine."""
ONLINE = (Snapshot.type, Timestamp.type, *DELEGATED)
TOP = (Root.type, Targets.type, Snapshot.type, Timestamp.type)
"""Roles whose keys root names."""
ROLES = (*OFFLINE, *ONLINE)


@dataclass(frozen=True, slots=True)
class Expiry:
    """How long signed metadata of each role is believed by devices."""

    root: timedelta = timedelta(days=365)
    targets: timedelta = timedelta(days=90)
    rollouts: timedelta = timedelta(days=7)
    graphs: timedelta = timedelta(days=7)
    snapshot: timedelta = timedelta(days=7)
    timestamp: timedelta = timedelta(days=1)  # bounds how long a device can be kept from an update

    def of(self, role: str) -> timedelta:
        """Life of one role's metadata."""
        life: timedelta = getattr(self, role)
        return life


def paths_of(role: str) -> list[str]:
    """Patterns of the target paths that a delegated role may sign."""
    return [f"{role}/*"]


def role_for(path: str) -> str:
    """The role that signs a target path."""
    first = path.partition("/")[0]
    return first if first in DELEGATED else Targets.type


def delegated_role(role: str, key_ids: list[str]) -> DelegatedRole:
    """How `targets` delegates: one signature counts, and nobody else is asked for these paths."""
    return DelegatedRole(role, key_ids, 1, terminating=True, paths=paths_of(role))


def meta_file(version: int, data: bytes) -> MetaFile:
    """How one metadata file names another: version, length and hash, so nothing can be mixed."""
    return MetaFile.from_data(version, data, ["sha256"])
