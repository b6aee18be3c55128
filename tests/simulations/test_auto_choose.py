"""Whole runs that find settings out first: what they try, kills, and what they do not look at."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fleetprune.errors import BudgetError, ConfigError, TransportError
from fleetprune_sim.assemble import assemble
from fleetprune_sim.auto.choose import choose
from fleetprune_sim.auto.trial import RESULT, Result, run_trial, shortened
from fleetprune_sim.simulate_command import app
from fleetprune_sim.study import Order, carry_out
from fleetprune_sim.tasks import SimTask
from tests.simulations import tiny_task
from tests.simulations.test_auto_asked import FLEET
from tests.simulations.test_simulate import lasting as lasting_of_a_run

ROOT = Path(__file__).parents[2]
TASK = "tests.simulations.tiny_task:task"
AUTO = {
    "training.criterion": "auto",
    "pruning.granularity": "auto",
    "training.rounds": 10,
    "simulation.auto_rounds": 1.8,  # 4 candidates for 2 rounds, 2 for 4
}
"""Of a fleet with limits of MACs alone, so that only units can be cut."""


def order(folder: Path, **options) -> Order:
    return Order(folder, **{"fleet": None, "task": TASK, "method": "nested", "seed": 0} | options)


def run(folder: Path, changes=AUTO, tell=lambda news: None, **options):
    return carry_out(order(folder, changes=changes, **options), tell)


def lasting(summary):
    """Without what depends on the machine."""
    kept = lasting_of_a_run(summary)
    return kept | {"auto": {k: v for k, v in summary["auto"].items() if k != "wall_s"}}


def trials(folder: Path) -> dict[str, int]:
    """When each finished trial was finished."""
    return {
        path.parent.relative_to(folder).as_posix(): path.stat().st_mtime_ns
        for path in folder.glob(f"auto/*/*/{RESULT}")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and all that it told."""
    folder, told = tmp_path_factory.mktemp("whole") / "run", []
    summary = run(folder, tell=told.append)
    return folder, summary, told


def test_the_better_half_is_tried_for_longer_and_the_best_is_run(whole):
    folder, summary, _ = whole
    auto = summary["auto"]
    tried = [c for c in auto["candidates"] if c["rungs"]]
    assert [c["settings"]["training.criterion"] for c in tried] == [
        "taylor", "magnitude", "wanda", "fisher",
    ]  # fmt: skip
    for candidate in tried:
        for rung in candidate["rungs"]:
            mean = np.mean(list(rung["classes"].values()))
            assert rung["accuracy"] == pytest.approx(mean, abs=1e-6)
    first = [c["rungs"][0]["accuracy"] for c in tried]
    again = [c for c in tried if len(c["rungs"]) == 2]
    best_two = sorted(range(4), key=lambda i: -first[i])[:2]  # ties go to the first
    assert [tried.index(c) for c in again] == sorted(best_two)
    (chosen,) = [c for c in tried if c["outcome"] == "chosen"]
    assert chosen["rungs"][1]["accuracy"] == max(c["rungs"][1]["accuracy"] for c in again)
    assert [r["rounds"] for r in chosen["rungs"]] == [2, 4]
    assert (auto["rounds"], auto["samples"], auto["left_out"]) == (4 * 2 + 2 * 4, 60, 10)
    assert auto["chosen"] == chosen["settings"]
    for key, value in auto["chosen"].items():
        table, _, name = key.partition(".")
        assert summary["settings"][table][name] == value
    assert summary["rounds"] == 10
    assert json.loads((folder / "summary.json").read_text())["auto"] == auto


def test_what_cannot_be_tried_is_told_with_the_reason(whole):
    refused = {
        " ".join(c["settings"].values()): c["reason"]
        for c in whole[1]["auto"]["candidates"]
        if c["outcome"] == "refused"
    }
    assert set(refused) == {"hybrid", "weight", "gamma"}
    assert refused["gamma"] == "gamma: no norm layer scales any unit; choose magnitude"
    assert refused["hybrid"].startswith("pruning.granularity hybrid prunes weights down to flash")


def test_progress_counts_the_rounds_of_trying(whole):
    _, _, told = whole
    assert {news.total for news in told} == {16 + 10 + 1}
    done = [news.done for news in told]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 27)
    notes = list(dict.fromkeys(news.note for news in told))
    assert notes[0] == "trying channel taylor (1 of 4, 2 rounds)"
    assert sum(note.endswith("(2 of 2, 4 rounds)") for note in notes) == 1


def test_little_is_left_of_a_trial(whole):
    folder, _, _ = whole
    assert len(trials(folder)) == 6
    kept = {p.name for p in (folder / "auto").rglob("*") if p.is_file()}
    assert kept == {"run.json", RESULT}


