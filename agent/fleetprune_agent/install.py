"""Installing a release: nothing that was not verified and tried becomes active.

refresh -> manifest -> room on the disk -> pull into the idle slot -> verify -> golden samples
-> switch, on trial -> (first good runs: `Predictor` commits; failures: rolled back)

Every step may be killed and is simply begun again at the next start: what was downloaded is
kept, the active slot is not touched before the switch.
"""

import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import GraphError, InstallError, TrustError
from fleetprune.files import free_bytes
from fleetprune.manifest import Manifest
from fleetprune_agent.serving import Model, load_model
from fleetprune_agent.slot_files import GOLDEN, MODEL
from fleetprune_agent.slots import MAX_STARTS, Slots
from fleetprune_agent.trust import TrustedRepository

MAX_GOLDEN = 64 * 1024 * 1024  # bytes of golden samples once unpacked


@dataclass(frozen=True, slots=True)
class Checks:
    """How a release is tried before it may become active."""

    runs: int = 5
    """Timed runs of one sample; the median counts."""
    threads: int = 1
    reserve_bytes: int = 1024 * 1024
    """Left free on the disk for everything else on the device."""
    clock: Callable[[], float] = time.perf_counter  # seconds


class Status(StrEnum):
    """What an attempt to install came to."""

    INSTALLED = "installed"
    CURRENT = "current"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class InstallOutcome:
    """Result of `install`."""

    status: Status
    release: int
    """The release that the repository offers."""
    reason: str = ""
    """Why it was rejected, now or earlier."""
    latency_ms: float | None = None
    """Median of one sample on this device, where the release was tried."""


def install(
    repository: TrustedRepository,
    slots: Slots,
    device_class: str,
    checks: Checks | None = None,
    *,
    device: str = "",
) -> InstallOutcome:
    """Bring the release that our class's rollout wants of us into service, on trial.

    Args:
        repository: Verified access to releases.
        slots: Where they are installed.
        device_class: Ours.
        checks: How to try a release.
        device: Our name, which decides whether we are in a rollout's cohort.

    Returns:
        INSTALLED, CURRENT (nothing else is wanted) or REJECTED (it failed its checks here).

    Raises:
        TrustError: The repository, or what it sent, is not to be trusted.
        TransportError: It does not answer; progress is kept, call again later.
        InstallError: The disk is full or refuses. In all three the active release is untouched.
    """
    checks = checks or Checks()
    repository.refresh()
    active = slots.active()
    installed = active.release if active else 0
    rollout = repository.rollout(device_class)
    wanted = installed if rollout is None else rollout.wanted(device, installed)
    if not wanted:
        return InstallOutcome(Status.CURRENT, 0)
    manifest = repository.manifest(device_class, wanted)
    if active is not None and active.release == manifest.release:
        if active.manifest.sha256 != manifest.sha256:
            raise TrustError(
                f"release {manifest.release} has model {manifest.sha256}, "
                f"but the installed release of that number has {active.manifest.sha256}"
            )
        return InstallOutcome(Status.CURRENT, manifest.release)
    reason = slots.rejected().get(manifest.release)
    if reason is not None:
        return InstallOutcome(Status.REJECTED, manifest.release, reason)
    _require_room(repository, slots, manifest, checks.reserve_bytes)
    folder = slots.stage(manifest)
    try:
        repository.target(manifest.model, folder / MODEL)
        repository.target(manifest.golden, folder / GOLDEN)
    except InstallError:
        slots.unstage()  # a disk kept full by half a release could not even take the next metadata
        raise
    try:
        _require_attempt_left(slots.begin_check(manifest))
        latency = check_health(folder, manifest, checks)
    except GraphError as e:
        slots.reject(manifest.release, str(e))
        return InstallOutcome(Status.REJECTED, manifest.release, str(e))
    slots.switch(manifest)
    return InstallOutcome(Status.INSTALLED, manifest.release, latency_ms=latency)


def _require_attempt_left(attempt: int) -> None:
    """GraphError if earlier attempts ended with the process: the model kills what tries it."""
    if attempt > MAX_STARTS:
        raise GraphError(f"the health check did not finish in {MAX_STARTS} attempts")


def check_health(folder: Path, manifest: Manifest, checks: Checks) -> float:
    """Try a staged release on its golden samples.

    Args:
        folder: Holds `MODEL` and `GOLDEN`, verified.
        manifest: Says what to expect.
        checks: How often to time it.

    Returns:
        Median latency of one sample in milliseconds.

    Raises:
        GraphError: The model does not load, raises, differs from the golden outputs, yields
            values that are not finite or is too slow; or the golden samples are unusable.
    """
    x, y = load_golden(folder / GOLDEN, manifest)
    model = load_model(folder / MODEL, checks.threads)
    got = model.run(x)
    if got.shape != y.shape:
        raise GraphError(f"golden samples: the model's output has shape {got.shape}, not {y.shape}")
    worst = float(np.max(np.abs(got - y)))
    if not worst <= manifest.tolerance:
        raise GraphError(
            f"golden samples: outputs differ by up to {worst:.3g}, allowed are "
            f"{manifest.tolerance:.3g}"
        )
    latency = _latency_ms(model, x[:1], checks)
    if manifest.max_latency_ms is not None and latency > manifest.max_latency_ms:
        raise GraphError(
            f"one sample takes {latency:.3g} ms (median of {checks.runs}), allowed are "
            f"{manifest.max_latency_ms:.3g} ms"
        )
    return latency


def load_golden(path: Path, manifest: Manifest) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Read golden samples: no pickles, no zip bombs, no surprises in shape.

    Returns:
        `x` (n, *input_shape) and `y` (n, classes), float32, finite, n >= 1.

    Raises:
        GraphError: They are anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MAX_GOLDEN:
            raise GraphError(
                f"golden samples: {unpacked} bytes unpacked, expected at most {MAX_GOLDEN}"
            )
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise GraphError(f"golden samples: {e}") from e
    if x.dtype != np.float32 or y.dtype != np.float32:
        raise GraphError(f"golden samples: x is {x.dtype} and y is {y.dtype}, expected float32")
    if len(x.shape) == 0 or len(x) == 0 or x.shape[1:] != manifest.input_shape:
        raise GraphError(f"golden samples: x is {x.shape}, expected (n, *{manifest.input_shape})")
    if y.ndim != 2 or len(y) != len(x):
        raise GraphError(f"golden samples: y is {y.shape}, expected ({len(x)}, classes)")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise GraphError("golden samples: values that are not finite")
    return x, y


def _latency_ms(model: Model, x: NDArray[np.float32], checks: Checks) -> float:
    times = []
    for _ in range(checks.runs):
        begun = checks.clock()
        model.run(x)
        times.append(checks.clock() - begun)
    return median(times) * 1000


def _require_room(
    repository: TrustedRepository, slots: Slots, manifest: Manifest, reserve: int
) -> None:
    """InstallError before anything is overwritten, if the release will not fit."""
    size = manifest.size + repository.describe(manifest.golden).size
    free = free_bytes(slots.folder)
    if size + reserve > free + slots.reclaimable():
        raise InstallError(
            f"disk full: release {manifest.release} needs {size} bytes and {reserve} in reserve, "
            f"{free + slots.reclaimable()} bytes free in {slots.folder}"
        )
