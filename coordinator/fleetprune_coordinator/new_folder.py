"""A folder of keys is made whole or not at all, and never over another."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fleetprune.errors import ConfigError
from fleetprune.files import storage_errors, sync_folder


@contextmanager
def new_folder(folder: Path, mode: int = 0o700) -> Iterator[Path]:
    """A temporary folder to fill, renamed to `folder` at the end: a kill leaves nothing half-made.

    Args:
        folder: To be made; may exist if it is empty.
        mode: Its permissions.

    Raises:
        ConfigError: `folder` already holds something.
        InstallError: The disk is full or refuses.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} already holds keys or files, expected a new or empty folder: "
            "keys are never overwritten"
        )
    with storage_errors("make", folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            yield staging
            staging.chmod(mode)
            staging.rename(folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
