"""A simulation's worker processes: where they come from, and how they end."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from typing import Any, Final

_LOADED: Final = ["fleetprune_sim.study", "fleetprune_sim.station", "torch._dynamo"]
"""The last is what torch loads when it first traces a model: a third of the time."""


def worker_context() -> BaseContext:
    """Forks of a server that has loaded the libraries, where a system has such.

    A fresh interpreter for each worker would load torch and the rest anew, in seconds of processor
    time. The server has never computed anything, so it has no threads that a fork would lose.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    return context


class Workers(ProcessPoolExecutor):
    """Worker processes that a person may lose patience with."""

    def __init__(self, count: int, initializer: Callable[..., None], *arguments: Any) -> None:
        """Up to `count`, each of which begins with `initializer(*arguments)`."""
        super().__init__(
            count, worker_context(), initializer=_begin, initargs=(initializer, arguments)
        )
        self._others = set(multiprocessing.active_children())

    def end(self, *, now: bool = False) -> None:
        """End all, after what they are doing, or in the middle of it: it can be taken up again."""
        if now:
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()
        self.shutdown(cancel_futures=True)


def _begin(initializer: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches every process of a terminal: the first one decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_first, name="parent", daemon=True).start()
    initializer(*arguments)


def _end_with_the_first() -> None:
    """A worker whose run is killed does not work on for an hour, and hold the run's lock."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
