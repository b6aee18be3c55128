"""Releases, keys and proposals as data for `--json` and as lines for people."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from tuf.api.metadata import (  # type: ignore[attr-defined]  # tuf re-exports without saying so
    Role,
    Root,
    Targets,
)

from fleetprune.manifest import Manifest
from fleetprune.rollout import WHOLE, Rollout
from fleetprune_coordinator.proposals import Proposal
from fleetprune_coordinator.release_check import VERIFIED, Checked
from fleetprune_coordinator.releases import ReleaseRepository
from fleetprune_coordinator.roles import DELEGATED, ROLES, TOP

SHORT = 8  # characters of a key's id or a file's hash that a person compares


def manifest_data(manifest: Manifest) -> dict[str, Any]:
    """What a person wants to know of a release before it is signed."""
    return {
        "class": manifest.device_class,
        "release": manifest.release,
        "sha256": manifest.sha256,
        "bytes": manifest.size,
        "macs": manifest.macs,
        "accuracy": manifest.accuracy,
        "samples": manifest.samples,
        "max_latency_ms": manifest.max_latency_ms,
        "max_rss_mb": manifest.max_rss_mb,
        "round": manifest.round,
        "licence": manifest.licence,
    }


def standing(rollout: Rollout | None, release: int) -> str:
    """Who runs a release, and why."""
    if rollout is None or release not in (rollout.stable, rollout.candidate):
        return "signed; no rollout names it"
    if release == rollout.candidate:
        named = f" and {len(rollout.canaries)} by name" if rollout.canaries else ""
        text = f"rolled out to {rollout.share * 100 / WHOLE:g} % of devices{named}"
    elif rollout.candidate:
        text = f"for devices that are not yet to run release {rollout.candidate}"
    else:
        text = "for all devices"
    return text + ("; paused" if rollout.paused else "")


def list_data(repository: ReleaseRepository) -> dict[str, Any]:
    """Signed releases, and what waits for signatures."""
    rollouts: dict[str, Rollout | None] = {}
    rows = []
    for manifest in repository.manifests():
        name = manifest.device_class
        rollout = rollouts.setdefault(name, repository.rollout(name))
        rows.append(manifest_data(manifest) | {"state": standing(rollout, manifest.release)})
    return {
        "releases": rows,
        "pending": [proposal_data(p) for p in repository.pending()],
        "warnings": repository.expiring(),
    }


def keys_data(repository: ReleaseRepository) -> list[dict[str, Any]]:
    """Each role's keys, and which of them are here."""
    state, ring = repository.signed.load(), repository.signed.keys
    return [
        {
            "role": role,
            "key": key_id,
            "here": key_id in ring.keys,
            "threshold": state.authority(role).threshold,
            "version": state.documents[role].signed.version,
            "expires": state.documents[role].signed.expires.isoformat(),
        }
        for role in ROLES
        for key_id in state.key_ids(role)
    ]


def proposal_data(proposal: Proposal) -> dict[str, Any]:
    """What would be signed, and what is missing."""
    return {
        "folder": str(proposal.folder),
        "reason": proposal.about.reason,
        "metadata": {
            role: {
                "version": document.signed.version,
                "expires": document.signed.expires.isoformat(),
            }
            for role, document in proposal.documents.items()
        },
        "releases": [manifest_data(m) for m in proposal.manifests()],
        "to_all": list(proposal.about.to_all),
        "files": {path: info.hashes["sha256"] for path, info in proposal.new().items()},
        "dropped": sorted({path.rpartition("/")[0] for path in proposal.dropped()}),
        "kept": len(proposal.targets_before.signed.targets) - len(proposal.dropped()),
        "keys": list(key_changes(proposal)),
        "missing": [str(lack) for lack in proposal.lacks()],
    }


def key_changes(proposal: Proposal) -> Iterator[str]:
    """A line for each role whose keys or threshold would be others."""
    before = _authorities(proposal.root_before, proposal.targets_before.signed)
    after = _authorities(proposal.root, proposal.targets or proposal.targets_before.signed)
    for role in sorted({*before, *after}):
        old, new = before.get(role), after.get(role)
        if old == new:
            continue
        texts = ["none" if a is None else _quorum(*a) for a in (old, new)]
        yield f"role {role}: {texts[0]} -> {texts[1]}"


def _authorities(
    root: Root, targets: Targets
) -> dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]]:
    """By role: threshold, key ids and paths."""
    found: dict[str, tuple[Role, tuple[str, ...]]]
    found = {role: (root.roles[role], ()) for role in TOP}
    roles = {} if targets.delegations is None else targets.delegations.roles or {}
    found |= {role: (of, tuple(of.paths or ())) for role, of in roles.items()}
    return {
        role: (of.threshold, tuple(sorted(of.keyids)), paths) for role, (of, paths) in found.items()
    }


