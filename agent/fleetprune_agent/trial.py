"""A staged release is tried before it may become active: what is asked, and in which process.

The trial of a model that takes its process down must not take the agent down, so it runs in a
process of its own (`in_child`), which lives as long as the trial and is the first that the kernel
kills when memory runs out. A simulation of many devices tries in its own process (`in_process`).
"""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fleetprune.errors import GraphError, InstallError, MessageError
from fleetprune.manifest import Manifest
from fleetprune.messages import MAX_REASON, Count, Line, Message
from fleetprune_agent.data import Samples, Split

log = logging.getLogger(__name__)

ATTEMPTS: Final = 2  # a child killed by a signal may be the victim of something else: once
TIMEOUT_S: Final = 300.0  # seconds for one attempt
MAX_RECENT: Final = 256  # samples of the shadow run
MAX_EVIDENCE: Final = 16 * 1024 * 1024  # bytes of samples that travel to the child
_POLL_S: Final = 0.5


class Limits(Message):
    """What a model may take on this device: its class's budget. None: no limit."""

    latency_ms: float | None = None
    rss_mb: float | None = None
    agreement: float | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> "Limits":
        """Those of the device's own class, which a smaller class's model is held against too."""
        return cls(
            latency_ms=manifest.max_latency_ms,
            rss_mb=manifest.max_rss_mb,
            agreement=manifest.min_agreement,
        )


class Request(Message):
    """What is to be tried."""

    folder: str
    """Of the staged release: model and golden samples, verified."""
    manifest: Manifest
    limits: Limits = Limits()
    incumbent: str | None = None
    """Model file of the release that runs."""
    incumbent_shape: tuple[int, ...] = ()
    """Of one of its samples."""
    incumbent_labels: tuple[str, ...] = ()
    runs: int = Field(default=5, ge=1)
    """Timed runs of one sample; the median counts."""
    threads: int = Field(default=1, ge=1)


class Finding(Message):
    """What a trial found; None: not measured."""

    failed: Line = Field(default="", max_length=MAX_REASON)
    """Why the model must not run here; empty: it may."""
    latency_ms: float | None = None
    rss_mb: float | None = None
    """That loading it and running one sample added to the process."""
    samples: Count = 0
    """Held-out samples of the two accuracies."""
    accuracy: float | None = None
    accuracy_before: float | None = None
    """Of the release that runs, on the same samples."""
    recent: Count = 0
    """Samples of the shadow run."""
    agreement: float | None = None
    """Share of these on which both models say the same."""


def _no_samples() -> NDArray[np.float32]:
    return np.zeros((0,), np.float32)


