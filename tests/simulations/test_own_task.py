"""The example of docs/simulate.md: a user's own task, run as the page says."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/simulate.md"


def write_example(page: Path, folder: Path, name: str) -> None:
    """Write a page's code block of this name to a file of this name."""
    code = re.search(rf"```\w+\n# {re.escape(name)}\n(.*?)```", page.read_text(), re.DOTALL)
    assert code is not None
    (folder / name).write_text(code[1])


def documented(folder: Path, pattern: str, *more: str):
    """Run the command of the page that begins like this; returns what it prints as JSON."""
    found = re.search(rf"fleetprune ({pattern}[^`\n]*)", PAGE.read_text())
    assert found is not None
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fleetprune", *found[1].split(), *more, "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_pages_own_task_runs(tmp_path):
    write_example(PAGE, tmp_path, "pumps.py")
    summary = documented(tmp_path, "simulate --task pumps:task ")
    assert summary["task"] == "pumps"
    assert all(entry["within_budget"] for entry in summary["classes"].values())
    # Twelve figures of three kinds far apart: anything that learns is far above one in three.
    assert summary["classes"]["hub"]["accuracy"] > 0.7
    report = (tmp_path / "pumps" / "report.html").read_text()
    assert "pumps" in report


def test_the_pages_own_task_runs_on_the_readmes_fleet(tmp_path):
    write_example(PAGE, tmp_path, "pumps.py")
    for name in ("activity.py", "fleet.toml"):
        write_example(ROOT / "README.md", tmp_path, name)
    pattern = r"simulate fleet\.toml --task pumps:task --out pumps"
    assert re.search(pattern, (ROOT / "docs/bring-your-own.md").read_text())
    summary = documented(tmp_path, pattern, "--rounds", "4")
    assert (summary["task"], summary["rounds"]) == ("pumps", 4)
    hub, meter = (summary["classes"][name] for name in ("hub", "meter"))
    assert hub["within_budget"]
    assert meter["within_budget"]
    assert meter["artifact"]["macs"] <= 0.25 * summary["dense"]["macs"]
    assert meter["artifact"]["bytes"] <= 40_000
    assert min(hub["accuracy"], meter["accuracy"]) > 0.7
    assert (tmp_path / "pumps" / "report.html").is_file()
    # The fleet's own state folder is for the coordinator alone.
    assert not (tmp_path / "coordinator").exists()
