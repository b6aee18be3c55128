"""A broker of one's own for demos and tests: loopback only, nothing persistent.

mosquitto where it is installed, since it is what real installations run; otherwise iotcore, which
comes as a wheel. Either way a child process on a free port of 127.0.0.1, open to whoever is on
this machine: not for anything else. `deploy/mosquitto` has the configuration for a real one.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import IO

from fleetprune.errors import MissingExtraError, TransportError
from fleetprune.files import storage_errors
from fleetprune.local_port import HOST, free_port
from fleetprune.mqtt import MAX_PACKET, BrokerSettings

START_S = 60.0  # iotcore's interpreter takes one second on a small machine that is idle
STOP_S = 5.0
POLL_S = 0.02

_MOSQUITTO = """\
# A private broker for a demo: loopback, anonymous, nothing kept.
listener {port} {host}
allow_anonymous true
persistence false
set_tcp_nodelay true
max_packet_size {packet}
log_dest file {log}
log_type error
log_type warning
log_type notice
{user}"""

# iotcore's own `Broker.start()` would do, but its child shares our standard output. The child
# ends by itself when its standard input closes, however we die.
_IOTCORE = """\
import os, sys, threading
from iotcore import Broker
def watch():
    sys.stdin.buffer.read()
    os._exit(0)
threading.Thread(target=watch, daemon=True).start()
Broker(port=int(sys.argv[1]), listen=sys.argv[2], max_payload_size=int(sys.argv[3])).run_forever()
"""


class BrokerKind(StrEnum):
    """Which program."""

    MOSQUITTO = "mosquitto"
    IOTCORE = "iotcore"


def find_mosquitto() -> str | None:
    """Path of the program; Debian puts it where a user's PATH does not look."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


class EmbeddedBroker:
    """A broker that can be stopped, killed and started again on the same port."""

    def __init__(self, folder: Path, port: int = 0, kind: BrokerKind | None = None) -> None:
        """Prepare; `start` runs it.

        Args:
            folder: For configuration and log; created.
            port: 0: a free one.
            kind: None: mosquitto if it is installed.

        Raises:
            InstallError: The folder cannot be written.
        """
        self._folder = folder
        self.kind = kind or (BrokerKind.MOSQUITTO if find_mosquitto() else BrokerKind.IOTCORE)
        self.log = folder / f"{self.kind}.log"
        self.settings = BrokerSettings(host=HOST, port=port or free_port())
        self._process: subprocess.Popen[bytes] | None = None
        with storage_errors("create", folder):
            folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Run the broker and wait until it accepts connections.

        Raises:
            MissingExtraError: Neither program is installed.
            TransportError: It does not start; says what its log says.
        """
        command = self._command()
        with storage_errors("write", self.log), self.log.open("ab") as log:
            self._process = self._spawn(command, log)
        deadline = time.monotonic() + START_S
        while not self._accepts():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise TransportError(
                    f"{self.kind} does not start on port {self.settings.port}: {self._last_words()}"
                )
            time.sleep(POLL_S)

    @staticmethod
    def _spawn(command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603  (our own command line)
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )

    def _command(self) -> list[str]:
        port = self.settings.port
        if self.kind is BrokerKind.IOTCORE:
            return [sys.executable, "-c", _IOTCORE, str(port), HOST, str(MAX_PACKET)]
        program = find_mosquitto()
        if program is None:
            raise MissingExtraError(
                "no MQTT broker: install mosquitto, or iotcore with pip install fleetprune[demo]"
            )
        # Started as root it would become user "mosquitto", who may not write our folder.
        user = "user root\n" if os.geteuid() == 0 else ""
        config = self._folder / "mosquitto.conf"
        with storage_errors("write", config):
            config.write_text(
                _MOSQUITTO.format(
                    port=port, host=HOST, packet=MAX_PACKET, log=self.log.resolve(), user=user
                )
            )
        return [program, "-c", str(config)]

    def _accepts(self) -> bool:
        try:
            socket.create_connection((HOST, self.settings.port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n") if self.log.exists() else []
        return next((line for line in reversed(lines) if line.strip()), "it says nothing")

    def stop(self) -> None:
        """Let it end by itself, else kill it; nothing happens if it does not run."""
        self._end(kill=False)

    def kill(self) -> None:
        """SIGKILL: whatever it held is lost."""
        self._end(kill=True)

    def _end(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if kill:
            process.kill()
        else:
            process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()


@contextmanager
def embedded_broker(
    folder: Path, port: int = 0, kind: BrokerKind | None = None
) -> Iterator[BrokerSettings]:
    """Run a broker for the length of a `with` block; its log stays in `folder`.

    Raises:
        MissingExtraError: Neither program is installed.
        TransportError: It does not start.
    """
    broker = EmbeddedBroker(folder, port, kind)
    broker.start()
    try:
        yield broker.settings
    finally:
        broker.stop()
