"""What corruptions cost, in the report: sums that can be checked in the head, and a real run."""

import json
from pathlib import Path

import pytest
import torch

from fleetprune_sim import summary
from fleetprune_sim.corruptions import CORRUPTIONS
from fleetprune_sim.evaluate import score
from fleetprune_sim.models import mlp
from fleetprune_sim.report.as_json import comparisons_json
from fleetprune_sim.report.comparison import compare
from fleetprune_sim.report.figures import Spread
from fleetprune_sim.report.finding import find_runs
from fleetprune_sim.report.page import write_report
from fleetprune_sim.report.robustness import Stand, before_cut, of_class, robustness
from fleetprune_sim.report.robustness_finding import differences, finding
from fleetprune_sim.report.robustness_grid import MEANINGS, under_corruptions
from fleetprune_sim.report.sections import sections
from fleetprune_sim.report.variants import group
from fleetprune_sim.report.words import lost
from fleetprune_sim.study import CHECKPOINT, Order, carry_out
from tests.simulations.report_runs import SHARES, Synthetic, write_fleet
from tests.simulations.tiny_task import INPUTS, LABELS, corpus

TASK = "tests.simulations.tiny_task:task"


def compared(root):
    ((task, variants),) = group(find_runs([root]).runs).items()
    return compare(task, variants)


def flat(noise: float, bias: float = 0.05) -> dict[str, dict[str, float]]:
    """The same losses for all classes."""
    return {name: {"noise": noise, "bias": bias} for name in SHARES}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    return compared(write_fleet(tmp_path_factory.mktemp("fleet")))


def test_losses_are_taken_seed_by_seed():
    stand = Stand({0: {"clean": 0.75, "noise": 0.5}, 1: {"noise": 0.5}, 2: {"clean": 0.5}})
    assert stand.accuracy("noise") == {0: 0.5, 1: 0.5, 2: None}
    assert stand.lost("noise") == {0: 0.25, 1: None, 2: None}
    assert stand.corruptions == ["clean", "noise"]


@pytest.mark.parametrize(
    ("spread", "text"),
    [
        (Spread(0.062, 0.004, 3), "6.2 ± 0.4"),
        (Spread(-0.012, None, 1), "−1.2"),
        (Spread(-0.0001, None, 1), "0.0"),
        (None, "–"),
    ],
)
def test_points_that_are_lost(spread, text):
    assert lost(spread) == text


def test_the_table_has_clean_accuracy_and_what_each_corruption_leaves_and_costs(fleet):
    (grid,) = under_corruptions(fleet)
    assert grid.head == ["method", "clean (%)", "noise (%)", "bias (%)"]
    assert [title for title, _ in grid.groups] == list(SHARES)
    # Accuracy moves a point from seed to seed, what is lost does not.
    assert grid.groups[3][1] == [
        ["nested", "77.0 ± 1.0", "61.0 ± 1.0 (16.0 ± 0.0)", "72.0 ± 1.0 (5.0 ± 0.0)"],
        ["exclude", "no model", "–", "–"],
        ["dense", "81.0 ± 1.0", "65.0 ± 1.0 (16.0 ± 0.0)", "76.0 ± 1.0 (5.0 ± 0.0)"],
        ["sparse", "72.0 ± 1.0", "56.0 ± 1.0 (16.0 ± 0.0)", "67.0 ± 1.0 (5.0 ± 0.0)"],
    ]
    assert grid.says.endswith(
        " Means ± sample standard deviations over 3 seeds. In brackets: points lost. All on the "
        "same samples, up to 2,000 of the test set; clean: as they are. Noise: Gaussian noise of "
        "0.5 standard deviations of the channel. Bias: 0.5 standard deviations added to one "
        "channel of each sample."
    )
    assert MEANINGS.keys() == CORRUPTIONS.keys()


def test_it_stands_behind_accuracy_against_cost(fleet):
    titles = [section.title for section in sections(fleet)]
    assert titles[1:3] == ["Accuracy against cost", "Under corruptions"]


def test_rows_for_scripts(fleet):
    table = robustness(fleet)
    records = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    # Three methods with four classes, one with two; clean and two corruptions.
    assert len(records) == (3 * 4 + 2) * 3
    (found,) = [
        r for r in records
        if (r["variant"], r["class"], r["corruption"]) == ("nested", "watch", "noise")
    ]  # fmt: skip
    assert found == {
        "task": "fashion", "method": "nested", "variant": "nested", "model": "shipped",
        "class": "watch", "corruption": "noise", "seeds": 3, "accuracy_mean": 0.64,
        "accuracy_sd": 0.01, "lost_mean": 0.14, "lost_sd": 0.0,
    }  # fmt: skip


