"""The demo's own part, with programs that only write what the real ones would.

`tests/e2e/test_demo.py` runs the real ones.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from fleetprune_sim.demo_config import DEVICES

# Stands for `python -m fleetprune`: FAKE says how it goes wrong.
FLEETPRUNE = """
import json, os, signal, sys, time
from pathlib import Path

how = os.environ.get("FAKE", "")
side, command, *rest = sys.argv[1:]
options = dict(zip(rest[::2], rest[1::2]))
config = Path(rest[rest.index("--config") + 1])
name = config.parent.name
classes = {"gateway", "phone", "sensor"}
if side == "agent":
    if how == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if how == "agent dies" and name == "phone-2":
        time.sleep(0.5)
        print("fleetprune: no samples")
        sys.exit(2)
    time.sleep(60)
if command == "init":
    if how == "init fails":
        sys.exit("fleetprune: keys exist")
    folder = config.parent / "coordinator"
    folder.mkdir()
    (folder / "1.root.json").write_text("root")
    sys.exit()
events = Path(rest[rest.index("--events") + 1])

def emit(event, **fields):
    with events.open("a") as file:
        file.write(json.dumps({"event": event, **fields}) + chr(10))

devices = [p.name for p in sorted((config.parent / "devices").iterdir())]
for device in devices:
    emit("enrolled", device=device, device_class=device.split("-")[0])
emit("round", round=1, of=1, loss=0.5, seconds=0.1, bytes_up=1, bytes_down=2, devices=6)
if how in ("hangs", "stubborn", "agent dies"):
    time.sleep(60)
if how == "coordinator dies":
    print("fleetprune: disk full")
    os.kill(os.getpid(), signal.SIGKILL)
for device in devices:
    emit("installed", device=device, device_class=device.split("-")[0], release=1, accuracy=0.9,
         latency_ms=0.1, rss_mb=70.0)
if how != "no summary":
    (config.parent / "summary.json").write_text(json.dumps({
        "schema": 1, "rounds": 1, "wall_s": 1.0,
        "dense": {"bytes": 100, "macs": 100, "accuracy": 0.95},
        "classes": {c: {"devices": 2, "budget": {"macs": 100}, "accuracy": 0.9,
                        "within_budget": True,
                        "artifact": {"sha256": c * 8, "bytes": 10, "macs": 50, "latency_ms": 0.1}}
                    for c in sorted(classes)},
        "devices": [{"id": d, "class": d[:-2], "installed_sha256": d[:-2] * 8} for d in devices
                    if how != "stranger" or d != "phone-1"],
    }))
emit("done")
"""

PROGRAM = """
import sys
from fleetprune_sim import demo, demo_processes
demo._COMMAND = (sys.executable, {fake!r})
demo.SILENCE_S = {silence}
demo_processes.GRACE_S = 2.0
from fleetprune.cli import main
main()
"""


@pytest.fixture
def run(tmp_path: Path):
    """Starts `fleetprune demo` on the fakes; whatever it leaves running fails the test."""
    fake = tmp_path / "fake_fleetprune.py"
    fake.write_text(textwrap.dedent(FLEETPRUNE))

    def start(*arguments: str, how: str = "", silence: float = 60.0) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                PROGRAM.format(fake=str(fake), silence=silence),
                "demo",
                *arguments,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "FAKE": how, "TMPDIR": str(tmp_path), "COLUMNS": "80"},
        )

    yield start
    assert left_running(tmp_path) == []


def left_running(folder: Path) -> list[str]:
    """Command lines of processes that name the folder: fakes, agents, brokers."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(folder) in line and process.pid != os.getpid():
            found.append(line)
    return found


