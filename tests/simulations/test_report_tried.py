"""What was tried before the runs, in the report: made-up accuracies that one can check."""

import io
import json

import pytest
from rich.console import Console

from fleetprune.errors import DataError
from fleetprune_sim.report.comparison import compare
from fleetprune_sim.report.console import print_tried
from fleetprune_sim.report.finding import find_runs
from fleetprune_sim.report.page import write_report
from fleetprune_sim.report.sections import sections
from fleetprune_sim.report.tried import candidates, lead, tried, uncertainty
from fleetprune_sim.report.tried_grid import what_was_tried
from fleetprune_sim.report.variants import group
from tests.simulations.report_runs import Synthetic

KEYS = ("pruning.granularity", "training.criterion")
ONCE = {"taylor": (0.5,), "wanda": (0.75, 0.9), "fisher": (0.7, 0.8), "snip": (0.6,)}
"""Accuracies after 2 rounds, and of the best two after 4."""


def auto(chosen="wanda", accuracies=ONCE, samples=100):
    def entry(name, reached):
        return {
            "settings": dict(zip(KEYS, ("channel", name), strict=True)),
            "outcome": "chosen" if name == chosen else "dropped",
            "reason": None,
            "rungs": [
                {"rounds": 2 * (i + 1), "accuracy": a, "classes": {"hub": a + 0.05, "phone": a}}
                for i, a in enumerate(reached)
            ],
        }

    entries = [entry(name, reached) for name, reached in accuracies.items()]
    entries.append(
        {"settings": {KEYS[0]: "hybrid"}, "outcome": "refused", "reason": "no bytes", "rungs": []}
    )
    return {
        "asked": list(KEYS),
        "chosen": dict(zip(KEYS, ("channel", chosen), strict=True)),
        "rounds": 16,
        "wall_s": 1.0,
        "samples": samples,
        "candidates": entries,
        "left_out": 2,
        "next": [dict(zip(KEYS, ("channel", "l1"), strict=True))],
    }


def write(root, seed=0, found=None, criterion="wanda", method="nested"):
    settings = {"training": {"criterion": criterion}, "pruning": {"granularity": "channel"}}
    run = Synthetic(method=method, seed=seed, settings=settings)
    folder = run.write(root / f"{method}-{criterion}-{seed}-{found is not None}")
    if found is not None:
        summary = {**run.summary(), "auto": found}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def compared(root):
    ((task, variants),) = group(find_runs([root]).runs).items()
    return compare(task, variants)


@pytest.fixture
def one(tmp_path):
    write(tmp_path, found=auto())
    return compared(tmp_path)


def test_the_chosen_one_is_first_and_the_refused_last(one):
    (row,) = one.rows
    assert [c.name for c in candidates(row)] == [
        "channel wanda", "channel fisher", "channel snip", "channel taylor", "hybrid",
    ]  # fmt: skip


def test_a_table_of_candidates_rung_by_rung(one):
    (grid,) = what_was_tried(one)
    assert grid.head == ["granularity", "criterion", "after 2 (%)", "after 4 (%)", "outcome"]
    assert grid.groups == [
        (
            "",
            [
                ["channel", "wanda", "75.0", "90.0", "chosen"],
                ["channel", "fisher", "70.0", "80.0", "dropped after 4"],
                ["channel", "snip", "60.0", "", "dropped after 2"],
                ["channel", "taylor", "50.0", "", "dropped after 2"],
                ["hybrid", "any", "", "", "refused: no bytes"],
            ],
        )
    ]
    # 0.9 * 0.1 / 100 is 0.03 squared; two such errors are 4.2 points, twice that is 8.5.
    assert uncertainty(0.9, 100) == pytest.approx(0.03)
    assert grid.says == (
        "pruning.granularity and training.criterion: 4 candidates in 16 rounds, 4.0 times those of "
        "the run; the columns say after how many rounds of a training of their own. The mean over "
        "classes of accuracy on 100 samples of the validation set decided; nobody looked at the "
        "test set. In the last trial the chosen one is 10.0 points ahead of channel fisher. So few "
        "samples leave an accuracy uncertain by 3.0 points: that is more than chance. One seed has "
        "decided; another may choose otherwise. There were no rounds for 2 more, first of all "
        "channel l1: for these, raise simulation.auto_rounds."
    )


def test_a_narrow_lead_may_be_chance(tmp_path):
    write(tmp_path, found=auto(accuracies={**ONCE, "fisher": (0.7, 0.82)}))
    (grid,) = what_was_tried(compared(tmp_path))
    assert "8.0 points ahead" in grid.says
    assert "uncertain by 3.0 points: that may be chance." in grid.says


