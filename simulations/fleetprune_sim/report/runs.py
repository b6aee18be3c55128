"""One run: its summary and its history, read from its folder without touching it."""

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fleetprune.config_file import explain
from fleetprune.errors import DataError
from fleetprune_sim.history import FILE, DeviceRow, EvaluationRow, RoundRow
from fleetprune_sim.report.summary_file import Summary
from fleetprune_sim.wanted import RUN

SUMMARY = "summary.json"
FILE_LIMIT = 16_000_000  # bytes; a summary with a thousand classes has one

Row = TypeVar("Row", RoundRow, EvaluationRow, DeviceRow)


@dataclass(frozen=True)
class Run:
    """A finished simulation."""

    folder: Path
    summary: Summary
    rounds: tuple[RoundRow, ...]
    """by number"""
    evaluations: tuple[EvaluationRow, ...]
    """by round"""
    devices: tuple[DeviceRow, ...]
    """by name"""
    described: Mapping[str, Any] = field(default_factory=dict)
    """What the run is of, as its folder says; nothing where it does not."""

    def curve(self, device_class: str) -> list[EvaluationRow]:
        """Evaluations of the model that a class was given, by round; none if it was left out."""
        model = self.summary.classes[device_class].model
        for name in (device_class, model):
            if found := [e for e in self.evaluations if e.device_class == name and model]:
                return found
        return []


def read_run(folder: Path) -> Run:
    """Read a finished run.

    Args:
        folder: Holds `summary.json` and `history.db`.

    Raises:
        DataError: One of them is missing, cannot be read, or is not what it should be.
    """
    summary = _summary(folder / SUMMARY)
    path = folder / FILE
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected the history of a simulated run")
    try:
        with closing(_open(path)) as database:
            rounds = _rows(database, "rounds", RoundRow)
            evaluations = _rows(database, "evaluations", EvaluationRow)
            devices = _rows(database, "devices", DeviceRow)
    except sqlite3.Error as e:
        raise DataError(f"{path}: not the history of a run: {e}") from e
    return Run(
        folder,
        summary,
        tuple(sorted(rounds, key=lambda r: (r.number, r.phase, r.step))),
        tuple(sorted(evaluations, key=lambda e: e.round)),
        tuple(sorted(devices, key=lambda d: d.device)),
        _described(folder / RUN),
    )


def _summary(path: Path) -> Summary:
    try:
        return Summary.model_validate_json(_content(path))
    except ValidationError as e:
        raise DataError(f"{path}: {explain(e, Summary)}") from e


def _described(path: Path) -> Mapping[str, Any]:
    """Nothing in it is needed, so whatever is wrong with it is no error."""
    try:
        found = json.loads(_content(path))
    except (DataError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_LIMIT + 1)
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror}") from e
    if len(content) > FILE_LIMIT:
        raise DataError(f"{path}: larger than {FILE_LIMIT:,} bytes")
    return content


def _open(path: Path) -> sqlite3.Connection:
    """Read-only, also in a folder that is read-only.

    SQLite wants to make a file beside a database with a write-ahead log, unless it is told that
    nobody writes; a log that is still there holds rows, so then it is told nothing.
    """
    settled = not path.with_name(f"{path.name}-wal").exists()
    mode = "mode=ro&immutable=1" if settled else "mode=ro"
    return sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True)


def _rows(database: sqlite3.Connection, table: str, kind: type[Row]) -> list[Row]:
    names = ", ".join(f.name for f in fields(kind))
    found: list[tuple[Any, ...]] = database.execute(f"select {names} from {table}").fetchall()  # noqa: S608
    return [kind(*row) for row in found]
