"""`fleetprune access ...`: who may take part in a fleet."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fleetprune.errors import ConfigError
from fleetprune.stopping import stop_on_signals
from fleetprune_coordinator.access import ACCESS, Access, check_name, open_access
from fleetprune_coordinator.access_book import DeviceAccess
from fleetprune_coordinator.authority import (
    CLIENTS,
    SERVERS,
    Authority,
    Lives,
    init_authority,
)
from fleetprune_coordinator.config import FleetConfig, JoinConfig, load_fleet_config
from fleetprune_coordinator.deployment import update

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Let devices into a fleet, and shut them out.",
)

Config = Annotated[
    Path, typer.Option("--config", "-c", help="The fleet's description.", show_default=True)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Argument(help="The device's name.")]
FLEET_TOML = Path("fleet.toml")
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


@app.command()
def init(config: Config = FLEET_TOML, *, as_json: Json = False) -> None:
    """Make the fleet's certificate authority, and the certificates that are not devices'.

    Refused if there is one: devices trust the one that they were given.
    """
    fleet = load_fleet_config(config)
    folder = fleet.state / ACCESS
    now = datetime.now(UTC)
    init_authority(folder, fleet.fleet, _server_names(fleet), now, _lives(fleet))
    with _access(fleet) as access:
        fingerprint = access.authority.fingerprint
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "authority": str(folder),
                    "ca": str(folder / "ca.crt"),
                    "fingerprint": fingerprint,
                    "servers": {k: list(v) for k, v in _server_names(fleet).items()},
                }
            )
        )
        return
    typer.echo(f"The authority is in {folder}: keep ca.key off the devices, and a copy safe.")
    for name, hosts in _server_names(fleet).items():
        typer.echo(f"{name + '.crt':16}is for {', '.join(hosts)}")
    for name, who in CLIENTS.items():
        typer.echo(f"{name + '.crt':16}is for {who}")
    typer.echo(f"Devices know it by {folder / 'ca.crt'}, or by its fingerprint:")
    typer.echo(fingerprint)
    typer.echo("Next: `fleetprune deploy mosquitto`, then `fleetprune access token DEVICE`.")


@app.command()
def token(
    device: Device,
    config: Config = FLEET_TOML,
    *,
    device_class: Annotated[str, typer.Option("--class", help="The class that it will be of.")],
    hours: Annotated[float, typer.Option(min=0.01, max=24 * 90, help="How long it lives.")] = 24.0,
    as_json: Json = False,
) -> None:
    """Print a one-time token with which a device joins; it is shown this once.

    An earlier token of the device is void. A revoked device may join again with it.
    """
    fleet = load_fleet_config(config)
    if device_class not in fleet.classes:
        raise ConfigError(
            f"class {device_class!r} is not one of this fleet's: {', '.join(sorted(fleet.classes))}"
        )
    check_name(device)
    with _access(fleet) as access:
        back = device in access.shut_out()
        text = access.make_token(device, device_class, hours * HOUR_S)
        broker = update(fleet, access) if back else ""
    if as_json:
        until = time.time() + hours * HOUR_S
        typer.echo(
            json.dumps(
                {"token": text, "device": device, "class": device_class, "expires_at": int(until)}
            )
        )
        return
    typer.echo(text)
    typer.echo(
        f"for {device}, class {device_class}, within {hours:g} h. On the device: "
        "fleetprune agent join URL --token-file FILE",
        err=True,
    )
    if broker:
        typer.echo(broker, err=True)


@app.command("list")
def list_(config: Config = FLEET_TOML, *, as_json: Json = False) -> None:
    """Show the devices that have joined, until when, and who is shut out."""
    fleet = load_fleet_config(config)
    with _access(fleet) as access:
        devices = access.devices()
    now = time.time()
    if as_json:
        content = [
            {
                "device": d.name,
                "class": d.device_class,
                "state": _state(d, now)[0],
                "reason": _state(d, now)[1],
                "certificate_until": d.not_after,
                "token_until": d.token_until,
            }
            for d in devices
        ]
        typer.echo(json.dumps({"fleet": fleet.fleet, "devices": content}))
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("device", "class", "state", "certificate until", "why"):
        table.add_column(heading, no_wrap=heading != "why", overflow="fold")
    for d in devices:
        state, why = _state(d, now)
        table.add_row(d.name, d.device_class, state, _day(d.not_after), why)
    Console().print(table)


@app.command()
def revoke(
    device: Device,
    config: Config = FLEET_TOML,
    *,
    reason: Annotated[str, typer.Option(help="For the record.")] = "",
    as_json: Json = False,
) -> None:
    """Shut a device out: the coordinator at once, the broker when it has read its files."""
    fleet = load_fleet_config(config)
    with _access(fleet) as access:
        access.revoke(device, reason)
        broker = update(fleet, access)
    if as_json:
        typer.echo(json.dumps({"device": device, "state": "revoked", "broker": broker}))
    else:
        typer.echo(f"{device} is revoked; the coordinator does not listen to it from now on")
        typer.echo(broker)


@app.command()
def reissue(config: Config = FLEET_TOML, *, as_json: Json = False) -> None:
    """Make new certificates for broker, join endpoint, coordinator and block servers.

    For the keys that they have. Do it before the old ones end, or when host names change.
    """
    fleet = load_fleet_config(config)
    folder = fleet.state / ACCESS
    authority, now, life = Authority(folder), datetime.now(UTC), _lives(fleet).own
    ends = {}
    for name, hosts in _server_names(fleet).items():
        ends[name] = authority.certify_server(name, hosts, now, life).not_valid_after_utc
    for name in CLIENTS:
        ends[name] = authority.certify_client(name, now, life).not_valid_after_utc
    if as_json:
        typer.echo(json.dumps({name: end.timestamp() for name, end in ends.items()}))
        return
    for name, end in ends.items():
        typer.echo(f"{folder / f'{name}.crt'} until {_day(end.timestamp())}")
    typer.echo("Next: `fleetprune deploy mosquitto`, restart the broker and the coordinator.")


@app.command()
def serve(
    config: Config = FLEET_TOML,
    *,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Run the endpoint where devices join, apart from the coordinator, until stopped."""
    from fleetprune_coordinator.join_server import JoinServer, welcome  # noqa: PLC0415

    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    fleet = load_fleet_config(config)
    settings = fleet.join or JoinConfig()
    with stop_on_signals() as stop, _access(fleet) as access:
        told = welcome(fleet, settings)
        told.root()  # without one nobody can join: say so now
        server = JoinServer(access, told, settings)
        server.start()
        typer.echo(f"devices join at https://{_server_names(fleet)['join'][0]}:{server.port}")
        stop.wait()
        server.stop()