def test_the_run_itself_is_the_one_with_the_chosen_settings(whole, tmp_path):
    _, summary, _ = whole
    told = {k: v for k, v in AUTO.items() if v != "auto"} | summary["auto"]["chosen"]
    plain = run(tmp_path / "run", told)
    assert plain["auto"] is None
    assert plain | {"auto": 0} == summary | {
        "auto": 0,
        **{k: plain[k] for k in ("wall_s", "client_rounds_per_s", "classes")},
    }
    for name, entry in plain["classes"].items():
        assert entry["artifact"]["sha256"] == summary["classes"][name]["artifact"]["sha256"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("told", [1, 9, 24])
def test_a_run_stopped_anywhere_ends_as_if_it_had_not_been(whole, tmp_path, told):
    folder, seen, left = tmp_path / "run", [], told

    def stop(news):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    with pytest.raises(Killed):
        run(folder, tell=stop)
    before = trials(folder)
    with pytest.raises(ConfigError, match=r"holds this run already: add --resume to go on"):
        run(folder)
    resumed = run(folder, tell=seen.append, resume=True)
    assert lasting(resumed) == lasting(whole[1])
    assert before.items() <= trials(folder).items()  # nothing was done twice
    assert len(before) > 0 or told < 3


def test_a_run_killed_in_a_trial_ends_as_if_it_had_not_been(whole, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "fleetprune", "simulate", "--task", TASK, "--out", folder]
    for key, value in AUTO.items():
        command += ["--set", f"{key}={value}"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 300
        while not (len(trials(folder)) >= 1 and list(folder.glob("auto/*/*/history.db"))):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = trials(folder)
    assert lasting(run(folder, resume=True)) == lasting(whole[1])
    assert before.items() <= trials(folder).items()


def scrambled() -> SimTask:
    """The tiny task with a test set whose labels say nothing."""

    def corpus(seed, cache):
        found = tiny_task.corpus(seed, cache)
        y = np.random.default_rng(1).permutation(found.y_test)
        assert (y != found.y_test).any()
        return replace(found, y_test=y)

    return replace(tiny_task.task(), load=corpus)


def test_the_test_set_has_no_say(whole, tmp_path):
    other = run(tmp_path / "run", task="tests.simulations.test_auto_choose:scrambled")
    auto, mine = lasting(other)["auto"], lasting(whole[1])["auto"]
    assert auto == mine
    for name, entry in other["classes"].items():
        assert entry["accuracy"] < whole[1]["classes"][name]["accuracy"] - 0.2


def test_a_finished_run_is_not_done_again(whole):
    folder, summary, _ = whole
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert run(folder, resume=True) == summary
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_another_budget_is_another_run(whole):
    folder, _, _ = whole
    with pytest.raises(ConfigError) as caught:
        run(folder, {**AUTO, "simulation.auto_rounds": 2.0}, resume=True)
    assert str(caught.value) == (
        f"{folder} holds another run (config.simulation.auto_rounds 1.8 instead of 2.0): "
        "give this one another --out"
    )


def test_where_one_candidate_is_left_nothing_is_tried(tmp_path):
    told = {"pruning.granularity": "auto", "training.rounds": 1}
    auto = run(tmp_path / "run", told)["auto"]
    assert (auto["chosen"], auto["rounds"]) == ({"pruning.granularity": "channel"}, 0)
    assert [c["outcome"] for c in auto["candidates"]] == ["chosen", "refused", "refused"]
    assert not (tmp_path / "run" / "auto").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"simulation.auto_rounds": 0.1},
            ConfigError,
            r"^simulation\.auto_rounds 0\.1 of 10 rounds is 1: two candidates need 4, raise it to "
            r"0\.4 or more$",
        ),
        (
            {"classes.small.macs_share": 0.001},
            ConfigError,
            r"nothing can be chosen; channel: class small: macs \d+ cannot be met, the smallest",
        ),
        ({"training.remask_every": 0}, ConfigError, r'^training\.criterion "auto": masks never'),
    ],
)
def test_what_cannot_be_found_out_leaves_the_folder_free(tmp_path, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        run(tmp_path / "run", {**AUTO, **changes})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_where_no_candidate_trains_the_reason_is_told(tmp_path):
    silent = {f"simulation.classes.{name}.drop_out": 1.0 for name in ("large", "small")}
    with pytest.raises(TransportError) as caught:
        run(tmp_path / "run", {**AUTO, **silent})
    assert str(caught.value).startswith(
        "none of 4 candidates could be trained; channel-taylor: round 1: no device has trained in "
        "3 tries; of the 4 tasks of the last one, 4 fell silent: "
    )


def test_a_candidate_that_cannot_be_trained_is_told_of_and_loses(tmp_path):
    """At such a rate scores of gradients are not finite, and with them no device trains."""
    wanted = assemble(None, TASK, "nested", 0, {**AUTO, "training.learning_rate": 1e9})
    auto = choose(wanted, tmp_path, lambda done, of, note: None, {}).tried
    assert auto is not None
    outcomes = {c["settings"]["training.criterion"]: c for c in auto["candidates"][:4]}
    assert outcomes["taylor"]["outcome"] == outcomes["fisher"]["outcome"] == "failed"
    assert "no device has trained in 3 tries" in outcomes["taylor"]["reason"]
    assert outcomes["taylor"]["rungs"] == []
    assert auto["chosen"]["training.criterion"] in ("magnitude", "wanda")


def trial(folder: Path, changes):
    wanted = assemble(None, TASK, "nested", 0, {"training.rounds": 2, **changes})
    return run_trial(wanted, folder, lambda number: None, {})


def test_a_trial_that_is_refused_says_why_and_is_not_asked_again(tmp_path):
    found = trial(tmp_path, {"classes.small.macs_share": 0.001})
    assert found.score == -1
    assert found.failed.startswith("class small: macs 1 cannot be met, the smallest achievable is")
    assert trial(tmp_path, {"classes.small.macs_share": 0.001}) == found
    with pytest.raises(BudgetError):
        run(tmp_path / "run", {"classes.small.macs_share": 0.001})


def test_what_a_kill_has_left_of_a_finished_trial_is_cleared(tmp_path):
    found = trial(tmp_path, {})
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "registry.db").touch()
    assert trial(tmp_path, {}) == found
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", RESULT]


