"""How a process that runs for months is told to end: SIGTERM or SIGINT set an event, at once."""

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_END: Final = b"\0"  # no signal has this number


class Stop(threading.Event):
    """Set by SIGTERM and SIGINT."""

    def __init__(self) -> None:
        super().__init__()
        self.signals: list[signal.Signals] = []  # that came, in their order


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Take SIGTERM and SIGINT over, from the main thread, until the context ends.

    Python runs a signal's handler in the main thread. A kernel may give the signal to any thread,
    and often does so after a SIGCONT: a main thread that waits for a lock then hears of it only
    when that wait ends, which may be never. The C handler's wake-up socket has no such gap.
    """
    stop = Stop()
    listening, waking = socket.socketpair()
    waking.setblocking(False)
    listener = threading.Thread(
        target=_listen, args=(listening, stop), name="fleetprune-signals", daemon=True
    )
    listener.start()
    # At both ends in the order in which no instant has our handlers but not our socket.
    fd_before = signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, _heard) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: of no Python code
        signal.set_wakeup_fd(fd_before)
        waking.send(_END)
        listener.join()
        listening.close()
        waking.close()


def _heard(_number: int, _frame: FrameType | None) -> None:
    """Nothing is left to do: the number is in the socket already."""


def _listen(listening: socket.socket, stop: Stop) -> None:
    while (byte := listening.recv(1)) not in (_END, b""):
        if byte[0] in _SIGNALS:  # other handlers' signals come here, too
            stop.signals.append(signal.Signals(byte[0]))
            stop.set()
