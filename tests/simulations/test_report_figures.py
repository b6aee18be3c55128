"""Means, deviations, times, fronts and sums that can be checked in the head."""

from dataclasses import replace
from itertools import pairwise

import pytest

from fleetprune.errors import DataError
from fleetprune_sim.data.partition import PartitionSpec
from fleetprune_sim.history import DeviceRow, EvaluationRow, RoundRow
from fleetprune_sim.methods.fedavg import PLAIN
from fleetprune_sim.report import findings, tables, words
from fleetprune_sim.report.blocks import Figure, Mark, Standing
from fleetprune_sim.report.budget_grid import budgets
from fleetprune_sim.report.budgets import checks
from fleetprune_sim.report.comparison import Comparison, compare
from fleetprune_sim.report.cost_axis import sides
from fleetprune_sim.report.figures import Spread, class_result, moments
from fleetprune_sim.report.finding import find_runs
from fleetprune_sim.report.front import on_front
from fleetprune_sim.report.headline import about, headline, verdict
from fleetprune_sim.report.leads import behind, lead
from fleetprune_sim.report.partition_table import chosen, devices, partition
from fleetprune_sim.report.result_grid import results
from fleetprune_sim.report.runs import read_run
from fleetprune_sim.report.sections import sections
from fleetprune_sim.report.setting_words import meaning
from fleetprune_sim.report.table import Table
from fleetprune_sim.report.variants import group
from fleetprune_sim.settings import DeviceProfile, SimulationConfig
from tests.simulations.report_runs import SHARES, Synthetic, write_fleet


def compared(root, **options) -> Comparison:
    ((task, variants),) = group(find_runs([root]).runs).items()
    return compare(task, variants, **options)


def row_of(comparison: Comparison, label: str):
    return next(row for row in comparison.rows if row.variant.label == label)


def record(table: Table, **where) -> dict:
    records = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    (found,) = [r for r in records if all(r[k] == v for k, v in where.items())]
    return found


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Comparison:
    return compared(write_fleet(tmp_path_factory.mktemp("fleet")))


def test_spread():
    assert Spread.of([1.0, None, 2.0, 6.0]) == Spread(3.0, pytest.approx(7**0.5), 3)
    assert Spread.of([4.0]) == Spread(4.0, None, 1)
    assert Spread.of([None]) is None


def test_figures_of_one_class_of_one_run(tmp_path):
    run = read_run(Synthetic(level=0.80, up=4_000).write(tmp_path / "run"))
    watch = class_result(run, "watch")
    assert (watch.macs, watch.macs_share) == (250_000, 0.25)
    assert (watch.bytes, watch.bytes_share) == (10_000, 0.25)
    assert (watch.accuracy, watch.own_accuracy) == (0.78, pytest.approx(0.785))
    # Three devices in four rounds, two joules a round each.
    assert (watch.client_rounds, watch.energy_j) == (12, 24.0)
    assert (watch.up_bytes, watch.down_bytes) == (48_000, 12_000)
    assert watch.up_factor == 10.0  # 40,000 bytes a round if it were dense


def test_a_class_that_was_left_out_has_no_figures(tmp_path):
    models = {"hub": "hub", "phone": "phone", "watch": None, "sensor": None}
    watch = class_result(read_run(Synthetic(models=models).write(tmp_path / "run")), "watch")
    assert not watch.served
    assert not watch.within_budget
    assert watch.accuracy is watch.validation is watch.macs is watch.up_factor is None
    assert watch.curve == ()


def test_time_to_accuracy_is_that_of_the_first_evaluation_that_reached_it(tmp_path):
    run = read_run(Synthetic(level=0.79, rounds=4).write(tmp_path / "run"))
    hub = class_result(run, "hub")  # 0.2, 0.4, 0.6, 0.8 after 100, 200, 300, 400 s
    assert [m.accuracy for m in hub.curve] == [0.2, 0.4, pytest.approx(0.6), 0.8]
    # Ten devices, 5,000 bytes each, both ways.
    assert [m.bytes for m in hub.curve] == [50_000, 100_000, 150_000, 200_000]
    assert hub.seconds_to(0.2) == 100.0
    assert hub.seconds_to(0.21) == 200.0
    assert hub.seconds_to(0.8) == 400.0
    assert hub.seconds_to(0.81) is None


