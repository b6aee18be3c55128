"""`fleetprune export`: a class's model as a file for other tools."""

import json
from pathlib import Path
from typing import Annotated

import click
import typer

from fleetprune_coordinator.config import load_fleet_config

app = typer.Typer()

FORMATS = ("onnx", "state_dict", "torch-export")


@app.command()
def export(
    what: Annotated[
        str,
        typer.Argument(metavar="RELEASE_OR_CLASS", help="A device class, or a release's number."),
    ],
    *,
    out: Annotated[Path, typer.Option(help="The file; for a release of several classes a folder.")],
    format_: Annotated[
        str,
        typer.Option("--format", click_type=click.Choice(FORMATS), help="Kind of file."),
    ] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise the ONNX file as the fleet has measured it.")
    ] = False,
    config: Annotated[Path, typer.Option("--config", "-c", help="The fleet's description.")] = Path(
        "fleet.toml"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a device class's model, physically small, as the registry has it now.

    As ONNX, as a torch state_dict with a description that
    `fleetprune_coordinator.export.load` builds the network from, or as a torch.export program. A
    release's number instead of a class copies what was released. The coordinator may be running.
    """
    fleet = load_fleet_config(config)
    from fleetprune_coordinator.export import Format  # noqa: PLC0415  (needs torch)
    from fleetprune_coordinator.export import export as write  # noqa: PLC0415

    written = write(fleet, what, Format(format_), out, int8=int8)
    if as_json:
        typer.echo(
            json.dumps(
                [
                    {
                        "path": str(one.path),
                        "class": one.device_class,
                        "bytes": one.bytes,
                        "parameters": one.parameters,
                    }
                    for one in written
                ]
            )
        )
        return
    for one in written:
        of = "" if one.parameters is None else f", {one.parameters:,} parameters"
        typer.echo(f"{one.device_class}: {one.path}, {one.bytes:,} bytes{of}")
