"""Makes rollouts go on beside whatever else the coordinator does."""

import logging
import threading
import time
from collections.abc import Callable

from fleetprune.errors import FleetpruneError
from fleetprune_coordinator.rollouts import Rollouts

log = logging.getLogger(__name__)

BEAT_S = 2.0  # seconds between looks when nothing is reported
REST_S = 0.2  # seconds after a look before the next: many reports at once are one look
REST = 4.0  # and at least so many times what the look took: a large fleet's reports never end


class Pacemaker:
    """A thread that looks at rollouts every few seconds, and at once when devices report."""

    def __init__(self, rollouts: Rollouts, listening: Callable[[], bool]) -> None:
        """Prepare.

        Args:
            rollouts: What goes on.
            listening: Whether devices can be heard.
        """
        self._rollouts, self._listening = rollouts, listening
        self._wake, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="rollouts", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """There is something new."""
        self._wake.set()

    def stop(self) -> None:
        """End after the look that is under way."""
        self._ending.set()
        self._wake.set()
        self._thread.join()

    def _beat(self) -> None:
        last = ""
        while not self._ending.is_set():
            self._wake.wait(BEAT_S)
            self._wake.clear()
            began = time.monotonic()
            try:
                self._rollouts.tick(listening=self._listening())
                last = ""
            except FleetpruneError as e:  # a full disk, say: it is tried again
                if str(e) != last:
                    log.warning("rollouts: %s", e)
                last = str(e)
            except Exception:  # gates that fell asleep would be worse than any error
                log.exception("rollouts")
            self._ending.wait(max(REST_S, REST * (time.monotonic() - began)))
