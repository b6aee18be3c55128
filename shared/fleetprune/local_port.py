"""A port of this machine, for a program that has to be told where to listen."""

import random
import socket
from typing import Final

HOST: Final = "127.0.0.1"
# Below those that systems hand out by themselves: Linux from 32768, the others from 49152. One
# of theirs could be somebody's by the time the program listens, or while it is started again.
PORTS: Final = range(20_000, 32_768)


def free_port() -> int:
    """A TCP port on which nobody listens now, and which the system gives nobody by itself.

    Raises:
        OSError: None of a hundred drawn ones is free.
    """
    draw = random.SystemRandom()
    for _ in range(99):
        try:
            return _bound(draw.choice(PORTS))
        except OSError:
            continue
    return _bound(draw.choice(PORTS))


def _bound(port: int) -> int:
    with socket.socket() as probe:
        probe.bind((HOST, port))
    return port
