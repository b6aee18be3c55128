"""How fast transfers may go, and when releases are left alone: pure, the time is an argument."""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, time
from typing import Annotated, Final

from pydantic import AfterValidator, Field

from fleetprune.config_file import Section

WINDOW_S: Final = 2.0  # a limited link's blocks under way: what it takes so long to bring
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


def _hours(text: str) -> str:
    found = _HOURS.fullmatch(text)
    if found is None or found.group(1, 2) == found.group(3, 4):
        raise ValueError('expected two times of the day such as "22:00-06:00"')
    return text


Hours = Annotated[str, AfterValidator(_hours)]
"""`HH:MM-HH:MM`, local time, the end excluded; past midnight where the end is the earlier."""


class PacingSettings(Section):
    """What transfers may cost the link."""

    bytes_per_s: int | None = Field(default=None, ge=1024)
    """Of all transfers together, both directions; None: as fast as it goes."""
    quiet_hours: tuple[Hours, ...] = ()
    """When no release is fetched, by this device's local time."""
    metered: bool = False
    """Whether every byte costs money: then only small releases are fetched."""
    metered_bytes: int = Field(default=0, ge=0)
    """The most that a release may take over a metered link, as it would travel; 0: none may."""

    def may_fetch(self, local: datetime, size: int) -> str:
        """Why a release is not to be fetched now; empty: it may be.

        Args:
            local: The time here.
            size: Bytes that would travel: of the delta, where there is one.
        """
        for hours in self.quiet_hours:
            start, end = (time.fromisoformat(t) for t in hours.split("-"))
            if _between(start, local.time(), end):
                return f"quiet hours {hours}: it is {local:%H:%M}, fetched from {end:%H:%M} on"
        if self.metered and size > self.metered_bytes:
            return f"metered link: {size} bytes, at most {self.metered_bytes} are fetched over it"
        return ""


def _between(start: time, now: time, end: time) -> bool:
    return start <= now < end if start < end else now >= start or now < end


@dataclass
class TokenBucket:
    """So many bytes per second in the mean; spends first and waits afterwards.

    What is spent may be more than there is: a block cannot be halved. The debt is waited for, so
    that no second has more than its bytes plus one transfer's window.
    """

    rate: float  # bytes per second
    level: float = 0.0  # bytes that may be spent at once; negative: a debt
    at: float = float("-inf")  # when `level` was right

    def wait_s(self, now: float) -> float:
        """Seconds until something may be spent again; 0: now."""
        self._fill(now)
        return max(0.0, -self.level / self.rate)

    def spend(self, size: int, now: float) -> None:
        """Take `size` bytes, into debt if need be."""
        self._fill(now)
        self.level -= size

    def _fill(self, now: float) -> None:
        self.level = min(0.0, self.level + (max(now, self.at) - self.at) * self.rate)
        self.at = max(now, self.at)


class Limit:
    """A `TokenBucket` that several threads share, or none at all."""

    def __init__(self, bytes_per_s: int | None, clock: Callable[[], float]) -> None:
        """`bytes_per_s` None: everything may go at once. `clock`: monotonic seconds."""
        self._bucket = None if bytes_per_s is None else TokenBucket(float(bytes_per_s))
        self._clock, self._lock = clock, threading.Lock()

    def wait_s(self) -> float:
        """See `TokenBucket`."""
        if self._bucket is None:
            return 0.0
        with self._lock:
            return self._bucket.wait_s(self._clock())

    def spend(self, size: int) -> None:
        """See `TokenBucket`."""
        if self._bucket is not None:
            with self._lock:
                self._bucket.spend(size, self._clock())

    def window(self, most: int, block_size: int) -> int:
        """Blocks under way at once: `most`, and fewer where the limit is slow."""
        if self._bucket is None:
            return most
        return max(1, min(most, int(self._bucket.rate * WINDOW_S / block_size)))
