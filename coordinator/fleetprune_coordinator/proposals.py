"""Metadata that waits for signatures of keys that are not here: a folder that can be carried about.

    pending/<name>/proposal.json      what it is, and what is done once it is signed
    pending/<name>/root.json          new metadata, partly signed; one or both of them
    pending/<name>/targets.json
    pending/<name>/files/<path>       every file that is signed for the first time
    pending/<name>/before/            what it replaces: targets.json and the chain of roots

It holds everything that a person must see before signing, so it can be signed on a machine that
has nothing else: no network, no fleet, no repository. What is here is not trusted. Nothing of it is
published before the signatures are verified against the root of today, and every file against the
hash that was signed.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from securesystemslib.formats import encode_canonical
from securesystemslib.signer import CryptoSigner, Key  # type: ignore[attr-defined]
from tuf.api.metadata import (  # type: ignore[attr-defined]  # tuf re-exports without saying so
    Metadata,
    Root,
    TargetFile,
    Targets,
)

from fleetprune.errors import ConfigError, MessageError, RegistryError, TrustError
from fleetprune.files import storage_errors, sync_folder, write_atomic
from fleetprune.manifest import Manifest
from fleetprune.messages import Line, Name
from fleetprune_coordinator.roles import OFFLINE
from fleetprune_coordinator.signed_folder import read_metadata

PENDING = "pending"
_KINDS: dict[str, type[Root] | type[Targets]] = {Root.type: Root, Targets.type: Targets}


class PendingError(RegistryError):
    """Something is ready but for signatures whose keys are not here."""


class About(BaseModel):
    """What a proposal is for, and what follows once it is signed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: Line
    release: int = Field(default=0, ge=0)
    """That it makes; 0: none."""
    to_all: tuple[Name, ...] = ()
    """Classes whose devices are all told to run that release."""
    resign: tuple[str, ...] = ()
    """Delegated roles that get another key and are signed anew with it."""
    retired: tuple[str, ...] = ()
    """Ids of keys that count no longer; their files are deleted."""


@dataclass(frozen=True)
class Lack:
    """Signatures that are still missing."""

    role: str
    by: str
    """Which keys count, where it is not plain: the root's of today, or those of the new one."""
    missing: int
    unsigned: tuple[str, ...]
    """Ids of the keys that could sign."""

    def __str__(self) -> str:
        keys = ", ".join(k[:8] for k in self.unsigned)
        s = "s" if self.missing > 1 else ""
        return f"{self.role}.json: {self.missing} more signature{s} of {self.by} ({keys})"


