"""Trials in real processes of their own: what they find, and how they may end."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from models import INPUTS, ZEROS, chooses, endless, gemm, golden, hungry, npz

from fleetprune.errors import GraphError, InstallError
from fleetprune.manifest import Manifest
from fleetprune_agent.data import Split, checked
from fleetprune_agent.slot_files import GOLDEN, MODEL
from fleetprune_agent.trial import (
    MAX_RECENT,
    Evidence,
    Finding,
    InChild,
    Limits,
    Request,
    TrialStoppedError,
    comparable,
    in_process,
)

ZERO_GOLDEN = npz(x=ZEROS, y=np.zeros((1, 3), np.float32))


def counted(n: int) -> np.ndarray:
    """Samples whose first values are 1..n."""
    x = np.zeros((n, INPUTS), np.float32)
    x[:, 0] = np.arange(1, n + 1)
    return x


def request(folder: Path, model: bytes, samples: bytes, **fields: object) -> Request:
    (folder / MODEL).write_bytes(model)
    (folder / GOLDEN).write_bytes(samples)
    manifest = Manifest(
        release=2,
        device_class="phone",
        model="m",
        sha256="0" * 64,
        size=1,
        golden="g",
        input_shape=(INPUTS,),
    )
    return Request(folder=str(folder), manifest=manifest, **fields)


def against(folder: Path, incumbent: bytes) -> dict[str, object]:
    path = folder / "incumbent.onnx"
    path.write_bytes(incumbent)
    return {"incumbent": str(path), "incumbent_shape": (INPUTS,)}


@pytest.fixture(params=["in this process", "in a child"])
def trial(request):
    return in_process if request.param == "in this process" else InChild()


def test_a_good_model_is_measured(tmp_path, trial):
    finding = trial(request(tmp_path, gemm(1), golden(1)), Evidence())
    assert finding.failed == ""
    assert finding.latency_ms > 0
    assert (finding.rss_mb is None) == (trial is in_process)
    assert (finding.accuracy, finding.agreement, finding.samples) == (None, None, 0)


def test_a_bad_model_fails(tmp_path, trial):
    with pytest.raises(GraphError) as e:
        trial(request(tmp_path, gemm(1.5), golden(1)), Evidence())
    assert str(e.value) == "golden samples: outputs differ by up to 0.5, allowed are 0.001"


def test_both_models_on_the_devices_own_samples(tmp_path, trial):
    """Ten samples 1..10: the models disagree on the last two; classes are all 1."""
    old, new = [0, *[1] * 10], [0, *[1] * 8, 2, 2]
    x = counted(10)
    evidence = Evidence(recent=x, x=x[:5], y=np.array([1, 1, 1, 1, 2]))
    asked = request(tmp_path, chooses(*new), ZERO_GOLDEN, **against(tmp_path, chooses(*old)))
    finding = trial(asked, evidence)
    assert (finding.agreement, finding.recent) == (0.8, 10)
    assert (finding.accuracy, finding.accuracy_before, finding.samples) == (0.8, 0.8, 5)
    enough = asked.model_copy(update={"limits": Limits(agreement=0.8)})
    assert trial(enough, evidence).agreement == 0.8
    strict = asked.model_copy(update={"limits": Limits(agreement=0.9)})
    with pytest.raises(GraphError) as e:
        trial(strict, evidence)
    assert str(e.value) == (
        "agrees with the release that runs on 8 of 10 recent samples, 0.9 of them are required"
    )
    few = Evidence(recent=x[-3:])
    assert trial(strict, few).agreement == pytest.approx(1 / 3), "too few to decide anything"


def test_an_incumbent_that_fails_is_not_the_candidates_fault(tmp_path, trial):
    asked = request(
        tmp_path,
        gemm(1),
        golden(1),
        limits=Limits(agreement=1.0),
        **against(tmp_path, b"not a model"),
    )
    finding = trial(asked, Evidence(recent=counted(20)))
    assert (finding.failed, finding.agreement, finding.recent) == ("", None, 20)


def test_what_cannot_be_compared_is_not(tmp_path, trial):
    model = against(tmp_path, gemm(1))
    samples = Evidence(recent=counted(20), x=counted(3), y=np.zeros(3, np.int64))
    other = request(tmp_path, gemm(1), golden(1), **{**model, "incumbent_shape": (5,)})
    finding = trial(other, samples)
    assert (finding.agreement, finding.accuracy_before) == (None, None)
    assert finding.accuracy == 1.0
    strange = Evidence(recent=np.ones((20, 7), np.float32))
    finding = trial(request(tmp_path, gemm(1), golden(1), **model), strange)
    assert (finding.agreement, finding.recent) == (None, 0)


def test_memory_that_a_model_adds_is_held_against_the_budget(tmp_path):
    asked = request(tmp_path, hungry(1, 60), npz(x=ZEROS, y=np.full((1, 3), 1, np.float32)))
    needs = InChild()(asked, Evidence()).rss_mb
    assert 60 < needs < 90, "one tensor of 60 MB, computed in place"
    within = asked.model_copy(update={"limits": Limits(rss_mb=2 * needs)})
    assert InChild()(within, Evidence()).rss_mb < 2 * needs
    tight = asked.model_copy(update={"limits": Limits(rss_mb=needs / 2)})
    with pytest.raises(GraphError, match=r"^loading and running it takes [\d.e+]+ MB, allowed are"):
        InChild()(tight, Evidence())


def test_a_model_that_eats_all_memory_takes_only_its_own_process(tmp_path):
    asked = request(
        tmp_path,
        hungry(1, 20_000),
        npz(x=ZEROS, y=np.full((1, 3), 1, np.float32)),
        limits=Limits(rss_mb=20),
    )
    with pytest.raises(GraphError, match=r"^the model raised |^MemoryError"):
        InChild()(asked, Evidence())


def test_a_model_that_never_ends(tmp_path):
    asked = request(tmp_path, endless(1), npz(x=ZEROS, y=np.full((1, 3), 1, np.float32)))
    pids = []
    with pytest.raises(GraphError) as e:
        InChild(timeout_s=2.0, on_start=pids.append)(asked, Evidence())
    assert str(e.value) == "the health check did not end in 2 s"
    assert len(pids) == 2, "once more, in case the machine was busy"
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_child_that_is_killed_is_tried_once_more(tmp_path):
    asked = request(tmp_path, gemm(1), golden(1))
    pids = []

    def kill_first(pid: int) -> None:
        pids.append(pid)
        if len(pids) == 1:
            os.kill(pid, signal.SIGKILL)

    assert InChild(on_start=kill_first)(asked, Evidence()).failed == ""
    assert len(pids) == 2
    with pytest.raises(GraphError) as e:
        InChild(on_start=lambda pid: os.kill(pid, signal.SIGSEGV))(asked, Evidence())
    assert str(e.value) == "the health check was ended by SIGSEGV: a crash, or out of memory"


SLOW_START = """
import runpy, time
time.sleep(1.5)
runpy.run_module("fleetprune_agent.health", run_name="__main__")
"""


def test_a_device_that_takes_long_to_start_the_check_gets_all_samples(tmp_path):
    """More than a pipe holds, and longer than the agent waits between two looks."""
    asked = request(tmp_path, gemm(2), golden(2), **against(tmp_path, gemm(1)))
    evidence = Evidence(recent=np.zeros((100_000, INPUTS), np.float32))
    found = InChild(timeout_s=60.0, command=("-P", "-c", SLOW_START))(asked, evidence)
    assert found.recent == len(evidence.recent)


def test_a_child_that_cannot_even_start_is_not_the_models_fault(tmp_path, monkeypatch):
    asked = request(tmp_path, gemm(1), golden(1))
    with pytest.raises(InstallError) as e:
        InChild(command=("-c", "import sys; sys.exit('no memory for imports')"))(asked, Evidence())
    assert str(e.value) == "the health check ended with code 1: no memory for imports"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    with pytest.raises(InstallError) as e:
        InChild()(asked, Evidence())
    assert str(e.value) == "the health check cannot be started: No such file or directory"


def test_what_was_found_before_the_incumbent_took_the_child_down_counts(tmp_path):
    found = Finding(latency_ms=1.5).to_bytes().decode()
    code = f"import os,sys; sys.stdin.buffer.read(); print({found!r}, flush=True); os.abort()"
    asked = request(tmp_path, gemm(1), golden(1))
    assert InChild(command=("-c", code))(asked, Evidence()) == Finding(latency_ms=1.5)


def test_an_incumbent_that_hangs_does_not_cost_the_candidate_its_verdict(tmp_path):
    asked = request(tmp_path, gemm(1), golden(1), **against(tmp_path, endless(1)))
    finding = InChild(timeout_s=2.0)(asked, Evidence(recent=counted(20)))
    assert (finding.failed, finding.recent, finding.agreement) == ("", 20, None)


def test_an_agent_that_is_told_to_stop_gets_no_verdict(tmp_path):
    asked = request(tmp_path, endless(1), golden(1))
    stop, pids = threading.Event(), []
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(TrialStoppedError):
        InChild(stopped=stop.is_set, on_start=pids.append)(asked, Evidence())
    assert not Path(f"/proc/{pids[0]}").exists()


def test_a_killed_agent_leaves_no_child_behind(tmp_path):
    asked = request(tmp_path, endless(1), golden(1))
    code = (
        "import sys\n"
        "from fleetprune_agent.trial import Evidence, InChild, Request\n"
        "request = Request.from_bytes(sys.stdin.buffer.read())\n"
        "InChild(on_start=lambda pid: print(pid, flush=True))(request, Evidence())"
    )
    agent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with agent:
        agent.stdin.write(asked.to_bytes())
        agent.stdin.close()
        child = Path("/proc") / agent.stdout.readline().decode().strip()
        time.sleep(0.5)
        assert child.exists()
        agent.kill()
    for _ in range(100):
        if not child.exists() or "Z" in (child / "stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    pytest.fail("the child goes on without its agent")


def parts(train: int, held: int, labelled: bool = True) -> Split:
    def samples(n: int):
        y = np.zeros(n, np.int64) if labelled else None
        return checked(counted(n), y, str, "memory")

    return Split(samples(train), samples(held))


def test_evidence_is_held_out_and_newest_first_choice():
    evidence = Evidence.of(parts(10, 4))
    assert (len(evidence.recent), len(evidence.x), len(evidence.y)) == (4, 4, 4)
    assert evidence.recent[-1, 0] == 4
    assert len(Evidence.of(parts(1000, 500)).recent) == MAX_RECENT
    assert len(Evidence.of(parts(10, 4, labelled=False)).x) == 0
    own = Evidence.of(parts(10, 4), counted(7))
    assert (len(own.recent), len(own.x)) == (7, 4)
    copy = Evidence.from_bytes(own.to_bytes())
    assert copy.recent.tolist() == own.recent.tolist()
    assert (copy.x.tolist(), copy.y.tolist()) == (own.x.tolist(), own.y.tolist())


def test_evidence_is_bounded_in_bytes():
    large = checked(np.zeros((9, 1024, 1024), np.float32), [0] * 9, str, "memory")  # 4 MiB each
    evidence = Evidence.of(Split(large, large))
    assert (len(evidence.recent), len(evidence.x), comparable(large)) == (1, 2, 2)
