"""How long models of several shapes take on this device: measured in turn, so that they compare.

A device's speed drifts with heat, load and clock. So every graph is visited in every sweep, and a
time is told as the share that it has of its sweep, times what a sweep takes in the median. Weights
do not matter here; what is timed are graphs whose weights are made when they are loaded.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import DataError, GraphError, TrustError
from fleetprune.graphmeta import reference_feeds
from fleetprune.messages import GraphRef, Task
from fleetprune_agent.sessions import run_graph
from fleetprune_agent.trainer import StoppedError, never

RUNTIME: Final = "onnxruntime"
SWEEPS: Final = 10  # over all graphs, where the task names no number
RUNS: Final = 10  # of each graph in a sweep, where the task names no number
WARM_UP: Final = 2  # runs that are not timed, after a graph is loaded
VISIT_S: Final = 1.0  # seconds after which a graph that runs slowly is left for the next one
MOST_GRAPHS: Final = 64  # of one task: they are held in memory


@dataclass(frozen=True, eq=False)
class Timed:
    """What some graphs take, in their order.

    Attributes:
        median_ms: (n,) float32, of one sample.
        spread_ms: (n,) float32, between the quartiles of all runs.
        runs: Timed runs of all graphs together.
    """

    median_ms: NDArray[np.float32]
    spread_ms: NDArray[np.float32]
    runs: int


def fetch_all(task: Task, fetch: Callable[[GraphRef], bytes]) -> list[bytes]:
    """The graphs of a timing task, checked by their hashes.

    Raises:
        DataError: There are too many.
        TrustError: The bytes have another hash.
    """
    if len(task.graphs) > MOST_GRAPHS:
        raise DataError(
            f"task {task.task} times {len(task.graphs)} graphs, expected at most {MOST_GRAPHS}"
        )
    graphs = []
    for ref in task.graphs:
        data = fetch(ref)
        if (got := hashlib.sha256(data).hexdigest()) != ref.sha256:
            raise TrustError(f"{ref.target}: SHA-256 {got}, expected {ref.sha256}")
        graphs.append(data)
    return graphs


def time_graphs(
    graphs: Sequence[bytes],
    *,
    sweeps: int = 0,
    runs: int = 0,
    threads: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    stopped: Callable[[], bool] = never,
) -> Timed:
    """Time inference graphs at batch 1.

    One session is open at a time: a device has no room for all of them.

    Args:
        graphs: ONNX files of kind infer, verified.
        sweeps: Visits of each; 0: `SWEEPS`.
        runs: Timed runs per visit; 0: `RUNS`. A visit ends after `VISIT_S` and at least one run.
        threads: Processor cores to use.
        clock: Seconds.
        stopped: Asked before each run.

    Raises:
        GraphError: A graph does not load or run, or is of another kind.
        StoppedError: `stopped` said so.
    """
    visits = [
        [_visit(graph, runs or RUNS, threads, clock, stopped) for graph in graphs]
        for _ in range(sweeps or SWEEPS)
    ]
    medians = np.array([[np.median(seconds) for seconds in sweep] for sweep in visits])
    speeds = np.exp(np.log(medians).mean(axis=1))
    usual = float(np.median(speeds))
    shares = [
        np.concatenate([seconds / speed for seconds, speed in zip(of_one, speeds, strict=True)])
        for of_one in zip(*visits, strict=True)
    ]
    quartiles = np.array([np.quantile(s, (0.25, 0.75)) for s in shares])
    return Timed(
        median_ms=(1e3 * usual * np.median(medians / speeds[:, None], axis=0)).astype(np.float32),
        spread_ms=(1e3 * usual * (quartiles[:, 1] - quartiles[:, 0])).astype(np.float32),
        runs=sum(len(seconds) for sweep in visits for seconds in sweep),
    )


def _visit(
    graph: bytes,
    runs: int,
    threads: int,
    clock: Callable[[], float],
    stopped: Callable[[], bool],
) -> NDArray[np.float64]:
    """(runs,) seconds of the runs of one graph, above 0."""
    # Imported here: it loads onnxruntime, which an agent without work does not need.
    from fleetprune_agent.runtime import inference_session, session_meta  # noqa: PLC0415

    session = inference_session(graph, threads)
    meta = session_meta(session)
    if meta.kind != "infer":
        raise GraphError(f"a graph of kind {meta.kind} is to be timed, expected infer")
    feeds = {"x": reference_feeds(meta)["x"][:1]}
    seconds: list[float] = []
    begun = clock()
    for number in range(WARM_UP + runs):
        if stopped():
            raise StoppedError("stopped while a graph was timed")
        started = clock()
        run_graph(session, feeds)
        if number >= WARM_UP:
            seconds.append(max(clock() - started, 1e-9))  # a coarse clock may see no time pass
        if seconds and clock() - begun > VISIT_S:
            break
    return np.array(seconds)
