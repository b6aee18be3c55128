"""The report in a real browser: every chart is drawn, nothing fails, nothing is fetched."""

import csv
import io
import json
import re
import shutil
import subprocess
from html import unescape
from itertools import combinations
from math import hypot
from pathlib import Path

import pytest

from fleetprune_sim.report import tables
from fleetprune_sim.report.budgets import budget_table, checks
from fleetprune_sim.report.comparison import compare
from fleetprune_sim.report.finding import find_runs
from fleetprune_sim.report.page import write_report
from fleetprune_sim.report.partition_table import devices, partition
from fleetprune_sim.report.robustness import robustness
from fleetprune_sim.report.settings_grid import settings
from fleetprune_sim.report.variants import group
from tests.simulations.report_runs import GROUPS, write_fleet

EVIL = "<script>document.title='owned'</script>"
ODD = '=1+1, "x"\n'
PROBE = """
<script>
(async () => {
  const root = document.documentElement;
  for (let i = 0; i < 400 && !root.dataset.charts; i++)
    await new Promise((done) => setTimeout(done, 25));
  const marks = (chart) => {
    const found = {};
    for (const group of chart.querySelectorAll("g.role-mark")) {
      const kind = [...group.classList].find((c) => c.startsWith("mark-"));
      const seen = [...group.children].filter((e) => e.getBBox().width + e.getBBox().height > 0);
      found[kind] = (found[kind] ?? 0) + seen.length;
    }
    return found;
  };
  const files = {};
  for (const link of document.querySelectorAll("a[data-table]"))
    if (!link.hidden) files[link.download] = await (await fetch(link.href)).text();
  const charts = {};
  for (const chart of document.querySelectorAll(".chart"))
    charts[chart.id] = {
      marks: marks(chart),
      points: [...chart.querySelectorAll("g.mark-symbol path")].map((point) => {
        const { x, y, width, height } = point.getBoundingClientRect();
        return [x + width / 2, y + height / 2];
      }),
      menu: chart.querySelector("summary").getBoundingClientRect().bottom,
      top: chart.querySelector("svg").getBoundingClientRect().top,
      label: chart.querySelector("[role='graphics-document']").getAttribute("aria-label"),
      width: chart.querySelector("svg").getBoundingClientRect().width,
      room: chart.getBoundingClientRect().width,
    };
  const text = document.querySelector(".role-axis-label text");
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify({
    charts, files,
    errors: root.dataset.errors,
    drawn: root.dataset.charts,
    title: document.title,
    overflow: root.scrollWidth - root.clientWidth,
    page: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    label: getComputedStyle(text).fill,
    trouble: document.getElementById("trouble").textContent,
    tables: [...document.querySelectorAll(":not(details) > * > .table > .scroll")].map((s) => ({
      cut: s.scrollWidth - s.clientWidth > 1,
      hint: getComputedStyle(s.parentElement.nextElementSibling).display !== "none",
      shadow: getComputedStyle(s.parentElement, "::after").opacity === "1",
    })),
  });
  document.body.append(out);
})();
</script>
"""


def chromium() -> str:
    found = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if found is None:
        pytest.skip("no Chromium on this machine: nothing says that the charts are drawn")
    return found


