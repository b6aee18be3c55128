"""When to cut how much: from the dense model to the budget along a curve, or at once.

A schedule is written for *slack*, the share of the way from the budget up to the dense model that a
class still has: 1 at first, 0 from `end` on. So it ends at each class's own budget, whatever that
is: a final sparsity would say the same thing twice, and could contradict the budget.
"""

import math
from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Curve(StrEnum):
    """How slack falls."""

    ONE_SHOT = "one_shot"
    """All at once in round `begin`, and masks stay as they are from then on."""
    CONSTANT = "constant"
    """All at once in round `begin`; masks go on changing within the budget."""
    LINEAR = "linear"
    """By the same amount in every round."""
    POLYNOMIAL = "polynomial"
    """`(1 - progress)**power`: most early, while much can be spared (Zhu and Gupta, "To prune, or
    not to prune", 2017, whose power is 3)."""
    COSINE = "cosine"
    """`(1 + cos(pi progress)) / 2`: slowly at both ends."""
    DYNAMIC = "dynamic"
    """As the training allows (`dynamic_schedule`), at `end` at the latest."""


class Schedule(BaseModel):
    """From which round to which, along which curve.

    Zhu and Gupta's `s_t = s_f + (s_i - s_f) * (1 - (t - t0) / (n dt))**3` is the cubic one, with
    `initial` for `1 - s_i`, the class's budget for `s_f` and `frequency` for `dt`. `begin == end`
    cuts at once, which measured better on fleets whose weak devices cannot hold more than their
    budget even while training: it is the default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    curve: Curve = Curve.POLYNOMIAL
    begin: int = Field(default=0, ge=0)  # round
    end: int = Field(default=0, ge=0)  # round
    power: float = Field(default=3.0, gt=0)
    """Of the polynomial."""
    initial: float = Field(default=1.0, gt=0, le=1)
    """Share of the dense model's costs until `begin`."""
    frequency: int = Field(default=1, ge=1)
    """Rounds between two steps of the curve."""
    step: float = Field(default=0.1, gt=0, le=1)
    """Of the dynamic schedule: slack given up at once."""
    window: int = Field(default=3, ge=1)
    """Of the dynamic schedule: rounds whose mean loss is compared with that of as many before."""
    stable: float = Field(default=0.01, ge=0)
    """Of the dynamic schedule: a loss that falls by a smaller share than this is stable."""
    bound: float = Field(default=0.02, gt=0, le=1)
    """Of the dynamic schedule: loss of accuracy, below the best so far, at which it backs off."""

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> Self:
        if self.begin > self.end and self.curve not in (Curve.ONE_SHOT, Curve.CONSTANT):
            raise ValueError(
                f"begins in round {self.begin}, after its end {self.end}; raise end, or lower begin"
            )
        return self

    @property
    def settled(self) -> int:
        """The first round in which every budget holds in full."""
        at_once = self.curve in (Curve.ONE_SHOT, Curve.CONSTANT)
        return self.begin if at_once else self.end

    def slack(self, round_: int) -> float:
        """What is left of the way from the budget up to `initial`, 1 until `begin`, 0 at the end.

        Of a dynamic schedule, the most that it may still leave: its budget holds from `end` on
        whatever the training does.
        """
        if round_ >= self.settled:
            return 0.0
        if round_ <= self.begin or self.curve is Curve.DYNAMIC:
            return 1.0
        at = self.begin + (round_ - self.begin) // self.frequency * self.frequency
        progress = (at - self.begin) / (self.end - self.begin)
        if self.curve is Curve.COSINE:
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return float((1.0 - progress) ** (1.0 if self.curve is Curve.LINEAR else self.power))

    def limit(self, round_: int, dense: int, budget: int, slack: float | None = None) -> int:
        """The limit in force in a round, between `budget` and `initial * dense` (whole units).

        Never below the budget, and never above it where the dense model already meets it.

        Args:
            round_: The round.
            dense: What the dense model costs.
            budget: The class's limit.
            slack: What a dynamic schedule has left; None: what the curve says.
        """
        start = max(budget, int(self.initial * dense))
        most = self.slack(round_)
        left = most if slack is None else min(slack, most)
        return budget + int((start - budget) * left)


def regrowth(round_: int, end: int, share: float) -> float:
    """Share of a mask that may be replaced in a round: `share / 2 * (1 + cos(pi t / end))`.

    RigL's annealing of the update fraction (Evci et al., "Rigging the Lottery", 2020): many units
    are tried early, and masks settle by themselves. From `end` on it is 0.

    Args:
        round_: t, at least 0.
        end: The round in which masks stand.
        share: In round 0, between 0 and 1.
    """
    if round_ >= end:
        return 0.0
    return share * 0.5 * (1.0 + math.cos(math.pi * round_ / end))
