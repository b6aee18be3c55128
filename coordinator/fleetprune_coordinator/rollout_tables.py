"""The registry's part about rollouts: their state, their devices, and the audit log."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fleetprune.messages import Telemetry
from fleetprune.rollout import Rollout
from fleetprune_coordinator.rollout_state import Device, RolloutRecord, Status
from fleetprune_coordinator.store import Store


@dataclass(frozen=True, slots=True)
class LogEntry:
    """A decision about a rollout."""

    device_class: str
    release: int
    action: str
    who: str
    reason: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    rollout: int | None = None
    at: float = 0.0
    """Set by the registry."""


class RolloutTables(Store):
    """At most one open rollout per class, and what the class's devices are to be told."""

    def add_rollout(self, rollout: RolloutRecord) -> RolloutRecord:
        """Store a new rollout; returns it with its number (RegistryError if one is open)."""
        with self.transaction() as db:
            last = self.query("SELECT max(id) AS id FROM rollouts")[0]["id"]
            made = replace(rollout, id=int(last or 0) + 1)
            db.table("rollouts").insert({"id": made.id, "listened_at": self._now(), **_row(made)})
            return made

    def save_rollout(self, rollout: RolloutRecord) -> None:
        """Store what has changed about a rollout."""
        with self.transaction() as db:
            db.table("rollouts").update(rollout.id, _row(rollout))

    def rollouts(self, device_class: str | None = None) -> list[RolloutRecord]:
        """All rollouts, the newest first."""
        where, of = ("", []) if device_class is None else ("WHERE class = ?", [device_class])
        rows = self.query(f"SELECT * FROM rollouts {where} ORDER BY id DESC", of)  # noqa: S608
        return [_record(r) for r in rows]

    def open_rollouts(self) -> dict[str, RolloutRecord]:
        """The rollouts that run or are paused, by class."""
        rows = self.query("SELECT * FROM rollouts WHERE status IN ('running', 'paused')")
        return {r["class"]: _record(r) for r in rows}

    def set_document(self, document: Rollout) -> None:
        """Store what the devices of a class are to be told."""
        with self.transaction() as db:
            db.table("rollout_documents").upsert(
                {"class": document.device_class, "json": document.to_bytes().decode()}, pk="class"
            )

    def documents(self) -> dict[str, Rollout]:
        """What devices are to be told, by class."""
        rows = self.query("SELECT class, json FROM rollout_documents ORDER BY class")
        return {r["class"]: Rollout.from_bytes(r["json"].encode()) for r in rows}

    def rollout_devices(self, device_class: str, rollout: int | None = None) -> list[Device]:
        """The devices of a class with their last reports.

        Args:
            device_class: The class.
            rollout: Whose devices are those that were told; None: nobody was.
        """
        rows = self.query(
            "SELECT d.name, d.online, d.last_seen, t.fields, t.at, "
            "r.told_at, r.committed_at, r.latency_before FROM devices d "
            "LEFT JOIN telemetry t ON t.id = "
            "(SELECT id FROM telemetry WHERE device = d.id ORDER BY id DESC LIMIT 1) "
            "LEFT JOIN rollout_devices r ON r.device = d.id AND r.rollout = ? "
            "WHERE d.class = ? ORDER BY d.id",
            [rollout, device_class],
        )
        return [
            Device(
                name=r["name"],
                online=bool(r["online"]),
                last_seen=r["last_seen"],
                telemetry=None
                if r["fields"] is None
                else Telemetry.model_validate_json(r["fields"]),
                reported_at=r["at"] or 0.0,
                told_at=r["told_at"],
                committed_at=r["committed_at"],
                latency_before=r["latency_before"],
            )
            for r in rows
        ]

    def tell(self, rollout: int, told: Mapping[str, float | None]) -> None:
        """Note that devices could know of a rollout from now on.

        Args:
            rollout: By number.
            told: Per device the latency of what it ran, in milliseconds, if that is known.
        """
        with self.transaction() as db:
            db.conn.executemany(
                "INSERT OR IGNORE INTO rollout_devices (rollout, device, told_at, latency_before) "
                "SELECT ?, id, ?, ? FROM devices WHERE name = ?",
                [(rollout, self._now(), ms, name) for name, ms in told.items()],
            )

    def note_committed(self, rollout: int, at: Mapping[str, float]) -> None:
        """Note when devices first said that they run the candidate."""
        with self.transaction() as db:
            db.conn.executemany(
                "UPDATE rollout_devices SET committed_at = ? WHERE rollout = ? "
                "AND committed_at IS NULL AND device = (SELECT id FROM devices WHERE name = ?)",
                [(when, rollout, name) for name, when in at.items()],
            )

    def unheard_s(self, rollout: int) -> float:
        """Seconds since somebody last listened to a rollout's devices."""
        row = self.query("SELECT listened_at FROM rollouts WHERE id = ?", [rollout])[0]
        return float(self._now() - row["listened_at"])

    def listened(self, rollout: int) -> None:
        """Note that a rollout's devices could be heard until now."""
        with self.transaction() as db:
            db.execute("UPDATE rollouts SET listened_at = ? WHERE id = ?", [self._now(), rollout])

    def make_up(self, rollout: int, gap_s: float) -> RolloutRecord:
        """Take seconds in which nobody listened, or of a pause, out of a rollout's clock.

        Returns:
            The rollout as it is then.
        """
        with self.transaction() as db:
            db.execute(
                "UPDATE rollouts SET began_at = began_at + ?, listened_at = ? WHERE id = ?",
                [gap_s, self._now(), rollout],
            )
            db.execute(
                "UPDATE rollout_devices SET told_at = told_at + ?, "
                "committed_at = committed_at + ? WHERE rollout = ?",
                [gap_s, gap_s, rollout],
            )
            return _record(self.query("SELECT * FROM rollouts WHERE id = ?", [rollout])[0])

    def add_log(self, *entries: LogEntry) -> None:
        """Write decisions into the audit log."""
        with self.transaction() as db:
            for e in entries:
                db.table("rollout_log").insert(
                    {
                        "at": self._now(),
                        "class": e.device_class,
                        "rollout": e.rollout,
                        "release": e.release,
                        "action": e.action,
                        "who": e.who,
                        "reason": e.reason,
                        "evidence": json.dumps(e.evidence),
                    }
                )

    def rollout_log(self, device_class: str | None = None, limit: int = 1000) -> list[LogEntry]:
        """The last decisions, the oldest first."""
        where, of = ("", []) if device_class is None else ("WHERE class = ?", [device_class])
        rows = self.query(
            f"SELECT * FROM rollout_log {where} ORDER BY id DESC LIMIT ?",  # noqa: S608
            [*of, limit],
        )
        return [_entry(r) for r in reversed(rows)]

    def last_decision(self, rollout: int) -> LogEntry | None:
        """The last decision about a rollout."""
        row = self.first("SELECT * FROM rollout_log WHERE rollout = ? ORDER BY id DESC", [rollout])
        return None if row is None else _entry(row)


