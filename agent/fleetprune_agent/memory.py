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
    try:
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024 / 1e6
    except (OSError, ValueError, IndexError):
        pass
    return peak_rss_mb()


def peak_rss_mb() -> float:
    """Largest resident memory this process has had, in MB of 10**6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