@contextmanager
def _access(fleet: FleetConfig) -> Iterator[Access]:
    access = open_access(fleet, time.time)
    if access is None:
        raise ConfigError(
            f"no authority in {fleet.state / ACCESS}: `fleetprune access init` makes one"
        )
    try:
        yield access
    finally:
        access.close()


def _server_names(fleet: FleetConfig) -> dict[str, tuple[str, ...]]:
    join = fleet.join.names if fleet.join is not None else ()
    return dict(zip(SERVERS, (fleet.broker_names, join or fleet.broker_names), strict=True))


def _lives(fleet: FleetConfig) -> Lives:
    config = fleet.access
    return Lives(
        *(timedelta(days=d) for d in (config.ca_days, config.own_days, config.device_days))
    )


def _state(device: DeviceAccess, now: float) -> tuple[str, str]:
    """What a device may do, and why."""
    if device.revoked_at is not None:
        why = f"{_day(device.revoked_at)}{f': {device.reason}' if device.reason else ''}"
        if device.token_until is not None:
            return "revoked", f"{why}; may join again until {_day(device.token_until)}"
        return "revoked", why
    if device.not_after is None or device.not_after < now:
        return "expired", "its certificate has ended: it needs a new token"
    if device.not_after - now < 14 * DAY_S:
        return "joined", "its certificate ends soon, and it has not renewed it: is it on line?"
    return "joined", ""


def _day(moment: float | None) -> str:
    return "-" if moment is None else f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d}"