class Proposal:
    """A folder in `pending/`, or a copy of one."""

    def __init__(self, folder: Path) -> None:
        """Read a proposal.

        Raises:
            ConfigError: There is none, or it is incomplete.
            TrustError: Its parts do not belong together.
        """
        self.folder = folder
        try:
            self.about = About.model_validate_json((folder / "proposal.json").read_bytes())
        except OSError as e:
            raise ConfigError(
                f"{folder} holds no proposal: proposal.json: {e.strerror}; "
                "`fleetprune release list` says what waits for signatures"
            ) from e
        except ValidationError as e:
            raise ConfigError(f"{folder} holds no proposal: {str(e).splitlines()[0]}") from e
        names = {role: folder / f"{role}.json" for role in OFFLINE}
        self.documents: dict[str, Metadata[Any]] = {
            role: read_metadata(path, _KINDS[role]) for role, path in names.items() if path.exists()
        }
        if not self.documents:
            raise ConfigError(f"{folder} holds no proposal: nothing is to be signed")
        self.roots = _chain(folder / "before")
        self.targets_before = read_metadata(folder / "before" / "targets.json", Targets)
        self._check()

    @property
    def root_before(self) -> Root:
        """The root of today, as the proposal has it."""
        root: Root = self.roots[-1].signed
        return root

    @property
    def root(self) -> Root:
        """The root that will be."""
        document = self.documents.get(Root.type)
        return self.root_before if document is None else document.signed

    @property
    def targets(self) -> Targets | None:
        """The targets that will be; None: they stay."""
        document = self.documents.get(Targets.type)
        return None if document is None else document.signed

    def new(self) -> dict[str, TargetFile]:
        """Targets that are signed for the first time."""
        before = self.targets_before.signed.targets
        after = {} if self.targets is None else self.targets.targets
        return {
            path: info
            for path, info in after.items()
            if path not in before or before[path].hashes != info.hashes
        }

    def dropped(self) -> list[str]:
        """Paths of targets that are signed no more."""
        after = self.targets_before.signed if self.targets is None else self.targets
        return [path for path in self.targets_before.signed.targets if path not in after.targets]

    def manifests(self) -> list[Manifest]:
        """Of the releases that are signed for the first time."""
        found = []
        for path in self.new():
            if path.endswith("/manifest.json"):
                try:
                    found.append(Manifest.from_bytes(self.file(path).read_bytes()))
                except MessageError as e:
                    raise TrustError(f"{path}: {e}") from e
        return found

    def file(self, path: str) -> Path:
        """Where a new target lies in the proposal."""
        return self.folder.joinpath("files", *path.split("/"))

    def lacks(self) -> list[Lack]:
        """What is missing; empty: it can be published."""
        lacks = []
        for role, document in self.documents.items():
            authorities = {f"role {role}": self.root}
            if role == Root.type:
                authorities = {"the root keys of today": self.root_before}
                if self.root.roles[role].keyids != self.root_before.roles[role].keyids:
                    authorities["the new root keys"] = self.root
            for by, root in authorities.items():
                found = root.get_verification_result(
                    role, document.signed_bytes, document.signatures
                )
                if found.missing:
                    lacks.append(Lack(role, by, found.missing, tuple(found.unsigned)))
        return lacks

    def sign(self, signer: CryptoSigner) -> list[str]:
        """Add a signature wherever this key counts.

        Returns:
            Names of the metadata that it signed.

        Raises:
            ConfigError: It counts nowhere here.
            InstallError: The disk is full or refuses.
        """
        key_id, signed = signer.public_key.keyid, []
        for role, document in self.documents.items():
            if key_id in self._key_ids(role):
                document.sign(signer, append=True)
                write_atomic(self.folder / f"{role}.json", document.to_bytes())
                signed.append(role)
        if not signed:
            named = {k[:8] for role in self.documents for k in self._key_ids(role)}
            raise ConfigError(
                f"key {key_id[:8]} counts for nothing in {self.folder}, "
                f"expected one of: {', '.join(sorted(named))}"
            )
        return signed

    def check_root(self, pinned: Metadata[Root]) -> None:
        """TrustError unless the root of today follows from one that a person has kept."""
        if any(root.signed_bytes == pinned.signed_bytes for root in self.roots):
            return
        raise TrustError(
            f"the given root is none of versions {self.roots[0].signed.version} to "
            f"{self.roots[-1].signed.version} in {self.folder}: it is another fleet's"
        )

    def _key_ids(self, role: str) -> set[str]:
        roots = [self.root, *([self.root_before] if role == Root.type else [])]
        return {key_id for root in roots for key_id in root.roles[role].keyids}

    def _keys(self) -> Iterator[Key]:
        """Every key that would count for something."""
        yield from self.root.keys.values()
        if self.targets is not None and self.targets.delegations is not None:
            yield from self.targets.delegations.keys.values()

    def _check(self) -> None:
        """TrustError if a person would sign something else than what the proposal shows."""
        before = self.root_before
        document = self.targets_before
        if not before.get_verification_result(
            Targets.type, document.signed_bytes, document.signatures
        ):
            raise TrustError(f"{self.folder}/before/targets.json is not signed by its root's keys")
        versions = {Root.type: before.version, Targets.type: document.signed.version}
        for role, proposed in self.documents.items():
            if proposed.signed.version != versions[role] + 1:
                raise TrustError(
                    f"{self.folder}/{role}.json is version {proposed.signed.version}, "
                    f"expected {versions[role] + 1}: the one after before/{role}.json"
                )
        for key in self._keys():
            _require_own_id(key)
        for path, info in self.new().items():
            if ".." in path.split("/"):
                raise TrustError(f"target path {path!r} in {self.folder} leaves its folder")
            _require_file(self.file(path), info)
        new = self.new()
        for manifest in self.manifests():
            model = new.get(manifest.model)
            if model is None or (model.length, model.hashes.get("sha256")) != (
                manifest.size,
                manifest.sha256,
            ):
                raise TrustError(
                    f"the manifest of release {manifest.release} for {manifest.device_class} "
                    "names another model than the one that would be signed"
                )


