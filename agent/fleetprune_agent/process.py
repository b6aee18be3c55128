"""The agent's own process: `python -m fleetprune_agent.process [--debug] agent.toml`.

`fleetprune agent run` becomes this process. Parsing a command line takes typer, rich and what they
import, 9 MB that an agent would hold for months and never use again; a fresh interpreter is the
one way to be rid of them.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Final, NoReturn

from fleetprune.exits import end_with
from fleetprune.stopping import stop_on_signals
from fleetprune_agent.config import load_config

_DEBUG: Final = "--debug"


def become(config: Path, *, debug: bool = False) -> NoReturn:
    """Replace this process by the agent's; its number, files and signals stay.

    Args:
        config: The agent's configuration, unread.
        debug: Show tracebacks.
    """
    # -P: a file that happens to lie in the current folder must not shadow a module.
    command = [sys.executable, "-P", "-m", "fleetprune_agent.process", *([_DEBUG] if debug else [])]
    os.execv(sys.executable, [*command, str(config)])  # noqa: S606  (no shell is wanted)


def work(config: Path) -> int:
    """Run the agent until SIGTERM or SIGINT; returns its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("tuf").setLevel(logging.WARNING)  # its notes explain nothing to an operator
    settings = load_config(config)
    with stop_on_signals() as stop:
        # Imported here: a wrong configuration is reported before the slow imports.
        from fleetprune_agent.agent import Agent  # noqa: PLC0415

        return Agent(settings).run(stop)


def main() -> NoReturn:
    """Entry point; the arguments are those that `become` gives."""
    *flags, config = sys.argv[1:]
    end_with(lambda: work(Path(config)), debug=lambda: _DEBUG in flags)


if __name__ == "__main__":
    main()
