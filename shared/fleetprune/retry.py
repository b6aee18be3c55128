"""When to try again: waits that grow, are spread by chance and follow the link's own speed.

Endless immediate retries of a fleet are a denial of service that the fleet mounts on its own
broker; equal waits make all devices knock at the same moment after an outage. Neither class
reads a clock or a global random generator.
"""

import random
from dataclasses import dataclass

MAX_DOUBLINGS = 32  # 2**32 first waits exceed every limit; keeps the power finite


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponentially growing waits between attempts, between `first_s` and `most_s` seconds."""

    first_s: float
    most_s: float

    def limit(self, attempt: int) -> float:
        """The longest wait before attempt `attempt` (0, 1, ...)."""
        return float(min(self.most_s, self.first_s * 2 ** min(attempt, MAX_DOUBLINGS)))

    def full_jitter(self, attempt: int, rng: random.Random) -> float:
        """Anything from 0 to the limit: spreads a fleet's reconnects evenly."""
        return rng.uniform(0.0, self.limit(attempt))

    def half_jitter(self, attempt: int, rng: random.Random) -> float:
        """The upper half of the limit: for waits that must leave the peer time to answer."""
        limit = self.limit(attempt)
        return rng.uniform(limit / 2, limit)


class RoundTrip:
    """Retransmission timeout learned from answered messages (RFC 6298, with Karn's rule).

    A fixed timeout is wrong on most links: 64 KiB take a millisecond on Ethernet and a minute on
    NB-IoT, where a timeout of seconds would request every block over and over and clog the link.
    """

    FIRST_S = 2.0  # before the first measurement; RFC 6298 says 1 s, a broker adds a hop
    LEAST_S = 0.5  # a queued block on a busy broker is not a lost block
    MOST_S = 60.0  # RFC 6298's own upper bound

    def __init__(self) -> None:
        self._mean: float | None = None
        self._deviation = 0.0
        self._doublings = 0

    @property
    def timeout_s(self) -> float:
        """Seconds after which a message counts as lost."""
        base = self.FIRST_S if self._mean is None else self._mean + 4 * self._deviation
        grown = max(self.LEAST_S, base) * 2 ** min(self._doublings, MAX_DOUBLINGS)
        return float(min(self.MOST_S, grown))

    def measured(self, seconds: float) -> None:
        """A message that was sent once was answered; one sent twice says nothing (Karn)."""
        if self._mean is None:
            self._mean, self._deviation = seconds, seconds / 2
        else:
            self._deviation += (abs(seconds - self._mean) - self._deviation) / 4
            self._mean += (seconds - self._mean) / 8
        self._doublings = 0

    def expired(self) -> None:
        """A message was lost: wait twice as long until one is measured again."""
        self._doublings += 1

    def answered(self) -> None:
        """A message that was sent more than once was answered: half as patient again.

        Without this a link that loses messages at random, where late in a transfer everything
        has been sent twice and nothing is measured, would be taken for a slow one.
        """
        self._doublings = max(0, self._doublings - 1)

    def forget_losses(self) -> None:
        """The link is new (a reconnect): its losses say nothing about it."""
        self._doublings = 0
