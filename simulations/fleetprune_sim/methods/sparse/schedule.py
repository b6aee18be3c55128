"""When a mask changes, and by how much."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Changes every few rounds, fewer and fewer weights, until a share of the training is over."""

    rounds: int
    every: int
    """Rounds from one new mask to the next; 0: there are none."""
    last_share: float
    """Of the rounds, until which the mask changes."""

    @property
    def end(self) -> float:
        """The round in which changes have become none; one change comes before it in any case."""
        return max(self.last_share * self.rounds, 2.0 * self.every)

    def turns(self) -> list[int]:
        """Rounds that end with a new mask; never the last, since new weights begin at zero."""
        if not self.every:
            return []
        return [n for n in range(self.every, self.rounds, self.every) if n < self.end]

    def share(self, number: int, most: float) -> float:
        """Share of the kept weights that changes places.

        Args:
            number: Of the round.
            most: Share in round 0; falls along half a cosine to 0 at the end.
        """
        progress = min(1.0, number / self.end) if self.end else 1.0
        return most / 2 * (1 + math.cos(math.pi * progress))
