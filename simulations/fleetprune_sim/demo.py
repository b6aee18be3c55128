"""`fleetprune demo`: a whole fleet on one machine, in processes of its own.

An embedded broker on loopback, one coordinator and six agents that share nothing but that
broker. They run the same commands as a real fleet; this module only writes their configuration,
starts them, shows what the coordinator reports, and stops them.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.live import Live

from fleetprune_sim.broker import embedded_broker
from fleetprune_sim.demo_config import (
    CLASSES,
    DEVICES,
    TASKS,
    DemoClass,
    DemoFolder,
    claim,
    write_agents,
    write_fleet,
)
from fleetprune_sim.demo_processes import POLL_S, Children, DemoError, Interrupted
from fleetprune_sim.demo_state import (
    MAKING_GRAPHS,
    DeviceState,
    Event,
    EventReader,
    FleetState,
    apply,
    describe,
    strangers,
)
from fleetprune_sim.demo_view import class_table, closing, live

COORDINATOR = "coordinator"
INIT_S = 60.0  # seconds for `fleetprune coordinator init`; it takes about one
SILENCE_S = 180.0  # seconds without an event after which something hangs; a round takes under 2
_COMMAND = (sys.executable, "-P", "-m", "fleetprune")
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # six agents share the cores

_STOPPING: Event = {"event": "stopping"}

app = typer.Typer()


@dataclass(frozen=True)
class DemoOptions:
    """What the command line asked for."""

    task: str
    rounds: int
    seed: int
    classes: tuple[DemoClass, ...] = CLASSES
    training: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the table `training` that differ from the task's."""


Watcher = Callable[[FleetState, Event], None]
"""Called after every event."""


@app.command()
def demo(
    task: Annotated[
        str,
        typer.Option(click_type=click.Choice(list(TASKS)), help="What the fleet learns."),
    ] = "digits",
    out: Annotated[
        Path | None, typer.Option(help="Keep summary.json, releases and logs in this folder.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of training [default: the task's own].")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides who has which samples.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON instead of the table.")
    ] = False,
) -> None:
    """Run a whole fleet of six devices on this machine, from training to running releases.

    Two gateways keep the dense model, two phones get at most half of its MACs, two sensors at
    most a quarter; sensors never train. The task `har` needs FLEETPRUNE_DATA.
    """
    options = DemoOptions(task, rounds or TASKS[task].rounds, seed)
    console = Console(stderr=as_json)
    interrupted = Interrupted()
    with interrupted.listening(), _folder(out) as folder:
        with _watching(console, task, plain=as_json) as watch:
            summary = run_demo(folder, options, watch, interrupted)
        if as_json:
            typer.echo(json.dumps(summary, indent=2))
        else:
            console.print(class_table(summary))
            console.print(closing(summary, str(out) if out is not None else None))


def run_demo(
    folder: DemoFolder, options: DemoOptions, watch: Watcher, interrupted: Interrupted
) -> dict[str, Any]:
    """Run the fleet until every device runs its release; nothing is left running.

    Args:
        folder: Empty, or with what an earlier demo left.
        options: What to run.
        watch: Told about every event.
        interrupted: Ends the run early when a signal came.

    Returns:
        The summary that is also in `summary.json`.

    Raises:
        DemoError: A process failed or hangs, or a device does not run what it should.
        DataError: The task's data set is missing.
        KeyboardInterrupt: A signal came.
    """
    task = TASKS[options.task]
    state = FleetState(
        {d: DeviceState(g.name, g.trains) for g in options.classes for d in g.devices},
        options.rounds,
    )
    watch(state, {"event": "loading"})
    data = task.load(options.seed, folder.cache)
    interrupted.check()
    with (
        embedded_broker(folder.root / "broker") as broker,
        Children(folder.logs, interrupted) as children,
    ):
        training = {**options.training, "rounds": options.rounds, "seed": options.seed}
        classes, port = options.classes, broker.port
        write_fleet(folder, task, data, classes=classes, training=training, port=port)
        fleet = ("--config", str(folder.fleet_toml))
        children.start("init", (*_COMMAND, "coordinator", "init", *fleet), folder.root)
        children.wait("init", INIT_S)
        write_agents(folder, task, classes=classes, port=port)
        serve = (*_COMMAND, "coordinator", "serve", *fleet, "--until-released")
        children.start(COORDINATOR, (*serve, "--events", str(folder.events)), folder.root)
        for device in DEVICES:
            agent = (*_COMMAND, "agent", "run", "--config", str(folder.agent_toml(device)))
            children.start(device, agent, folder.device(device), _ONE_THREAD)
        _follow(folder, children, state, watch)
    return _result(folder)


def _follow(folder: DemoFolder, children: Children, state: FleetState, watch: Watcher) -> None:
    """Read events until the coordinator has ended well."""
    reader = EventReader(folder.events)
    heard = time.monotonic()
    while True:
        try:
            children.check(list(DEVICES))
        except KeyboardInterrupt:
            watch(apply(state, _STOPPING), _STOPPING)  # it may take until `GRACE_S` is over
            raise
        ended = children.ended(COORDINATOR)  # before the events, so that none is missed
        for event in reader.read():
            heard = time.monotonic()
            state = apply(state, event)
            watch(state, event)
        if ended:
            return
        if time.monotonic() - heard > SILENCE_S:
            raise DemoError(f"nothing happened for {SILENCE_S:.0f} s; see {folder.logs}")
        time.sleep(POLL_S)


def _result(folder: DemoFolder) -> dict[str, Any]:
    """The coordinator's summary, once every device runs what was made for its class."""
    try:
        summary: dict[str, Any] = json.loads(folder.summary.read_bytes())
    except (OSError, ValueError) as e:
        raise DemoError(f"the coordinator left no summary: {e}; see {folder.logs}") from e
    if wrong := strangers(summary, DEVICES):
        raise DemoError(
            f"{', '.join(wrong)} did not report running the artifact of their class; "
            f"see {folder.logs}"
        )
    return summary


@contextmanager
def _folder(out: Path | None) -> Iterator[DemoFolder]:
    """The folder to work in: a temporary one that goes away, or the user's."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="fleetprune-demo-") as temporary:
            yield DemoFolder(Path(temporary))
        return
    claim(out)
    yield DemoFolder(out.resolve())


@contextmanager
def _watching(console: Console, task: str, plain: bool) -> Iterator[Watcher]:
    """A live display on a terminal, a line per event elsewhere."""
    if plain or not console.is_terminal:

        def say(state: FleetState, event: Event) -> None:
            if line := describe(event):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
            if state.news == MAKING_GRAPHS and event.get("event") == "enrolled":
                console.print(state.news, highlight=False, markup=False, soft_wrap=True)

        yield say
        return
    with Live(console=console, refresh_per_second=4, transient=True) as display:

        def show(state: FleetState, event: Event) -> None:
            display.update(live(state, task))

        yield show
