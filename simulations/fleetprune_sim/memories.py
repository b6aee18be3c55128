"""What every device of a run remembers, in one file: error feedback and its last answer."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from fleetprune_sim.history import open_database

FILE = "devices.db"
"""Name of the file in a run's folder."""


class Memories:
    """Frames by device. A round's are saved at once, so that a kill finds all of it or nothing.

    A task that is done again because nothing was saved starts from the same memory, so it has the
    same answer; one that was saved is answered from memory.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or make it; ConfigError if it is damaged."""
        self._db = open_database(path)
        columns = {"device": str, "frame": bytes}
        self._db.table("memories").create(columns, pk="device", if_not_exists=True)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def load(self, devices: Iterable[str]) -> dict[str, bytes]:
        """What those of the devices that remember anything do."""
        found = self._db.execute(
            "SELECT device, frame FROM memories WHERE device IN (SELECT value FROM json_each(?))",
            [json.dumps(list(devices))],
        )
        return dict(found.fetchall())

    def save(self, frames: Mapping[str, bytes]) -> None:
        """Replace what these devices remember."""
        with self._db.conn:
            self._db.conn.executemany(
                "INSERT OR REPLACE INTO memories (device, frame) VALUES (?, ?)", frames.items()
            )
