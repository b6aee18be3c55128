"""The registry's tables, one migration per change; each commits together with its record.

Migrations that have been released are never edited: a change is a new function at the end.
Times are seconds since 1970, flags are 0 or 1, binaries are files named by their hash.
"""

from sqlite_utils.db import Database, Table
from sqlite_utils.migrations import Migrations

migrations = Migrations("fleetprune")


def _index(db: Database, table: str, *columns: str, unique: bool = False) -> None:
    found = db[table]
    if isinstance(found, Table):  # not a view
        found.create_index(columns, unique=unique)


@migrations()
def m0001_devices(db: Database) -> None:
    """Who takes part, and what was measured on them."""
    db.create_table(
        "classes",
        {"name": str, "trains": int, "active": int},
        pk="name",
        not_null={"trains", "active"},
    )
    db.create_table(
        "devices",
        {
            "id": int,
            "name": str,
            "class": str,
            "trains": int,
            "samples": int,
            "block": int,
            "agent_version": str,
            "rss_mb": float,
            "enrolled_at": float,
            "last_seen": float,
            "online": int,
        },
        pk="id",
        foreign_keys=[("class", "classes", "name")],
        not_null={"name", "class", "trains", "samples", "online"},
    )
    _index(db, "devices", "name", unique=True)
    db.create_table(
        "telemetry",
        {"id": int, "device": int, "at": float, "fields": str},
        pk="id",
        foreign_keys=[("device", "devices", "id")],
        not_null={"device", "at", "fields"},
    )
    _index(db, "telemetry", "device", "id")
    db.create_table(
        "traffic",
        {"device": int, "round": int, "up": int, "down": int},
        pk=("device", "round"),
        foreign_keys=[("device", "devices", "id")],
        not_null={"up", "down"},
    )


@migrations()
def m0002_rounds(db: Database) -> None:
    """Masks, rounds with their tasks and results, snapshots of the model, stored binaries."""
    db.create_table(
        "blobs",
        {"sha256": str, "bytes": int, "created_at": float},
        pk="sha256",
        not_null={"bytes", "created_at"},
    )
    db.create_table(
        "masks",
        {"version": int, "round": int, "order": str, "keep": str, "created_at": float},
        pk="version",
        not_null={"round", "order", "keep"},
    )
    db.create_table(
        "rounds",
        {
            "id": int,
            "number": int,
            "phase": str,
            "step": int,
            "state": str,
            "mask_version": int,
            "started_at": float,
            "closed_at": float,
            "metrics": str,
        },
        pk="id",
        foreign_keys=[("mask_version", "masks", "version")],
        not_null={"number", "phase", "step", "state", "mask_version", "started_at"},
    )
    _index(db, "rounds", "number", "phase", "step", unique=True)
    # The database itself holds that at most one round is open.
    db.execute("CREATE UNIQUE INDEX one_open_round ON rounds (state) WHERE state = 'open'")
    db.create_table(
        "tasks",
        {
            "id": str,
            "round": int,
            "device": int,
            "json": str,
            "model": str,
            "state": str,
            "reason": str,
            "announced_at": float,
            "deadline": float,
            "up_bytes": int,
            "down_bytes": int,
        },
        pk="id",
        foreign_keys=[("round", "rounds", "id"), ("device", "devices", "id")],
        not_null={"round", "device", "json", "model", "state"},
    )
    _index(db, "tasks", "round")
    _index(db, "tasks", "device", "state")
    # `model` and `sha256` outlive the binaries they name: collected ones stay on record.
    db.create_table(
        "results",
        {"task": str, "sha256": str, "bytes": int, "received_at": float, "metadata": str},
        pk="task",
        foreign_keys=[("task", "tasks", "id")],
        not_null={"sha256", "bytes", "received_at"},
    )
    db.create_table(
        "snapshots",
        {"id": int, "round": int, "mask_version": int, "sha256": str, "created_at": float},
        pk="id",
        foreign_keys=[("mask_version", "masks", "version"), ("sha256", "blobs", "sha256")],
        not_null={"round", "mask_version", "sha256"},
    )


