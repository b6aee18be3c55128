"""When to cut how much: the polynomial decay of Zhu and Gupta (2017)."""

from pydantic import BaseModel, ConfigDict, Field


class PolynomialDecay(BaseModel):
    """Density falls from `initial` to nothing-more-to-cut along `(1 - progress)**power`.

    The paper's `s_t = s_f + (s_i - s_f) * (1 - (t - t0) / (n dt))**3`, written for the extra
    density that a class still has above its budget: 1 at `begin`, 0 from `end` on. `begin == end`
    cuts at once, which measured better on fleets whose weak devices cannot hold more than their
    budget even while training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    begin: int = Field(default=0, ge=0)  # round
    end: int = Field(default=0, ge=0)  # round
    power: float = Field(default=3.0, gt=0)
    initial: float = Field(default=1.0, gt=0, le=1)
    """Share of the dense model's costs at `begin`."""

    def slack(self, round_: int) -> float:
        """What is left of the way from the budget up to `initial`, 1 at `begin`, 0 at `end`."""
        if round_ >= self.end:
            return 0.0
        if round_ <= self.begin:
            return 1.0
        progress = (round_ - self.begin) / (self.end - self.begin)
        return float((1.0 - progress) ** self.power)

    def limit(self, round_: int, dense: int, budget: int) -> int:
        """The limit in force in a round, between `budget` and `initial * dense` (whole units).

        Never below the budget, and never above it where the dense model already meets it.
        """
        start = max(budget, int(self.initial * dense))
        return budget + int((start - budget) * self.slack(round_))