def waiting(proposal: Proposal) -> str:
    """What a proposal waits for, in one line."""
    lacks = "; ".join(map(str, proposal.lacks()))
    return (
        f"{proposal.about.reason} is not published, it waits for signatures in {proposal.folder}: "
        f"{lacks}. `fleetprune release sign {proposal.folder} --key FILE` adds one, then "
        "`fleetprune release publish`"
    )


def _chain(folder: Path) -> list[Metadata[Root]]:
    """The roots, each verified by the one before."""
    roots: list[Metadata[Root]] = []
    numbers = sorted(int(p.name.split(".")[0]) for p in folder.glob("*.root.json"))
    for number in numbers:
        document = read_metadata(folder / f"{number}.root.json", Root)
        before = roots[-1].signed if roots else None
        try:
            found = document.signed.get_root_verification_result(
                before, document.signed_bytes, document.signatures
            )
        except ValueError as e:
            raise TrustError(f"{folder}: a root is missing before {number}.root.json") from e
        if not found:
            raise TrustError(f"{folder}/{number}.root.json is not signed by its own keys")
        roots.append(document)
    if not roots:
        raise ConfigError(f"{folder} holds no root.json")
    return roots


def _require_own_id(key: Key) -> None:
    """TrustError if a key goes by another id than that of its own content: people compare ids."""
    content = {"keytype": key.keytype, "scheme": key.scheme, "keyval": key.keyval}
    if hashlib.sha256(str(encode_canonical(content)).encode()).hexdigest() != key.keyid:
        raise TrustError(f"key {key.keyid[:8]} is not the key that its id names")


def _require_file(file: Path, info: TargetFile) -> None:
    if not file.is_file():
        raise TrustError(f"{info.path} would be signed, but {file} is missing")
    size = file.stat().st_size
    if size == info.length:
        with file.open("rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if digest == info.hashes.get("sha256"):
            return
    raise TrustError(f"{file} is not the file that would be signed as {info.path}")


def write_proposal(
    repository: Path,
    about: About,
    documents: Mapping[str, Metadata[Any]],
    targets_before: Metadata[Targets],
    files: Mapping[str, bytes],
) -> Proposal:
    """Leave a proposal in `pending/`, whole or not at all.

    Args:
        repository: The release repository's folder.
        about: What it is for.
        documents: New metadata by role.
        targets_before: What is signed now.
        files: Target path to content of the new targets.

    Raises:
        RegistryError: Another proposal for the same metadata is there.
        InstallError: The disk is full or refuses.
    """
    name = "-".join(f"{role}-{document.signed.version}" for role, document in documents.items())
    folder = repository / PENDING / name
    for there in proposals(repository):
        if there.about == about and _same(there.documents, documents):
            return there  # made before a restart
    require_free(repository, documents)
    with storage_errors("write", folder):
        folder.parent.mkdir(exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix="."))
        try:
            (staging / "before").mkdir()
            for root in (repository / "public" / "metadata").glob("*.root.json"):
                write_atomic(staging / "before" / root.name, root.read_bytes())
            write_atomic(staging / "before" / "targets.json", targets_before.to_bytes())
            for path, data in files.items():
                file = staging.joinpath("files", *path.split("/"))
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file, data)
            for role, document in documents.items():
                write_atomic(staging / f"{role}.json", document.to_bytes())
            write_atomic(staging / "proposal.json", about.model_dump_json().encode())
            staging.chmod(0o755)
            staging.rename(folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return Proposal(folder)


def require_free(repository: Path, roles: Iterable[str]) -> None:
    """RegistryError if new metadata of one of the roles waits for signatures."""
    for there in proposals(repository):
        if there.documents.keys() & set(roles):
            raise RegistryError(
                f"{there.folder} waits for signatures already ({there.about.reason}): sign and "
                "publish it, or delete it"
            )


def _same(one: Mapping[str, Metadata[Any]], other: Mapping[str, Metadata[Any]]) -> bool:
    """Whether both would sign the same, but for the time at which they were made."""

    def content(documents: Mapping[str, Metadata[Any]]) -> dict[str, Any]:
        return {
            role: {k: v for k, v in document.signed.to_dict().items() if k != "expires"}
            for role, document in documents.items()
        }

    return content(one) == content(other)


def proposals(repository: Path) -> list[Proposal]:
    """What waits for signatures."""
    folder = repository / PENDING
    return [Proposal(p) for p in sorted(folder.glob("[!.]*")) if p.is_dir()]