def test_json(fleet):
    (task,) = comparisons_json([fleet], [])["tasks"]
    nested = task["variants"][0]
    assert nested["before"] is None
    assert nested["classes"]["watch"]["robustness"]["noise"] == {
        "accuracy": {"mean": 0.64, "sd": 0.01, "n": 3},
        "lost": {"mean": 0.14, "sd": 0.0, "n": 3},
    }
    assert list(nested["classes"]["watch"]["robustness"]) == ["clean", "noise", "bias"]
    assert task["variants"][1]["classes"]["watch"]["robustness"] == {}


def test_summaries_that_do_not_tell_show_nothing(tmp_path):
    for seed in (0, 1):
        Synthetic(seed=seed, robust=False).write(tmp_path / str(seed))
    comparison = compared(tmp_path)
    assert under_corruptions(comparison) == []
    (task,) = comparisons_json([comparison], [])["tasks"]
    assert task["variants"][0]["before"] is None
    assert [c["robustness"] for c in task["variants"][0]["classes"].values()] == 4 * [{}]
    write_report(tmp_path / "report.html", find_runs([tmp_path]).runs, "x")
    assert "Under corruptions" not in (tmp_path / "report.html").read_text()


def test_of_runs_of_which_some_tell_these_are_shown(tmp_path):
    for seed in (0, 1, 2):
        Synthetic(seed=seed, robust=seed > 0).write(tmp_path / f"n{seed}")
    Synthetic(method="dense", robust=False).write(tmp_path / "d")
    comparison = compared(tmp_path)
    (grid,) = under_corruptions(comparison)
    assert set(robustness(comparison).column("seeds")) == {2}
    assert ["dense", "–", "–", "–"] in grid.groups[0][1]


def test_narrower_classes_are_compared_with_the_widest(fleet):
    # Two, four and six points more under noise, in every seed; under bias none.
    assert finding(fleet) == (
        "nested loses most under noise: hub 10.0 ± 0.0, phone 12.0 ± 0.0, watch 14.0 ± 0.0 and "
        "sensor 16.0 ± 0.0 points. Compared with its widest model (hub), nested clearly loses "
        "more under noise: sensor 6.0 ± 0.0, watch 4.0 ± 0.0 and phone 2.0 ± 0.0 points. "
        "Of 6 differences 3 are clear; chance alone makes about 1.1 look so."
    )


def test_what_was_cut_is_shown_once_and_compared_with(tmp_path):
    root = write_fleet(tmp_path, before=0.85)
    comparison = compared(root)
    (grid,) = under_corruptions(comparison)
    assert grid.groups[0] == (
        "before the cut",
        [["all", "85.0 ± 0.0", "77.0 ± 0.0 (8.0 ± 0.0)", "81.0 ± 0.0 (4.0 ± 0.0)"]],
    )
    said = finding(comparison)
    # Under noise the uncut model loses 8 points, nested 10 to 16.
    assert "Compared with the model before the cut, nested clearly loses more under noise: " in said
    assert "sensor 8.0 ± 0.0, watch 6.0 ± 0.0, phone 4.0 ± 0.0 and hub 2.0 ± 0.0 points." in said
    assert said.endswith("Of 8 differences 8 are clear; chance alone makes about 1.5 look so.")
    (task,) = comparisons_json([comparison], [])["tasks"]
    assert task["variants"][0]["before"]["accuracy"] == {"mean": 0.85, "sd": 0.0, "n": 3}
    assert task["variants"][0]["before"]["robustness"]["bias"]["lost"]["mean"] == 0.04
    rows = [row for row in robustness(comparison).rows if row[3] == "before the cut"]
    assert len(rows) == 4 * 3
    assert {row[4] for row in rows} == {None}


def test_methods_that_have_cut_different_models_are_named(tmp_path):
    for method, level, before in (("nested", 0.8, 0.9), ("fjord", 0.7, 0.9), ("small", 0.6, 0.8)):
        Synthetic(method=method, level=level, before=before).write(tmp_path / method)
    Synthetic(method="dense", level=0.5).write(tmp_path / "dense")
    (grid,) = under_corruptions(compared(tmp_path))
    assert [row[:2] for row in grid.groups[0][1]] == [
        ["nested and fjord", "90.0"],
        ["small", "80.0"],
    ]


