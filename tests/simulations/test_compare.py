"""`fleetprune compare`: what it prints, writes and refuses."""

import csv
import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from fleetprune.cli import Options, run
from fleetprune.errors import DataError
from fleetprune_sim.report.comparison import compare
from fleetprune_sim.report.console import print_comparison
from fleetprune_sim.report.finding import find_runs
from fleetprune_sim.report.variants import group
from tests.simulations.report_runs import Synthetic, write_fleet


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_fleet(tmp_path_factory.mktemp("runs"))


def call(*words) -> int:
    return run(["compare", *map(str, words)], Options())


def said(capsys) -> str:
    return capsys.readouterr().out.replace("\u00a0", " ")


def lines(text: str) -> list[list[str]]:
    """Non-empty lines as words, without what ends a line."""
    return [line.split() for line in text.splitlines() if line.strip()]


def test_a_table_per_task_with_a_row_per_class_and_method(root, capsys):
    assert call(root) == 0
    table = lines(said(capsys))
    assert " ".join(table[0]) == ("fashion Means ± sample standard deviations over 3 seeds.")
    assert " ".join(table[1]) == "method n accuracy % own % MACs file upload fits to target"
    rows = [" ".join(row) for row in table[3:]]
    at = rows.index("watch 78.8 %")
    assert rows[at + 1 : at + 5] == [
        "nested 3 78.0 ± 1.0 78.5 ± 1.0 25 % 25 % 10.0 × yes 6.7 min (2/3)",
        "exclude 3 – – – – – none –",
        "dense 3 82.0 ± 1.0 82.5 ± 1.0 100 % 100 % 1.0 × 0/3 6.7 min",
        "sparse 3 73.0 ± 1.0 73.5 ± 1.0 100 % 100 % 5.0 × 0/3 never",
    ]
    at = rows.index("mean")
    assert rows[at + 1] == "nested 3 78.5 ± 1.0 79.0 ± 1.0 47 % 47 % 10.0 × 4/4"
    assert rows[at + 2] == "exclude 3 69.5 ± 1.0 70.0 ± 1.0 75 % 75 % 2.0 × 2/4"
    assert "not the same for all methods" in rows[-1]


def test_a_baseline_adds_points_and_says_over_how_many_pairs(root, capsys):
    assert call(root, "--baseline", "dense", "--target", "0.5") == 0
    text = said(capsys)
    rows = [" ".join(row) for row in lines(text)]
    assert "nested 3 80.0 ± 1.0 80.5 ± 1.0 −4.0 ± 0.0 100 % 100 % 10.0 × yes 5.0 min" in rows
    assert "Points: accuracy above dense's, paired by seed; 3 seeds. In the mean: over the" in text
    at = rows.index("mean")
    assert rows[at + 1] == "nested 3 78.5 ± 1.0 79.0 ± 1.0 −4.0 ± 0.0 47 % 47 % 10.0 × 4/4"
    # Two classes have nothing to be compared with: of the others the mean is 14 points lower.
    assert rows[at + 2] == "exclude 3 69.5 ± 1.0 70.0 ± 1.0 −14.0 ± 0.0 75 % 75 % 2.0 × 2/4"
    assert rows[at + 3] == "dense 3 82.5 ± 1.0 83.0 ± 1.0 – 100 % 100 % 1.0 × 1/4"
    assert "±: one sample standard deviation over the seeds." in text
    assert rows.count("hub 50.0 %") == 1


def test_tasks_are_kept_apart(tmp_path, capsys):
    for task in ("fashion", "har"):
        Synthetic(task=task).write(tmp_path / task)
    assert call(tmp_path) == 0
    titles = [line for line in said(capsys).splitlines() if "One seed" in line]
    assert titles == [
        f"{task}  One seed: nothing here says how much is chance." for task in ("fashion", "har")
    ]


def test_json(root, capsys):
    assert call(root, "--json", "--target", "0.5", "--baseline", "exclude") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["unfinished"]) == (1, [])
    (task,) = found["tasks"]
    assert (task["task"], task["baseline"], task["fleet_differs_in"]) == ("fashion", "exclude", [])
    assert task["targets"] == dict.fromkeys(("hub", "phone", "watch", "sensor"), 0.5)
    nested = task["variants"][0]
    assert (nested["label"], nested["seeds"], nested["settings"]) == ("nested", [0, 1, 2], {})
    assert nested["mean_over_classes"]["accuracy"] == {"mean": 0.785, "sd": 0.01, "n": 3}
    assert nested["mean_over_classes"]["delta"] == {"mean": 0.1, "sd": 0.0, "n": 3}
    phone = nested["classes"]["phone"]
    assert phone["accuracy"] == {"mean": 0.79, "sd": 0.01, "n": 3}
    assert phone["own_accuracy"] == {"mean": 0.795, "sd": 0.01, "n": 3}
    assert phone["delta"] == {"mean": 0.1, "sd": 0.0, "n": 3}
    assert phone["macs_share"]["mean"] == phone["bytes_share"]["mean"] == 0.5
    assert phone["up_factor"]["mean"] == 10.0
    assert phone["seconds_to_target"] == {"mean": 300.0, "sd": 0.0, "n": 3}
    assert (phone["runs"], phone["runs_within_budget"]) == (3, 3)
    assert nested["classes"]["watch"]["delta"] is None
    assert task["variants"][1]["mean_over_classes"]["classes"] == 2


