"""One thread that does jobs one after the other: each may need most of the device's memory."""

import heapq
import logging
import threading
import time
from collections.abc import Callable
from itertools import count

log = logging.getLogger(__name__)


class Jobs:
    """Jobs by key, the earliest due first; a key that waits already is not queued twice."""

    def __init__(self, after_each: Callable[[], None] = lambda: None) -> None:
        """Prepare; `start` starts the thread.

        Args:
            after_each: Called after every job, in the thread; to give memory back.
        """
        self._after_each = after_each
        self._due: list[tuple[float, int, str, Callable[[], None]]] = []
        self._order = count()
        self._changed = threading.Condition()
        self._stopping = False
        self._running: str | None = None
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def put(self, key: str, job: Callable[[], None], delay_s: float = 0.0) -> bool:
        """Queue a job, to be done in `delay_s` seconds at the earliest.

        A job that waits under the same key is replaced if it is due later, else kept. One that
        is running does not count: what it found may be out of date already.

        Returns:
            Whether the job was queued.
        """
        due = time.monotonic() + delay_s
        with self._changed:
            waiting = [entry for entry in self._due if entry[2] == key]
            if waiting and waiting[0][0] <= due:
                return False
            self._due = [entry for entry in self._due if entry[2] != key]
            self._due.append((due, next(self._order), key, job))
            heapq.heapify(self._due)
            self._changed.notify_all()
            return True

    def knows(self, key: str) -> bool:
        """Whether a job of that key waits or runs."""
        with self._changed:
            return self._running == key or any(entry[2] == key for entry in self._due)

    def stop(self, timeout: float) -> bool:
        """Do no more jobs; whether the one that runs ended within `timeout` seconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _next(self) -> tuple[str, Callable[[], None]] | None:
        with self._changed:
            while not self._stopping:
                wait = self._due[0][0] - time.monotonic() if self._due else None
                if wait is not None and wait <= 0:
                    _, _, key, job = heapq.heappop(self._due)
                    self._running = key
                    return key, job
                self._changed.wait(wait)
            return None

    def _run(self) -> None:
        while (found := self._next()) is not None:
            key, job = found
            try:
                job()
            except Exception:
                log.exception("job %s failed; the agent goes on", key)
            with self._changed:
                self._running = None
            del job, found
            self._after_each()
