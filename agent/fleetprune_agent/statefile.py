"""Small JSON files of ours that must outlive power cuts, updates and bad flash.

A file that does not parse is the same as one that is not there; it is set aside as `<name>.bad`,
for a person to look at. A file whose schema is newer than ours was written by a newer agent: it is
never replaced, because the agent that wrote it may come back.
"""

import json
import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from fleetprune.errors import InstallError, MessageError
from fleetprune.files import write_atomic
from fleetprune.messages import MAX_MESSAGE, SCHEMA, Message

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)


def read_message(path: Path, kind: type[M]) -> M | None:
    """A file of ours; None where it is missing, damaged or newer."""
    try:
        return kind.from_bytes(_read(path))
    except (OSError, MessageError):
        return None


def replace_message(path: Path, message: Message) -> None:
    """Write a file of ours in one step; what does not parse is set aside first.

    Args:
        path: In an existing folder.
        message: The new content.

    Raises:
        InstallError: The disk is full or refuses, or the file is a newer version's.
    """
    refuse_newer(path)
    tidy(path, type(message))
    write_atomic(path, message.to_bytes())


def refuse_newer(path: Path) -> None:
    """InstallError if a newer version wrote this file."""
    schema = _schema(path)
    if schema > SCHEMA:
        raise InstallError(
            f"{path} was written by a newer version (schema {schema}, this one knows {SCHEMA}): "
            "update the agent; nothing is changed"
        )


def tidy(path: Path, kind: type[Message]) -> None:
    """Set a damaged file aside; missing, whole and newer ones stay as they are.

    One writer at a time: a file that is being replaced must not be judged by its old content.
    """
    try:
        kind.from_bytes(_read(path))
    except FileNotFoundError:
        return
    except (OSError, MessageError) as e:
        if _schema(path) <= SCHEMA:
            set_aside(path, str(e))


def set_aside(path: Path, why: str) -> None:
    """Rename to `<name>.bad`, of which the newest is kept; says so in the log."""
    bad = path.with_name(f"{path.name}.bad")
    try:
        if bad.is_dir() and not bad.is_symlink():
            shutil.rmtree(bad)
        elif path.is_dir():
            bad.unlink(missing_ok=True)
        path.replace(bad)
    except OSError as e:
        log.warning("%s is damaged and cannot be set aside: %s", path, e.strerror or e)
    else:
        log.warning("%s is damaged and set aside as %s: %s", path, bad.name, " ".join(why.split()))


def tidy_folder(folder: Path) -> None:
    """Set a folder of JSON files aside as a whole if one of them does not parse."""
    if not folder.exists():
        return
    if not folder.is_dir():
        set_aside(folder, "not a folder")
        return
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as e:
            set_aside(folder, f"{path.name}: {e}")
            return
        if not isinstance(content, dict):
            set_aside(folder, f"{path.name}: not an object")
            return


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_MESSAGE + 1)


def _schema(path: Path) -> int:
    """That a file claims; 0 where it cannot be read."""
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(_read(path))
        schema = content.get("schema") if isinstance(content, dict) else None
        return schema if isinstance(schema, int) else 0
    return 0
