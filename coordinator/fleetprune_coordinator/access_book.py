"""What the authority remembers: devices, one-time tokens, certificates; an SQLite file.

It is a file of its own beside the registry, because several processes write it while the
coordinator runs: the commands, the join endpoint, the coordinator itself. Every change is one
transaction that takes SQLite's write lock before it reads.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fleetprune.errors import RegistryError
from fleetprune_coordinator.tokens import Kept

BUSY_S: Final = 10.0  # that a writer waits for another one
_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE devices (
    name TEXT PRIMARY KEY, class TEXT NOT NULL, revoked_at REAL, reason TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE tokens (
    id TEXT PRIMARY KEY, device TEXT NOT NULL, class TEXT NOT NULL,
    salt BLOB NOT NULL, digest BLOB NOT NULL, expires_at REAL NOT NULL,
    used_by TEXT, used_at REAL
) STRICT;
CREATE INDEX tokens_device ON tokens (device);
CREATE TABLE certificates (
    serial TEXT PRIMARY KEY, device TEXT NOT NULL, key TEXT NOT NULL, pem TEXT NOT NULL,
    issued_at REAL NOT NULL, not_before REAL NOT NULL, not_after REAL NOT NULL, revoked_at REAL
) STRICT;
CREATE INDEX certificates_device ON certificates (device);
CREATE INDEX certificates_key ON certificates (key);
PRAGMA user_version = 1;
"""