def test_of_a_new_head_there_is_nothing_to_compare_with(tmp_path):
    for seed in range(3):
        Synthetic(seed=seed, new_head="fc").write(tmp_path / f"n{seed}")
    comparison = compared(tmp_path)
    (grid,) = under_corruptions(comparison)
    ((_, rows),) = grid.groups
    assert rows[0] == ["before the cut", "new head: nothing to compare with", "–", "–"]
    assert rows[1][0] == "hub"
    assert finding(comparison) == (
        "nested loses most under noise: hub 10.0 ± 0.0, phone 12.0 ± 0.0, watch 14.0 ± 0.0 and "
        "sensor 16.0 ± 0.0 points. New head: nothing to compare with before the cut. Compared "
        "with its widest model (hub), nested clearly loses more under noise: sensor 6.0 ± 0.0, "
        "watch 4.0 ± 0.0 and phone 2.0 ± 0.0 points. Of 6 differences 3 are clear; chance alone "
        "makes about 1.1 look so."
    )
    (task,) = comparisons_json([comparison], [])["tasks"]
    assert (task["variants"][0]["before"], task["variants"][0]["new_head"]) == (None, "fc")
    assert "before the cut" not in robustness(comparison).column("model")


def test_new_heads_stand_behind_models_that_could_be_judged(tmp_path):
    Synthetic(before=0.9).write(tmp_path / "nested")
    Synthetic(method="small", level=0.6, new_head="fc").write(tmp_path / "small")
    Synthetic(method="dense", level=0.5).write(tmp_path / "dense")
    comparison = compared(tmp_path)
    (grid,) = under_corruptions(comparison)
    assert [row[:2] for row in grid.groups[0][1]] == [
        ["nested", "90.0"],
        ["small", "new head: nothing to compare with"],
    ]
    assert "New head" not in finding(comparison)  # of the best method, which has none


def test_a_single_method_has_a_row_per_class(tmp_path):
    Synthetic(before=0.85).write(tmp_path / "run")
    (grid,) = under_corruptions(compared(tmp_path))
    assert grid.head[0] == "class"
    ((_, rows),) = grid.groups
    assert [row[0] for row in rows] == ["before the cut", *SHARES]
    assert rows[1] == ["hub", "80.0", "70.0 (10.0)", "75.0 (5.0)"]


def test_one_seed_does_not_say_what_is_chance(tmp_path):
    Synthetic().write(tmp_path / "run")
    (grid,) = under_corruptions(compared(tmp_path))
    assert grid.says.startswith(
        "nested loses most under noise: hub 10.0, phone 12.0, watch 14.0 and sensor 16.0 points. "
        "Compared with its widest model (hub), nested loses more under noise: sensor 6.0, "
        "watch 4.0 and phone 2.0 points. Of 6 differences 3 are a point or more. "
        "One seed: nothing here says how much is chance. "
    )


def test_as_much_as_chance_makes_only_seems_so(tmp_path):
    # Sensor loses 2, 3 and 4 points more under noise; phone once more, once less.
    for seed, (sensor, phone) in enumerate(((0.12, 0.13), (0.13, 0.07), (0.14, 0.10))):
        cost = flat(0.10) | {"sensor": {"noise": sensor}, "phone": {"noise": phone}}
        Synthetic(seed=seed, lost=cost).write(tmp_path / str(seed))
    assert finding(compared(tmp_path)).endswith(
        "Compared with its widest model (hub), nested seems to lose more under noise: "
        "sensor 3.0 ± 1.0 points. But of 6 differences 1 is clear, and chance alone makes about "
        "1.1 look so."
    )


def test_what_is_within_the_spread_is_not_called_a_loss(tmp_path):
    for seed, noise in enumerate((0.16, 0.07, 0.10)):
        Synthetic(seed=seed, lost=flat(0.10) | {"watch": {"noise": noise}}).write(
            tmp_path / str(seed)
        )
    assert finding(compared(tmp_path)).endswith(
        "Compared with its widest model (hub), nested does not clearly lose more: at most "
        "watch 1.0 ± 4.6 points under noise."
    )


def test_a_model_that_loses_less_is_said_too(tmp_path):
    for seed in range(3):
        cost = flat(0.10) | {"watch": {"noise": 0.07, "bias": 0.06}}
        Synthetic(seed=seed, lost=cost).write(tmp_path / str(seed))
    assert finding(compared(tmp_path)).endswith(
        "nested seems to lose more under bias: watch 1.0 ± 0.0 points; less under noise: "
        "watch 3.0 ± 0.0 points. But of 6 differences 2 are clear, and chance alone makes about "
        "1.1 look so."
    )