def test_tries_and_calibrations_cost_time_and_bytes_once(tmp_path):
    def row(number: int, phase: str, step: int, name: str, seconds: float) -> RoundRow:
        return RoundRow(number, phase, step, name, 1, 1, 0, 0, 10, 1, seconds, 1.0, 0.0)

    run = read_run(Synthetic().write(tmp_path / "run"))
    rounds = (
        row(1, "train", 0, "hub", 100.0),
        row(1, "train", 0, "phone", 100.0),  # the same round: the time passed once
        row(1, "train", 1, "hub", 7.0),
        row(2, "calibrate", 1, "hub", 3.0),
        row(2, "train", 0, "hub", 50.0),
        row(3, "train", 0, "hub", 1000.0),
        row(4, "train", 0, "hub", 9000.0),
    )
    evaluations = [EvaluationRow(n, "hub", 0.5, 1.0) for n in (1, 2, 3)]
    found = moments(replace(run, rounds=rounds), evaluations)
    assert [(m.seconds, m.bytes) for m in found] == [
        (107.0, 33),
        (157.0, 44),  # its own calibration comes after the evaluation
        (1160.0, 66),
    ]


def test_means_and_deviations_over_seeds(fleet):
    nested = row_of(fleet, "nested")
    assert nested.variant.seeds == (0, 1, 2)
    assert nested.cells["hub"].spread("accuracy") == Spread(
        pytest.approx(0.80), pytest.approx(0.01), 3
    )
    # 0.80, 0.79, 0.78 and 0.77 in the mean, and every seed 0.01 from the next.
    assert nested.mean("accuracy") == Spread(pytest.approx(0.785), pytest.approx(0.01), 3)
    assert nested.up_factor == Spread(10.0, 0.0, 3)
    assert nested.virtual_s == Spread(400.0, 0.0, 3)
    exclude = row_of(fleet, "exclude")
    assert exclude.served == 2
    assert exclude.mean("accuracy").mean == pytest.approx((0.70 + 0.69) / 2)


def test_the_default_target_is_95_per_cent_of_the_best_final_accuracy(fleet):
    # Dense ends at 0.85 in the mean; nested at 0.80, 0.81, 0.82.
    assert fleet.targets["hub"] == pytest.approx(0.95 * 0.85)
    reached = row_of(fleet, "nested").cells["hub"].seconds_to(fleet.targets["hub"])
    assert reached == Spread(400.0, 0.0, 2)
    assert row_of(fleet, "sparse").cells["hub"].seconds_to(fleet.targets["hub"]) is None


def test_best_keeps_the_most_budgets_and_then_is_the_most_accurate(fleet):
    # Dense is more accurate, but only the hub can hold it; exclude serves two of four.
    assert [row.variant.label for row in fleet.rows] == ["nested", "exclude", "dense", "sparse"]
    assert [row.within for row in fleet.rows] == [True, False, False, False]


def test_differences_are_taken_by_pairs_of_seeds(tmp_path):
    for seed, level in ((0, 0.80), (1, 0.82), (2, 0.84), (3, 0.1)):
        Synthetic(seed=seed, level=level).write(tmp_path / f"n{seed}")
    for seed in (0, 1, 2, 9):
        Synthetic(method="dense", seed=seed, level=0.81).write(tmp_path / f"d{seed}")
    comparison = compared(tmp_path, baseline="dense")
    # -0.01, 0.01 and 0.03; seeds 3 and 9 have no partner.
    assert comparison.delta(row_of(comparison, "nested"), "hub") == Spread(
        pytest.approx(0.01), pytest.approx(0.02), 3
    )
    assert comparison.delta(row_of(comparison, "dense"), "hub") is None