@migrations()
def m0003_releases(db: Database) -> None:
    """What was shipped to whom, and what happened."""
    db.create_table(
        "releases",
        {
            "number": int,
            "class": str,
            "sha256": str,
            "bytes": int,
            "macs": int,
            "peak_activation_bytes": int,
            "accuracy": float,
            "path": str,
            "round": int,
            "mask_version": int,
            "created_at": float,
        },
        pk=("number", "class"),
        foreign_keys=[("class", "classes", "name"), ("mask_version", "masks", "version")],
        not_null={"sha256", "bytes", "path", "round", "mask_version"},
    )
    db.create_table(
        "events",
        {"id": int, "at": float, "kind": str, "device": str, "text": str},
        pk="id",
        not_null={"at", "kind", "text"},
    )


@migrations()
def m0004_meta(db: Database) -> None:
    """What is true of the registry as a whole."""
    db.create_table("meta", {"key": str, "value": str}, pk="key", not_null={"value"})


@migrations()
def m0005_latencies(db: Database) -> None:
    """What devices of each class measured with each version of a runtime, per shape."""
    db.create_table(
        "latency_tables",
        {
            "class": str,
            "runtime": str,
            "version": str,
            "model": str,
            "devices": int,
            "measured_at": float,
        },
        pk=("class", "runtime", "version"),
        foreign_keys=[("class", "classes", "name")],
        not_null={"model", "devices", "measured_at"},
    )
    db.create_table(
        "latency_points",
        {
            "id": int,
            "class": str,
            "runtime": str,
            "version": str,
            "keep": str,
            "median_ms": float,
            "spread_ms": float,
        },
        pk="id",
        not_null={"class", "runtime", "version", "keep", "median_ms", "spread_ms"},
    )
    _index(db, "latency_points", "class", "runtime", "version")


@migrations()
def m0006_precision(db: Database) -> None:
    """Latency tables of quantised files beside those of float32 files, which all were before."""
    db.execute("ALTER TABLE latency_tables RENAME TO old_latency_tables")
    db.create_table(
        "latency_tables",
        {
            "class": str,
            "runtime": str,
            "version": str,
            "precision": str,
            "model": str,
            "devices": int,
            "measured_at": float,
        },
        pk=("class", "runtime", "version", "precision"),
        foreign_keys=[("class", "classes", "name")],
        not_null={"model", "devices", "measured_at"},
    )
    db.execute(
        "INSERT INTO latency_tables "
        "SELECT class, runtime, version, 'float32', model, devices, measured_at "
        "FROM old_latency_tables"
    )
    db.execute("DROP TABLE old_latency_tables")
    db.execute("ALTER TABLE latency_points ADD COLUMN precision TEXT NOT NULL DEFAULT 'float32'")


@migrations()
def m0007_rollouts(db: Database) -> None:
    """Which release is on its way to whom, what devices are told, and who decided what and why."""
    db.create_table(
        "rollouts",
        {
            "id": int,
            "class": str,
            "candidate": int,
            "stable": int,
            "stages": str,
            "salt": str,
            "canaries": str,
            "started_at": float,
            "began_at": float,
            "stage": int,
            "status": str,
            "reason": str,
            "held": int,
            "changed_at": float,
            "listened_at": float,
        },
        pk="id",
        foreign_keys=[("class", "classes", "name")],
        not_null={"class", "candidate", "stable", "stages", "stage", "status", "started_at"},
    )
    db.execute(
        "CREATE UNIQUE INDEX one_open_rollout ON rollouts (class) "
        "WHERE status IN ('running', 'paused')"
    )
    db.create_table(
        "rollout_devices",
        {
            "rollout": int,
            "device": int,
            "told_at": float,
            "committed_at": float,
            "latency_before": float,
        },
        pk=("rollout", "device"),
        foreign_keys=[("rollout", "rollouts", "id"), ("device", "devices", "id")],
        not_null={"told_at"},
    )
    # What is to be signed: committed before it is published, and published again after a kill.
    db.create_table(
        "rollout_documents",
        {"class": str, "json": str},
        pk="class",
        foreign_keys=[("class", "classes", "name")],
        not_null={"json"},
    )
    db.create_table(
        "rollout_log",
        {
            "id": int,
            "at": float,
            "class": str,
            "rollout": int,
            "release": int,
            "action": str,
            "who": str,
            "reason": str,
            "evidence": str,
        },
        pk="id",
        not_null={"at", "class", "release", "action", "who", "reason", "evidence"},
    )
    _index(db, "rollout_log", "class")
    _index(db, "rollout_log", "rollout")
