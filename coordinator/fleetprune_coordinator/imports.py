"""The user's own code, named in the configuration as `module:name`."""

import difflib
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fleetprune.errors import ConfigError


def import_object(dotted: str, what: str, folder: Path | None = None) -> Any:
    """Import what `module:name` names.

    Args:
        dotted: The module and, after the colon, the attribute; both may have dots.
        what: The key that says so, for messages.
        folder: Looked in first, while importing only.

    Raises:
        ConfigError: There is no such module or attribute, or the module fails to import.
    """
    name, colon, attribute = dotted.partition(":")
    if not (name and colon and attribute):
        raise ConfigError(f"{what}: {dotted!r}, expected module:name")
    with _first_on_path(folder):
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as e:
            if e.name is not None and (name == e.name or name.startswith(f"{e.name}.")):
                beside = f" in {folder} or" if folder is not None else ""
                raise ConfigError(
                    f"{what}: no module {e.name}{beside} among the installed packages"
                ) from e
            raise ConfigError(f"{what}: {name} needs a module {e.name} that is missing") from e
        except Exception as e:
            raise ConfigError(f"{what}: {name} fails to import: {type(e).__name__}: {e}") from e
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{what}: {name} has no {attribute}{hint}")
        found = getattr(found, part)
    return found


@contextmanager
def _first_on_path(folder: Path | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    entry = str(folder)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()  # the folder may be seconds old
    try:
        yield
    finally:
        sys.path.remove(entry)
