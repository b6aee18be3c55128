"""`fleetprune deploy ...`: files that other programs of an installation read."""

import json
import time
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer

from fleetprune.errors import ConfigError
from fleetprune_coordinator.access import ACCESS, open_access
from fleetprune_coordinator.config import load_fleet_config
from fleetprune_coordinator.deployment import deploy
from fleetprune_coordinator.mosquitto import DATA, Place
from fleetprune_coordinator.trial import try_mosquitto

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Write what a broker needs to know."
)


@app.callback()
def _group() -> None:
    """Write what a broker needs to know."""


@app.command()
def mosquitto(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="The fleet's description.", show_default=True)
    ] = Path("fleet.toml"),
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder to write, for the broker alone.")],
    place: Annotated[
        str | None,
        typer.Option(help="Where the broker will find that folder, if not where it is written."),
    ] = None,
    data: Annotated[
        str, typer.Option(help="Folder where the broker keeps what it remembers.")
    ] = str(DATA),
    check: Annotated[
        bool, typer.Option("--check", help="Start mosquitto with it once, on another port.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write mosquitto's configuration, access list, certificates and revocation list.

    What is there is replaced: do it again after `access reissue`.
    """
    fleet = load_fleet_config(config)
    access = open_access(fleet, time.time)
    if access is None:
        raise ConfigError(
            f"no authority in {fleet.state / ACCESS}: `fleetprune access init` makes one"
        )
    folder = PurePosixPath(out.absolute() if place is None else place)
    try:
        files = deploy(fleet, access, out, Place(folder, PurePosixPath(data)))
    finally:
        access.close()
    said = try_mosquitto(out) if check else ""
    if as_json:
        typer.echo(json.dumps({"files": [str(f) for f in files], "checked": said or None}))
        return
    for file in files:
        typer.echo(str(file))
    if said:
        typer.echo(said)
    typer.echo(
        "Next: let mosquitto's user own these files, and make its mosquitto.conf the one line"
        f"\ninclude_dir {folder}"
    )