def visit(page: Path, *options: str, inject: str = "") -> tuple[dict, list[str]]:
    """What a browser makes of a page: findings of the probe, and lines on its console."""
    html = page.read_text()
    end = html.rindex("</body>")
    copy = page.with_name("probed.html")
    copy.write_text(html[:end] + inject + PROBE + html[end:])
    done = subprocess.run(
        [
            chromium(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={page.parent / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--virtual-time-budget=20000",
            "--enable-logging=stderr",
            *options,
            "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(unescape(found[1])), console


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    write_fleet(root / "runs", names={"watch": EVIL, "sensor": ODD})
    runs = find_runs([root / "runs"]).runs
    write_report(root / "report.html", runs, "Fashion")
    ((task, variants),) = group(runs).items()
    return root / "report.html", compare(task, variants)


@pytest.fixture(scope="module")
def light(fleet):
    return visit(fleet[0], "--window-size=1280,900", "--blink-settings=preferredColorScheme=1")


@pytest.fixture(scope="module")
def narrow_and_dark(fleet):
    return visit(fleet[0], "--window-size=500,900", "--blink-settings=preferredColorScheme=0")


def test_nothing_fails_and_nothing_is_fetched(light):
    found, console = light
    assert (found["errors"], found["trouble"]) == ("[]", "")
    assert console == []
    assert found["drawn"] == str(len(found["charts"])) == "26"
    assert found["title"] == "Fashion"


def test_an_attempt_to_fetch_would_be_seen(fleet):
    image = '<img src="http://example.invalid/pixel.png" alt="">'
    found, _ = visit(fleet[0], inject=image + "<script>setTimeout(() => nothing(), 1)</script>")
    blocked, *others = json.loads(found["errors"])
    assert blocked == "blocked: http://example.invalid/pixel.png"
    assert "Uncaught ReferenceError: nothing is not defined" in others
    assert "example.invalid" in found["trouble"]


def test_curves_have_a_line_and_a_band_per_method_and_a_point_per_evaluation(fleet, light):
    comparison, charts = fleet[1], light[0]["charts"]
    table = tables.curves(comparison)
    for i, name in enumerate(comparison.classes):
        rows = table.where("class", name)
        methods = len(set(rows.column("variant")))
        assert methods == (4 if i < 2 else 3)  # one method leaves two classes out
        for x in ("round", "bytes", "virtual_s"):
            assert charts[f"fashion-accuracy-{x}-{i}"]["marks"] == {
                "mark-area": methods,
                "mark-line": methods,
                "mark-symbol": len(rows.rows),
            }


@pytest.mark.parametrize("cost", ["macs", "bytes"])
def test_the_pareto_plot_has_a_point_per_model_and_one_front(fleet, light, cost):
    points = tables.pareto(fleet[1])
    assert len(points.rows) == 4 + 4 + 2 + 4 + 4  # the last four: zeros left out
    assert light[0]["charts"][f"fashion-pareto-{cost}-0"]["marks"] == {
        "mark-symbol": 18,
        "mark-rule": 18,
        "mark-line": 1,
    }


@pytest.mark.parametrize("cost", ["macs", "bytes"])
def test_no_point_covers_another(light, cost):
    points = light[0]["charts"][f"fashion-pareto-{cost}-0"]["points"]
    assert len(points) == 18
    assert all(hypot(a[0] - b[0], a[1] - b[1]) > 8 for a, b in combinations(points, 2))


def test_menus_stand_above_their_charts(light, narrow_and_dark):
    for found, _ in (light, narrow_and_dark):
        for name, chart in found["charts"].items():
            assert chart["menu"] <= chart["top"] + 1, name


def test_tables_that_are_cut_off_say_so(light, narrow_and_dark):
    for found, _ in (light, narrow_and_dark):
        for table in found["tables"]:
            assert table["hint"] == table["shadow"] == table["cut"]
    assert any(table["cut"] for table in narrow_and_dark[0]["tables"])


def test_bars_are_drawn_for_every_figure_that_is_known(light):
    bars = {
        "up-bytes-per-device": 16,
        "down-bytes-per-device": 16,
        "energy-j-per-device": 16,
    }
    charts = light[0]["charts"]
    assert {name: charts[f"fashion-{name}-0"]["marks"] for name in bars} == {
        name: {"mark-rect": n} for name, n in bars.items()
    }
    # Two of the four methods got there; of all it is said how many seeds did.
    assert charts["fashion-seconds-to-target-0"]["marks"] == {"mark-rect": 8, "mark-text": 16}


def test_units_and_partition(fleet, light):
    charts = light[0]["charts"]
    for i, name in enumerate(fleet[1].classes):
        assert charts[f"fashion-units-{i}"]["marks"] == {"mark-rect": 2 * len(GROUPS)}
        run = fleet[1].best.variant.runs[0]
        cells = len(partition(run).where("class", name).rows)
        assert charts[f"fashion-partition-{i}"]["marks"] == {"mark-rect": cells}


def test_every_chart_is_described_and_fills_its_place(light, narrow_and_dark):
    for found, _ in (light, narrow_and_dark):
        for name, chart in found["charts"].items():
            assert len(chart["label"]) > 20, name
            assert chart["room"] - 2 <= chart["width"] <= chart["room"] + 1, name


def test_downloads_hold_the_exact_rows(fleet, light):
    comparison, files = fleet[1], light[0]["files"]
    run = comparison.best.variant.runs[0]
    expected = [
        tables.figures(comparison),
        tables.per_seed(comparison),
        tables.curves(comparison),
        tables.pareto(comparison),
        tables.spent(comparison),
        tables.keep_counts(comparison),
        partition(run),
        devices(run),
        budget_table(checks(comparison)),
        settings(comparison)[0].table,
        robustness(comparison),
    ]
    assert {f"fashion-{table.name}.csv" for table in expected} == set(files)
    for table in expected:
        header, *rows = csv.reader(io.StringIO(files[f"fashion-{table.name}.csv"], newline=""))
        assert tuple(header) == table.columns
        assert [tuple(map(same, row)) for row in rows] == [
            tuple(map(same, row)) for row in csv.reader(io.StringIO(table.csv(), newline=""))
        ][1:]
        assert len(rows) == len(table.rows) > 0
    assert any(
        ODD in row for row in csv.reader(io.StringIO(files["fashion-spent.csv"], newline=""))
    )


def same(field: str) -> str | float:
    """A number however it is written."""
    try:
        return float(field)
    except ValueError:
        return field


def test_both_colour_schemes_are_legible(light, narrow_and_dark):
    for (found, _), dark in ((light, False), (narrow_and_dark, True)):
        page, ink, label = (luminance(found[key]) for key in ("page", "ink", "label"))
        assert (page < 0.1) is dark
        assert contrast(page, ink) > 12
        assert contrast(page, label) > 4.5


def test_a_narrow_dark_page_is_complete_and_does_not_scroll_sideways(light, narrow_and_dark):
    found, console = narrow_and_dark
    assert (found["errors"], console, found["overflow"]) == ("[]", [], 0)
    marks = {name: chart["marks"] for name, chart in found["charts"].items()}
    assert marks == {name: chart["marks"] for name, chart in light[0]["charts"].items()}


def luminance(color: str) -> float:
    channels = [int(c) / 255 for c in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
