"""What happened in a simulated training, round by round: one SQLite file per run."""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlite_utils import Database

from fleetprune.errors import ConfigError

FILE = "history.db"
"""Name of the file in a run's folder."""


@dataclass(frozen=True)
class RoundRow:
    """One device class in one round; training rounds have step 0 unless they were tried again."""

    number: int
    phase: str
    """`train` or `calibrate`"""
    step: int
    device_class: str
    tasks: int
    answers: int
    """that came in time"""
    late: int
    """that came after the round was closed"""
    lost: int
    """devices that fell silent in mid-round"""
    up_bytes: int
    """payload of results, as encoded"""
    down_bytes: int
    """payload of tasks, models and graphs, as encoded"""
    virtual_s: float
    """how long the round took by the fleet's clock, the same for every class"""
    energy_j: float
    """of all devices of the class"""
    wall_s: float
    """how long it took to simulate, the same for every class"""


@dataclass(frozen=True)
class EvaluationRow:
    """One device class's model after a training round, on the validation set."""

    round: int
    device_class: str
    accuracy: float
    loss: float
    """mean cross-entropy"""


@dataclass(frozen=True)
class DeviceRow:
    """One simulated device."""

    device: str
    device_class: str
    samples: int
    label_counts: str
    """JSON list, one count per label"""


@dataclass(frozen=True)
class GraphRow:
    """A graph that a device has fetched, and for which round."""

    device: str
    sha256: str
    number: int
    phase: str
    step: int


Row = TypeVar("Row", RoundRow, EvaluationRow, DeviceRow, GraphRow)
_TABLES: dict[type[Any], tuple[str, tuple[str, ...]]] = {
    RoundRow: ("rounds", ("number", "phase", "step", "device_class")),
    EvaluationRow: ("evaluations", ("round", "device_class")),
    DeviceRow: ("devices", ("device",)),
    GraphRow: ("graphs", ("device", "sha256")),
}


def open_database(path: Path) -> Database:
    """One of a run's databases, which is made where it is missing.

    Raises:
        ConfigError: The file is damaged.
    """
    database = Database(path)
    try:
        database.enable_wal()
        database.execute("PRAGMA synchronous = OFF")  # to outlive this process is enough
    except sqlite3.Error as e:
        database.close()
        raise ConfigError(f"{path} cannot be read ({e}): give this run another --out") from e
    return database


class History:
    """Rows by kind; writing one again replaces it, so that a round may be told twice."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it; ConfigError if it is damaged."""
        self._db = open_database(path)
        for kind, (table, key) in _TABLES.items():
            columns: dict[str, Any] = {f.name: f.type for f in fields(kind)}
            self._db.table(table).create(columns, pk=key, if_not_exists=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def write(self, rows: Iterable[Row]) -> None:
        """Add rows of one kind, in one transaction."""
        rows = list(rows)
        if rows:
            table, _ = _TABLES[type(rows[0])]
            names = [f.name for f in fields(rows[0])]
            places = ", ".join("?" for _ in names)
            query = f"insert or replace into {table} ({', '.join(names)}) values ({places})"  # noqa: S608
            with self._db.conn:
                self._db.conn.executemany(query, map(astuple, rows))

    def read(self, kind: type[Row]) -> list[Row]:
        """All rows of a kind, in the order of their key."""
        table, key = _TABLES[kind]
        names = [f.name for f in fields(kind)]
        query = f"select {', '.join(names)} from {table} order by {', '.join(key)}"  # noqa: S608
        return [kind(*row) for row in self._db.execute(query).fetchall()]


def cells(rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    """Rows as tuples, their names first: what a CSV file holds."""
    return [tuple(f.name for f in fields(rows[0])), *map(astuple, rows)] if rows else []