@dataclass(frozen=True, slots=True)
class DeviceAccess:
    """What the authority knows of a device."""

    name: str
    device_class: str
    revoked_at: float | None = None
    reason: str = ""
    not_after: float | None = None
    """Of its newest certificate that is not revoked; None: it has none."""
    token_until: float | None = None
    """Until when a token for it can be used; None: there is none."""


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token that was made."""

    id: str
    device: str
    device_class: str
    kept: Kept
    expires_at: float
    used_by: str | None
    """SHA-256 of the public key that joined with it; None: not used."""


@dataclass(frozen=True, slots=True)
class Certified:
    """A certificate that was issued."""

    serial: str
    """In hex."""
    device: str
    key: str
    """SHA-256 of its public key."""
    pem: str
    issued_at: float
    not_before: float
    not_after: float
    revoked_at: float | None = None


class AccessBook:
    """One connection, shared by this process's threads under one lock."""

    def __init__(self, path: Path) -> None:
        """Open, and make where it is missing; RegistryError if that fails."""
        self._path, self._lock = path, threading.RLock()
        try:
            self._db = sqlite3.connect(
                path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
            )
            self._db.row_factory = sqlite3.Row
            path.chmod(0o600)
            self._db.execute("PRAGMA synchronous = FULL")
            self._prepare()
        except (sqlite3.Error, OSError) as e:
            raise RegistryError(f"cannot open {path}: {e}") from e

    def _prepare(self) -> None:
        with self.transaction():
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > _VERSION:
                raise RegistryError(
                    f"{self._path} is of a newer version of Fleetprune than this one: upgrade it"
                )
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, against other threads and processes; not to be nested."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.Error as e:
                raise RegistryError(f"{self._path}: {e}") from e

    def edition(self) -> int:
        """A number that is another one after any change, whoever made it; cheap."""
        with self._lock:  # the first part counts other connections' changes, the second our own
            return (int(self._rows("PRAGMA data_version")[0][0]) << 32) + self._db.total_changes

    # ---- devices

    def devices(self, now: float) -> list[DeviceAccess]:
        """All, by name."""
        rows = self._rows(
            "SELECT d.*, (SELECT max(not_after) FROM certificates c WHERE c.device = d.name "
            "AND c.revoked_at IS NULL) AS not_after, (SELECT max(expires_at) FROM tokens t "
            "WHERE t.device = d.name AND t.used_by IS NULL AND t.expires_at > ?) AS token_until "
            "FROM devices d ORDER BY d.name",
            now,
        )
        return [
            DeviceAccess(
                r["name"],
                r["class"],
                r["revoked_at"],
                r["reason"],
                r["not_after"],
                r["token_until"],
            )
            for r in rows
        ]

    def device(self, name: str) -> DeviceAccess | None:
        """One, without what certificates and tokens say; None: it has never joined."""
        rows = self._rows("SELECT * FROM devices WHERE name = ?", name)
        return (
            DeviceAccess(
                rows[0]["name"], rows[0]["class"], rows[0]["revoked_at"], rows[0]["reason"]
            )
            if rows
            else None
        )

    def admit(self, name: str, device_class: str) -> None:
        """A device has joined (again)."""
        self._rows(
            "INSERT INTO devices (name, class) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET "
            "class = excluded.class, revoked_at = NULL, reason = ''",
            name,
            device_class,
        )

    def revoke(self, name: str, reason: str, now: float) -> None:
        """Shut a device out: its certificates, and tokens that nobody has used."""
        self._rows(
            "UPDATE devices SET revoked_at = ?, reason = ? WHERE name = ?", now, reason, name
        )
        self._rows(
            "UPDATE certificates SET revoked_at = ? WHERE device = ? AND revoked_at IS NULL",
            now,
            name,
        )
        self._rows("DELETE FROM tokens WHERE device = ?", name)

    # ---- tokens

    def add_token(self, record: TokenRecord) -> None:
        """A new one; those that the device had are void."""
        self._rows("DELETE FROM tokens WHERE device = ?", record.device)
        self._rows(
            "INSERT INTO tokens (id, device, class, salt, digest, expires_at) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            record.id,
            record.device,
            record.device_class,
            record.kept.salt,
            record.kept.digest,
            record.expires_at,
        )

    def token(self, id_: str) -> TokenRecord | None:
        """The one with this id."""
        rows = self._rows("SELECT * FROM tokens WHERE id = ?", id_)
        if not rows:
            return None
        r = rows[0]
        kept = Kept(r["salt"], r["digest"])
        return TokenRecord(r["id"], r["device"], r["class"], kept, r["expires_at"], r["used_by"])

    def use_token(self, id_: str, key: str, now: float) -> None:
        """It has let a key in, and lets no other in."""
        self._rows("UPDATE tokens SET used_by = ?, used_at = ? WHERE id = ?", key, now, id_)

    # ---- certificates

    def add_certificate(self, made: Certified) -> None:
        """One that is about to be handed out."""
        self._rows(
            "INSERT INTO certificates VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            made.serial,
            made.device,
            made.key,
            made.pem,
            made.issued_at,
            made.not_before,
            made.not_after,
            made.revoked_at,
        )

    def certificates(self, *, device: str | None = None, key: str | None = None) -> list[Certified]:
        """Of a device, or of a public key; the newest first."""
        column, value = ("device", device) if device is not None else ("key", key)
        rows = self._rows(
            f"SELECT * FROM certificates WHERE {column} = ? "  # noqa: S608  (one of two names)
            "ORDER BY issued_at DESC, rowid DESC",
            value,
        )
        return [Certified(*r) for r in rows]

    def revoked(self, now: float) -> list[tuple[str, float]]:
        """Serial numbers (hex) of revoked certificates that have not expired, and since when."""
        rows = self._rows(
            "SELECT serial, revoked_at FROM certificates "
            "WHERE revoked_at IS NOT NULL AND not_after > ? ORDER BY serial",
            now,
        )
        return [(r["serial"], r["revoked_at"]) for r in rows]

    def forget_before(self, moment: float) -> None:
        """Delete tokens and certificates that ended before; a device keeps its newest."""
        self._rows("DELETE FROM tokens WHERE expires_at < ?", moment)
        self._rows(
            "DELETE FROM certificates WHERE not_after < ? AND issued_at < (SELECT "
            "max(issued_at) FROM certificates c WHERE c.device = certificates.device)",
            moment,
        )

    def _rows(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            try:
                return self._db.execute(sql, values).fetchall()
            except sqlite3.Error as e:
                raise RegistryError(f"{self._path}: {e}") from e
