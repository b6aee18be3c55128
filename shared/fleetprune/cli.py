"""The command `fleetprune`, and what it does about errors.

Its sub-commands live in distributions' other packages and are loaded by name when they are
called, so that `fleetprune agent` on a device imports neither torch nor flwr, and a command
whose optional dependencies are missing can say so. Exit codes: see `exits`.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version as distribution_version
from typing import Annotated, Any, NoReturn

import click
import typer
from typer.core import TyperGroup

from fleetprune.errors import MissingExtraError
from fleetprune.exits import INTERRUPTED, end_with, say


@dataclass(frozen=True)
class SubCommand:
    """Where a sub-command is, and what it needs."""

    module: str
    """Holds the typer application `app`."""
    extra: str
    """Optional dependencies of the distribution that it needs."""
    summary: str


SUB_COMMANDS = {
    "agent": SubCommand(
        "fleetprune_agent.commands", "agent", "Train, install and run models on this device."
    ),
    "coordinator": SubCommand(
        "fleetprune_coordinator.commands", "coordinator", "Run a fleet's rounds and releases."
    ),
    "release": SubCommand(
        "fleetprune_coordinator.release_command",
        "coordinator",
        "Look at, sign and verify what devices trust.",
    ),
    "rollout": SubCommand(
        "fleetprune_coordinator.rollout_command",
        "coordinator",
        "Roll releases out in stages, stop them, or go back.",
    ),
    "device": SubCommand(
        "fleetprune_coordinator.device_command",
        "coordinator",
        "Look at devices: what each runs, and why.",
    ),
    "access": SubCommand(
        "fleetprune_coordinator.access_command",
        "coordinator",
        "Let devices into a fleet, and shut them out.",
    ),
    "deploy": SubCommand(
        "fleetprune_coordinator.deploy_command",
        "coordinator",
        "Write what a broker needs to know.",
    ),
    "plan": SubCommand(
        "fleetprune_coordinator.plan_command",
        "coordinator",
        "Show what each class would keep, without training.",
    ),
    "export": SubCommand(
        "fleetprune_coordinator.export_command",
        "coordinator",
        "Write a class's model as a file for other tools.",
    ),
    "simulate": SubCommand(
        "fleetprune_sim.simulate_command", "sim", "Train a fleet in silico and compare methods."
    ),
    "demo": SubCommand(
        "fleetprune_sim.demo", "demo", "Run a whole fleet of six devices on this machine."
    ),
    "compare": SubCommand(
        "fleetprune_sim.compare_command", "sim", "Lay simulated runs side by side."
    ),
}


@dataclass
class Options:
    """Options of the command itself, known once they are parsed."""

    debug: bool = False


class LazyCommand(click.Command):
    """Stands for a sub-command in the list of commands, and becomes it when it is called."""

    def __init__(self, name: str, target: SubCommand) -> None:
        super().__init__(name, help=target.summary)
        self._target = target

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Load the real command and let it parse its own arguments."""
        module = importlib.import_module(self._target.module)
        command = typer.main.get_command(module.app)
        return command.make_context(info_name, args, parent=parent, **extra)


class LazyGroup(TyperGroup):
    """Finds its sub-commands in `SUB_COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names, in the order in which they are documented."""
        return list(SUB_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A stand-in that loads the sub-command when it is called."""
        target = SUB_COMMANDS.get(cmd_name)
        return None if target is None else LazyCommand(cmd_name, target)

    def invoke(self, ctx: click.Context) -> Any:
        """Call the sub-command; a missing dependency becomes advice."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as e:
            target = SUB_COMMANDS.get(ctx.invoked_subcommand or "")
            package = (e.name or "").partition(".")[0]
            if target is None or not package or package == "fleetprune":
                raise
            raise MissingExtraError(
                f"`fleetprune {ctx.invoked_subcommand}` needs {package}, which is not installed: "
                f"pip install 'fleetprune[{target.extra}]'"
            ) from e


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fleetprune {distribution_version('fleetprune')}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from (a traceback).")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Give every device class in a fleet the best model that fits it.

    The models are learned from data that never leaves the devices.
    """
    if isinstance(ctx.obj, Options):
        ctx.obj.debug = debug


def run(arguments: Sequence[str], options: Options) -> int:
    """Run one command line; returns its exit code, or raises what `main` reports.

    Args:
        arguments: Words after `fleetprune`.
        options: Filled in from the arguments.
    """
    command = typer.main.get_command(app)
    try:
        result = command.main(
            list(arguments), prog_name="fleetprune", standalone_mode=False, obj=options
        )
    except click.ClickException as e:  # already says how the command is used
        if isinstance(e, click.exceptions.NoArgsIsHelpError):
            e.show()
        else:
            say(e.format_message())
        return e.exit_code
    except click.Abort:
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def main() -> NoReturn:
    """Entry point of the console command."""
    options = Options()
    end_with(lambda: run(sys.argv[1:], options), debug=lambda: options.debug)


if __name__ == "__main__":
    main()