@dataclass(frozen=True, slots=True)
class Evidence:
    """The device's own samples that models are compared on.

    Attributes:
        recent: (n, *shape) float32; n may be 0.
        x: (m, *shape) float32, held out from training; m may be 0.
        y: (m,) int64.
    """

    recent: NDArray[np.float32] = field(default_factory=_no_samples)
    x: NDArray[np.float32] = field(default_factory=_no_samples)
    y: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(cls, split: Split, recent: NDArray[np.float32] | None = None) -> "Evidence":
        """Of a device's data.

        Args:
            split: Its samples.
            recent: (n, *shape) that its model saw in service; None: the newest of its data.
        """
        held = split.held_out
        if recent is None:
            recent = (held if len(held) else split.train).x
        recent = recent[-MAX_RECENT:]
        keep = _fitting(recent, MAX_EVIDENCE // 4)
        recent = recent[len(recent) - keep :]
        if held.y is None:
            return cls(recent)
        keep = comparable(held)
        return cls(recent, held.x[:keep], held.y[:keep])

    def to_bytes(self) -> bytes:
        """An .npz file."""
        file = io.BytesIO()
        np.savez(file, recent=self.recent, x=self.x, y=self.y)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Evidence":
        """Inverse of `to_bytes`; for our own bytes only."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return cls(arrays["recent"], arrays["x"], arrays["y"])


def comparable(held: Samples) -> int:
    """How many of the held-out samples a trial measures on: all, unless they are very large."""
    return _fitting(held.x, MAX_EVIDENCE // 2) if held.y is not None else 0


def _fitting(x: NDArray[np.float32], most: int) -> int:
    """How many of these samples fit into so many bytes."""
    return min(len(x), most // max(1, x[:1].nbytes)) if len(x) else 0


class TrialStoppedError(Exception):
    """The agent ends: no verdict."""


Trial = Callable[[Request, Evidence], Finding]
"""Raises GraphError if the model must not run here; TrialStoppedError, or InstallError where
something else is wrong, if that is not known."""


def in_process(request: Request, evidence: Evidence) -> Finding:
    """Try a release in this process; its memory is not measured."""
    from fleetprune_agent.health import examine  # noqa: PLC0415  (onnxruntime)

    return examine(request, evidence)


@dataclass(frozen=True, slots=True)
class InChild:
    """Tries a release in a process of its own."""

    timeout_s: float = TIMEOUT_S
    stopped: Callable[[], bool] = lambda: False
    """Asked twice a second: the agent ends."""
    command: tuple[str, ...] = ("-P", "-m", "fleetprune_agent.health")
    """Of the interpreter that runs."""
    on_start: Callable[[int], None] = lambda _pid: None
    """Told the process number of each attempt."""

    def __call__(self, request: Request, evidence: Evidence) -> Finding:
        """See `Trial`."""
        payload = json.dumps(
            {"parent": os.getpid(), "request": json.loads(request.to_bytes())}
        ).encode()
        payload += b"\n" + evidence.to_bytes()
        for attempt in range(1, ATTEMPTS + 1):
            finding, why = self._attempt(payload)
            if finding is not None:
                if finding.failed:
                    raise GraphError(finding.failed)
                return finding
            log.warning("health check, attempt %d of %d: %s", attempt, ATTEMPTS, why)
        raise GraphError(why)

    def _attempt(self, payload: bytes) -> tuple[Finding | None, str]:
        """The finding, or None and what happened to the process."""
        try:
            child = subprocess.Popen(  # noqa: S603  (our own interpreter and code)
                [sys.executable, *self.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the agent
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError as e:
            raise InstallError(f"the health check cannot be started: {e.strerror or e}") from e
        with child:
            self.on_start(child.pid)
            _feed(child, payload)
            out, err, late = self._wait(child)
        finding = _last_line(out)
        if finding is not None:
            return finding, ""
        if late:
            return None, f"the health check did not end in {self.timeout_s:g} s"
        if child.returncode < 0:
            name = _signal_name(-child.returncode)
            return None, f"the health check was ended by {name}: a crash, or out of memory"
        last = err.decode(errors="replace").strip().rpartition("\n")[2]
        raise InstallError(f"the health check ended with code {child.returncode}: {last[:200]}")

    def _wait(self, child: "subprocess.Popen[bytes]") -> tuple[bytes, bytes, bool]:
        """Output, errors, and whether it had to be killed for taking too long."""
        give_up = time.monotonic() + self.timeout_s
        late = False
        while True:
            try:
                out, err = child.communicate(timeout=_POLL_S)
            except subprocess.TimeoutExpired:
                if self.stopped():
                    child.kill()
                    raise TrialStoppedError from None
                if time.monotonic() >= give_up:
                    late = True
                    child.kill()
                    give_up = float("inf")
            else:
                return out, err, late


def _feed(child: "subprocess.Popen[bytes]", payload: bytes) -> None:
    """Write to a child's standard input, however long it takes to read.

    Not by `communicate`: called again after a timeout, it never writes what is left, and a child
    that takes longer to load its libraries waits for the rest of its samples for ever.
    """
    pipe, child.stdin = child.stdin, None

    def write() -> None:
        assert pipe is not None
        with suppress(OSError), pipe:  # a child that ended says more than its broken pipe
            pipe.write(payload)

    threading.Thread(target=write, name="evidence", daemon=True).start()


def _last_line(out: bytes) -> Finding | None:
    """The last whole line: a later one knows more (see `health.main`)."""
    whole, newline, _ = out.rpartition(b"\n")
    if not newline:
        return None
    try:
        return Finding.from_bytes(whole.rpartition(b"\n")[2])
    except MessageError:
        return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