def test_a_report_and_a_csv_file_are_written_and_named(tmp_path, capsys):
    for task in ("fashion", "har"):
        Synthetic(task=task).write(tmp_path / task)
    page, table = tmp_path / "report.html", tmp_path / "table.csv"
    assert call(tmp_path, "--out", page, "--csv", table) == 0
    assert said(capsys).splitlines()[-2:] == [f"Written: {table}", f"Written: {page}"]
    assert "<h1>Federated pruning of fashion and har</h1>" in page.read_text()
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [(r["task"], r["class"]) for r in rows] == [
        (task, c) for task in ("fashion", "har") for c in ("hub", "phone", "watch", "sensor")
    ]
    assert (rows[1]["accuracy_mean"], rows[1]["accuracy_sd"], rows[1]["accuracy_n"]) == (
        "0.79", "", "1",
    )  # fmt: skip


def test_unfinished_runs_are_named_and_left_out(tmp_path, capsys):
    Synthetic(seed=0).write(tmp_path / "done")
    going = Synthetic(seed=1).write(tmp_path / "going", finished=False)
    assert call(tmp_path, "--json") == 0
    output = capsys.readouterr()
    assert output.err == f"fleetprune: {going}: unfinished, left out\n"
    found = json.loads(output.out)
    assert found["unfinished"] == [str(going)]
    assert found["tasks"][0]["variants"][0]["seeds"] == [0]


def test_every_problem_is_a_line_and_nothing_is_compared(tmp_path, capsys):
    Synthetic().write(tmp_path / "good")
    bad = Synthetic().write(tmp_path / "bad")
    (bad / "summary.json").write_text('{"schema": 7}')
    assert call(tmp_path, tmp_path / "nowhere") == 2
    output = capsys.readouterr()
    assert output.out == ""
    first, second = output.err.splitlines()
    assert first.startswith(f"fleetprune: {bad}/summary.json: schema: input should be 1, got 7")
    assert second == f"fleetprune: {tmp_path}/nowhere: no such folder"


def test_without_a_finished_run_there_is_nothing_to_compare(tmp_path, capsys):
    going = Synthetic().write(tmp_path / "going", finished=False)
    with pytest.raises(DataError, match=r"^none of these runs is finished$"):
        call(tmp_path)
    assert capsys.readouterr().err == f"fleetprune: {going}: unfinished, left out\n"


def test_unwritable_files_and_unknown_baselines_are_refused(root, tmp_path):
    with pytest.raises(DataError, match=r"/no/table\.csv: cannot be written: No such file"):
        call(root, "--csv", tmp_path / "no" / "table.csv")
    with pytest.raises(DataError, match="baseline fjord is not among the runs of fashion"):
        call(root, "--baseline", "fjord")


def test_a_limit_on_latency_is_left_to_the_device(tmp_path, capsys):
    Synthetic(latency_ms=1.0).write(tmp_path / "run")
    assert call(tmp_path) == 0
    text = " ".join(said(capsys).split())
    assert "Fits: within budget, but for the latency of sensor: only the device can tell." in text
    assert "±" not in text  # a single seed has none


def test_fleets_that_differ_are_to_be_read_with_care(tmp_path, capsys):
    Synthetic().write(tmp_path / "a")
    Synthetic(method="dense", rounds=2).write(tmp_path / "b")
    assert call(tmp_path) == 0
    assert said(capsys).splitlines()[-1] == "Read with care: the runs differ in rounds."


@pytest.mark.parametrize(
    ("width", "headings"),
    [
        (100, "method n accuracy % own % points MACs file upload fits to target"),
        (80, "method accuracy % points MACs file upload fits to target"),
        (70, "method accuracy % points MACs upload fits to target"),
    ],
)
def test_a_narrow_terminal_gets_fewer_columns_and_whole_words(root, width, headings):
    ((task, variants),) = group(find_runs([root]).runs).items()
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=True, color_system=None)
    print_comparison(console, compare(task, variants, baseline="dense"))
    table = text.getvalue().replace("\u00a0", " ").splitlines()
    assert " ".join(table[2].split()) == headings
    assert max(map(len, table)) <= width
    assert not any("…" in line for line in table)


def test_a_missing_library_is_named(tmp_path):
    program = (
        "import sys; sys.modules['vl_convert'] = None\n"
        "from fleetprune.cli import main; sys.argv = ['fleetprune', 'compare', '.']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "fleetprune: `fleetprune compare` needs vl_convert, which is not installed: "
        "pip install 'fleetprune[sim]'\n"
    )


def test_comparing_needs_no_torch(root):
    program = (
        "import sys\n"
        "from fleetprune.cli import Options, run\n"
        f"run(['compare', {str(root)!r}, '--json'], Options())\n"
        "sys.exit(' '.join({'torch', 'flwr', 'onnxruntime'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
