"""Whose block is sent next: one block of each device in turn, none twice.

A release is announced to the whole fleet at once, and five hundred windows of 512 KiB are more
than a broker's queues hold. So it is requests that wait here, of a few bytes each, and a block is
read and handed over when the broker has acknowledged earlier ones.
"""

import threading
from collections import OrderedDict

from fleetprune.blocks import MAX_REQUESTED, Request

MAX_WAITING = 2 * MAX_REQUESTED  # blocks of one device: a window of two transfers at once
MAX_DEVICES = 100_000  # devices that wait at once; bounds what invented names cost


class BlockQueue:
    """Requested blocks that wait for their turn; for any number of threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, OrderedDict[tuple[int, int], Request]] = OrderedDict()
        self._closed = False

    def put(self, device: str, request: Request) -> None:
        """Let the blocks of a request wait; those that wait already keep their place.

        Of a device that asks for more than `MAX_WAITING` the oldest are forgotten: it asks again.
        """
        with self._changed:
            own = self._waiting.get(device)
            if own is None:
                if len(self._waiting) >= MAX_DEVICES:
                    return
                own = self._waiting[device] = OrderedDict()
            for index in request.indices:
                own.setdefault((request.transfer, index), request)
            while len(own) > MAX_WAITING:
                own.popitem(last=False)
            self._changed.notify()

    def take(self, timeout: float | None = None) -> tuple[str, Request, int] | None:
        """The next (device, request, index); None: closed, or nothing came in time.

        Args:
            timeout: Seconds to wait; None: until there is something.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, timeout)
            if self._closed or not self._waiting:
                return None
            device, own = self._waiting.popitem(last=False)
            (_, index), request = own.popitem(last=False)
            if own:
                self._waiting[device] = own  # to the end of the line
            return device, request, index

    def close(self) -> None:
        """Forget all that waits; `take` returns None from now on."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
