"""Several roads to one repository: the preferred one, and the next where it does not lead there.

All of them lead to the same signed files, so it does not matter for trust which one a byte came
over. A road that failed is tried last for a while, longer each time and spread by chance: a fleet
whose server answers 503 must not knock with every file that it needs.
"""

import logging
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from fleetprune.blocks import NotFoundError
from fleetprune.errors import HostileInputError, TransportError
from fleetprune.retry import Backoff
from fleetprune_agent.trust import BlobSource

log = logging.getLogger(__name__)

AVOID: Final = Backoff(first_s=30.0, most_s=1800.0)
T = TypeVar("T")


@dataclass
class Road:
    """One way to the repository."""

    name: str
    source: BlobSource
    closed: Callable[[], str] = lambda: ""
    """Why it cannot be used now, where that is known without trying; empty: it may be."""
    failures: int = 0
    avoid_until: float = float("-inf")


class FallbackSource:
    """A `trust.BlobSource` made of others."""

    def __init__(
        self,
        roads: Sequence[Road],
        clock: Callable[[], float],
        rng: random.Random,
        abort: threading.Event,
    ) -> None:
        """Use `roads`, the preferred one first.

        Args:
            roads: At least one.
            clock: Monotonic seconds.
            rng: Spreads how long a road is avoided.
            abort: When set, no other road is tried.
        """
        self._roads, self._clock, self._rng, self._abort = tuple(roads), clock, rng, abort

    def read(self, name: str, max_bytes: int) -> bytes:
        """See `BlobSource`."""
        return self._over_any(lambda source: source.read(name, max_bytes))

    def pull(self, name: str, size: int, sha256: str, into: Path) -> None:
        """See `BlobSource`; what came over one road is not fetched again over another."""
        self._over_any(lambda source: source.pull(name, size, sha256, into))

    def _over_any(self, use: Callable[[BlobSource], T]) -> T:
        """The first answer; NotFoundError is one.

        Raises:
            TransportError: No road leads there; says why of each.
            HostileInputError: What came over every road that leads there is not to be used.
        """
        reasons: list[str] = []
        hostile: HostileInputError | None = None
        now = self._clock()
        for road in sorted(self._roads, key=lambda r: r.avoid_until > now):
            closed = road.closed()
            if closed:
                reasons.append(f"{road.name}: {closed}")
                continue
            try:
                result = use(road.source)
            except NotFoundError:
                self._good(road)
                raise
            except (TransportError, HostileInputError) as e:
                if self._abort.is_set():
                    raise
                self._bad(road, e)
                reasons.append(f"{road.name}: {e}")
                hostile = e if isinstance(e, HostileInputError) else hostile
            else:
                self._good(road)
                return result
        if hostile is not None:
            raise hostile
        raise TransportError("; ".join(reasons))

    def _good(self, road: Road) -> None:
        road.failures, road.avoid_until = 0, float("-inf")

    def _bad(self, road: Road, error: Exception) -> None:
        wait = AVOID.half_jitter(road.failures, self._rng)
        road.failures += 1
        road.avoid_until = self._clock() + wait
        log.warning("%s failed and is avoided for %.0f s: %s", road.name, wait, error)