def test_all_may_be_found_out_where_the_model_comes_trained(tmp_path):
    told = {"training.first_criterion": "auto", "simulation.auto_rounds": 1.8}
    auto = run(tmp_path / "all" / "run", {**AUTO, **told}, warm_rounds=2)["auto"]
    assert auto["asked"] == [
        "pruning.granularity", "training.first_criterion", "training.criterion",
    ]  # fmt: skip
    tried = [list(c["settings"].values()) for c in auto["candidates"] if c["rungs"]]
    assert tried == [
        ["channel", "reconstruction", "taylor"],
        ["channel", "reconstruction", "magnitude"],
        ["channel", "taylor", "taylor"],
        ["channel", "reconstruction", "wanda"],
    ]


def test_a_damaged_result_is_made_anew(tmp_path):
    found = trial(tmp_path / "trial", {})
    (tmp_path / "trial" / RESULT).write_text("{")
    with pytest.raises(ConfigError, match=r"trial\.json cannot be read \(.+\): --resume makes it"):
        trial(tmp_path / "trial", {})
    assert trial(tmp_path / "trial", {}).classes == found.classes


def test_scores_are_means_over_classes():
    assert Result({"a": 0.5, "b": 0.75, "c": 1.0}).score == 0.75
    # Both are 43 of 60 right; float32 has them as two numbers.
    one, other = np.float32(44 / 60) + np.float32(42 / 60), 2 * np.float32(43 / 60)
    assert Result({"a": float(one)}).score == Result({"a": float(other)}).score


def test_a_short_training_keeps_all_proportions():
    told = {
        "training.rounds": 40,
        "training.remask_every": 5,
        "training.last_remask": 30,
        "schedule.begin": 4,
        "schedule.end": 20,
        "schedule.frequency": 4,
        "schedule.window": 3,
    }
    config = assemble(None, TASK, "nested", 0, told).config
    assert shortened(config, 10) == {
        "training.rounds": 10,
        "training.remask_every": 1,
        "training.last_remask": 8,
        "training.calibration_passes": 0,
        "schedule.begin": 1,
        "schedule.end": 5,
        "schedule.frequency": 1,
        "schedule.window": 1,
        "simulation.evaluate_every": 0,
    }
    told = {"training.rounds": 40, "training.remask_every": 0, "training.fixed_statistics": 0.5}
    short = shortened(assemble(None, TASK, "nested", 0, told).config, 20)
    assert short["training.remask_every"] == 0
    assert "training.calibration_passes" not in short  # devices need the statistics half-way


def test_a_file_that_says_auto_and_json(tmp_path):
    (tmp_path / "fleet.toml").write_text(FLEET)
    options = ["--out", str(tmp_path / "out"), "--json", "--rounds", "4", "--seed", "0-1"]
    options += ["--set", "training.remask_every=1", "--set", "simulation.auto_rounds=4"]
    done = CliRunner().invoke(app, [str(tmp_path / "fleet.toml"), *options])
    assert done.exception is None, done.exception
    runs = json.loads(done.stdout)
    assert [set(r["auto"]["chosen"]) for r in runs] == 2 * [
        {"pruning.granularity", "training.criterion"}
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What was tried" in page
    assert "nested (" not in page  # one method, whatever its seeds have chosen