def _entry(row: Mapping[str, Any]) -> LogEntry:
    return LogEntry(
        device_class=row["class"],
        release=row["release"],
        action=row["action"],
        who=row["who"],
        reason=row["reason"],
        evidence=json.loads(row["evidence"]),
        rollout=row["rollout"],
        at=row["at"],
    )


def _row(r: RolloutRecord) -> dict[str, Any]:
    return {
        "class": r.device_class,
        "candidate": r.candidate,
        "stable": r.stable,
        "stages": json.dumps(r.stages),
        "salt": r.salt,
        "canaries": json.dumps(r.canaries),
        "started_at": r.started_at,
        "began_at": r.began_at,
        "stage": r.stage,
        "status": r.status.value,
        "reason": r.reason,
        "held": int(r.held),
        "changed_at": r.changed_at,
    }


def _record(row: Mapping[str, Any]) -> RolloutRecord:
    return RolloutRecord(
        id=row["id"],
        device_class=row["class"],
        candidate=row["candidate"],
        stable=row["stable"],
        stages=tuple(json.loads(row["stages"])),
        salt=row["salt"],
        canaries=tuple(json.loads(row["canaries"])),
        started_at=row["started_at"],
        began_at=row["began_at"],
        stage=row["stage"],
        status=Status(row["status"]),
        reason=row["reason"],
        held=bool(row["held"]),
        changed_at=row["changed_at"],
    )
