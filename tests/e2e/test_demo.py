"""The demo as a user runs it: a broker, a coordinator and six agents, from data to releases."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

CLASSES = {"gateway": 1.0, "phone": 0.5, "sensor": 0.25}  # name to share of the dense MACs
ROUNDS = 4


def left_running(folder: Path) -> list[str]:
    """Command lines of processes that name the folder."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(folder) in line and process.pid != os.getpid():
            found.append(line)
    return found


@pytest.mark.timeout(240)
def test_every_device_ends_with_the_release_of_its_class(tmp_path: Path) -> None:
    out = tmp_path / "out"
    demo = subprocess.run(
        [sys.executable, "-m", "fleetprune", "demo", "--rounds", str(ROUNDS), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
        env={**os.environ, "COLUMNS": "100"},
    )
    logs = "\n".join(
        f"== {log.name}\n{log.read_text()[-2000:]}" for log in sorted(out.glob("logs/*.log"))
    )
    assert demo.returncode == 0, f"{demo.stderr}\n{logs}"
    assert left_running(tmp_path) == []

    summary = json.loads((out / "summary.json").read_text())
    assert summary["schema"] == 1
    assert summary["rounds"] == ROUNDS
    assert set(summary["classes"]) == set(CLASSES)
    for name, share in CLASSES.items():
        group = summary["classes"][name]
        artifact = group["artifact"]
        content = (out / artifact["path"]).read_bytes()
        assert len(content) == artifact["bytes"]
        assert hashlib.sha256(content).hexdigest() == artifact["sha256"]
        assert artifact["macs"] <= share * summary["dense"]["macs"]
        assert group["within_budget"] is True
        assert 0 <= group["accuracy"] <= 1
        assert name in demo.stdout
    assert summary["classes"]["gateway"]["accuracy"] > 0.5  # far above a guess, after few rounds
    assert summary["traffic"]["up_bytes"] > 0

    assert len(summary["devices"]) == 6
    for device in summary["devices"]:
        artifact = summary["classes"][device["class"]]["artifact"]
        assert device["installed_sha256"] == artifact["sha256"]
        assert device["bytes_down"] > artifact["bytes"]
        config = out / "devices" / device["id"] / "agent.toml"
        status = subprocess.run(
            [sys.executable, "-m", "fleetprune", "agent", "status", "--json", "--config", config],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert json.loads(status.stdout)["sha256"] == artifact["sha256"]
