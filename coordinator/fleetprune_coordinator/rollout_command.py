"""`fleetprune rollout ...`: how releases reach devices, and orders about it."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fleetprune_coordinator.config import FleetConfig, load_fleet_config
from fleetprune_coordinator.orders import Action, give, make_order, require_registry
from fleetprune_coordinator.registry import Registry
from fleetprune_coordinator.rollout_report import log_report, rollout_report, utc

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Roll releases out in stages, stop them, or go back.",
)

Config = Annotated[
    Path, typer.Option("--config", "-c", help="The fleet's description.", show_default=True)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Classes = Annotated[
    list[str] | None, typer.Option("--class", help="Only this class; may be repeated.")
]
Reason = Annotated[str, typer.Option("--reason", help="Goes into the audit log.")]
Release = Annotated[int, typer.Argument(min=1, help="Its number.")]
FLEET_TOML = Path("fleet.toml")


@app.command()
def status(config: Config = FLEET_TOML, *, as_json: Json = False) -> None:
    """Show how far each class's rollout is, and why no further."""
    fleet = load_fleet_config(config)
    report = _read(fleet)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    console = Console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("class", "stable", "release", "status", "stage"):
        table.add_column(heading, no_wrap=True)
    for heading in ("well", "failed", "awaited", "devices"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report["classes"]:
        table.add_row(*_cells(row))
    console.print(table)
    for row in report["classes"]:
        for line in _notes(row):
            _line(console, line)
    for name in report["canaries_not_enrolled"]:
        _line(console, f"rollout.canaries: {name} is not enrolled")


def _read(fleet: FleetConfig) -> dict[str, Any]:
    require_registry(fleet)
    with Registry.open(fleet.state, time.time, read_only=True) as registry:
        return rollout_report(registry, fleet, time.time())


def _cells(row: dict[str, Any]) -> list[str]:
    r = row["rollout"]
    stable = str(row["stable"] or "-")
    if r is None:
        return [row["class"], stable, "-", "none yet", "-", "-", "-", "-", str(row["devices"])]
    e = r["evidence"]
    counts = [str(e[key]) for key in ("good", "failed", "waiting")]
    stage = f"{r['stages'][r['stage']]} ({r['stage'] + 1} of {len(r['stages'])})"
    return [
        row["class"], stable, str(r["release"]), r["status"], stage, *counts, str(row["devices"])
    ]  # fmt: skip


def _notes(row: dict[str, Any]) -> list[str]:
    r, name = row["rollout"], row["class"]
    if r is None:
        return [f"{name}: no release has been rolled out"]
    lines = [f"{name}: {r['status']}: {r['reason']}"]
    if r["status"] == "running":
        if r["soaks_until"] > time.time():
            lines[0] += f" until {utc(r['soaks_until'])} at least"
        if r["canaries"] and r["stage"] == 0:
            lines.append(f"{name}: canaries {', '.join(r['canaries'])}")
    loss = r["evidence"]["accuracy"]
    if loss is not None:
        lines.append(
            f"{name}: accuracy changed by {-100 * loss['loss']:+.1f} ± "
            f"{100 * loss['error']:.1f} points on {loss['samples']} samples"
        )
    lines += [f"{name}: {device} {why}" for device, why in r["evidence"]["reasons"].items()]
    return lines


@app.command()
def log(
    config: Config = FLEET_TOML,
    *,
    class_: Annotated[str | None, typer.Option("--class", help="Only this class.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The last so many decisions.")] = 100,
    as_json: Json = False,
) -> None:
    """Show who decided what, when and why; --json has the evidence."""
    fleet = load_fleet_config(config)
    require_registry(fleet)
    with Registry.open(fleet.state, time.time, read_only=True) as registry:
        entries = log_report(registry, class_, limit)
    if as_json:
        typer.echo(json.dumps(entries, indent=2))
        return
    console = Console()
    for e in entries:
        _line(
            console,
            f"{utc(e['at'])}  {e['device_class']} {e['release']}  {e['action']} by {e['who']}: "
            f"{e['reason']}",
        )


@app.command()
def start(
    release: Release,
    config: Config = FLEET_TOML,
    *,
    class_: Classes = None,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Roll a release out in stages; it takes the place of what is under way."""
    _give(config, "start", class_, as_json, release=release, reason=reason)


@app.command()
def pause(
    config: Config = FLEET_TOML,
    *,
    class_: Classes = None,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Let every device keep what it runs, until `resume`."""
    _give(config, "pause", class_, as_json, reason=reason)


@app.command()
def resume(
    config: Config = FLEET_TOML,
    *,
    class_: Classes = None,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Go on after a pause, which does not count as time."""
    _give(config, "resume", class_, as_json, reason=reason)


@app.command()
def abort(
    config: Config = FLEET_TOML,
    *,
    class_: Classes = None,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Stop: devices that have the release go back to the stable one."""
    _give(config, "abort", class_, as_json, reason=reason)


@app.command()
def rollback(
    release: Release,
    config: Config = FLEET_TOML,
    *,
    class_: Classes = None,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Return all devices to an older release, at once."""
    _give(config, "rollback", class_, as_json, release=release, reason=reason)


@app.command()
def promote(
    config: Config = FLEET_TOML,
    *,
    class_: Classes = None,
    to_all: Annotated[bool, typer.Option("--all", help="Go on to all devices.")] = False,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Go on to the next stage without waiting, whatever the gates say; a pause ends."""
    report = _read(load_fleet_config(config))
    seen = {r["class"]: r["rollout"]["stage"] for r in report["classes"] if r["rollout"]}
    _give(config, "promote", class_, as_json, reason=reason, to_all=to_all, seen=seen)


def _give(
    config: Path, action: Action, classes: list[str] | None, as_json: bool, **more: Any
) -> None:
    fleet = load_fleet_config(config)
    require_registry(fleet)
    done = give(fleet, make_order(action, classes or [], **more))
    if as_json:
        typer.echo(json.dumps(done))
        return
    console = Console()
    for d in done:
        mark = "" if d["changed"] else "nothing to do: "
        _line(console, f"{d['device_class']}: {mark}release {d['release']} {_said(action, d)}")


def _said(action: Action, done: dict[str, Any]) -> str:
    return str(done["reason"]) if not done["changed"] else f"{_DONE[action]}: {done['reason']}"


_DONE: dict[Action, str] = {
    "start": "is rolled out",
    "pause": "is paused",
    "resume": "goes on",
    "abort": "is stopped",
    "rollback": "is returned to",
    "promote": "is promoted",
}


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
