"""How often the agent ended unasked: the boot-loop breaker's memory.

A model on trial may take the process down, and so may one that has answered a few times. Ends
count that were not a clean stop (a crash, the out-of-memory killer, a watchdog; power cuts cannot
be told from these), came within `STEADY_S` of uptime, and followed each other. A model that once
ran for `STEADY_S` in one go is settled: later ends are counted for the coordinator and nothing
else. Uptime is used because a device that loses power often loses the time as well.
"""

from typing import Final

from pydantic import Field

from fleetprune.messages import Count, Message

STEADY_S: Final = 600.0  # seconds of uptime with one model, after which it is settled
MAX_EARLY: Final = 5  # early ends in succession that a new release may have


class Starts(Message):
    """Content of starts.json."""

    sha256: str = Field(default="", max_length=64)
    """Of the model that was active when this was written; empty: none was."""
    running: bool = True
    """The agent started and has not stopped cleanly."""
    crashes: Count = 0
    """Ends that were not asked for while this model was active."""
    early: Count = 0
    """Of these, the last in succession that came before the model was settled."""
    settled: bool = False


def begun(last: Starts | None, sha256: str) -> Starts:
    """What is to be noted when the agent starts.

    Args:
        last: What was noted before; an end without a clean stop is told by `running`.
        sha256: Of the model that is active now, and so was at that end.
    """
    same = last if last is not None and last.sha256 == sha256 else Starts(sha256=sha256)
    crashed = last is not None and last.running
    return Starts(
        sha256=sha256,
        crashes=same.crashes + crashed,
        early=same.early + 1 if crashed and not same.settled else 0,
        settled=same.settled,
    )
