"""`fleetprune coordinator ...`: make keys, serve a fleet, look at it."""

import json
import logging
import os
import re
import signal
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fleetprune.errors import ConfigError
from fleetprune.stopping import stop_on_signals
from fleetprune_coordinator.config import FleetConfig, load_fleet_config

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Run a fleet's rounds and releases."
)

Config = Annotated[
    Path, typer.Option("--config", "-c", help="The fleet's description.", show_default=True)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
FLEET_TOML = Path("fleet.toml")


@app.command()
def init(
    config: Config = FLEET_TOML,
    *,
    root_keys: Annotated[int, typer.Option(help="Keys of role root.")] = 1,
    root_threshold: Annotated[int, typer.Option(help="How many of them must sign.")] = 1,
    targets_keys: Annotated[int, typer.Option(help="Keys of role targets.")] = 1,
    targets_threshold: Annotated[int, typer.Option(help="How many of them must sign.")] = 1,
    encrypt: Annotated[
        bool,
        typer.Option(
            help="Encrypt the private keys with a passphrase: the first line of the file that "
            "FLEETPRUNE_PASSPHRASE_FILE names, or what you are asked for."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make the fleet's keys and an empty release repository.

    Refused if they exist: devices trust the keys that they were given. The keys of root and
    targets may then be moved off this machine; see `fleetprune release`.
    """
    from fleetprune_coordinator.keys import (  # noqa: PLC0415
        RELEASES,
        KeyPlan,
        Quorum,
        init_repository,
    )
    from fleetprune_coordinator.passphrase import new_passphrase  # noqa: PLC0415

    fleet = load_fleet_config(config)
    folder = fleet.state / RELEASES
    plan = KeyPlan(Quorum(root_keys, root_threshold), Quorum(targets_keys, targets_threshold))
    plan.check()
    phrase = new_passphrase() if encrypt else None
    init_repository(folder, datetime.now(UTC), keys=plan, passphrase=phrase)
    root = folder / "public" / "metadata" / "1.root.json"
    if as_json:
        typer.echo(json.dumps({"repository": str(folder), "root": str(root)}))
    else:
        typer.echo(f"Keys are in {folder / 'keys'}: keep them off the devices, and a copy safe.")
        typer.echo(f"Give every device {root} as its root of trust.")


@app.command()
def serve(
    config: Config = FLEET_TOML,
    *,
    until_released: Annotated[
        bool, typer.Option(help="End when every device online has installed the release.")
    ] = False,
    events: Annotated[
        Path | None, typer.Option(help="Append what happens to this file, a JSON object a line.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
    as_json: Json = False,
) -> None:
    """Train with the fleet, release a model per class, and go on serving.

    Killed at any moment and started again, it goes on where it was.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    from fleetprune_coordinator.serve import serve as run  # noqa: PLC0415  (needs torch and flwr)

    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    # Flower logs through a handler of its own: leave it only what is wrong.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with stop_on_signals() as stop:
        fleet = load_fleet_config(config)
        try:
            summary = run(fleet, stop=stop, events=events, until_released=until_released)
        except KeyboardInterrupt:
            if signal.SIGINT in stop.signals:
                raise
            raise typer.Exit from None  # SIGTERM is how a service is meant to be stopped
    if as_json:
        typer.echo(json.dumps(summary))


@app.command()
def blocks(
    config: Config = FLEET_TOML,
    *,
    name: Annotated[
        str, typer.Option(help="Of this server; another one for each. Default: host and process.")
    ] = "",
    folder: Annotated[
        Path | None,
        typer.Option(help="The repository's public folder. Default: the one in `state`."),
    ] = None,
    alone: Annotated[
        bool, typer.Option(help="For brokers without shared subscriptions: run only one.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Serve releases and graphs beside the coordinator, which then has less to do.

    As many as are wanted share the load, on this machine or on others that have a copy of the
    folder. They hold no keys and keep nothing: kill and start them at will.
    """
    from fleetprune_coordinator.block_process import BlockProcess  # noqa: PLC0415

    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    fleet = load_fleet_config(config)
    host = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname()).strip("-")[:40] or "host"
    process = BlockProcess(
        fleet.broker,
        fleet.fleet,
        folder or fleet.state / "releases" / "public",
        name or f"{host}-{os.getpid()}",
        shared=not alone,
    )
    with stop_on_signals() as stop:
        process.run(stop)


@app.command()
def status(config: Config = FLEET_TOML, *, as_json: Json = False) -> None:
    """Show devices, rounds and releases; works while the coordinator runs."""
    fleet = load_fleet_config(config)
    state = _status(fleet)
    if as_json:
        typer.echo(json.dumps(state))
        return
    console = Console()
    rounds = state["rounds"]
    console.print(
        f"{fleet.fleet}: round {rounds['closed']} of {rounds['of']}"
        f"{', one is open' if rounds['open'] else ''}; release {state['release']}"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("device", "class", "online", "release", "state"):
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    for heading in ("accuracy", "latency ms", "MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for d in state["devices"]:
        table.add_row(
            d["device"],
            d["class"],
            "yes" if d["online"] else "no",
            str(d["release"]),
            d["state"],
            *("-" if v is None else f"{v:.3g}" for v in (d["accuracy"], d["latency_ms"])),
            f"{d['rss_mb']:.0f}",
        )
    console.print(table)
    for d in state["devices"]:
        if d["error"]:
            console.print(f"{d['device']}: {d['error']}", markup=False, highlight=False)


def _status(fleet: FleetConfig) -> dict[str, Any]:
    from fleetprune_coordinator.records import Phase, RoundState  # noqa: PLC0415
    from fleetprune_coordinator.registry import Registry  # noqa: PLC0415
    from fleetprune_coordinator.store import DATABASE  # noqa: PLC0415

    if not (fleet.state / DATABASE).exists():
        raise ConfigError(
            f"{fleet.state} holds no registry yet: `fleetprune coordinator serve` makes it"
        )
    with Registry.open(fleet.state, time.time, read_only=True) as registry:
        rounds = registry.rounds()
        last = {t.node_id: t.telemetry for t in registry.latest_telemetry()}
        releases = registry.releases()
        devices = [
            {
                "device": d.name,
                "class": d.device_class,
                "online": d.online,
                "release": t.release if (t := last.get(d.id)) else 0,
                "state": t.state if t else "unknown",
                "accuracy": t.accuracy if t else None,
                "latency_ms": t.latency_ms if t else None,
                "rss_mb": t.rss_mb if t else d.rss_mb,
                "error": t.error if t else "",
            }
            for d in registry.devices()
        ]
        return {
            "fleet": fleet.fleet,
            "rounds": {
                "of": fleet.training.rounds,
                "closed": sum(
                    r.phase is Phase.TRAIN and r.state is RoundState.CLOSED for r in rounds
                ),
                "open": any(r.state is RoundState.OPEN for r in rounds),
            },
            "release": max((r.number for r in releases), default=0),
            "devices": devices,
        }