def test_a_baseline_must_be_one_of_the_variants(tmp_path):
    Synthetic(settings={"lr": 0.1}).write(tmp_path / "a")
    Synthetic(settings={"lr": 0.2}).write(tmp_path / "b")
    with pytest.raises(DataError) as e:
        compared(tmp_path, baseline="dense")
    expected = "expected one of nested (lr=0.1), nested (lr=0.2)"
    assert str(e.value) == f"baseline dense is not among the runs of fashion, {expected}"
    with pytest.raises(DataError, match="baseline nested is ambiguous of fashion"):
        compared(tmp_path, baseline="nested")
    chosen_one = compared(tmp_path, baseline="nested (lr=0.2)").baseline
    assert chosen_one.variant.own == {"settings.lr": "0.2"}


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1, 0.5), (2, 0.6), (3, 0.55), (2, 0.7)], [True, False, False, True]),
        ([(1, 0.5), (2, 0.5)], [True, False]),
        ([(2, 0.5), (2, 0.5), (3, 0.4)], [True, True, False]),
        ([], []),
    ],
)
def test_front(points, front):
    assert on_front(points) == front


def test_pareto_table(fleet):
    table = tables.pareto(fleet)
    # Nested is alone where it is small; dense, which is one model for all classes, wins where it
    # is most accurate: as hub.
    front = [row[:2] for row in table.rows if row[table.columns.index("macs_front")]]
    assert sorted(front) == [
        ("dense", "hub"), ("nested", "phone"), ("nested", "sensor"), ("nested", "watch"),
    ]  # fmt: skip
    point = record(table, variant="sparse", **{"class": "watch"}, counted="zeros left out")
    assert (point["macs"], point["bytes"]) == (200_000, 9_000)
    assert not point["macs_front"]
    shipped = record(table, variant="sparse", **{"class": "watch"}, counted="as shipped")
    assert (shipped["macs"], shipped["within_budget"]) == (1_000_000, False)
    assert (shipped["low"], shipped["high"]) == (pytest.approx(0.72), pytest.approx(0.74))
    assert not any(row[:2] == ("exclude", "sensor") for row in table.rows)


def test_curves_are_averaged_round_by_round(fleet):
    point = record(tables.curves(fleet), variant="nested", **{"class": "hub"}, round=2)
    # 0.80, 0.81 and 0.82 at the end, half of it half-way.
    assert (point["accuracy"], point["seeds"]) == (0.405, 3)
    assert (point["low"], point["high"]) == (0.4, 0.41)
    assert (point["bytes"], point["virtual_s"]) == (100_000, 200.0)


def test_long_curves_are_thinned_evenly_and_keep_their_ends(tmp_path):
    Synthetic(rounds=250).write(tmp_path / "run")
    rounds = tables.curves(compared(tmp_path)).where("class", "hub").column("round")
    assert len(rounds) == tables.POINTS == 100
    assert (rounds[0], rounds[-1]) == (1, 250)
    assert {b - a for a, b in pairwise(rounds)} <= {2, 3}


def test_traffic_and_energy_of_a_device(fleet):
    spent = record(tables.spent(fleet), variant="nested", **{"class": "sensor"})
    # Four devices, four rounds.
    assert (spent["up_bytes"], spent["down_bytes"]) == (64_000, 16_000)
    assert (spent["up_bytes_per_device"], spent["down_bytes_per_device"]) == (16_000, 4_000)
    assert spent["energy_j_per_device"] == 8.0
    assert (spent["seconds_to_target"], spent["seeds_that_reached_it"]) == (400.0, 2)
    left_out = record(tables.spent(fleet), variant="exclude", **{"class": "sensor"})
    assert (left_out["up_bytes"], left_out["seconds_to_target"]) == (0, None)


def test_keep_counts_stand_beside_the_dense_model(fleet):
    table = tables.keep_counts(fleet).where("variant", "nested").where("class", "phone")
    assert [row[2:] for row in table.rows] == [("stem", 8, 16), ("block", 16, 32), ("head", 32, 64)]


