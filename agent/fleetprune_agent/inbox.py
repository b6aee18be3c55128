"""Tasks that were accepted and not yet answered, on disk.

An accepted task is done even if power fails: its message is stored before it is acknowledged and
removed after its answer lies in the outbox. Between the two, doing it again is harmless (see
`feedback`).
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fleetprune.errors import MessageError
from fleetprune.files import make_folder, storage_errors, write_atomic
from fleetprune.messages import Task

MAX_WAITING: Final = 4  # a coordinator sends one per round; more is a flood


class TaskInbox:
    """A few tasks in a folder of their own; used by one thread at a time."""

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        """Open or create.

        Args:
            folder: Used for nothing else.
            now: Seconds since the epoch, as file times have them.
        """
        self._folder, self._now = folder, now
        make_folder(folder)

    def add(self, task: Task) -> bool:
        """Store a task; False if it does not fit. One that is there already stays as it is."""
        path = self._path(task)
        if path.exists():
            return True
        if len(self._files()) >= MAX_WAITING:
            return False
        write_atomic(path, task.to_bytes())
        return True

    def done(self, task: Task) -> None:
        """Forget a task."""
        with storage_errors("remove", self._path(task)):
            self._path(task).unlink(missing_ok=True)

    def waiting(self) -> list[Task]:
        """Tasks that are not answered, the oldest first; damaged files are removed."""
        tasks = []
        for path in self._files():
            try:
                tasks.append(Task.from_bytes(path.read_bytes()))
            except (MessageError, OSError):
                path.unlink(missing_ok=True)
        return tasks

    def expired(self, task: Task) -> bool:
        """Whether nobody waits for the answer any more.

        A clock that was set back makes a task look young, and it is done for nothing; it never
        makes one look old that is not.
        """
        try:
            accepted = self._path(task).stat().st_mtime
        except FileNotFoundError:
            return True
        return self._now() - accepted > task.deadline_s

    def _path(self, task: Task) -> Path:
        return self._folder / f"{task.task}.json"

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.json"), key=lambda p: p.stat().st_mtime_ns)
