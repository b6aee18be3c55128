"""The coordinator's control socket: orders of people on the same machine.

`control/socket` below the state folder is a Unix socket of mode 0600 in a folder of mode 0700, and
the kernel says who is at the other end: the coordinator's own user or root, and nobody else is
answered. So there is no secret to keep. One line of JSON is asked and one answered, both bounded in
bytes and in time.
"""

import json
import logging
import os
import pwd
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fleetprune.errors import FleetpruneError, RolloutError, TransportError, UsageError

log = logging.getLogger(__name__)

FOLDER, SOCKET = "control", "socket"
MAX_ORDER = 16 * 1024  # bytes; a reason and some classes
MAX_ANSWER = 1024 * 1024  # bytes
ORDER_S = 5.0  # seconds for an order to come whole
ANSWER_S = 60.0  # seconds for an answer: a look at all rollouts may have to end first
BACKLOG = 8
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

Obey = Callable[[bytes, str], Any]
"""An order, unverified, and who gives it, to what is answered."""


def user_name(uid: int) -> str:
    """A user, for the audit log."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


class ControlServer:
    """Answers orders in a thread of its own, one after the other."""

    def __init__(self, state: Path, obey: Obey) -> None:
        """Prepare; entering the context opens the socket.

        Args:
            state: The coordinator's folder, of which this process is the only writer.
            obey: Carries an order out; FleetpruneErrors are answered.
        """
        self._folder, self._obey = state / FOLDER, obey
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)

    def __enter__(self) -> Self:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._folder.chmod(0o700)
        (self._folder / SOCKET).unlink(missing_ok=True)  # of a coordinator that was killed
        with _address(self._folder) as address:
            self._socket.bind(address)
        (self._folder / SOCKET).chmod(0o600)
        self._socket.listen(BACKLOG)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        (self._folder / SOCKET).unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:  # closed
                return
            with peer:
                try:
                    self._answer(peer)
                except OSError as e:  # it went away, or was too slow
                    log.info("control socket: %s", e)

    def _answer(self, peer: socket.socket) -> None:
        data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        uid = _CREDENTIALS.unpack(data)[1]
        try:
            order = _read_line(peer, MAX_ORDER, ORDER_S)
            if uid not in (0, os.geteuid()):
                log.warning("control socket: %s was turned away", user_name(uid))
                _send(peer, {"error": f"{user_name(uid)} may not give orders here"})
                return
            _send(peer, {"done": self._obey(order, user_name(uid))})
        except FleetpruneError as e:
            _send(peer, {"error": str(e), "misuse": isinstance(e, UsageError)})
        except OSError:
            raise
        except Exception as e:  # the coordinator goes on, whatever an order does
            log.exception("control socket")
            _send(peer, {"error": f"{type(e).__name__}: {e}"})


def call(state: Path, order: bytes) -> Any:
    """Have an order carried out by the coordinator that runs on a folder.

    Args:
        state: Its folder.
        order: JSON in one line.

    Returns:
        What it answers; None: none runs there.

    Raises:
        UsageError, RolloutError: What it says is wrong.
        TransportError: It does not answer, or one may not ask.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as to:
        try:
            with _address(state / FOLDER) as address:
                to.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except OSError as e:
            raise TransportError(f"{state / FOLDER / SOCKET}: {e.strerror or e}") from e
        try:
            to.sendall(order + b"\n")
            answer = json.loads(_read_line(to, MAX_ANSWER, ANSWER_S))
        except (OSError, ValueError, TransportError) as e:
            raise TransportError(f"the coordinator on {state} does not answer: {e}") from e
    if "error" in answer:
        raise (UsageError if answer.get("misuse") else RolloutError)(answer["error"])
    return answer["done"]


@contextmanager
def _address(folder: Path) -> Iterator[str]:
    """A name for the socket that is short enough: the kernel takes 107 bytes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)


def _read_line(peer: socket.socket, most: int, within_s: float) -> bytes:
    """One line without its end; TransportError if it is too long, cut off or too slow."""
    deadline, data = time.monotonic() + within_s, b""
    while not data.endswith(b"\n"):
        try:
            peer.settimeout(max(0.001, deadline - time.monotonic()))
            part = peer.recv(4096)
        except TimeoutError as e:
            raise TransportError(f"no whole line within {within_s:g} s") from e
        if not part:
            raise TransportError(f"the connection ended after {len(data)} bytes of a line")
        data += part
        if len(data) > most:
            raise TransportError(f"a line of more than {most} bytes")
    return data[:-1]


def _send(peer: socket.socket, answer: dict[str, Any]) -> None:
    peer.settimeout(ORDER_S)
    peer.sendall(json.dumps(answer).encode() + b"\n")
