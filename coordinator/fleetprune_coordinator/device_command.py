"""`fleetprune device ...`: what devices run, and why."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fleetprune.errors import UsageError
from fleetprune_coordinator.config import FleetConfig, load_fleet_config
from fleetprune_coordinator.orders import require_registry
from fleetprune_coordinator.registry import Registry
from fleetprune_coordinator.rollout_report import device_report, utc

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Look at devices: what each runs, and why."
)

Config = Annotated[
    Path, typer.Option("--config", "-c", help="The fleet's description.", show_default=True)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
FLEET_TOML = Path("fleet.toml")


@app.command("list")
def list_(
    config: Config = FLEET_TOML,
    *,
    class_: Annotated[str | None, typer.Option("--class", help="Only this class.")] = None,
    as_json: Json = False,
) -> None:
    """Show all devices, one a line."""
    fleet = load_fleet_config(config)
    rows = [r for r in _read(fleet, []) if class_ in (None, r["class"])]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    console = Console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("device", "class", "online"):
        table.add_column(heading, no_wrap=True)
    for heading in ("runs", "wanted"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for r in rows:
        online, wanted = "yes" if r["online"] else "no", str(r["wanted"] or "-")
        runs = str(r["release"] or "-")
        table.add_row(r["device"], r["class"], online, runs, wanted, _plain(r["reason"]))
    console.print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="The device.")],
    config: Config = FLEET_TOML,
    *,
    as_json: Json = False,
) -> None:
    """Show everything that is known about one device."""
    rows = _read(load_fleet_config(config), [name])
    if not rows:
        raise UsageError(
            f"no device {name} has enrolled in this fleet: `fleetprune device list` shows all"
        )
    row = rows[0]
    if as_json:
        typer.echo(json.dumps(row, indent=2))
        return
    console = Console()
    for key, value in row.items():
        if value not in (None, "", 0) or key == "online":
            console.print(f"{key:>16}  {_shown(key, value)}", markup=False, highlight=False)


def _read(fleet: FleetConfig, names: list[str]) -> list[dict[str, Any]]:
    require_registry(fleet)
    with Registry.open(fleet.state, time.time, read_only=True) as registry:
        return device_report(registry, fleet, time.time(), names)


def _shown(key: str, value: Any) -> str:
    if key in {"last_seen", "told_at", "reported_at"}:
        return utc(value)
    if key == "online":
        return "yes" if value else "no"
    if key == "cohort":
        return f"{value / 100:.2f} %"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
    """What a device says is not markup."""
    return text.replace("[", r"\[")
