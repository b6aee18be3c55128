"""docs/installation-matrix.md says what is so."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("state_matrix.py")
PAGE = Path(__file__).parents[2] / "docs" / "installation-matrix.md"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True)


@pytest.mark.timeout(400)
def test_the_page_is_what_the_processes_do():
    done = run(str(SCRIPT))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == PAGE.read_text()


BREAKS = {
    "no report after a kill": (
        "Duties.repeat_report = lambda self: None; cell(Phase.TRIAL, 'killed', sound)",
        "AssertionError",
    ),
    "a slot that is in use": (
        "Slots._idle = lambda self, active: 'a'; cell(Phase.VERIFYING, 'killed', sound)",
        "NO MODEL",
    ),
    "a failure that is forgotten": (
        "Slots.reject = lambda self, *_, **__: None; cell('starting', '', fails_its_check)",
        "AssertionError",
    ),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_cell_can_fail(broken):
    change, message = BREAKS[broken]
    code = f"import sys; sys.path.append({str(SCRIPT.parent)!r}); from state_matrix import *; "
    done = run("-c", code + change)
    assert done.returncode == 1
    assert message in done.stderr
