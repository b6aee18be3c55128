"""A broker's folder: filled once, and kept up to date when devices come and go."""

import subprocess
from pathlib import Path
from typing import Final

from fleetprune.errors import ConfigError, InstallError
from fleetprune.files import make_folder, write_atomic
from fleetprune_coordinator.access import Access
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.mosquitto import (
    ACCESS_LIST,
    CERTIFICATES,
    CONFIG,
    REVOKED,
    Place,
    access_list,
    configuration,
)

RELOAD_S: Final = 60.0  # for the command that makes the broker read its files


def deploy(config: FleetConfig, access: Access, out: Path, place: Place) -> list[Path]:
    """Write all that the broker needs; what is there is replaced.

    Args:
        config: The fleet.
        access: Its authority.
        out: Folder to write.
        place: Where the broker will find it.

    Returns:
        The files.

    Raises:
        InstallError: The disk refuses.
    """
    make_folder(out)
    write_atomic(out / CONFIG, configuration(config.broker.port, place).encode())
    for name in CERTIFICATES:
        data = (access.authority.folder / name).read_bytes()
        write_atomic(out / name, data, mode=0o600 if name.endswith(".key") else 0o644)
    _write_lists(config, access, out)
    return [out / name for name in (CONFIG, ACCESS_LIST, *CERTIFICATES, REVOKED)]


def update(config: FleetConfig, access: Access) -> str:
    """Bring the deployed lists up to date and make the broker read them.

    Returns:
        What was done, or is left to do, in one line.

    Raises:
        InstallError: The lists cannot be written, or the command fails.
    """
    folder, command = config.access.deployed, config.access.reload
    if folder is None:
        return (
            "the broker does not know yet: run `fleetprune deploy mosquitto` again, then make "
            "mosquitto read its files (SIGHUP); access.deployed and access.reload do it for you"
        )
    if not folder.is_dir():
        raise ConfigError(
            f"access.deployed: no folder {folder}: `fleetprune deploy mosquitto --out` makes it"
        )
    _write_lists(config, access, folder)
    if not command:
        return f"{folder} is up to date: make mosquitto read it (SIGHUP), or set access.reload"
    try:
        done = subprocess.run(  # noqa: S603  (the operator's own command)
            command, capture_output=True, text=True, timeout=RELOAD_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as e:
        raise InstallError(f"access.reload {' '.join(command)!r} failed: {e}") from e
    if done.returncode:
        words = " ".join(done.stderr.split())[-200:] or f"exit code {done.returncode}"
        raise InstallError(f"access.reload {' '.join(command)!r} failed: {words}")
    return f"{folder} is up to date, and the broker has read it"


def _write_lists(config: FleetConfig, access: Access, folder: Path) -> None:
    text = access_list(config.fleet, access.shut_out())
    write_atomic(folder / ACCESS_LIST, text.encode())
    write_atomic(folder / REVOKED, access.revocations())
