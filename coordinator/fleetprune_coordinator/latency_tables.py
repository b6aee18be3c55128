"""The registry's part about latency: what the devices of each class measured, and with what."""

import json
from collections.abc import Mapping
from typing import Any

from fleetprune.latency import LatencyPoint, LatencyTable, Precision
from fleetprune_coordinator.store import Store

_KEY = "class = ? AND runtime = ? AND version = ? AND precision = ?"


class LatencyTables(Store):
    """One table per class, runtime, version and precision; a newer measurement replaces it."""

    def set_latency(self, table: LatencyTable, model: str) -> None:
        """Store what a class measured, in the place of what it measured before.

        Args:
            table: The measurement.
            model: Names the architecture whose shapes were timed (`timing.digest`).

        Raises:
            RegistryError: The class is unknown.
        """
        key = [table.device_class, table.runtime, table.version, table.precision.value]
        with self.transaction() as db:
            db.execute(f"DELETE FROM latency_points WHERE {_KEY}", key)  # noqa: S608
            db.execute(
                "INSERT INTO latency_tables "
                "(class, runtime, version, precision, model, devices, measured_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (class, runtime, version, precision) DO UPDATE SET "
                "model = excluded.model, devices = excluded.devices, "
                "measured_at = excluded.measured_at",
                [*key, model, table.devices, self._now()],
            )
            db.conn.executemany(
                "INSERT INTO latency_points "
                "(class, runtime, version, precision, keep, median_ms, spread_ms) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(*key, json.dumps(p.keep), p.median_ms, p.spread_ms) for p in table.points],
            )

    def latency(self, device_class: str, model: str, precision: Precision) -> LatencyTable | None:
        """The newest table of a class for an architecture; None if it has measured none.

        Args:
            device_class: The class.
            model: See `set_latency`.
            precision: Of the files that were timed.
        """
        row = self.first(
            "SELECT * FROM latency_tables WHERE class = ? AND model = ? AND precision = ? "
            "ORDER BY measured_at DESC, runtime, version",
            [device_class, model, precision.value],
        )
        return None if row is None else self._table(row)

    def latencies(self) -> list[LatencyTable]:
        """All tables, by class, runtime, version and precision."""
        rows = self.query(
            "SELECT * FROM latency_tables ORDER BY class, runtime, version, precision"
        )
        return [self._table(row) for row in rows]

    def _table(self, row: Mapping[str, Any]) -> LatencyTable:
        key = (row["class"], row["runtime"], row["version"], row["precision"])
        points = self.query(
            f"SELECT * FROM latency_points WHERE {_KEY} ORDER BY id",  # noqa: S608
            key,
        )
        return LatencyTable(
            device_class=row["class"],
            runtime=row["runtime"],
            version=row["version"],
            precision=row["precision"],
            devices=row["devices"],
            points=tuple(
                LatencyPoint(
                    keep=json.loads(p["keep"]),
                    median_ms=p["median_ms"],
                    spread_ms=p["spread_ms"],
                )
                for p in points
            ),
        )
