"""Running ONNX graphs with plain NumPy state, and keeping few of them ready.

A session costs a few milliseconds to make and megabytes to keep, so a device holds the graphs of
its last task only; the files stay on disk, named by the hash that the task was checked against.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import GraphError, TrustError
from fleetprune.files import write_atomic
from fleetprune.graphmeta import GraphMeta
from fleetprune.messages import GraphRef

Arrays = dict[str, NDArray[Any]]
KEPT_FILES = 32  # graphs on disk; 3-200 kB each


class Session(Protocol):
    """The part of `onnxruntime.InferenceSession` that is used here."""

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[Any]:
        """Outputs in the order of `get_outputs`."""
        ...

    def get_inputs(self) -> Sequence[Any]:
        """Inputs, each with `name` and `shape`."""
        ...

    def get_outputs(self) -> Sequence[Any]:
        """Outputs, each with `name` and `shape`."""
        ...


def run_graph(session: Session, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
    """Run a graph once.

    Args:
        session: Of any graph.
        feeds: Arrays by input name; inputs that the graph does not have are left out.

    Returns:
        Arrays by output name.

    Raises:
        GraphError: The runtime refuses the inputs or fails.
    """
    wanted, names = _names(session)
    try:
        outputs = session.run(names, {k: v for k, v in feeds.items() if k in wanted})
    except Exception as e:  # onnxruntime's own exceptions have no common base but this
        raise GraphError(f"onnxruntime: {str(e).splitlines()[0][:300]}") from e
    return dict(zip(names, outputs, strict=True))


_known_names: WeakKeyDictionary[Session, tuple[frozenset[str], list[str]]] = WeakKeyDictionary()
"""Of sessions in use: asking onnxruntime takes as long as a small network's step."""


def _names(session: Session) -> tuple[frozenset[str], list[str]]:
    """Names of a session's inputs and outputs."""
    known = _known_names.get(session)
    if known is None:
        known = (
            frozenset(i.name for i in session.get_inputs()),
            [o.name for o in session.get_outputs()],
        )
        _known_names[session] = known
    return known


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph that is ready to run, verified on this machine."""

    session: Session
    meta: GraphMeta


class Graphs:
    """Verified sessions by hash: the latest `kept` in RAM, their files on disk.

    Devices simulated in one process share one of these, so that each graph is loaded once; used
    by one thread at a time.
    """

    def __init__(self, *, threads: int = 1, folder: Path | None = None, kept: int = 2) -> None:
        """Keep files in `folder`; None: no files (simulation)."""
        self.threads, self._folder, self._kept = threads, folder, kept
        self._ready: OrderedDict[str, Graph] = OrderedDict()
        self._verified: set[str] = set()
        self._refused: dict[str, str] = {}

    def get(self, ref: GraphRef, fetch: Callable[[GraphRef], bytes]) -> Graph:
        """The graph of a reference; the first use of this process verifies it.

        Args:
            ref: Names the graph and its SHA-256.
            fetch: Gets the bytes, unverified, if they are not here yet.

        Raises:
            GraphError: The graph does not load, or does not compute what it should on this
                machine; this is remembered and not tried again.
            TrustError: The bytes have another hash.
        """
        ready = self._ready.get(ref.sha256)
        if ready is None:
            if why := self._refused.get(ref.sha256):
                raise GraphError(why)
            data = self._bytes(ref, fetch)
            try:
                ready = self._load(ref.sha256, data)
            except GraphError as e:
                self._refused[ref.sha256] = str(e)
                raise
            self._ready[ref.sha256] = ready
        self._ready.move_to_end(ref.sha256)
        while len(self._ready) > self._kept:
            self._ready.popitem(last=False)
        return ready

    def release(self) -> None:
        """Drop all sessions; files and verdicts stay."""
        self._ready.clear()

    def _load(self, sha256: str, onnx: bytes) -> Graph:
        # Imported here: it loads onnxruntime, which an agent without work does not need.
        from fleetprune_agent.runtime import session_meta, training_session, verify  # noqa: PLC0415

        session = training_session(onnx, threads=self.threads)
        meta = session_meta(session)
        if sha256 not in self._verified:
            verify(session, meta)
            self._verified.add(sha256)
        return Graph(session, meta)

    def _bytes(self, ref: GraphRef, fetch: Callable[[GraphRef], bytes]) -> bytes:
        file = None if self._folder is None else self._folder / f"{ref.sha256}.onnx"
        if file is not None and file.is_file():
            data = file.read_bytes()
            if hashlib.sha256(data).hexdigest() == ref.sha256:
                return data
        data = fetch(ref)
        got = hashlib.sha256(data).hexdigest()
        if got != ref.sha256:
            raise TrustError(f"{ref.target}: SHA-256 {got}, expected {ref.sha256}")
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, data)
            files = sorted(file.parent.glob("*.onnx"), key=lambda f: f.stat().st_mtime)
            for old in files[:-KEPT_FILES]:
                old.unlink(missing_ok=True)
        return data


def require_finite(what: str, values: NDArray[Any]) -> None:
    """GraphError if a value is NaN or infinite."""
    if not np.isfinite(values).all():
        i = int(np.argmin(np.isfinite(values.ravel())))
        raise GraphError(f"{what}[{i}] is {values.ravel()[i]}, expected finite numbers")
