import ctypes

import numpy as np

from fleetprune_agent.memory import peak_rss_mb, quiet_malloc, rss_mb, trim


def test_resident_memory_follows_what_is_held():
    before = rss_mb()
    block = np.ones(10_000_000)  # 80 MB, touched
    held = rss_mb()
    assert 70 < held - before < 90
    assert peak_rss_mb() >= held - 1
    del block
    trim()
    assert rss_mb() < held - 60


def test_reads_the_kernel_s_own_report(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmRSS:\t   1000 kB\n")
    assert rss_mb(status) == 1.024
    assert rss_mb(tmp_path / "none") == peak_rss_mb()


def test_other_c_libraries_are_left_alone(monkeypatch):
    def missing(_name):
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert quiet_malloc() is False
    trim()
