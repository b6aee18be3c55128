"""Whom the coordinator listens to, as the authority's book says at this moment.

Needs no key, so block servers that are processes of their own can ask, too.
"""

import threading
from pathlib import Path

from fleetprune_coordinator.access_book import AccessBook, DeviceAccess


class Gate:
    """Asked for each message: remembers answers until anybody changes the book."""

    def __init__(self, book: AccessBook) -> None:
        self._book = book
        self._known: dict[str, DeviceAccess | None] = {}
        self._edition = -1
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> "Gate":
        """The gate of a book; RegistryError if it cannot be opened."""
        return cls(AccessBook(path))

    def close(self) -> None:
        """Close the book."""
        self._book.close()

    def refusal(self, device: str) -> str | None:
        """Why a device's messages are not to be acted upon; None: they are."""
        return why_not(device, self._device(device))

    def device_class(self, device: str) -> str | None:
        """The class that the device's token said; None: it has never joined."""
        known = self._device(device)
        return None if known is None else known.device_class

    def _device(self, device: str) -> DeviceAccess | None:
        with self._lock:
            edition = self._book.edition()
            if edition != self._edition:
                self._edition = edition
                self._known.clear()
            if device not in self._known:
                self._known[device] = self._book.device(device)
            return self._known[device]


def why_not(device: str, known: DeviceAccess | None) -> str | None:
    """Why a device is not let in, given what the book says of it; None: it is."""
    if known is None:
        return f"device {device} has not joined this fleet: `fleetprune access token` lets it in"
    if known.revoked_at is not None:
        return f"device {device} is revoked{f': {known.reason}' if known.reason else ''}"
    return None