def test_budgets_say_how_far(fleet):
    found = {(c.variant, c.device_class, c.kind): c for c in checks(fleet)}
    over = found["dense", "phone", "macs"]
    assert (over.limit, over.shipped, over.within, over.left) == (500_000, 1_000_000, False, -1.0)
    exact = found["nested", "phone", "macs"]
    assert (exact.within, exact.left) == (True, 0.0)  # <=
    file = found["nested", "sensor", "flash_bytes"]
    assert (file.shipped, file.left) == (5_000, 0.9)
    assert found["exclude", "sensor", "macs"].within is None
    assert ("nested", "hub", "macs") not in found


def test_a_large_fleet_is_drawn_in_part_class_by_class():
    rows = [
        DeviceRow(f"{c}{i:03}", c, 9, "[4, 5]")
        for c, n in (("a", 100), ("b", 20))
        for i in range(n)
    ]
    drawn = chosen(rows, 60)
    assert len(drawn) == 60
    assert [d.device for d in drawn if d.device_class == "b"] == [
        f"b{i:03}" for i in range(0, 20, 2)
    ]
    assert chosen(rows[:60], 60) == rows[:60]
    assert len(chosen([*rows, DeviceRow("c0", "c", 9, "[9, 0]")], 60)) == 49 + 9 + 1


def test_partition_tables(tmp_path):
    run = read_run(Synthetic().write(tmp_path / "run"))
    table = partition(run)
    assert len(table.rows) == 10 * 3
    assert record(table, device="sensor-002", label="shoe") == {
        "class": "sensor", "device": "sensor-002", "label": "shoe", "samples": 18, "share": 0.3,
    }  # fmt: skip
    assert devices(run).columns == (
        "device",
        "class",
        "samples",
        "label shirt",
        "label shoe",
        "label bag",
    )
    assert ("sensor-002", "sensor", 60, 32, 18, 10) in devices(run).rows
    broken = replace(run, devices=(DeviceRow("x", "hub", 5, "?"),))
    assert devices(broken).rows == (("x", "hub", 5),)


def test_figures_for_scripts(tmp_path):
    write_fleet(tmp_path / "runs")
    table = tables.figures(compared(tmp_path / "runs", baseline="dense", target=0.5))
    assert len(table.rows) == 4 * 4
    watch = record(table, variant="nested", **{"class": "watch"})
    assert (watch["accuracy_mean"], watch["accuracy_sd"], watch["accuracy_n"]) == (0.78, 0.01, 3)
    assert (watch["delta_mean"], watch["delta_n"]) == (-0.04, 3)
    assert watch["delta_sd"] == pytest.approx(0, abs=1e-12)
    assert (watch["up_factor_mean"], watch["macs_share_mean"]) == (10.0, 0.25)
    # 0.5 of 0.79 at the end: after three of four rounds, in every seed.
    assert (watch["seconds_to_target_mean"], watch["seconds_to_target_n"]) == (300.0, 3)
    assert (watch["target"], watch["runs_within_budget"], watch["seeds"]) == (0.5, 3, 3)
    left_out = record(table, variant="exclude", **{"class": "watch"})
    assert (left_out["accuracy_mean"], left_out["accuracy_n"]) == (None, 0)
    assert len(tables.per_seed(compared(tmp_path / "runs")).rows) == 3 * 4 * 4


def test_csv_quotes_and_leaves_empty_what_is_not_known():
    table = Table("t", ("a", "b"), (('x,"y"', None), (True, 1.5)))
    assert table.csv() == 'a,b\n"x,""y""",\ntrue,1.5\n'


