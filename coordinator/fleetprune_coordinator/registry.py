"""The coordinator's memory: everything that must survive it, in one folder.

state/registry.db     SQLite, readable with any tool
state/registry.lock   held by the one process that writes
state/blobs/<sha256>  models, results, snapshots
"""

from fleetprune_coordinator.device_tables import DeviceTables
from fleetprune_coordinator.latency_tables import LatencyTables
from fleetprune_coordinator.records import EventRecord, ReleaseRecord
from fleetprune_coordinator.rollout_tables import RolloutTables
from fleetprune_coordinator.round_tables import RoundTables

DAY = 24 * 3600.0  # seconds


class Registry(DeviceTables, RoundTables, LatencyTables, RolloutTables):
    """All tables; safe to use from several threads."""

    def add_release(self, *releases: ReleaseRecord) -> None:
        """Store what one or several releases are for their classes, all or none.

        Raises:
            RegistryError: The release exists for the class, or class or mask are unknown.
        """
        with self.transaction() as db:
            for r in releases:
                self.mask(r.mask_version)
                db.table("releases").insert(
                    {
                        "number": r.number,
                        "class": r.device_class,
                        "sha256": r.sha256,
                        "bytes": r.bytes,
                        "macs": r.macs,
                        "peak_activation_bytes": r.peak_activation_bytes,
                        "accuracy": r.accuracy,
                        "path": r.path,
                        "round": r.round,
                        "mask_version": r.mask_version,
                        "created_at": self._now(),
                    }
                )

    def releases(self) -> list[ReleaseRecord]:
        """All releases by number and class."""
        rows = self.query("SELECT * FROM releases ORDER BY number, class")
        return [ReleaseRecord(device_class=r.pop("class"), **r) for r in rows]

    def add_event(self, kind: str, text: str, device: str | None = None) -> None:
        """Note something an operator may want to read."""
        with self.transaction() as db:
            db.table("events").insert(
                {"at": self._now(), "kind": kind, "device": device, "text": text}
            )

    def events(self, limit: int = 100) -> list[EventRecord]:
        """The last `limit` events, the newest first."""
        rows = self.query(
            "SELECT at, kind, device, text FROM events ORDER BY id DESC LIMIT ?", [limit]
        )
        return [EventRecord(**r) for r in rows]

    def collect_garbage(
        self,
        *,
        keep_snapshots: int = 2,
        grace_s: float = 3600.0,
        telemetry_s: float = 30 * DAY,
    ) -> int:
        """Delete what nothing needs any more.

        Kept are the binaries of an open round, the last snapshots, and whatever was stored within
        the last `grace_s` (somebody may be about to refer to it); of telemetry, each device's last
        report and the last `telemetry_s`; the devices of each class's last rollout.

        Returns:
            Bytes of files deleted.
        """
        with self.transaction() as db:
            now = self._now()
            db.execute(
                "DELETE FROM snapshots WHERE id NOT IN "
                "(SELECT id FROM snapshots ORDER BY id DESC LIMIT ?)",
                [max(1, keep_snapshots)],
            )
            db.execute(
                "DELETE FROM telemetry WHERE at < ? AND id NOT IN "
                "(SELECT max(id) FROM telemetry GROUP BY device)",
                [now - telemetry_s],
            )
            db.execute(
                "DELETE FROM rollout_devices WHERE rollout NOT IN "
                "(SELECT max(id) FROM rollouts GROUP BY class)"
            )
            db.execute(
                """
                DELETE FROM blobs WHERE created_at <= ? AND sha256 NOT IN (
                    SELECT sha256 FROM snapshots
                    UNION
                    SELECT t.model FROM tasks t JOIN rounds r ON r.id = t.round
                    WHERE r.state = 'open'
                    UNION
                    SELECT s.sha256 FROM results s JOIN tasks t ON t.id = s.task
                    JOIN rounds r ON r.id = t.round WHERE r.state = 'open')
                """,
                [now - grace_s],
            )
        return self._sweep_files()
