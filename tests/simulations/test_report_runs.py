"""Which runs are found, what is read of them, which belong together."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fleetprune.errors import DataError
from fleetprune_sim.history import FILE, EvaluationRow, History
from fleetprune_sim.report.finding import DEPTH, find_runs
from fleetprune_sim.report.runs import _open, read_run
from fleetprune_sim.report.variants import fleet_differences, group
from tests.simulations.report_runs import Synthetic


def changed(folder: Path, **keys) -> Path:
    path = folder / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


def labels(root: Path) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    tasks = group(find_runs([root]).runs)
    return {task: [(v.label, v.seeds) for v in variants] for task, variants in tasks.items()}


def test_a_run_is_read_and_its_folder_stays_as_it_is(tmp_path):
    folder = Synthetic(seed=5).write(tmp_path / "run")
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    run = read_run(folder)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert run.summary.seed == 5
    assert run.summary.classes["phone"].artifact.macs == 500_000
    assert len(run.rounds) == 4 * 4
    assert [e.round for e in run.evaluations] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert len(run.devices) == 10


def test_a_history_is_opened_without_a_trace_and_cannot_be_changed(tmp_path):
    folder = Synthetic().write(tmp_path / "run")
    with closing(_open(folder / FILE)) as database:
        assert database.execute("select count(*) from rounds").fetchone() == (16,)
        assert {p.name for p in folder.iterdir()} == {FILE, "summary.json"}
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            database.execute("delete from rounds")


def test_rows_that_are_still_in_the_write_ahead_log_are_read(tmp_path):
    folder = Synthetic().write(tmp_path / "run")
    copy = tmp_path / "copy"
    with History(folder / FILE) as history:
        history.write([EvaluationRow(99, "hub", 0.5, 1.0)])
        assert (folder / f"{FILE}-wal").stat().st_size > 0
        shutil.copytree(folder, copy)
    assert read_run(copy).evaluations[-1].round == 99


def test_a_class_has_the_curve_of_the_model_it_was_given(tmp_path):
    run = Synthetic(models={"hub": "hub", "phone": "hub", "watch": "watch", "sensor": None})
    found = read_run(run.write(tmp_path / "run"))
    assert [e.device_class for e in found.curve("watch")] == ["watch"] * 4
    assert found.curve("sensor") == []
    others = tuple(e for e in found.evaluations if e.device_class != "phone")
    found = type(found)(found.folder, found.summary, found.rounds, others, found.devices)
    assert [e.device_class for e in found.curve("phone")] == ["hub"] * 4


def test_runs_are_found_in_sub_folders_once(tmp_path):
    deep = tmp_path.joinpath("a", "b", "c", "d")
    Synthetic(seed=1).write(deep)
    Synthetic(seed=0).write(tmp_path / "run")
    Synthetic(seed=2).write(tmp_path / "run" / "inner")
    Synthetic(seed=3).write(deep.parent / "d2" / "too-deep")
    assert len(deep.relative_to(tmp_path).parts) == DEPTH
    found = find_runs([tmp_path, tmp_path / "run", tmp_path / "a"])
    assert [run.folder for run in found.runs] == [
        deep,
        tmp_path / "run",
        deep.parent / "d2" / "too-deep",
    ]
    assert [run.folder for run in find_runs([tmp_path]).runs] == [deep, tmp_path / "run"]
    assert found.problems == found.unfinished == ()


def test_unfinished_runs_are_listed_and_the_others_go_on(tmp_path):
    Synthetic(seed=0).write(tmp_path / "done")
    going = Synthetic(seed=1).write(tmp_path / "going", finished=False)
    found = find_runs([tmp_path])
    assert [run.folder.name for run in found.runs] == ["done"]
    assert (found.unfinished, found.problems) == ((going,), ())


def test_warm_ups_are_left_out_unless_they_are_named(tmp_path):
    Synthetic().write(tmp_path / "run")
    warm = Synthetic(method="dense").write(tmp_path / "warm-20-seed-0")
    (warm / "dense.pt").touch()
    assert [run.folder.name for run in find_runs([tmp_path]).runs] == ["run"]
    assert [run.folder for run in find_runs([warm]).runs] == [warm]


def test_what_is_no_run_is_one_line_each(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "summary.json").write_text("{}")
    no_json = Synthetic().write(tmp_path / "no-json")
    (no_json / "summary.json").write_text('{"schema": 1,')
    newer = changed(Synthetic().write(tmp_path / "newer"), schema=2)
    more_than_all = changed(Synthetic().write(tmp_path / "more"), rounds=-1)
    torn = Synthetic().write(tmp_path / "torn")
    (torn / FILE).write_bytes(b"no database" * 100)
    old = Synthetic().write(tmp_path / "old")
    (old / FILE).write_bytes(b"")
    names = ("gone", "file", "empty", "demo", "no-json", "newer", "more", "torn", "old")
    found = find_runs([tmp_path / name for name in names])
    assert found.runs == ()
    lines = dict(zip(names, found.problems, strict=True))
    assert lines["gone"] == f"{tmp_path}/gone: no such folder"
    assert lines["file"] == f"{tmp_path}/file: not a folder"
    assert lines["empty"] == (
        f"{tmp_path}/empty: no run in it or in 4 levels of sub-folders, "
        "expected a folder with summary.json and history.db"
    )
    assert lines["demo"] == f"{demo}: summary.json without history.db is not a simulated run"
    assert lines["no-json"].startswith(f"{no_json}/summary.json: invalid JSON: EOF while parsing")
    assert lines["newer"] == f"{newer}/summary.json: schema: input should be 1, got 2"
    assert lines["more"] == (
        f"{more_than_all}/summary.json: rounds: input should be greater than or equal to 0, got -1"
    )
    assert lines["torn"] == f"{torn}/{FILE}: not the history of a run: file is not a database"
    assert lines["old"] == f"{old}/{FILE}: not the history of a run: no such table: rounds"
    assert not any("\n" in line for line in lines.values())


def test_keys_that_are_newer_are_ignored_and_missing_ones_named(tmp_path):
    folder = changed(Synthetic().write(tmp_path / "run"), shiny=1)
    assert read_run(folder).summary.task == "fashion"
    summary = json.loads((folder / "summary.json").read_text())
    del summary["virtual"]
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(DataError, match=r"/summary\.json: virtual: field required$"):
        read_run(folder)


def test_runs_that_differ_in_their_seed_alone_are_one_variant(tmp_path):
    for seed in (2, 0, 1):
        Synthetic(seed=seed).write(tmp_path / f"a{seed}")
    Synthetic(method="dense").write(tmp_path / "b")
    Synthetic(task="har", seed=7).write(tmp_path / "c")
    assert labels(tmp_path) == {
        "fashion": [("nested", (0, 1, 2)), ("dense", (0,))],
        "har": [("nested", (7,))],
    }


def test_a_method_with_two_settings_is_two_variants_and_says_which(tmp_path):
    same = {"codec": "int4", "inner": {"steps": 3}}
    for seed in (0, 1):
        Synthetic(seed=seed, settings={"lr": 0.1, **same}).write(tmp_path / f"a{seed}")
        Synthetic(seed=seed, settings={"lr": 0.2, **same}).write(tmp_path / f"b{seed}")
    # Other methods have other settings; they do not split ours.
    Synthetic(method="dense", settings={"lr": 0.3}).write(tmp_path / "c")
    assert labels(tmp_path)["fashion"] == [
        ("nested (lr=0.1)", (0, 1)),
        ("nested (lr=0.2)", (0, 1)),
        ("dense", (0,)),
    ]


def test_settings_are_named_in_full_where_their_last_word_is_not_enough(tmp_path):
    for i, settings in enumerate(({"up": {"bits": 4}, "down": {"bits": 8}},
                                  {"up": {"bits": 8}, "down": {"bits": 4}})):  # fmt: skip
        Synthetic(settings=settings).write(tmp_path / str(i))
    assert [label for label, _ in labels(tmp_path)["fashion"]] == [
        "nested (up.bits=4, down.bits=8)",
        "nested (up.bits=8, down.bits=4)",
    ]


def test_the_same_run_twice_is_refused(tmp_path):
    one = Synthetic(seed=3).write(tmp_path / "one")
    other = Synthetic(seed=3, level=0.7).write(tmp_path / "other")
    with pytest.raises(DataError) as e:
        group(find_runs([tmp_path]).runs)
    assert str(e.value) == (
        f"{one} and {other} are both fashion, nested, seed 3 with the same settings: "
        "leave one of them out"
    )


def test_fleets_that_differ_are_named(tmp_path):
    Synthetic().write(tmp_path / "a")
    Synthetic(method="dense", partition={"kind": "dirichlet", "alpha": 0.1}).write(tmp_path / "b")
    Synthetic(method="small", rounds=2).write(tmp_path / "c")
    (variants,) = group(find_runs([tmp_path]).runs).values()
    assert fleet_differences(variants) == ["rounds", "partition.alpha"]
    assert fleet_differences(variants[:1]) == []