def test_the_headline_says_the_result_in_figures(fleet):
    said = headline(fleet).replace("\u00a0", " ")
    assert said == (
        "On fashion, nested gives hub 80.0 %, phone 79.0 %, watch 78.0 % and sensor 77.0 % "
        "accuracy on the test set, at 100, 50, 25 and 12 % of the dense model's MACs and 100, 50, "
        "25 and 12 % of its bytes; its devices upload 10.0 times less than dense float32 updates "
        "would take. It is behind dense by 4.0 points on hub."
    )
    assert verdict(fleet).replace("\u00a0", " ") == (
        "It keeps every budget, the only method that does. "
        "More accurate, but over some budget: dense (82.5 %)."
    )


def test_a_lead_within_the_noise_is_called_so(tmp_path):
    for seed, (level, other) in enumerate(((0.80, 0.79), (0.82, 0.84), (0.90, 0.86))):
        Synthetic(seed=seed, level=level).write(tmp_path / f"n{seed}")
        Synthetic(method="fjord", seed=seed, level=other).write(tmp_path / f"f{seed}")
    assert verdict(compared(tmp_path)).replace("\u00a0", " ") == (
        "It keeps every budget, as does the other method. Of these it is the most accurate, "
        "82.5 % in the mean of the classes; next is fjord with 81.5 % "
        "(1.0 points less, a lead within the spread of the seeds)."
    )


def test_what_another_method_does_better_is_in_the_headline(tmp_path):
    # By seed 5, 6 and 7 points ahead on the sensor; on the phone 3 ahead, then 3 behind, then even.
    for seed, (sensor, phone) in enumerate(((0.82, 0.82), (0.83, 0.76), (0.84, 0.79))):
        Synthetic(seed=seed).write(tmp_path / f"n{seed}")
        levels = {"sensor": sensor, "phone": phone, "hub": 0.5, "watch": 0.5}
        Synthetic(method="small", seed=seed, levels=levels).write(tmp_path / f"s{seed}")
    comparison = compared(tmp_path)
    assert comparison.best.variant.label == "nested"
    assert behind(comparison) == {"small": {"sensor": pytest.approx(0.06)}}
    assert headline(comparison).endswith(" It is behind small by 6.0 points on sensor.")


def test_only_methods_within_the_budget_are_ahead(tmp_path):
    dense = dict.fromkeys(SHARES, "hub")
    Synthetic().write(tmp_path / "n")
    Synthetic(method="dense", models=dense, level=0.95).write(tmp_path / "d")
    levels = {"watch": 0.80, "hub": 0.806}
    Synthetic(method="fjord", level=0.5, levels=levels).write(tmp_path / "f")
    # A single seed: two points are said, less than one is not.
    assert behind(compared(tmp_path)) == {
        "dense": {"hub": pytest.approx(0.15)},
        "fjord": {"watch": pytest.approx(0.02)},
    }


@pytest.mark.parametrize(
    ("mine", "theirs", "by", "clear"),
    [
        # Seeds are far apart, but in every one of them the first is ahead.
        ({0: 0.9, 1: 0.5, 2: 0.7}, {0: 0.88, 1: 0.48, 2: 0.69}, 0.05 / 3, True),
        ({0: 0.9, 1: 0.5}, {0: 0.85, 1: 0.53}, 0.01, False),
        ({0: 0.9, 1: 0.5}, {2: 0.85, 3: 0.45}, 0.05, False),  # no pair
        ({0: 0.91, 1: 0.9}, {2: 0.85, 3: 0.86}, 0.05, True),
        ({0: 0.9}, {0: 0.889}, 0.011, True),
        ({0: 0.9}, {0: 0.895}, 0.005, False),
        ({0: 0.9, 1: 0.9}, {0: 0.9, 1: 0.9}, 0.0, False),
    ],
)
def test_leads_are_judged_by_pairs_where_there_are_some(mine, theirs, by, clear):
    found = lead(mine, theirs)
    assert (found.by, found.clear) == (pytest.approx(by), clear)


def test_a_class_without_a_model_is_behind_nobody():
    assert lead({0: None}, {0: 0.9}) is None


