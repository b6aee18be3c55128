"""What `fleetprune simulate` makes of `--out`, and how it tells of its progress."""

import io
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fleetprune.errors import ConfigError
from fleetprune_sim import simulate_command
from fleetprune_sim.report.page import write_report
from fleetprune_sim.simulate_command import _carry_out, app
from fleetprune_sim.study import Order

TASK = "tests.simulations.tiny_task:task"


def simulate(out: Path, method: str, seed: str = "0", *more: str) -> str:
    """What it says on standard error; raises what it refuses."""
    options = ["--task", TASK, "--method", method, "--seed", seed, "--rounds", "1", *more]
    done = CliRunner().invoke(app, ["--out", str(out), *options])
    if done.exception is not None:
        raise done.exception
    return done.stderr


def refused(out: Path, *options: str) -> str:
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(ConfigError) as caught:
        simulate(out, *options)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def reported(monkeypatch):
    """Method and seed of the runs in the last report."""
    found: list[tuple[str, int]] = []

    def write(out, runs, title):
        found[:] = sorted((r.summary.method, r.summary.seed) for r in runs)
        write_report(out, runs, title)

    monkeypatch.setattr(simulate_command, "write_report", write)
    return found


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with runs of two methods."""
    out = tmp_path_factory.mktemp("study") / "study"
    simulate(out, "nested,small")
    return out


def test_a_fleet_that_is_not_there(tmp_path):
    missing = tmp_path / "nope.toml"
    assert refused(tmp_path / "out", "nested", "0", str(missing)) == (
        f"{missing}: no such file; docs/bring-your-own.md has examples, and fleetprune simulate "
        "--task digits needs none"
    )


def test_several_runs_do_not_go_into_the_folder_of_one(tmp_path):
    out = tmp_path / "one"
    simulate(out, "small", "3")
    told = f"{out} holds a single run (method small, seed 3): give several runs another --out"
    assert refused(out, "nested,small") == told
    assert refused(out, "small", "3-4", "--resume") == told


def test_a_single_run_does_not_go_into_the_folder_of_several(study):
    told = (
        f"{study} holds several runs, each in a folder of its own (nested/seed-0, small/seed-0): "
        f"add this one with --out {study}/dense/seed-5, or give it another"
    )
    assert refused(study, "dense", "5") == told
    assert refused(study, "dense", "5", "--resume") == told


def test_a_report_is_of_all_finished_runs_in_the_folder(tmp_path, study, reported):
    study = shutil.copytree(study, tmp_path / "study")
    simulate(study, "small,dense", "1-2")
    assert reported == [("dense", 1), ("dense", 2), ("nested", 0)] + [
        ("small", i) for i in range(3)
    ]
    simulate(study / "dense" / "seed-5", "dense", "5")
    assert reported == [("dense", 5)]
    shutil.copytree(study / "dense" / "seed-5", study / "dense" / "seed-6")  # no run of this name
    damaged = study / "small" / "seed-2" / "summary.json"
    damaged.write_text("{")
    told = simulate(study, "nested", "0-1", "--resume")
    assert reported == [
        *(("dense", i) for i in (1, 2, 5)),
        *(("nested", i) for i in (0, 1)),
        *(("small", i) for i in (0, 1)),
    ]
    (line,) = [line for line in told.splitlines() if str(damaged) in line]
    assert line.endswith(": left out of the report")
    assert "<h1>tiny: nested, dense, small</h1>" in (study / "report.html").read_text()


def order(folder: Path) -> Order:
    return Order(folder, None, TASK, "nested", seed=0, changes={"training.rounds": 3})


def carry_out(folder: Path, *, terminal: bool) -> str:
    told = io.StringIO()
    console = Console(file=told, force_terminal=terminal, width=100, _environ={})
    _carry_out([order(folder)], 1, console)
    return told.getvalue()


def test_progress_on_a_terminal_is_a_bar_that_fills(tmp_path):
    told = carry_out(tmp_path / "run", terminal=True)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", told).replace("\r", "\n").strip().splitlines()[-1]
    assert re.fullmatch(r"nested seed 0 ━+ 4/4 0:00:00 done", " ".join(last.split())), last


def test_progress_elsewhere_is_lines(tmp_path):
    first, *others, last = carry_out(tmp_path / "run", terminal=False).splitlines()
    assert first == "nested seed 0: 0 of 4"
    assert last == "nested seed 0: 4 of 4, done"
    accuracies = r"nested seed 0: [23] of 4, large \d+\.\d small \d+\.\d"
    assert [line for line in others if not re.fullmatch(accuracies, line)] == []
    assert others


def shown(out: Path, method: str, seed: str, *more: str) -> list[str]:
    """Lines on standard output, their words one blank apart."""
    options = ["--task", TASK, "--method", method, "--seed", seed, "--rounds", "1", *more]
    done = CliRunner().invoke(app, ["--out", str(out), *options])
    assert done.exception is None
    return [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]


def test_several_runs_are_one_table_of_means_over_seeds(tmp_path, study):
    lines = shown(shutil.copytree(study, tmp_path / "study"), "nested,small", "1")
    assert " ".join(lines).startswith(
        "tiny Means ± sample standard deviations over 2 seeds. With fewer than 3 seeds, a spread "
        "is a guess. method n accuracy % "
    )
    assert [line.split()[0] for line in lines].count("method") == 1
    # Two classes and their mean; seed 0 was there already.
    rows = [line for line in lines if re.match(r"(nested|small) 2 \d+\.\d ± \d+\.\d", line)]
    assert len(rows) == 6
    assert not any("seed 0" in line for line in lines)
    assert lines[-1] == f"report: {tmp_path / 'study' / 'report.html'}"


@pytest.mark.parametrize(
    ("options", "large", "small"),
    [
        ([], "no limit", "held"),
        (["--set", "classes.large.latency_ms=1", "--set", "classes.small.latency_ms=1"],
         "latency aside", "held, latency aside"),
    ],
)  # fmt: skip
def test_a_limit_on_latency_is_not_said_to_be_held(tmp_path, options, large, small):
    lines = shown(tmp_path / "run", "nested", "0", *options)
    found = {cells[1]: cells[-2] for line in lines if len(cells := line.split("│")) > 3}
    verdicts = {name.strip(): verdict.strip() for name, verdict in found.items()}
    assert verdicts == {"large": large, "small": small}
