"""The example of docs/simulate.md: a user's own task, run as the page says."""

import json
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/simulate.md"


def test_the_pages_own_task_runs(tmp_path):
    text = PAGE.read_text()
    code = re.search(r"```python\n# (pumps\.py)\n(.*?)```", text, re.DOTALL)
    assert code is not None
    (tmp_path / code[1]).write_text(code[2])
    command = re.search(r"^\$ fleetprune (simulate --task pumps:task .*)$", text, re.MULTILINE)
    assert command is not None
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fleetprune", *command[1].split(), "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["task"] == "pumps"
    assert all(entry["within_budget"] for entry in summary["classes"].values())
    # Twelve figures of three kinds far apart: anything that learns is far above one in three.
    assert summary["classes"]["hub"]["accuracy"] > 0.7
    report = (tmp_path / "pumps" / "report.html").read_text()
    assert "pumps" in report