@pytest.mark.parametrize(
    ("others", "said"),
    [(1, "as does the other method"), (2, "as do both other methods"),
     (3, "as do all 3 other methods")],
)  # fmt: skip
def test_how_many_others_keep_their_budgets(tmp_path, others, said):
    for i in range(others + 1):
        Synthetic(method=f"m{i}", level=0.9 - i / 10).write(tmp_path / str(i))
    assert verdict(compared(tmp_path)).startswith(f"It keeps every budget, {said}.")


def test_what_was_run_is_said_with_its_seeds(fleet, tmp_path):
    assert about(fleet) == (
        "12 simulated runs of fashion: nested, exclude, dense and sparse, each with seeds 0 to 2."
    )
    for seed in (4, 9):
        Synthetic(seed=seed).write(tmp_path / str(seed))
    assert about(compared(tmp_path)) == (
        "2 simulated runs of fashion: nested with seeds 4 and 9. "
        "With fewer than 3 seeds, a spread is a guess."
    )
    assert words.spread_note(fleet) == "Means ± sample standard deviations over 3 seeds."


def test_a_limit_on_latency_is_neither_kept_nor_broken(tmp_path):
    Synthetic(latency_ms=1e-6).write(tmp_path / "run")
    comparison = compared(tmp_path)
    found = {(c.device_class, c.kind): c for c in checks(comparison)}
    latency = found["sensor", "latency_ms"]
    assert (latency.limit, latency.shipped, latency.within, latency.left) == (
        1e-6,
        None,
        None,
        None,
    )
    assert found["sensor", "macs"].within is True
    assert verdict(comparison) == (
        "It keeps every budget, latency aside. "
        "Whether sensor is fast enough, only the device can tell."
    )
    grid = budgets(comparison)
    assert "Every limit, latency aside, is kept by every model." in grid.says
    sensor = grid.groups[0][1][-1]
    assert sensor[1] == Mark(True, "kept, latency aside")
    assert sensor[-1] == Mark(None, "measured on the device (at most 0.000001\u00a0ms)")
    rows = [dict(zip(grid.table.columns, row, strict=True)) for row in grid.table.rows]
    (row,) = [row for row in rows if row["limit"] == "latency_ms"]
    assert (row["shipped"], row["within"], row["left"]) == (None, None, None)


@pytest.mark.parametrize(
    ("ms", "text"),
    [(1e-6, "0.000001 ms"), (0.0573, "0.0573 ms"), (1.5, "1.5 ms"), (12.34, "12.3 ms"),
     (1234.0, "1,234 ms"), (0.0, "0 ms"), (100.0, "100 ms"), (40.0, "40 ms")],
)  # fmt: skip
def test_milliseconds_keep_digits_that_mean_something(ms, text):
    assert words.milliseconds(ms).replace("\u00a0", " ") == text


def test_the_best_of_each_class_stands_out(fleet):
    grid = results(fleet)
    order = [row.variant.label for row in fleet.rows]
    marked = {(i, order[j]): standing for (i, j), standing in grid.standing.items()}
    assert marked == {
        (0, "dense"): Standing.BEST,  # the hub can hold it
        **{(i, "nested"): Standing.BEST for i in (1, 2, 3, 4)},
        **{(i, "dense"): Standing.OVER for i in (1, 2, 3, 4)},
    }
    assert grid.head.count("of dense MACs") == grid.head.count("of dense file") == 1
    assert grid.groups[0][0] == "hub: 1 device, target 80.8\u00a0% on validation"
    assert grid.groups[0][1][0][-1] == "6.7\u00a0min (2 of 3)"


def test_points_in_each_others_way_stand_side_by_side(fleet):
    assert sides([(1, 0.5)] * 4 + [(9, 0.5)], [1, 1, 0, 1, 1]) == [1, -1, 0, 2, 0]
    assert sides([(1, 0.5), (1, 0.9)], [0, 0]) == [0, 0]
    assert sides([], []) == []
    table = tables.pareto(fleet)
    said = findings.of_pareto(table, "macs", fleet).replace("\u00a0", " ")
    assert "nested · sensor 77.0 %; nested · watch 78.0 %; nested · phone 79.0 %; dense" in said


