"""Starting a broker once with the files that were made for it, to see that it takes them."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import Final

from fleetprune.errors import InstallError, MissingExtraError
from fleetprune.local_port import free_port
from fleetprune_coordinator.mosquitto import CONFIG

TRIAL_S: Final = 20.0
_POLL_S: Final = 0.05


def try_mosquitto(folder: Path) -> str:
    """Start mosquitto with a deployed folder on a free port of this machine, and end it.

    Args:
        folder: As `deployment.deploy` has written it; nothing in it is changed.

    Returns:
        That it works, in one line.

    Raises:
        MissingExtraError: mosquitto is not installed here.
        InstallError: It does not start; says why.
    """
    program = shutil.which("mosquitto") or shutil.which(
        "mosquitto", path="/usr/sbin:/usr/local/sbin"
    )
    if program is None:
        raise MissingExtraError("mosquitto is not installed here: --check cannot start it")
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch:
        trial = Path(scratch) / "trial.conf"
        trial.write_text(local(folder, port, Path(scratch)))
        process = subprocess.Popen(  # noqa: S603  (our own command line)
            [program, "-c", str(trial)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            end = time.monotonic() + TRIAL_S
            while process.poll() is None and time.monotonic() < end:
                if _listens(port):
                    return f"mosquitto takes it ({program})"
                time.sleep(_POLL_S)
        finally:
            process.terminate()
            said = process.communicate()[0].decode(errors="replace").split("\n")
        errors = [line.partition(": ")[2] for line in said if "rror" in line]
        raise InstallError(f"mosquitto does not take {folder}: {'; '.join(errors) or said[-1]}")


def local(folder: Path, port: int, scratch: Path) -> str:
    """A deployed configuration for a broker on this machine, for trials: port and places changed.

    Args:
        folder: The deployed folder.
        port: On 127.0.0.1.
        scratch: Where it may write.
    """
    lines = []
    for line in (folder / CONFIG).read_text().splitlines():
        match line.split(" ", 1):
            case ["listener", _]:
                lines.append(f"listener {port} 127.0.0.1")
            case ["cafile" | "certfile" | "keyfile" | "crlfile" | "acl_file" as key, file]:
                lines.append(f"{key} {folder.absolute() / PurePosixPath(file).name}")
            case ["persistence_location", _]:
                lines.append(f"persistence_location {scratch}/")
            case ["log_dest", _]:
                lines.append("log_dest stdout")
            case _:
                lines.append(line)
    if os.geteuid() == 0:  # it would become user "mosquitto", who may not read what is ours
        lines.append("user root")
    return "\n".join(lines) + "\n"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
