"""What the process holds in RAM, and giving back what it no longer needs.

glibc keeps one heap ("arena") per thread and seldom returns freed memory to the system. An agent
has four threads and trains in bursts, so its resting size would be that of its last burst.
`quiet_malloc` limits the arenas and fixes the threshold above which blocks are mapped (and so
returned when freed); `trim` hands back what lies free at the top. Both do nothing on other C
libraries. The environment variables `MALLOC_ARENA_MAX=1` and `MALLOC_MMAP_THRESHOLD_=1048576`
(set in `deploy/systemd/fleetprune-agent.service`) do the same from the first allocation on.
"""

import ctypes
import resource
import sys
from pathlib import Path

_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_MAPPED_FROM = 1 << 20  # bytes; a batch's activations are above it, Python's own objects below


def quiet_malloc() -> bool:
    """Limit glibc to one arena; False where the C library has no such setting."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_M_ARENA_MAX, 1)) and bool(mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM))


def trim() -> None:
    """Give free heap memory back to the system."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return


def rss_mb(status: Path = Path("/proc/self/status")) -> float:
    """Resident memory of this process now, in MB of 10**6 bytes.

    Args:
        status: The kernel's report; where it cannot be read, the peak so far is returned.
    """
    now = _kernel_mb("VmRSS:", status)
    return peak_rss_mb() if now is None else now


def peak_rss_mb() -> float:
    """Largest resident memory this process has had, in MB of 10**6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def reset_peak() -> float:
    """Let `peak_mb` begin anew; returns the resident memory now, in MB of 10**6 bytes.

    Where the kernel does not allow it, a peak from before counts as taken already.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak_rss_mb()
    return rss_mb()


def peak_mb() -> float:
    """Largest resident memory since `reset_peak`, in MB of 10**6 bytes."""
    peak = _kernel_mb("VmHWM:", Path("/proc/self/status"))
    return peak_rss_mb() if peak is None else peak


def data_mb() -> float:
    """What counts against RLIMIT_DATA now, in MB of 10**6 bytes; 0 where it is not known."""
    return _kernel_mb("VmData:", Path("/proc/self/status")) or 0.0


def available_mb() -> float:
    """Memory that programs on this machine may still take, in MB; much where it is not known."""
    available = _kernel_mb("MemAvailable:", Path("/proc/meminfo"))
    return 1e6 if available is None else available


def _kernel_mb(key: str, file: Path) -> float | None:
    """A line `key  123 kB` of the kernel's reports."""
    try:
        for line in file.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024 / 1e6
    except (OSError, ValueError, IndexError):
        pass
    return None