def test_one_model_for_all_is_named_once(tmp_path):
    Synthetic(models=dict.fromkeys(SHARES, "sensor"), levels=dict.fromkeys(SHARES, 0.7)).write(
        tmp_path / "s"
    )
    Synthetic(method="other", level=0.6).write(tmp_path / "o")
    comparison = compared(tmp_path)
    said = findings.of_pareto(tables.pareto(comparison), "bytes", comparison)
    assert "for as little: nested · every class 70.0\u00a0%." in said
    assert "Points that would cover each other stand side by side." in said
    mine = tables.pareto(comparison).where("variant", "nested")
    assert mine.column("macs") == [125_000] * 4
    assert sorted(mine.column("macs_side")) == [-1, 0, 1, 2]


def test_all_of_a_curve_is_within_its_axis(fleet):
    specs = {
        name: spec
        for section in sections(fleet)
        for block in section.blocks
        if isinstance(block, Figure)
        for name, spec in block.specs.items()
    }
    table = tables.curves(fleet)
    for x in ("round", "bytes", "virtual_s"):
        low, high = specs[f"curve-{x}"]["layer"][0]["encoding"]["y"]["scale"]["domain"]
        assert low <= min(table.column("low"))
        assert max(table.column("high")) <= high


def test_differences_in_the_mean_are_over_classes_that_both_have(fleet, tmp_path):
    comparison = compared(write_fleet(tmp_path), baseline="exclude")
    # 0.80 and 0.79 against 0.70 and 0.69; two classes have nothing to be compared with.
    assert comparison.mean_delta(row_of(comparison, "nested")) == Spread(
        pytest.approx(0.1), pytest.approx(0.0), 3
    )
    assert comparison.mean_delta(row_of(comparison, "exclude")) is None
    assert fleet.mean_delta(fleet.best) is None


def test_settings_in_which_methods_differ_have_words():
    names = [
        *(f"training.{key}" for key in (*PLAIN, "devices_per_round", "min_devices")),
        *(f"simulation.{key}" for key in SimulationConfig.model_fields),
        *(f"simulation.partition.{key}" for key in PartitionSpec.model_fields),
        *(f"simulation.classes.hub.{key}" for key in DeviceProfile.model_fields),
    ]
    tables_of_their_own = {"simulation.partition", "simulation.classes"}
    assert {n for n in names if not meaning(f"settings.{n}")} == tables_of_their_own
    assert meaning("budgets.sensor.macs") == (
        "of sensor: most multiply-accumulates of one inference"
    )
    assert meaning("settings.lr") == ""


def test_a_method_that_leaves_classes_out_or_exceeds_budgets_says_so(tmp_path):
    models = {"hub": "hub", "phone": None, "watch": None, "sensor": "hub"}
    Synthetic(method="odd", models=models, up=80_000).write(tmp_path / "run")
    odd = compared(tmp_path)
    said = headline(odd).replace("\u00a0", " ")
    assert said == (
        "On fashion, odd gives hub 80.0 % and sensor 77.0 % accuracy on the test set, at 100 and "
        "100 % of the dense model's MACs and 100 and 100 % of its bytes, and leaves phone and "
        "watch without a model; its devices upload 2.0 times more than dense float32 updates "
        "would take."
    )
    assert verdict(odd) == "odd does not keep the budget of phone, watch and sensor."


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0.4 s"), (59.9, "59.9 s"), (60, "1.0 min"), (5400, "1.5 h"), (200_000, "2.3 d")],
)
def test_durations(seconds, text):
    assert words.duration(seconds).replace("\u00a0", " ") == text


def test_all_classes_are_in_all_tables(fleet):
    assert fleet.classes == tuple(SHARES)
    for table in (
        tables.figures(fleet),
        tables.curves(fleet),
        tables.pareto(fleet),
        tables.spent(fleet),
    ):
        assert set(table.column("class")) == set(SHARES), table.name