def _quorum(threshold: int, key_ids: tuple[str, ...], paths: tuple[str, ...]) -> str:
    keys = ", ".join(k[:SHORT] for k in key_ids)
    return f"{threshold} of {keys}" + (f" for {', '.join(paths)}" if paths else "")


def print_list(data: dict[str, Any], console: Console) -> None:
    """Releases as a table; what waits below."""
    table = _table("class", "release", "bytes", "accuracy", "round", "sha256", "state")
    for r in data["releases"]:
        table.add_row(
            r["class"],
            str(r["release"]),
            f"{r['bytes']:,}",
            _share(r["accuracy"]),
            str(r["round"]),
            r["sha256"][:SHORT],
            r["state"],
        )
    if data["releases"]:
        console.print(table)
    else:
        _line(console, "No release is signed yet: `fleetprune coordinator serve` makes them.")
    for p in data["pending"]:
        _line(console, f"{p['reason']} waits for signatures in {p['folder']}:")
        for lack in p["missing"]:
            _line(console, f"  {lack}")
    for warning in data["warnings"]:
        _line(console, warning)


def print_keys(data: list[dict[str, Any]], console: Console) -> None:
    """Keys as a table."""
    table = _table("role", "key", "private key", "needed", "version", "expires")
    for k in data:
        of = sum(other["role"] == k["role"] for other in data)
        table.add_row(
            k["role"],
            k["key"][: 2 * SHORT],
            "here" if k["here"] else "elsewhere",
            f"{k['threshold']} of {of}",
            str(k["version"]),
            k["expires"][:10],
        )
    console.print(table)


def print_proposal(data: dict[str, Any], console: Console) -> None:
    """All that a person must know before signing."""
    _line(console, f"{data['reason']}:")
    for role, document in data["metadata"].items():
        _line(
            console,
            f"  {role}.json version {document['version']}, valid until {document['expires'][:10]}",
        )
    for r in data["releases"]:
        limits = [f"{r['macs']:,} MACs"] if r["macs"] else []
        limits += [f"at most {r['max_latency_ms']:g} ms"] if r["max_latency_ms"] else []
        limits += [f"at most {r['max_rss_mb']:g} MB"] if r["max_rss_mb"] else []
        _line(console, f"  {r['class']} release {r['release']}: {r['bytes']:,} bytes")
        _line(console, f"    sha256    {r['sha256']}")
        _line(console, f"    accuracy  {_share(r['accuracy'])} of {r['samples']} samples")
        _line(console, f"    budget    {', '.join(limits) or 'none given'}")
    models = sum(path.endswith("/model.onnx") for path in data["files"])
    if data["files"]:
        _line(console, f"  {len(data['files'])} new files, {models} of them models")
    _line(console, f"  {data['kept']} files stay as they were signed before")
    for folder in data["dropped"]:
        _line(console, f"  no longer signed: {folder}")
    if data["to_all"]:
        _line(console, f"  then run by all devices of: {', '.join(data['to_all'])}")
    for change in data["keys"]:
        _line(console, f"  {change}")
    for lack in data["missing"]:
        _line(console, f"  missing: {lack}")


def check_data(found: Checked, public: Path) -> dict[str, Any]:
    """What `check` found."""
    return {
        "repository": str(public),
        "root_sha256": found.root_sha256,
        "roles": [
            {
                "role": r.role,
                "version": r.version,
                "expires": r.expires.isoformat(),
                "threshold": r.threshold,
                "keys": list(r.key_ids),
                "signed_by": list(r.signed_by),
            }
            for r in found.roles
        ],
        "rollouts": [r.model_dump(mode="json") for r in found.rollouts],
        "files": [
            {"path": f.path, "role": f.role, "bytes": f.bytes, "sha256": f.sha256, "state": f.state}
            for f in found.files
        ],
        "problems": found.problems,
    }


def print_check(found: Checked, console: Console) -> None:
    """The chain from the root to every file."""
    _line(console, f"root of trust: sha256 {found.root_sha256}")
    table = _table("role", "version", "expires", "signed by", "needed", "named by")
    for r in found.roles:
        by = "targets" if r.role in DELEGATED else "root"
        table.add_row(
            r.role,
            str(r.version),
            f"{r.expires:%Y-%m-%d %H:%M}",
            ", ".join(k[:SHORT] for k in r.signed_by),
            f"{r.threshold} of {len(r.key_ids)}",
            by,
        )
    console.print(table)
    for rollout in found.rollouts:
        for release in filter(None, (rollout.stable, rollout.candidate)):
            text = standing(rollout, release)
            _line(console, f"{rollout.device_class}: release {release} {text}")
    table = _table("file", "role", "bytes", "sha256", "state")
    for f in found.files:
        state = f.state if f.state == VERIFIED else f"[bold]{f.state}[/bold]"
        table.add_row(f.path, f.role, f"{f.bytes:,}", f.sha256[: 2 * SHORT], state)
    console.print(table)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
