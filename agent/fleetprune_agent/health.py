"""Tries a model on this machine: `python -P -m fleetprune_agent.health` is the child of a trial.

The request comes as one line of JSON on standard input, the samples after it; a finding goes out
as one line of JSON. The candidate is tried first and alone, so that its memory is its own; what
it did is printed before the incumbent is loaded, whose failure is not the candidate's.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import GraphError
from fleetprune_agent.golden import load_golden
from fleetprune_agent.memory import available_mb, data_mb, peak_mb, reset_peak
from fleetprune_agent.runtime import inference_session, tiny_model
from fleetprune_agent.serving import Model, load_model
from fleetprune_agent.slot_files import GOLDEN, MODEL
from fleetprune_agent.trial import Evidence, Finding, Limits, Request

MIN_RECENT = 10  # samples below which agreement is reported, but decides nothing
BATCH = 32  # samples per run: bounds the activations in memory

Floats = NDArray[np.float32]
Clock = Callable[[], float]  # seconds


def examine(
    request: Request,
    evidence: Evidence,
    *,
    clock: Clock = time.perf_counter,
    alone: bool = False,
    candidate_done: Callable[[Finding], None] = lambda _finding: None,
) -> Finding:
    """Try a release and compare it with the one that runs.

    Args:
        request: What to try.
        evidence: The device's samples.
        clock: For the latency.
        alone: This process does nothing else, so its memory can be measured.
        candidate_done: Told of the candidate before the incumbent is loaded.

    Raises:
        GraphError: The model must not run here: it does not load, raises, differs from the golden
            outputs, yields values that are not finite, is too slow or too large, or says other
            than the incumbent too often; or the golden samples are unusable.
    """
    manifest, limits = request.manifest, request.limits
    x, y = load_golden(Path(request.folder) / GOLDEN, manifest)
    if alone:
        inference_session(tiny_model(13, 8))  # what the runtime sets up once is not the model's
    before = reset_peak() if alone else 0.0
    model = load_model(Path(request.folder) / MODEL, request.threads)
    model.run(x[:1])
    rss = max(0.0, peak_mb() - before) if alone else None
    _check_golden(model, x, y, manifest.tolerance)
    latency = _latency_ms(model, x[:1], request.runs, clock)
    _check_budget(latency, rss, limits, request.runs)
    fits = evidence.recent.shape[1:] == manifest.input_shape
    says = _classes(model, evidence.recent) if fits else np.zeros(0, np.int64)
    fits = len(evidence.x) > 0 and evidence.x.shape[1:] == manifest.input_shape
    right = _accuracy(model, evidence) if fits else None
    finding = Finding(
        latency_ms=latency,
        rss_mb=rss,
        samples=len(evidence.x) if fits else 0,
        accuracy=right,
        recent=len(says),
    )
    del model
    candidate_done(finding)
    return _compare(request, evidence, says, finding)


def _compare(
    request: Request, evidence: Evidence, says: NDArray[np.int64], finding: Finding
) -> Finding:
    """Adds what the incumbent does on the same samples; GraphError if they disagree too often."""
    comparable = (request.incumbent_shape, request.incumbent_labels) == (
        request.manifest.input_shape,
        request.manifest.labels,
    )
    if request.incumbent is None or not comparable:
        return finding
    try:
        incumbent = load_model(Path(request.incumbent), request.threads)
        said = _classes(incumbent, evidence.recent) if len(says) else says
        right = None if finding.accuracy is None else _accuracy(incumbent, evidence)
    except GraphError:
        return finding  # the incumbent's fault
    agreement = float(np.mean(says == said)) if len(says) else None
    least = request.limits.agreement
    if agreement is not None and least is not None and len(says) >= MIN_RECENT:
        same = int(np.count_nonzero(says == said))
        if agreement < least:
            raise GraphError(
                f"agrees with the release that runs on {same} of {len(says)} recent samples, "
                f"{least:.3g} of them are required"
            )
    return finding.model_copy(update={"accuracy_before": right, "agreement": agreement})


def _check_golden(model: Model, x: Floats, y: Floats, tolerance: float) -> None:
    got = model.run(x)
    if got.shape != y.shape:
        raise GraphError(f"golden samples: the model's output has shape {got.shape}, not {y.shape}")
    worst = float(np.max(np.abs(got - y)))
    if not worst <= tolerance:
        raise GraphError(
            f"golden samples: outputs differ by up to {worst:.3g}, allowed are {tolerance:.3g}"
        )


def _check_budget(latency: float, rss: float | None, limits: Limits, runs: int) -> None:
    if limits.latency_ms is not None and latency > limits.latency_ms:
        raise GraphError(
            f"one sample takes {latency:.3g} ms (median of {runs}), allowed are "
            f"{limits.latency_ms:.3g} ms"
        )
    if limits.rss_mb is not None and rss is not None and rss > limits.rss_mb:
        raise GraphError(
            f"loading and running it takes {rss:.3g} MB, allowed are {limits.rss_mb:.3g} MB"
        )


def _classes(model: Model, x: Floats) -> NDArray[np.int64]:
    """(n,) what the model says about (n, *shape)."""
    parts = [model.run(x[i : i + BATCH]).argmax(axis=1) for i in range(0, len(x), BATCH)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _accuracy(model: Model, evidence: Evidence) -> float:
    return float(np.mean(_classes(model, evidence.x) == evidence.y))


def _latency_ms(model: Model, x: Floats, runs: int, clock: Clock) -> float:
    times = []
    for _ in range(runs):
        begun = clock()
        model.run(x)
        times.append(clock() - begun)
    return median(times) * 1000


def limit_memory(limits: Limits) -> None:
    """Let allocations fail in this process before the machine runs out of memory.

    A model with a budget may take three times that and 64 MB, so that what it takes can still be
    measured and said; without one, four fifths of what is available. Only the soft limit is set.
    """
    available = 0.8 * available_mb()
    allowed = available
    if limits.rss_mb is not None:
        allowed = min(available, 3 * limits.rss_mb + 64)
    with suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (int((data_mb() + allowed) * 1e6), hard))


def _serve_parent(parent: int) -> None:
    """End with the parent, and before it where memory is short; leave signals to end to it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pr_set_pdeathsig = 1
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if os.getppid() != parent:  # it died before it could be told
        sys.exit(1)


def main() -> None:
    """The child of a trial."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print must not be taken for a finding

    def say(finding: Finding) -> None:
        os.write(out, finding.to_bytes() + b"\n")

    asked = json.loads(sys.stdin.buffer.readline())
    _serve_parent(asked["parent"])
    request = Request.model_validate(asked["request"])
    evidence = Evidence.from_bytes(sys.stdin.buffer.read())
    limit_memory(request.limits)
    try:
        say(examine(request, evidence, alone=True, candidate_done=say))
    except GraphError as e:
        say(Finding(failed=str(e)[:1000]))
    except Exception as e:  # whatever it is, this model made it
        say(Finding(failed=f"{type(e).__name__}: {e}"[:1000]))


if __name__ == "__main__":
    main()