def test_a_line_per_candidate_trial_and_class_for_scripts(one):
    table = tried(one)
    assert table.columns == (
        "task", "method", "variant", "seed", *KEYS, "outcome", "reason", "rounds", "class",
        "accuracy",
    )  # fmt: skip
    wanda = table.where("training.criterion", "wanda").rows
    assert [row[-3:] for row in wanda] == [
        (2, None, 0.75), (2, "hub", 0.8), (2, "phone", 0.75),
        (4, None, 0.9), (4, "hub", 0.95), (4, "phone", 0.9),
    ]  # fmt: skip
    (hybrid,) = table.where("pruning.granularity", "hybrid").rows
    assert hybrid[-6:] == (None, "refused", "no bytes", None, None, None)


def test_seeds_that_choose_differently_are_one_variant(tmp_path):
    write(tmp_path, 0, auto())
    other = {**ONCE, "fisher": (0.8, 0.9), "wanda": (0.65, 0.8)}
    write(tmp_path, 1, auto("fisher", other), "fisher")
    comparison = compared(tmp_path)
    (row,) = comparison.rows
    assert row.variant.seeds == (0, 1)
    assert row.variant.settings["settings.training.criterion"] == '"auto"'
    assert row.variant.settings["settings.pruning.granularity"] == '"channel"'
    (grid,) = what_was_tried(comparison)
    lines = grid.groups[0][1]
    # The mean of 75 and 65, and their sample deviation: 10 / sqrt(2).
    assert lines[0] == ["channel", "wanda", "70.0 ± 7.1", "85.0 ± 7.1", "chosen by 1 of 2 seeds"]
    assert lines[1] == ["channel", "fisher", "75.0 ± 7.1", "85.0 ± 7.1", "chosen by 1 of 2 seeds"]
    assert (
        "The seeds do not agree (channel wanda in 1 and channel fisher in 1), so none of these is "
        "clearly the best. In the last trial the chosen one is 10.0 points ahead in the mean"
    ) in grid.says


def test_seeds_that_agree_say_so(tmp_path):
    for seed in range(3):
        write(tmp_path, seed, auto())
    (grid,) = what_was_tried(compared(tmp_path))
    assert "All 3 seeds chose channel wanda." in grid.says
    assert grid.groups[0][1][0][-1] == "chosen by 3 of 3 seeds"


def test_a_run_that_was_told_is_another_variant(tmp_path):
    write(tmp_path, 0, auto())
    write(tmp_path, 0)
    comparison = compared(tmp_path)
    names = "pruning.granularity, training.criterion"
    assert sorted(row.variant.label for row in comparison.rows) == [
        "nested (auto=-)",
        f"nested (auto={names})",
    ]
    (grid,) = what_was_tried(comparison)
    assert grid.title == f"Candidates, nested (auto={names})"


def test_the_same_run_twice_is_refused_also_where_it_has_chosen(tmp_path):
    write(tmp_path, 0, auto())
    write(tmp_path / "again", 0, auto("fisher"), "fisher")
    with pytest.raises(DataError, match=r"are both fashion, nested, seed 0 with the same settings"):
        compared(tmp_path)


def test_where_nothing_was_tried_there_is_no_table(tmp_path):
    write(tmp_path, 0)
    comparison = compared(tmp_path)
    assert what_was_tried(comparison) == []
    (section,) = [s for s in sections(comparison) if s.title == "What was tried"]
    assert section.blocks == []
    told = io.StringIO()
    print_tried(Console(file=told), comparison)
    assert told.getvalue() == ""


def test_one_possible_value_needs_no_trial(tmp_path):
    found = auto(accuracies={"wanda": ()})
    write(tmp_path, 0, {**found, "rounds": 0, "left_out": 0})
    comparison = compared(tmp_path)
    (grid,) = what_was_tried(comparison)
    assert grid.says == (
        "pruning.granularity and training.criterion: only one value makes sense for this fleet, so "
        "nothing was tried."
    )
    assert grid.groups[0][1][0] == ["channel", "wanda", "chosen"]
    assert lead(comparison.rows[0].variant.runs[0].summary.auto) is None


def test_a_page_and_a_terminal_show_it(tmp_path, one):
    write_report(tmp_path / "report.html", [one.rows[0].variant.runs[0]], "x")
    page = (tmp_path / "report.html").read_text()
    assert '<h2 class="section">What was tried</h2>' in page
    assert "refused: no bytes" in page
    told = io.StringIO()
    print_tried(Console(file=told, width=80), one)
    lines = [" ".join(line.split()) for line in told.getvalue().splitlines()]
    assert "channel wanda 75.0 90.0 chosen" in lines
    assert "channel taylor 50.0 dropped after 2" in lines
    assert "hybrid refused: no bytes" in lines
