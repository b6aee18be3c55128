"""Brings what lies in the outbox to the coordinator, and tries again until it is there."""

import logging
import random
import threading
from collections.abc import Callable

from fleetprune.blocks import RefusedError
from fleetprune.errors import FleetpruneError, TransportError, WireError
from fleetprune.outbox import Entry, Kind, Outbox
from fleetprune.retry import Backoff

log = logging.getLogger(__name__)

RETRY = Backoff(first_s=2.0, most_s=300.0)


class Courier:
    """A thread of its own, so that answers travel while the next task is worked on.

    A result leaves the outbox when the coordinator has confirmed the whole of it, or has said
    that it does not want it. Telemetry has no confirmation: the next report supersedes it.
    """

    def __init__(
        self,
        outbox: Outbox,
        push: Callable[[str, bytes], None],
        publish: Callable[[bytes], bool],
        rng: random.Random,
    ) -> None:
        """Prepare; `start` starts the thread.

        Args:
            outbox: Shared with this thread only through `put`.
            push: Delivers a result, blocking until it is confirmed.
            publish: Hands telemetry to the broker; False if it cannot.
            rng: Spreads retries.
        """
        self._outbox, self._push, self._publish, self._rng = outbox, push, publish, rng
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Stop after what is under way, or after `timeout` seconds; all else stays on disk."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def put(self, kind: Kind, name: str, payload: bytes) -> None:
        """Keep an entry durably and deliver it; what `Outbox.put` raises is raised."""
        with self._lock:
            self._outbox.put(kind, name, payload)
        self._wake.set()

    def wake(self) -> None:
        """Try now (the connection is back)."""
        self._wake.set()

    def __len__(self) -> int:
        """Entries that are not delivered."""
        with self._lock:
            return len(self._outbox)

    def _run(self) -> None:
        attempt = 0
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                clear = self._deliver_all()
            except FleetpruneError as e:  # the disk; deliveries are tried again
                log.warning("outbox: %s", e)
                clear = False
            attempt = 0 if clear else attempt + 1
            self._wake.wait(None if clear else RETRY.half_jitter(attempt, self._rng))

    def _deliver_all(self) -> bool:
        """One look at every entry; whether none is left for later."""
        with self._lock:
            entries = self._outbox.pending()
        clear = True
        while not self._stopping.is_set():
            with self._lock:  # telemetry is replaced under its name: not between these steps
                entry = next(entries, None)
                if entry is None:
                    return clear
                if entry.kind is Kind.TELEMETRY:
                    if self._publish(entry.payload):
                        self._outbox.done(entry.name)
                    else:
                        clear = False
                    continue
            if self._deliver(entry):
                with self._lock:
                    self._outbox.done(entry.name)
            else:
                clear = False
        return False

    def _deliver(self, result: Entry) -> bool:
        """Whether a result is dealt with."""
        try:
            self._push(result.name, result.payload)
        except RefusedError as e:
            log.warning("%s", e)
        except (TransportError, WireError) as e:
            log.info("%s is not delivered yet: %s", result.name, e)
            return False
        return True
