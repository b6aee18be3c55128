"""`fleetprune release ...`: what is signed, by whom, and how that changes."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from tuf.api.metadata import Root  # type: ignore[attr-defined]  # tuf re-exports it silently

from fleetprune.errors import ConfigError, TrustError
from fleetprune_coordinator import release_view as view
from fleetprune_coordinator.config import load_fleet_config
from fleetprune_coordinator.key_files import load_key, load_public_key, write_key
from fleetprune_coordinator.keys import RELEASES
from fleetprune_coordinator.passphrase import ask_passphrase, new_passphrase
from fleetprune_coordinator.proposals import Proposal
from fleetprune_coordinator.release_check import check
from fleetprune_coordinator.releases import ReleaseRepository
from fleetprune_coordinator.roles import OFFLINE, ROLES
from fleetprune_coordinator.rotation import Rotation
from fleetprune_coordinator.rotation import renew as sign_anew
from fleetprune_coordinator.rotation import rotate as replace_key
from fleetprune_coordinator.signed_folder import read_metadata

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Look at, sign and verify what devices trust."
)

Config = Annotated[
    Path, typer.Option("--config", "-c", help="The fleet's description.", show_default=True)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
FLEET_TOML = Path("fleet.toml")


def _folder(config: Path) -> Path:
    return load_fleet_config(config).state / RELEASES


def _open(config: Path) -> ReleaseRepository:
    return ReleaseRepository(_folder(config), lambda: datetime.now(UTC), passphrase=ask_passphrase)


def _tell(data: Any) -> None:
    typer.echo(json.dumps(data))


@app.command("list")
def list_(config: Config = FLEET_TOML, *, as_json: Json = False) -> None:
    """Show the signed releases, who runs them, and what waits for signatures."""
    data = view.list_data(_open(config))
    if as_json:
        _tell(data)
    else:
        view.print_list(data, Console())


@app.command()
def keys(config: Config = FLEET_TOML, *, as_json: Json = False) -> None:
    """Show each role's keys, and which private keys are on this machine."""
    data = view.keys_data(_open(config))
    if as_json:
        _tell(data)
    else:
        view.print_keys(data, Console())