def wait_for(path: Path, text: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{path} has no {text}"
        time.sleep(0.05)


def test_prints_lines_then_the_table_and_keeps_the_results(run, tmp_path):
    out = tmp_path / "out"
    demo = run("--out", str(out), "--rounds", "1")
    stdout, stderr = demo.communicate(timeout=300)
    assert (demo.returncode, stderr) == (0, "")
    assert "gateway-1 enrolled as gateway\n" in stdout
    assert "round 1/1  loss 0.500  0.1 s  up 1 B  down 2 B  6 devices\n" in stdout
    assert "sensor-2 runs release 1, 90.0% right on its own data\n" in stdout
    assert stdout.index("accuracy %") > stdout.index("sensor-2 runs release 1")
    summary = json.loads((out / "summary.json").read_text())
    assert [d["id"] for d in summary["devices"]] == list(DEVICES)
    assert summary["devices"][0]["installed_sha256"] == "gateway" * 8
    logs = {p.name for p in (out / "logs").iterdir()}
    assert logs == {"init.log", "coordinator.log", *(f"{d}.log" for d in DEVICES)}

    again = run("--out", str(out), "--rounds", "1")
    again.communicate(timeout=300)
    assert again.returncode == 0


def test_json_is_all_there_is_on_standard_output(run):
    demo = run("--json")
    stdout, stderr = demo.communicate(timeout=300)
    assert demo.returncode == 0
    assert list(json.loads(stdout)["classes"]) == ["gateway", "phone", "sensor"]
    assert "round 1/1" in stderr


def test_without_out_nothing_is_left(run, tmp_path):
    before = set(tmp_path.iterdir())
    demo = run()
    stdout, _ = demo.communicate(timeout=300)
    assert demo.returncode == 0
    assert "--out DIR keeps" in stdout
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("init fails", "fleetprune: init ended with exit code 1: fleetprune: keys exist (log: "),
        ("agent dies", "fleetprune: phone-2 ended with exit code 2: fleetprune: no samples (log: "),
        ("coordinator dies", "fleetprune: coordinator was killed by signal 9: "),
        ("no summary", "fleetprune: the coordinator left no summary: "),
        ("stranger", "fleetprune: phone-1 did not report running the artifact of their class; "),
    ],
)
def test_a_failure_stops_everything_and_is_one_line(run, tmp_path, how, message):
    demo = run("--out", str(tmp_path / "out"), how=how)
    _, stderr = demo.communicate(timeout=300)
    assert demo.returncode == 1
    assert stderr.startswith(message)
    assert stderr.count("\n") == 1
    assert left_running(tmp_path) == []


def test_silence_is_a_failure(run):
    demo = run(how="hangs", silence=1.0)
    _, stderr = demo.communicate(timeout=300)
    assert demo.returncode == 1
    assert stderr.startswith("fleetprune: nothing happened for 1 s; see ")


@pytest.mark.parametrize(
    ("number", "how"), [(signal.SIGINT, "hangs"), (signal.SIGTERM, "stubborn")]
)
def test_a_signal_stops_everything_quietly(run, tmp_path, number, how):
    demo = run("--out", str(tmp_path / "out"), how=how)
    wait_for(tmp_path / "out" / "events.jsonl", '"round"')
    deadline = time.monotonic() + 120
    while len(left_running(tmp_path)) < 8:  # so that the check at the end can fail
        assert time.monotonic() < deadline
        time.sleep(0.05)
    demo.send_signal(number)
    if how == "stubborn":
        time.sleep(0.2)
        demo.send_signal(number)  # an impatient user
    _, stderr = demo.communicate(timeout=300)
    assert (demo.returncode, stderr) == (130, "")
    assert left_running(tmp_path) == []


def test_a_folder_of_someone_else(run, tmp_path):
    demo = run("--out", str(tmp_path))
    _, stderr = demo.communicate(timeout=300)
    assert demo.returncode == 2
    assert "is not empty and not from a demo" in stderr


def test_missing_recordings_say_where_to_get_them(run, monkeypatch):
    monkeypatch.delenv("FLEETPRUNE_DATA", raising=False)
    demo = run("--task", "har")
    _, stderr = demo.communicate(timeout=300)
    assert demo.returncode == 2
    assert "GeoTecINIT/sp-sw-har-dataset" in stderr
    assert stderr.count("\n") == 1
