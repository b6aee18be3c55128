"""The dynamic threshold: cut on while the model has settled, wait while it learns, or back off.

An algorithm as a value: `start` gives a state, `step` the next one. What a round's accuracy is
measured on is for the caller to say; it must not be what the model is judged by in the end.
"""

from dataclasses import dataclass
from enum import StrEnum

from fleetprune.schedule import Schedule


class Move(StrEnum):
    """What the last step did, for people."""

    START = "start"
    CUT = "cut"
    """the loss was stable"""
    WAIT = "wait"
    """the model still learns, or there is too little to tell by"""
    BACK_OFF = "back off"
    """accuracy fell below the best by more than the bound"""
    DONE = "done"
    """at the budget"""


@dataclass(frozen=True)
class Threshold:
    """Where a dynamic schedule stands."""

    slack: float = 1.0
    """1: the dense model; 0: the budget"""
    losses: tuple[float, ...] = ()
    """since the last move, the latest last"""
    best: float | None = None
    """highest accuracy so far"""
    move: Move = Move.START


def start() -> Threshold:
    """Before the first round."""
    return Threshold()


def step(
    schedule: Schedule, state: Threshold, loss: float | None, accuracy: float | None
) -> Threshold:
    """What a round's outcome makes of the state.

    Accuracy decides before loss: a model that has been hurt gets back what the last step took.
    After each move the window of losses begins anew, since losses of another width say nothing
    about this one.

    Args:
        schedule: Step, window and bounds.
        state: Before the round.
        loss: The round's mean training loss; None: nobody reported one.
        accuracy: Of the round's model, between 0 and 1; None: it was not measured.
    """
    best = state.best
    if accuracy is not None:
        best = accuracy if best is None else max(best, accuracy)
        if accuracy < best - schedule.bound and state.slack < 1.0:
            slack = min(1.0, state.slack + schedule.step)
            return Threshold(slack, (), best, Move.BACK_OFF)
    if state.slack <= 0.0:
        return Threshold(0.0, (), best, Move.DONE)
    losses = state.losses if loss is None else (*state.losses, loss)[-2 * schedule.window :]
    if _stable(losses, schedule):
        # Rounded, so that ten steps of a tenth end at the budget and not a hair above it.
        return Threshold(max(0.0, round(state.slack - schedule.step, 9)), (), best, Move.CUT)
    return Threshold(state.slack, losses, best, Move.WAIT)


def _stable(losses: tuple[float, ...], schedule: Schedule) -> bool:
    """Whether the mean loss of the window has hardly fallen since the window before."""
    n = schedule.window
    if len(losses) < 2 * n:
        return False
    before, now = sum(losses[:n]) / n, sum(losses[n:]) / n
    return before - now < schedule.stable * abs(before)