@app.command()
def verify(
    config: Config = FLEET_TOML,
    *,
    root: Annotated[
        Path | None,
        typer.Option(help="The root that devices were given; the repository's own if not named."),
    ] = None,
    public: Annotated[
        Path | None, typer.Option(help="The public folder, or a copy of it; no fleet is needed.")
    ] = None,
    device_class: Annotated[
        str | None, typer.Option("--class", help="Look at this device class alone.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify the repository as a device would, from its root of trust to every file.

    Ends with 1 and one line if anything is wrong.
    """
    public = _folder(config) / "public" if public is None else public
    root = public / "metadata" / "1.root.json" if root is None else root
    try:
        pinned = root.read_bytes()
    except OSError as e:
        raise ConfigError(
            f"cannot read the root of trust {root}: {e.strerror}; `fleetprune coordinator init` "
            "makes it, --root names another"
        ) from e
    found = check(public, pinned, datetime.now(UTC), device_class)
    if as_json:
        _tell(view.check_data(found, public))
    else:
        view.print_check(found, Console())
    if found.problems:
        more = f", and {len(found.problems) - 1} more" if len(found.problems) > 1 else ""
        raise TrustError(f"the repository does not hold: {found.problems[0]}{more}")
    if not as_json:
        typer.echo(f"all is signed: {len(found.files)} files")


@app.command()
def sign(
    pending: Annotated[Path, typer.Argument(help="A folder in pending/, or a copy of it.")],
    *,
    key: Annotated[Path, typer.Option(help="The private key.")],
    root: Annotated[
        Path | None,
        typer.Option(help="A root that you have kept: the proposal must follow from it."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Add a signature to what waits for it, on any machine, after showing what is signed."""
    proposal = Proposal(pending)
    if root is not None:
        proposal.check_root(read_metadata(root, Root))
    if not as_json:
        view.print_proposal(view.proposal_data(proposal), Console())
    if not yes:
        typer.confirm("Sign this?", abort=True, err=as_json)
    signer = load_key(key, ask_passphrase)
    signed = proposal.sign(signer)
    data = view.proposal_data(proposal) | {"key": signer.public_key.keyid, "signed": signed}
    if as_json:
        _tell(data)
        return
    names = " and ".join(f"{role}.json" for role in signed)
    typer.echo(f"Signed {names} with key {signer.public_key.keyid[: view.SHORT]}.")
    typer.echo("Still missing: " + "; ".join(data["missing"]) if data["missing"] else _PUBLISH)


_PUBLISH = "It has all its signatures: `fleetprune release publish` on the coordinator."


@app.command()
def publish(
    pending: Annotated[
        Path | None, typer.Argument(help="The signed folder; all that wait if not named.")
    ] = None,
    *,
    config: Config = FLEET_TOML,
    as_json: Json = False,
) -> None:
    """Publish what has all its signatures, in one step."""
    repository = _open(config)
    folders = [p.folder for p in repository.pending()] if pending is None else [pending]
    if not folders:
        raise ConfigError("nothing waits for signatures")
    published = [repository.publish_pending(folder).reason for folder in folders]
    if as_json:
        _tell({"published": published})
    else:
        for reason in published:
            typer.echo(f"Published: {reason}.")


@app.command()
def rotate(
    role: Annotated[
        str, typer.Argument(click_type=click.Choice(ROLES), help="Whose key is replaced.")
    ],
    *,
    config: Config = FLEET_TOML,
    revoke: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEYID",
            help="A key to retire, where there are several; its first characters will do. "
            "May be repeated.",
        ),
    ] = None,
    add: Annotated[
        list[Path] | None,
        typer.Option(
            help="A public key (FILE.pub) made elsewhere by `release keygen`. May be repeated."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Replace a key: devices refuse what the old one signs from then on."""
    keys = [load_public_key(path) for path in add or ()]
    _report(replace_key(_open(config), role, revoke or (), keys), as_json=as_json)


@app.command()
def renew(
    role: Annotated[
        str, typer.Argument(click_type=click.Choice(OFFLINE), help="Whose metadata expires.")
    ],
    *,
    config: Config = FLEET_TOML,
    as_json: Json = False,
) -> None:
    """Sign an offline role's metadata anew, unchanged, before it expires."""
    _report(sign_anew(_open(config), role), as_json=as_json)


@app.command("keygen")
def keygen(
    file: Annotated[Path, typer.Argument(help="To be made, with FILE.pub beside it.")],
    *,
    encrypt: Annotated[bool, typer.Option(help="Encrypt it with a passphrase.")] = True,
    as_json: Json = False,
) -> None:
    """Make a key on a machine that is offline; only FILE.pub ever leaves it."""
    signer = write_key(file, new_passphrase() if encrypt else None)
    key_id = signer.public_key.keyid
    if as_json:
        _tell({"private": str(file), "public": f"{file}.pub", "key": key_id})
    else:
        typer.echo(f"Key {key_id} is in {file}; {file}.pub is for `fleetprune release rotate`.")


def _report(rotation: Rotation, *, as_json: bool) -> None:
    """Say what came of a change of keys."""
    if as_json:
        _tell(
            {
                "role": rotation.role,
                "retired": list(rotation.retired),
                "added": list(rotation.added),
                "pending": None if rotation.pending is None else str(rotation.pending),
            }
        )
        return
    what = f"{rotation.role}.json is signed anew"
    if rotation.retired:
        old, new = (
            " and ".join(k[: view.SHORT] for k in ids) for ids in (rotation.retired, rotation.added)
        )
        what = f"Role {rotation.role}: key {new} in place of {old}"
    if rotation.pending is None:
        typer.echo(f"{what}, and published.")
    else:
        typer.echo(f"{what}; it waits for signatures in {rotation.pending}.")
        for lack in Proposal(rotation.pending).lacks():
            typer.echo(f"  {lack}")
