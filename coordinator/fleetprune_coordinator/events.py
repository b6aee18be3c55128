"""What happened, one JSON object per line, for people and programs that watch."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

log = logging.getLogger(__name__)


class EventLog:
    """Appends events to a file (if there is one) and to the log."""

    def __init__(self, path: Path | None, now: Callable[[], float]) -> None:
        """Open `path` for appending; `now` gives seconds since 1970."""
        self._now = now
        self._file = path.open("a", encoding="utf-8") if path is not None else None

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event; a reader sees whole lines only."""
        line = json.dumps({"event": event, "at": round(self._now(), 3), **fields})
        log.info("%s", line)
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
