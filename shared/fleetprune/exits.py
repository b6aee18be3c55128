"""How a command ends: its exit code, and one line for an error.

Exit codes: 0 done; 1 something failed; 2 the input or the installation is wrong; 130 Ctrl-C.
"""

import sys
from collections.abc import Callable
from typing import NoReturn

from fleetprune.errors import FleetpruneError, UsageError

FAILED = 1
MISUSED = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def end_with(work: Callable[[], int], debug: Callable[[], bool]) -> NoReturn:
    """End the process with the exit code of some work; an error of ours becomes one line.

    Args:
        work: Does everything; returns the exit code.
        debug: Asked when an error comes; True lets it through, with its traceback.
    """
    try:
        code = work()
    except FleetpruneError as e:
        if debug():
            raise
        say(str(e))
        code = MISUSED if isinstance(e, UsageError) else FAILED
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def say(message: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"fleetprune: {' '.join(message.split())}\n")
