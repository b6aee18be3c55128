"""New keys for old ones, and new lives for metadata whose keys are offline.

Keys of the top roles are named by root, which needs signatures by the root keys of before and of
after; those of the delegated roles are named by targets. Devices that were off follow the chain of
roots, each signed by the keys of the one before. What a retired key signs is refused by every
device that has seen the new root, and a device that was off sees it first of all.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]
from tuf.api.metadata import (  # type: ignore[attr-defined]  # tuf re-exports without saying so
    Metadata,
    Root,
    Targets,
)

from fleetprune.errors import ConfigError
from fleetprune_coordinator.key_files import add_key, load_keys
from fleetprune_coordinator.proposals import About, Proposal, require_free, write_proposal
from fleetprune_coordinator.releases import ReleaseRepository
from fleetprune_coordinator.roles import DELEGATED, OFFLINE, ROLES
from fleetprune_coordinator.signed_folder import SignedFolder, State


@dataclass(frozen=True)
class Rotation:
    """What came of `rotate` or `renew`."""

    role: str
    retired: tuple[str, ...]
    """Ids of the keys that count no longer."""
    added: tuple[str, ...]
    """Ids of the keys that count from now on."""
    pending: Path | None
    """Where it waits for signatures; None: it is published."""


def rotate(
    repository: ReleaseRepository,
    role: str,
    revoke: Sequence[str] = (),
    add: Sequence[SSlibKey] = (),
) -> Rotation:
    """Replace keys of a role, as many by as many; the threshold stays.

    Args:
        repository: The release repository.
        role: Any of the six.
        revoke: The first characters of the ids of the keys to retire; empty: the only one.
        add: Public keys whose private halves are elsewhere; empty: new ones are made in `keys/`.

    Raises:
        ConfigError: There is no such role or key, or it is not clear which.
        RegistryError: Another change of the same metadata waits for signatures.
    """
    if role not in ROLES:
        raise ConfigError(f"there is no role {role}, expected one of: {', '.join(ROLES)}")
    folder = repository.signed
    with folder.change() as state:
        retired = _which(role, state.key_ids(role), revoke)
        if add and len(add) != len(retired):
            raise ConfigError(f"{len(add)} keys to add, expected {len(retired)}: one for each")
        touched = {Root.type, Targets.type} if role == Targets.type else {Root.type}
        require_free(folder.folder, {Targets.type} if role in DELEGATED else touched)
        if not add:
            phrase = folder.passphrase(folder.folder / "keys" / f"{role}.pem")
            add = [add_key(folder.folder, role, phrase).public_key for _ in retired]
            folder.keys = load_keys(folder.folder, folder.passphrase)
        about = About(
            reason=f"another key for role {role}",
            resign=(role,) if role in DELEGATED else (),
            retired=retired,
        )
        documents = _replaced(folder, state, role, retired, add)
        proposal = _propose(folder, about, documents)
    added = tuple(key.keyid for key in add)
    return Rotation(role, retired, added, _publish(repository, proposal))


def renew(repository: ReleaseRepository, role: str) -> Rotation:
    """Sign the metadata of an offline role anew, unchanged, before it expires.

    Raises:
        ConfigError: The role is another one: those are signed anew by themselves.
        RegistryError: Another change of the same metadata waits for signatures.
    """
    if role not in OFFLINE:
        raise ConfigError(
            f"{role}.json is signed anew by `fleetprune coordinator serve`, "
            f"expected one of: {', '.join(OFFLINE)}"
        )
    folder = repository.signed
    with folder.change() as state:
        signed = deepcopy(state.documents[role].signed)
        documents = {role: folder.draft(signed, state.key_ids(role))}
        proposal = _propose(folder, About(reason=f"a longer life for {role}.json"), documents)
    return Rotation(role, (), (), _publish(repository, proposal))


def _which(role: str, key_ids: list[str], revoke: Sequence[str]) -> tuple[str, ...]:
    """Ids of the keys that are meant."""
    named = ", ".join(k[:8] for k in key_ids)
    if not revoke:
        if len(key_ids) > 1:
            raise ConfigError(
                f"role {role} has {len(key_ids)} keys: say which to revoke of {named}"
            )
        return tuple(key_ids)
    found = []
    for start in revoke:
        fitting = [k for k in key_ids if k.startswith(start)]
        if len(fitting) != 1:
            what = "several keys" if fitting else "no key"
            raise ConfigError(
                f"{what} of role {role} with an id that begins with {start}, expected one of: "
                f"{named}"
            )
        found += fitting
    return tuple(dict.fromkeys(found))


def _replaced(
    folder: SignedFolder,
    state: State,
    role: str,
    retired: Sequence[str],
    added: Sequence[SSlibKey],
) -> dict[str, Metadata[Any]]:
    """What must be signed so that some keys count in place of others."""
    targets, root = deepcopy(state.content[Targets.type]), deepcopy(state.root)
    of = targets if role in DELEGATED else root
    for key_id in retired:
        of.revoke_key(key_id, role)
    for key in added:
        of.add_key(key, role)
    if role in DELEGATED:
        return {Targets.type: folder.draft(targets, state.key_ids(Targets.type))}
    both = dict.fromkeys([*state.key_ids(Root.type), *root.roles[Root.type].keyids])
    documents: dict[str, Metadata[Any]] = {Root.type: folder.draft(root, both)}
    if role == Targets.type:
        documents[role] = folder.draft(targets, root.roles[role].keyids)
    return documents


def _propose(folder: SignedFolder, about: About, documents: dict[str, Metadata[Any]]) -> Proposal:
    before = folder.load().documents[Targets.type]
    return write_proposal(folder.folder, about, documents, before, {})


def _publish(repository: ReleaseRepository, proposal: Proposal) -> Path | None:
    """Publish what has all its signatures; otherwise where it waits."""
    if proposal.lacks():
        return proposal.folder
    repository.publish_pending(proposal.folder)
    return None
