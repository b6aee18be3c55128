"""The folder an agent owns, and the root of trust it was provisioned with."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fleetprune.errors import ConfigError, InstallError
from fleetprune.files import make_folder

MAX_ROOT: Final = 512_000  # bytes; python-tuf's own bound
_LOCK: Final = "lock"


@contextmanager
def locked(state: Path) -> Iterator[None]:
    """Own a state folder; a kill gives it back.

    Raises:
        ConfigError: It cannot be made, or another agent runs on it.
    """
    try:
        make_folder(state)
    except InstallError as e:
        raise ConfigError(f"state folder {state} cannot be used: {e.__cause__}") from e
    try:
        descriptor = os.open(state / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise ConfigError(f"state folder {state} cannot be used: {e.strerror}") from e
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise ConfigError(f"state folder {state} is in use by another agent") from e
        yield
    finally:
        os.close(descriptor)


def is_running(state: Path) -> bool:
    """Whether an agent runs on a state folder."""
    try:
        descriptor = os.open(state / _LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def read_root(path: Path) -> bytes:
    """The pinned root metadata, which was put on the device by hand.

    Raises:
        ConfigError: It is missing, too large or not root metadata.
    """
    from tuf.api.exceptions import RepositoryError  # noqa: PLC0415  (slow to import)
    from tuf.api.metadata import Metadata, Root  # type: ignore[attr-defined]  # noqa: PLC0415

    try:
        with path.open("rb") as file:
            data = file.read(MAX_ROOT + 1)
    except OSError as e:
        raise ConfigError(
            f"root {path} cannot be read ({e.strerror}): "
            "copy public/metadata/1.root.json of the fleet's release repository there"
        ) from e
    if len(data) > MAX_ROOT:
        raise ConfigError(f"root {path} has more than {MAX_ROOT} bytes")
    try:
        Metadata[Root].from_bytes(data).verify_delegate("root", Metadata[Root].from_bytes(data))
    except (RepositoryError, ValueError) as e:
        raise ConfigError(f"root {path} is not signed root metadata: {e}") from e
    return data
