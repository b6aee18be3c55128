"""Child processes that never outlive the demo."""

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from fleetprune.errors import FleetpruneError

GRACE_S = 5.0  # seconds to end by itself after SIGTERM
POLL_S = 0.1  # seconds between two looks at the children
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoError(FleetpruneError):
    """A process of the demo failed."""


class Interrupted:
    """Remembers that Ctrl-C or SIGTERM came, to act on it where nothing is half done.

    An exception raised in the middle of starting a process would leave it running.
    """

    def __init__(self) -> None:
        self._came = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        self._came = True

    def check(self) -> None:
        """KeyboardInterrupt if a signal came."""
        if self._came:
            raise KeyboardInterrupt

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT, SIGTERM and SIGHUP over for the time being."""
        before = {number: signal.signal(number, self.note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Children:
    """Starts processes in groups of their own; leaving the context stops them all."""

    def __init__(self, logs: Path, interrupted: Interrupted) -> None:
        """Their output goes to `logs`, a file each."""
        self._logs = logs
        self._interrupted = interrupted
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(
        self, name: str, command: Sequence[str], cwd: Path, extra: Mapping[str, str] | None = None
    ) -> None:
        """Start a process under a name that is not yet taken.

        Args:
            name: Names its log.
            command: Program and arguments.
            cwd: Folder to run in.
            extra: Environment variables besides this process's own.
        """
        with self._log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(  # noqa: S603  (our own command line)
                command,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(extra or {})},
                start_new_session=True,  # Ctrl-C reaches the demo alone, which stops the others
            )

    def ended(self, name: str) -> bool:
        """Whether a process has ended well.

        Raises:
            DemoError: It failed; the message has its last words.
        """
        code = self._running[name].poll()
        if code is None:
            return False
        if code != 0:
            raise DemoError(self._obituary(name, code))
        return True

    def check(self, names: Sequence[str]) -> None:
        """Make sure that processes which must not end have not.

        Raises:
            DemoError: One of them has ended; the message has its last words.
            KeyboardInterrupt: The demo is to end.
        """
        self._interrupted.check()
        for name in names:
            code = self._running[name].poll()
            if code is not None:
                raise DemoError(self._obituary(name, code))

    def wait(self, name: str, timeout_s: float) -> None:
        """Wait until a process has ended well.

        Raises:
            DemoError: It failed or took too long.
            KeyboardInterrupt: The demo is to end.
        """
        deadline = time.monotonic() + timeout_s
        while not self.ended(name):
            self._interrupted.check()
            if time.monotonic() > deadline:
                raise DemoError(f"{name} took over {timeout_s:.0f} s; see {self._log(name)}")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Terminate what runs; kill what has not ended `GRACE_S` later."""
        _signal_all(self._running.values(), signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(
            child.poll() is None for child in self._running.values()
        ):
            time.sleep(POLL_S)
        _signal_all(self._running.values(), signal.SIGKILL)
        for child in self._running.values():
            child.wait()

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _obituary(self, name: str, code: int) -> str:
        """How a process ended, and the last line that it wrote."""
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        lines = self._log(name).read_text(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        return f"{name} {how}: {last} (log: {self._log(name)})"


def _signal_all(children: Iterable[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    """Signal the groups of those that still run; the others' numbers may be someone else's."""
    for child in children:
        if child.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, number)