def test_one_model_for_all_is_compared_once_and_with_the_widest_of_others(tmp_path):
    for seed in range(3):
        Synthetic(
            method="small", seed=seed, models=dict.fromkeys(SHARES, "sensor"), lost=flat(0.2),
            levels=dict.fromkeys(SHARES, 0.7),
        ).write(tmp_path / f"s{seed}")  # fmt: skip
    assert finding(compared(tmp_path)) == (
        "small loses most under noise: every class 20.0 ± 0.0 points."
    )
    for seed in range(3):
        models = dict.fromkeys(SHARES, "hub")
        Synthetic(method="dense", seed=seed, models=models, lost=flat(0.15)).write(
            tmp_path / f"d{seed}"
        )
    assert finding(compared(tmp_path)).endswith(
        "Compared with dense's widest model (hub), small clearly loses more under noise: "
        "every class 5.0 ± 0.0 points. Of 2 differences 1 is clear; chance alone makes about "
        "0.37 look so."
    )


def test_seeds_that_are_not_common_are_compared_by_their_means():
    mine = Stand({0: {"clean": 0.9, "noise": 0.7}, 1: {"clean": 0.9, "noise": 0.68}})
    theirs = Stand({2: {"clean": 0.9, "noise": 0.8}, 3: {"clean": 0.9, "noise": 0.8}})
    (found,) = differences({"watch": mine}, theirs, ["noise"])
    assert found.more == Spread(pytest.approx(0.11), None, 1)
    assert found.clear
    assert found.chance == pytest.approx(0.184, abs=1e-3)  # two degrees of freedom
    assert differences({"watch": mine}, Stand({}), ["noise"]) == []


def test_corruptions_that_cost_nothing(tmp_path):
    Synthetic(lost=flat(0.0, bias=-0.01)).write(tmp_path / "run")
    assert finding(compared(tmp_path)).startswith("No corruption costs nested accuracy.")


def test_a_real_run_with_a_new_head_judges_nothing_before_the_cut(tmp_path):
    start = mlp(inputs=INPUTS, hidden=16, classes=LABELS).state_dict()
    other = mlp(inputs=INPUTS, hidden=16, classes=LABELS + 1).state_dict()
    found = {}
    for name, state in (("kept", start), ("new", other)):
        torch.save(state, tmp_path / f"{name}.pt")
        changes = {
            "training.rounds": 1,
            "simulation.evaluate_every": 0,
            "model.initial": str(tmp_path / f"{name}.pt"),
            "model.head": "2",
        }
        run = Order(tmp_path / name, None, TASK, "nested", seed=0, changes=changes)
        found[name] = carry_out(run, lambda news: None)
    assert found["kept"]["new_head"] is None
    assert found["kept"]["before"]["accuracy"] > 0
    assert (found["new"]["new_head"], found["new"]["before"]) == ("2", None)
    (run,) = find_runs([tmp_path / "new"]).runs
    assert (run.summary.new_head, run.summary.before) == ("2", None)


def test_a_real_run_is_judged_before_the_cut_and_after(tmp_path, monkeypatch):
    judged = []
    accuracy = summary.accuracy

    def counted(onnx, x, y):
        judged.append(onnx)
        return accuracy(onnx, x, y)

    monkeypatch.setattr(summary, "accuracy", counted)
    for method, models in (("nested", 2), ("small", 1)):
        run = Order(
            tmp_path / method, None, TASK, method, seed=0, changes={"training.rounds": 1},
            warm_rounds=2,
        )  # fmt: skip
        judged.clear()
        found = carry_out(run, lambda news: None)
        after = [entry["robustness"] for entry in found["classes"].values()]
        assert [list(r) for r in after] == 2 * [["clean", "noise", "bias", "dropped"]]
        assert [r["clean"] for r in after] == [e["accuracy"] for e in found["classes"].values()]
        if method == "small":
            assert after[0] == after[1]
        # The warm-up's own model came before, where there was no warm-up yet.
        assert len(set(judged[-4 * models :])) == models
        assert len(judged) == 4 * (models + (method == "nested"))
    network = mlp(inputs=INPUTS, hidden=16, classes=LABELS)
    checkpoint = next(tmp_path.rglob(CHECKPOINT))
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    test = corpus(0, Path())
    alone = score(network, test.x_test, test.y_test).accuracy
    before = json.loads((tmp_path / "nested" / "summary.json").read_text())["before"]
    assert before == found["before"]
    assert before["accuracy"] == before["robustness"]["clean"] == alone
    comparison = compared(tmp_path)
    (grid,) = under_corruptions(comparison)
    assert grid.groups[0][0] == "before the cut"
    assert grid.groups[0][1][0][0] == "all"
    best = comparison.best
    assert of_class(best.cells["small"]).by_seed[0]
    assert before_cut(best).by_seed[0] == before["robustness"]
