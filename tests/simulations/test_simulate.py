"""`fleetprune simulate` as its users call it: whole runs, kills, and what it refuses."""

import json
import logging
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from fleetprune.cli import main
from fleetprune.errors import (
    BudgetError,
    ConfigError,
    DataError,
    FleetpruneError,
    TransportError,
)
from fleetprune_sim.assemble import changes_of, parse_changes
from fleetprune_sim.history import DeviceRow, EvaluationRow, History, RoundRow
from fleetprune_sim.station import Done, Station
from fleetprune_sim.study import Order, carry_out, carry_out_all

ROOT = Path(__file__).parents[2]
TASK = "tests.simulations.tiny_task:task"


def order(folder: Path, method: str = "nested", **options) -> Order:
    return Order(folder=folder, fleet=None, task=TASK, method=method, seed=0, **options)


def run(folder: Path, method: str = "nested", **options):
    return carry_out(order(folder, method, **options), lambda news: None)


def lasting(summary):
    """Without what depends on the machine."""
    kept = {k: v for k, v in summary.items() if k not in ("wall_s", "client_rounds_per_s")}
    kept["classes"] = {
        name: entry | {"artifact": entry["artifact"] | {"latency_ms": None}}
        for name, entry in summary["classes"].items()
    }
    return kept


