"""`fleetprune agent`: join, run, check, predict, status."""

import json
import logging
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from fleetprune.errors import ConfigError, DataError, FleetpruneError, TrustError
from fleetprune_agent.config import AgentConfig, CsvData, load_config
from fleetprune_agent.process import become

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Train, install and run models on this device.",
)

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="The agent's configuration (TOML).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

REACH_S = 8.0  # for `check` to reach the broker; more than one attempt to connect takes


@app.command()
def join(
    url: Annotated[str, typer.Argument(help="https://host:port where the fleet lets devices in.")],
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder for the device's files.")],
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token; without it, standard input.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option("--ca", help="The fleet's authority: its certificate (PEM).")
    ] = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="Or its fingerprint, as `fleetprune access init` says it.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Join a fleet with a one-time token; after a failure, call again with the same token.

    The device's key is made here and stays here.
    """
    from fleetprune_agent.join import join as work  # noqa: PLC0415  (ssl, http)

    if (ca is None) == (fingerprint is None):
        raise ConfigError("give either --ca or --fingerprint: without it anybody could be asked")
    done = work(url, _read_token(token_file), out, ca_file=ca, fingerprint=fingerprint)
    told = done.told
    until = datetime.fromtimestamp(done.identity.not_after, UTC)
    if as_json:
        content = {
            "fleet": told.fleet,
            "device": told.device,
            "device_class": told.device_class,
            "config": str(done.config),
            "config_kept": done.kept_config,
            "certificate_until": int(done.identity.not_after),
        }
        typer.echo(json.dumps(content))
        return 0
    typer.echo(
        f"{told.device} has joined {told.fleet} as {told.device_class}, until {until:%Y-%m-%d}"
    )
    if done.kept_config:
        typer.echo(f"{done.config} was there and is as it was")
    else:
        typer.echo(f"Next: add [data] to {done.config}, then `fleetprune agent check`.")
    return 0


def _read_token(file: Path | None) -> str:
    """The token: never an argument, which every process on the machine could read."""
    from fleetprune.join_token import MAX_TOKEN  # noqa: PLC0415

    try:
        with sys.stdin if file is None else file.open(encoding="utf-8") as source:
            return source.read(2 * MAX_TOKEN)
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is no text"
        raise ConfigError(
            f"the token cannot be read from {file or 'standard input'}: {why}; "
            "`fleetprune access token` on the coordinator prints one"
        ) from e


@app.command()
def run(ctx: typer.Context, config: ConfigOption) -> None:
    """Run the agent until it is told to stop (SIGTERM or Ctrl-C).

    Exit codes: 0 stopped; 1 something failed; 2 the configuration or data is wrong; 3 the
    coordinator refuses this device.
    """
    become(config, debug=bool(getattr(ctx.obj, "debug", False)))


@app.command()
def check(config: ConfigOption) -> int:
    """Check configuration, data, root of trust and broker: one line each.

    Exit codes: 0 all is well; 1 something is not.
    """
    settings = load_config(config)
    logging.getLogger("fleetprune").setLevel(logging.ERROR)  # each attempt; the line says it once
    typer.echo(f"ok    configuration  {settings.device} of class {settings.device_class}")
    checks: dict[str, Callable[[AgentConfig], str]] = {
        "data": _check_data,
        "root of trust": _check_root,
        "state folder": _check_state,
        "certificate": _check_certificate,
        "broker": _check_broker,
    }
    if settings.broker.cert_file is None:
        del checks["certificate"]
    failed = 0
    for name, examine in checks.items():
        try:
            typer.echo(f"ok    {name:13}  {examine(settings)}")
        except FleetpruneError as e:
            failed += 1
            typer.echo(f"wrong {name:13}  {' '.join(str(e).split())}")
    return 1 if failed else 0


def _check_data(settings: AgentConfig) -> str:
    from fleetprune_agent.data import split  # noqa: PLC0415  (numpy)
    from fleetprune_agent.readers import load_samples  # noqa: PLC0415

    parts = split(load_samples(settings.data), settings.data.held_out)
    labels = "without labels"
    if parts.train.y is not None:
        labels = f"in {len(set(parts.train.y.tolist()))} classes"
    return (
        f"{len(parts.train)} samples of shape {parts.train.shape} {labels}, "
        f"{len(parts.held_out)} more held out"
    )


def _check_root(settings: AgentConfig) -> str:
    from fleetprune_agent.state import read_root  # noqa: PLC0415  (tuf)

    read_root(settings.root)
    return str(settings.root)


def _check_state(settings: AgentConfig) -> str:
    from fleetprune_agent.state import is_running, locked  # noqa: PLC0415

    if is_running(settings.state):
        return f"{settings.state}, an agent is running"
    with locked(settings.state):
        return str(settings.state)


def _check_certificate(settings: AgentConfig) -> str:
    from fleetprune_agent.identity import current  # noqa: PLC0415

    now = time.time()
    identity = current(settings.broker, settings.state, now)
    if identity is None:
        raise TrustError(
            f"{settings.broker.cert_file} is no certificate of {settings.broker.ca_file}"
        )
    until = f"{datetime.fromtimestamp(identity.not_after, UTC):%Y-%m-%d}"
    if identity.not_after < now:
        raise TrustError(f"it has ended on {until}: join again with a new token")
    if identity.name != settings.device:
        raise TrustError(f"it is for {identity.name}, this device is called {settings.device}")
    return f"{identity.cert_file} until {until}"


def _check_broker(settings: AgentConfig) -> str:
    from fleetprune.mqtt import Connection  # noqa: PLC0415  (paho)
    from fleetprune_agent.identity import current, shown  # noqa: PLC0415

    def ignore(_topic: str, _payload: bytes) -> None:
        return

    broker = shown(settings.broker, current(settings.broker, settings.state, time.time()))
    # A name of its own: the running agent's would be thrown off the broker.
    name = f"{settings.fleet}-{settings.device}-check"
    connection = Connection(broker, name, on_message=ignore)
    connection.start()
    try:
        connection.wait_connected(REACH_S)
    finally:
        connection.stop()
    return settings.broker.address


@app.command()
def predict(
    config: ConfigOption,
    samples: Annotated[Path, typer.Option("--input", "-i", help="Samples: .npy, .npz or .csv.")],
    as_json: JsonOption = False,
) -> int:
    """Predict with the installed model: one line per sample."""
    from fleetprune_agent.recent import Recent  # noqa: PLC0415
    from fleetprune_agent.serving import Predictor  # noqa: PLC0415  (onnxruntime)
    from fleetprune_agent.slots import Slots  # noqa: PLC0415

    settings = load_config(config)
    keep = settings.recent_samples
    recent = Recent(settings.state, keep) if keep else None
    predictor = Predictor(Slots(settings.state), settings.threads, recent=recent)
    manifest = predictor.manifest
    scores = predictor.predict(_read_input(samples, settings))
    best = np.argmax(scores, axis=1)
    names = [manifest.labels[i] if i < len(manifest.labels) else str(i) for i in best]
    if as_json:
        content = {
            "release": predictor.manifest.release,
            "predictions": [
                {"class": int(i), "label": name, "scores": [round(float(s), 6) for s in row]}
                for i, name, row in zip(best, names, scores, strict=True)
            ],
        }
        typer.echo(json.dumps(content))
    else:
        for i, name in enumerate(names):
            typer.echo(f"{i}  {name}  {float(scores[i, best[i]]):.4f}")
    return 0


def _read_input(path: Path, settings: AgentConfig) -> NDArray[np.float32]:
    """(n, *shape) float32 of a file with or without labels."""
    from fleetprune_agent.data import checked  # noqa: PLC0415
    from fleetprune_agent.readers import read_csv, read_npz  # noqa: PLC0415

    if path.suffix == ".npz":
        return read_npz(path).x
    if path.suffix == ".csv":
        if not isinstance(settings.data, CsvData):
            raise DataError(f"{path}: how CSV is read is not configured (data.kind is not csv)")
        return read_csv(settings.data.model_copy(update={"path": path, "label": None})).x
    if path.suffix == ".npy":
        try:
            x = np.load(path, allow_pickle=False)
        except OSError as e:
            raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e
        except (ValueError, EOFError) as e:
            raise DataError(
                f"{path}: not a plain .npy file, or it holds pickled Python objects, which are "
                "refused: save it with numpy.save and a numeric array"
            ) from e
        return checked(x, None, lambda i: f"{path} index {i}", str(path)).x
    raise DataError(f"{path}: expected a file .npy, .npz or .csv")


@app.command()
def status(config: ConfigOption, as_json: JsonOption = False) -> int:
    """Show what is installed, what waits, and the last report. Needs no network."""
    from fleetprune.messages import Telemetry  # noqa: PLC0415
    from fleetprune_agent.journal import Journal, standing  # noqa: PLC0415
    from fleetprune_agent.slots import Slots  # noqa: PLC0415
    from fleetprune_agent.state import is_running  # noqa: PLC0415
    from fleetprune_agent.statefile import read_message  # noqa: PLC0415
    from fleetprune_agent.telemetry import variant  # noqa: PLC0415

    settings = load_config(config)
    state = settings.state
    slots = Slots(state) if state.is_dir() else None
    installed = slots.active() if slots else None
    journal = slots.journal.read() if slots else Journal()
    stands = standing(journal, installed, slots.refusals() if slots else ())
    last = read_message(state / "last.json", Telemetry)
    content = {
        "device": settings.device,
        "device_class": settings.device_class,
        "running": is_running(state),
        "release": installed.release if installed else 0,
        "sha256": installed.manifest.sha256 if installed else None,
        "state": installed.state.value if installed else "empty",
        "variant": variant(installed, settings.device_class),
        "wanted": stands.release,
        "phase": stands.phase.value,
        "reason": stands.reason or None,
        "plan": journal.serial,
        "crashes": slots.crashes() if slots else 0,
        "waiting_tasks": len(list((state / "tasks").glob("*.json"))),
        "undelivered": len(list((state / "outbox").glob("*.entry"))),
        "last_report": None if last is None else json.loads(last.to_bytes()),
    }
    if as_json:
        typer.echo(json.dumps(content))
        return 0
    report = content.pop("last_report")
    for key, value in content.items():
        typer.echo(f"{key.replace('_', ' '):15}  {'-' if value is None else value}")
    if isinstance(report, dict):
        for key in ("accuracy", "latency_ms", "rss_mb", "error"):
            if (value := report.get(key)) not in {None, ""}:
                shown = f"{value:.3g}" if isinstance(value, float) else value
                typer.echo(f"{'last ' + key:15}  {shown}")
    return 0
