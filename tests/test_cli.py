"""The console command: versions, lazy sub-commands, one line per error, exit codes."""

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

HEAD = """
import importlib.abc, sys, types

BLOCKED = {blocked!r}

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""

FAKE = """
import typer
from fleetprune.errors import DataError, TransportError

app = typer.Typer()

@app.command()
def use(): raise DataError("two\\nlines")

@app.command()
def fail(): raise TransportError("no broker")

@app.command()
def late():
    import scipy.fleetprune_missing.deep

@app.command()
def bug():
    import fleetprune.no_such_module

@app.command()
def code(): raise typer.Exit(7)

@app.command()
def wait():
    import time
    print("waiting", flush=True)
    time.sleep(60)

module = types.ModuleType("fake_commands")
module.app = app
sys.modules["fake_commands"] = module

import fleetprune.cli as cli
cli.SUB_COMMANDS["fake"] = cli.SubCommand("fake_commands", "fakery", "A fake.")
"""

MAIN = "\nfrom fleetprune.cli import main\nmain()\n"


def fleetprune(
    *arguments: str, blocked: tuple[str, ...] = (), fake: bool = False, after: str = ""
) -> subprocess.CompletedProcess[str]:
    program = HEAD.format(blocked=blocked) + (FAKE if fake else "") + MAIN
    if after:
        program = program.replace("main()\n", f"try:\n    main()\nfinally:\n    {after}\n")
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"},
    )


def test_version():
    done = fleetprune("--version")
    assert (done.returncode, done.stdout) == (0, f"fleetprune {version('fleetprune')}\n")


def test_python_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "fleetprune", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == f"fleetprune {version('fleetprune')}\n"


def test_help_lists_sub_commands_and_loads_none_of_them():
    done = fleetprune(
        "--help",
        blocked=("fleetprune_agent", "fleetprune_coordinator", "fleetprune_sim", "torch", "flwr"),
    )
    assert done.returncode == 0
    for name in ("agent", "coordinator", "demo"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (("agent", "predict", "--config", "agent.toml", "--input", "x.npy"), "onnxruntime"),
        (("coordinator", "serve"), "torch"),
        (("demo", "--rounds", "1"), "sklearn"),
        (("demo", "--help"), "fleetprune_sim"),
    ],
)
def test_missing_extra_is_one_line_that_says_what_to_install(arguments, missing):
    done = fleetprune(*arguments, blocked=(missing,))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"fleetprune: `fleetprune {arguments[0]}` needs {missing}, which is not installed: "
        f"pip install 'fleetprune[{arguments[0]}]'\n"
    )


def test_missing_extra_found_out_late():
    done = fleetprune("fake", "late", blocked=("scipy",), fake=True)
    assert (done.returncode, done.stderr) == (
        2,
        "fleetprune: `fleetprune fake` needs scipy, which is not installed: "
        "pip install 'fleetprune[fakery]'\n",
    )


def test_a_missing_module_of_our_own_is_a_bug_and_shows_a_traceback():
    done = fleetprune("fake", "bug", fake=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "fleetprune.no_such_module" in done.stderr


@pytest.mark.parametrize(
    ("command", "code", "line"), [("use", 2, "two lines"), ("fail", 1, "no broker")]
)
def test_error_is_one_line(command, code, line):
    done = fleetprune("fake", command, fake=True)
    assert (done.returncode, done.stderr) == (code, f"fleetprune: {line}\n")


def test_debug_shows_the_traceback():
    done = fleetprune("--debug", "fake", "fail", fake=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "TransportError: no broker" in done.stderr


def test_exit_code_of_a_sub_command():
    assert fleetprune("fake", "code", fake=True).returncode == 7


def test_unknown_command_and_option():
    done = fleetprune("prune")
    assert (done.returncode, done.stderr) == (2, "fleetprune: No such command 'prune'.\n")
    done = fleetprune("--prune")
    assert (done.returncode, done.stderr) == (2, "fleetprune: No such option '--prune'.\n")


def test_no_arguments_show_the_help():
    done = fleetprune()
    assert done.returncode == 2
    assert "coordinator" in done.stdout + done.stderr


def test_agent_imports_neither_torch_nor_flower():
    done = fleetprune(
        "agent",
        "--help",
        after="print('LOADED', sorted({'torch', 'flwr', 'sklearn'} & set(sys.modules)))",
    )
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout


def test_interrupt_is_quiet(tmp_path: Path):
    program = HEAD.format(blocked=()) + FAKE + MAIN
    errors = tmp_path / "stderr"
    with errors.open("wb") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-c", program, "fake", "wait"], stdout=subprocess.PIPE, stderr=stderr
        )
        with child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"waiting\n"
            time.sleep(0.1)
            child.send_signal(signal.SIGINT)
            assert child.wait(20) == 130
    assert errors.read_bytes() == b""