@pytest.fixture
def simulate(monkeypatch, capfd):
    """The command, here: a process of its own takes seconds to load its libraries."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = ["fleetprune", "simulate", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(command, ended.value.code or 0, out, err)

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(folder)


def test_a_run_tells_what_each_class_gets(whole):
    folder, summary = whole
    assert (summary["schema"], summary["task"], summary["method"]) == (1, "tiny", "nested")
    for name, share in (("large", 1.0), ("small", 0.5)):
        entry = summary["classes"][name]
        artifact = entry["artifact"]
        assert entry["within_budget"]
        assert artifact["macs"] <= share * summary["dense"]["macs"]
        assert (folder / artifact["path"]).stat().st_size == artifact["bytes"]
        assert 0 <= entry["accuracy"] <= 1
        assert 0 <= entry["own_accuracy"] <= 1
    assert summary["classes"]["large"]["devices"] + summary["classes"]["small"]["devices"] == 8


def test_bytes_time_and_energy_add_up(whole):
    folder, summary = whole
    with History(folder / "history.db") as history:
        rows = history.read(RoundRow)
        devices = history.read(DeviceRow)
        evaluated = history.read(EvaluationRow)
    assert summary["traffic"]["up_bytes"] == sum(r.up_bytes for r in rows) > 0
    assert summary["traffic"]["down_bytes"] == sum(r.down_bytes for r in rows) > 0
    assert summary["virtual"]["energy_j"] == pytest.approx(sum(r.energy_j for r in rows), abs=1e-3)
    per_round = {(r.phase, r.number, r.step): r.virtual_s for r in rows}
    assert summary["virtual"]["s"] == pytest.approx(sum(per_round.values()), abs=1e-2)
    assert all(r.tasks == r.answers + r.late + r.lost for r in rows)
    assert summary["client_rounds"] == sum(r.answers for r in rows if r.phase == "train")
    assert sorted({e.round for e in evaluated}) == [2, 4, 6]
    assert len(devices) == 8
    assert all(sum(json.loads(d.label_counts)) == d.samples for d in devices)


def test_the_same_seed_gives_the_same_run_in_any_number_of_processes(whole, tmp_path):
    _, summary = whole
    assert lasting(run(tmp_path / "two", workers=2)) == lasting(summary)


def test_another_seed_gives_another_run(whole, tmp_path):
    _, summary = whole
    other = carry_out(Order(tmp_path / "run", None, TASK, "nested", seed=1), lambda news: None)
    assert (
        other["classes"]["large"]["artifact"]["sha256"]
        != (summary["classes"]["large"]["artifact"]["sha256"])
    )


@pytest.mark.parametrize("rounds", [1, 4])
def test_a_run_killed_at_any_time_ends_as_if_it_had_not_been(whole, tmp_path, rounds):
    _, summary = whole
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "fleetprune", "simulate", "--task", TASK, "--out", folder]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 300
        while _rounds(folder) < rounds and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with pytest.raises(ConfigError, match=r"holds this run already: add --resume to go on"):
        run(folder)
    assert lasting(run(folder, resume=True)) == lasting(summary)


def _rounds(folder: Path) -> int:
    """Training rounds that a run has finished."""
    try:
        with sqlite3.connect(f"file:{folder / 'history.db'}?mode=ro", uri=True) as db:
            return int(db.execute("SELECT count(DISTINCT number) FROM rounds").fetchone()[0])
    except sqlite3.Error:
        return 0


def test_several_methods_and_seeds_have_a_folder_each(tmp_path, simulate):
    done = simulate(
        "--task", TASK, "--out", tmp_path / "all", "--method", "nested,small", "--seed", "0-1",
        "--rounds", 1, "--jobs", 2, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)
    assert [(r["method"], r["seed"], r["rounds"]) for r in runs] == [
        ("nested", 0, 1),
        ("small", 0, 1),
        ("nested", 1, 1),
        ("small", 1, 1),
    ]
    for found in runs:
        place = tmp_path / "all" / found["method"] / f"seed-{found['seed']}" / "summary.json"
        assert json.loads(place.read_text()) == found


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_runs_side_by_side_end_with_the_command(tmp_path, number, code):
    """In the middle of long runs, and though the signal is for the first process alone."""
    command = [
        *(sys.executable, "-m", "fleetprune", "simulate", "--task", TASK, "--rounds", "1000"),
        *("--out", str(tmp_path / "all"), "--method", "nested,small", "--jobs", "2"),
    ]
    log = tmp_path / "log"
    with (
        log.open("wb") as stderr,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr) as process,
    ):
        runs = [tmp_path / "all" / method / "seed-0" for method in ("nested", "small")]
        deadline = time.monotonic() + 300
        while not all(map(_rounds, runs)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        process.send_signal(number)
        assert process.wait(30) == code
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    said = log.read_text()
    assert "Traceback" not in said
    assert ("the same command with --resume goes on" in said) == (number is signal.SIGINT)


@pytest.mark.parametrize(
    ("changes", "late"),
    [
        # A multiply-accumulate a millisecond: whatever they do, it is not done in a second.
        ({"training.round_timeout_s": 1.0, "simulation.classes.small.macs_per_s": 1e3}, "small"),
        ({"training.quorum": 0.5}, None),
    ],
    ids=["timeout", "quorum"],
)
def test_answers_that_come_late_are_not_used(tmp_path, whole, changes, late):
    folder = tmp_path / "run"
    summary = run(folder, changes=changes)
    with History(folder / "history.db") as history:
        rows = history.read(RoundRow)
    assert sum(r.late for r in rows) > 0
    assert all(r.tasks == r.answers + r.late + r.lost for r in rows)
    train = [r for r in rows if r.phase == "train"]
    assert sum(r.late for r in train) > 0
    assert summary["client_rounds"] == sum(r.answers for r in train) < whole[1]["client_rounds"]
    with closing(sqlite3.connect(folder / "state" / "registry.db")) as db:
        closed = db.execute("SELECT metrics FROM rounds WHERE phase = 'train'").fetchall()
    # What the coordinator itself counts as trained.
    assert sum(json.loads(metrics)["trained"] for (metrics,) in closed) == summary["client_rounds"]
    for row in rows:
        if late is None:
            wanted = -(-sum(r.tasks for r in rows if _same_round(r, row)) // 2)
            assert sum(r.answers for r in rows if _same_round(r, row)) <= wanted
        else:
            assert row.virtual_s <= 1.0
            assert (row.answers == 0) == (row.device_class == late)


def _same_round(a: RoundRow, b: RoundRow) -> bool:
    return (a.phase, a.number, a.step) == (b.phase, b.number, b.step)


def test_methods_serve_classes_as_they_say(tmp_path):
    exclude = run(tmp_path / "exclude", "exclude", changes={"training.rounds": 1})
    assert exclude["classes"]["small"]["artifact"] is None
    assert exclude["classes"]["small"]["traffic"] == {"up_bytes": 0, "down_bytes": 0}
    dense = run(tmp_path / "dense", "dense", changes={"training.rounds": 1})
    assert [c["within_budget"] for c in dense["classes"].values()] == [True, False]
    small = run(tmp_path / "small", "small", changes={"training.rounds": 1})
    assert len({c["artifact"]["sha256"] for c in small["classes"].values()}) == 1


def test_a_trained_model_is_scored_before_it_is_cut(tmp_path):
    warm = run(
        tmp_path / "warm" / "run",
        warm_rounds=3,
        changes={"training.rounds": 2, "training.first_criterion": "taylor"},
    )
    assert warm["method"] == "nested"
    with History(tmp_path / "warm" / "run" / "history.db") as history:
        score = [r for r in history.read(RoundRow) if r.phase == "score"]
        evaluated = {e.round for e in history.read(EvaluationRow)}
    assert evaluated == {0, 2}  # as it was cut, and at the end
    # Only the class that holds the whole model knows what all of its units are worth, and what
    # its layers see.
    assert [(r.number, r.step, r.device_class) for r in score] == [(0, 0, "large"), (0, 1, "large")]
    state = torch.load(tmp_path / "warm" / "warm-3-seed-0" / "dense.pt", weights_only=True)
    started = tmp_path / "from"
    again = run(
        started,
        changes={
            "training.rounds": 2,
            "training.first_criterion": "taylor",
            "model.initial": str(tmp_path / "warm" / "warm-3-seed-0" / "dense.pt"),
        },
    )
    assert sorted(state) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert (
        again["classes"]["small"]["artifact"]["sha256"]
        == (warm["classes"]["small"]["artifact"]["sha256"])
    )


def test_methods_share_the_model_of_a_warm_up(tmp_path):
    changes = {"training.rounds": 1}
    orders = [
        order(tmp_path / method, method, warm_rounds=2, warm_in=tmp_path / "both", changes=changes)
        for method in ("nested", "heterofl")
    ]
    for _, outcome in carry_out_all(orders, 2, lambda news: None):
        assert isinstance(outcome, dict), outcome
    warm = tmp_path / "both" / "warm-2-seed-0"
    assert (warm / "dense.pt").is_file()
    assert sorted(p.name for p in tmp_path.glob("**/warm-*")) == [
        "warm-2-seed-0",
        "warm-2-seed-0.lock",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fedsgd"}, r"^no method 'fedsgd', expected one of dense, small, "),
        ({"task": "imagenet"}, r"^task 'imagenet' is unknown, expected one of digits, "),
        ({"changes": {"simulation.devices": 1}}, r"^1 devices for 2 classes, expected at least"),
        (
            {"changes": {"simulation.classes.huge.share": 1.0}},
            r"^simulation\.classes\.huge: no such class, expected one of large, small$",
        ),
        (
            {"changes": {"classes.smal.macs_share": 0.5}},
            r"^classes\.smal\.macs_share: no class 'smal', expected one of large, small$",
        ),
        (
            {"changes": {"simulation.partition.alpah": 1.0}},
            r"^simulation: partition\.alpah: unknown key, did you mean alpha\?",
        ),
        ({"engine": "slurm"}, r"^no engine 'slurm', expected loop or ray$"),
        (
            {"changes": {"classes.small.macs_share": 0.001}},
            r"^class small: macs \d+ cannot be met, the smallest achievable is \d+",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, options, message):
    wanted = {"task": TASK, "method": "nested", **options}
    with pytest.raises((ConfigError, DataError, Exception), match=message) as caught:
        carry_out(Order(folder=tmp_path / "run", fleet=None, seed=0, **wanted), lambda news: None)
    assert "\n" not in str(caught.value)


def test_a_setting_can_be_one_methods_alone():
    changes = parse_changes(
        ["training.batch=8", "fjord:training.batch=16", "small:training.epochs=2"]
    )
    assert changes_of("fjord", changes) == {"training.batch": 16}
    assert changes_of("small", changes) == {"training.batch": 8, "training.epochs": 2}
    assert changes_of("nested", changes) == {"training.batch": 8}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "fjord:training.batch=16",
            "--set fjord:training.batch: fjord is not among --method small",
        ),
        ("fjrod:training.batch=16", "no method 'fjrod', expected one of dense, small, "),
    ],
)
def test_a_setting_for_a_method_that_does_not_run_is_refused(tmp_path, simulate, setting, message):
    out = tmp_path / "run"
    done = simulate("--task", TASK, "--method", "small", "--out", out, "--set", setting)
    assert (done.returncode, done.stdout, out.exists()) == (2, "", False)
    assert message in done.stderr


def test_a_run_is_taken_up_from_any_working_directory(tmp_path, whole, monkeypatch):
    folder, summary = whole
    monkeypatch.chdir(tmp_path)
    assert run(folder, resume=True) == summary


def test_a_run_that_cannot_begin_leaves_its_folder_free(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(BudgetError, match=r"^class small: macs"):
        run(out, changes={"classes.small.macs_share": 0.001})
    assert not out.exists()


def test_what_fails_is_said_once(tmp_path, simulate):
    out = tmp_path / "run"
    done = simulate("--task", TASK, "--out", out, "--set", "classes.small.macs_share=0.001")
    lines = [line for line in done.stderr.splitlines() if "cannot be met" in line]
    assert (done.returncode, len(lines)) == (2, 1)
    assert lines[0].startswith("fleetprune: class small: macs ")


SILENT = {"simulation.classes.small.drop_out": 1.0, "simulation.classes.large.drop_out": 1.0}
SLOW = {"simulation.classes.small.macs_per_s": 1.0, "simulation.classes.large.macs_per_s": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training.learning_rate": 1e9},
            r"the 4 tasks of the last one, 4 failed \(GraphError: .* is (nan|inf), expected .*\): "
            r"where numbers are not finite, lower training\.learning_rate$",
        ),
        (
            SLOW,
            r"the \d tasks of the last one, .*\d came late.*: .*raise training\.round_timeout_s",
        ),
        (
            SILENT,
            r"the \d tasks of the last one, \d fell silent: lower simulation\.classes\.NAME\.dr",
        ),
    ],
    ids=["learning rate", "slow", "silent"],
)
def test_a_fleet_that_does_not_train_says_why_in_one_line(tmp_path, caplog, changes, message):
    with pytest.raises(TransportError) as caught:
        run(tmp_path / "run", changes=changes)
    said = str(caught.value)
    assert re.search(rf"^round 1: no device has trained in 3 tries; of {message}", said), said
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    with pytest.raises(ConfigError, match=r"add --resume to go on with it$"):
        run(tmp_path / "run", changes=changes)


def test_devices_that_fail_are_counted_and_said_once(tmp_path, caplog, monkeypatch):
    done = Station.run

    def fails(station, job):
        return Done(None, "GraphError: no") if job.device in ("d0", "d1") else done(station, job)

    monkeypatch.setattr(Station, "run", fails)
    summary = run(tmp_path / "run")
    assert summary["client_rounds"] > 0
    with History(tmp_path / "run" / "history.db") as history:
        asked = sum(r.tasks for r in history.read(RoundRow))
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert re.fullmatch(
        rf"nested seed 0: [1-9]\d* of {asked} tasks failed, first that of d[01] in round \d+: "
        r"GraphError: no",
        line,
    ), line


@pytest.mark.parametrize("place", ["/proc/run", "file/run"])
def test_an_out_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"/run cannot be written \(.+\): give another --out$"):
        run(tmp_path / place)


@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("run.json", r"run\.json cannot be read \(.+\): give this one another --out$"),
        ("summary.json", r"summary\.json cannot be read \(.+\): remove it, and --resume makes "),
        ("fleet/x.npy", r"x\.npy cannot be read \(.+\): remove .*fleet, and --resume makes it"),
        ("fleet/y_test.npy", r"y_test\.npy cannot be read \(.+\): remove .*fleet, and --resume "),
        ("fleet/devices.npz", r"devices\.npz cannot be read \(.+\): remove .*fleet, and --resume"),
        ("fleet/test.npz", r"^data\.test .*test\.npz: expected an \.npz with x and y: "),
    ],
)
def test_a_damaged_description_of_a_run_is_refused(tmp_path, whole, name, advice, kept):
    folder, summary = whole
    damaged = shutil.copytree(folder, tmp_path / "run") / name
    if damaged.parent.name == "fleet":
        (tmp_path / "run" / "summary.json").unlink()
    content = damaged.read_bytes()
    damaged.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ConfigError, match=advice) as caught:
        run(tmp_path / "run", resume=True)
    assert "\n" not in str(caught.value)
    if "remove" in advice:
        if damaged.parent.name == "fleet":
            shutil.rmtree(damaged.parent)
        else:
            damaged.unlink()
        assert lasting(run(tmp_path / "run", resume=True)) == lasting(summary)


@pytest.mark.parametrize("name", ["history.db", "devices.db", "state/registry.db"])
def test_a_damaged_database_of_a_run_is_refused(tmp_path, whole, name):
    folder, _ = whole
    copy = shutil.copytree(folder, tmp_path / "run")
    (copy / "summary.json").unlink()
    (copy / name).write_bytes(b"x" * 4096)
    with pytest.raises(FleetpruneError, match=rf"{name}.*file is not a database") as caught:
        run(copy, resume=True)
    assert "\n" not in str(caught.value)


def test_a_run_killed_while_it_writes_the_test_set_goes_on(tmp_path, whole, monkeypatch):
    _, summary = whole
    savez = np.savez

    def killed(path, **arrays):
        savez(path, **arrays)
        if Path(path).name.startswith("test"):
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run")
    assert lasting(run(tmp_path / "run", resume=True)) == lasting(summary)


def test_a_folder_with_something_else_is_left_alone(tmp_path, whole):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("...")
    with pytest.raises(ConfigError, match=r"is not empty and holds no run"):
        run(other)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]
    folder, _ = whole
    with pytest.raises(ConfigError, match=r"holds another run \(method nested instead of small\)"):
        run(folder, "small", resume=True)
