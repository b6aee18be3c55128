"""The report as a file: complete in itself, and nothing in a run's names can get out of hand."""

import json
import re
from datetime import date
from html.parser import HTMLParser
from importlib.metadata import version
from itertools import pairwise

import pytest

from fleetprune.errors import DataError
from fleetprune_sim.report.comparison import compare
from fleetprune_sim.report.finding import find_runs
from fleetprune_sim.report.markup import json_script, tag
from fleetprune_sim.report.page import POLICY, write_page, write_report
from fleetprune_sim.report.variants import group
from tests.simulations.report_runs import Synthetic, write_fleet

EVIL = "<script>document.title='owned'</script>"
LIMIT = 1_100_000  # bytes, of which the drawing library is 0.9 million


class Outline(HTMLParser):
    """Elements, with attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        self._open.append(name)

    def handle_endtag(self, name):
        while self._open and self._open.pop() != name:
            pass

    def handle_data(self, data):
        inner = self._open[-1] if self._open else ""
        if inner == "script":
            self.scripts.append(data)
        elif inner != "style":
            self.text.append(data)
            if re.fullmatch("h[1-6]", inner):
                self.headings.append((int(inner[1]), data))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_fleet(root, names={"watch": EVIL})
    write_report(root / "report.html", find_runs([root]).runs, "A & <b>")
    return root / "report.html"


@pytest.fixture(scope="module")
def outline(report):
    return Outline(report.read_text())


def test_the_file_is_small(report):
    assert 900_000 < report.stat().st_size < LIMIT
    assert list(report.parent.glob("*.part")) == []


def test_nothing_is_loaded_from_anywhere(report, outline):
    loading = {"src", "href", "data", "poster", "action", "srcset", "background"}
    assert [(n, a) for n, a in outline.elements if loading & a.keys()] == []
    assert not {"link", "iframe", "object", "embed", "base", "img"} & {
        n for n, _ in outline.elements
    }
    style = re.search(r"<style>(.*?)</style>", report.read_text(), re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_forbids_fetching_and_comes_first(outline):
    first = [a for n, a in outline.elements if n == "meta"][:2]
    assert first[1] == {"http-equiv": "Content-Security-Policy", "content": POLICY}
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert rules["default-src"] == "'none'"
    assert not re.search(r"https?:|\*|'self'", POLICY)


def test_the_drawing_library_and_every_table_are_there_once(report, outline):
    text = report.read_text()
    assert text.count("window.vegaEmbed") == 1
    assert text.count("EDITOR_ACTION") == text.split("</script>")[2].count("EDITOR_ACTION") > 0
    data = json.loads(outline.scripts[1])
    (task,) = data["tasks"].values()
    assert task["specs"].keys() == {
        "pareto-macs", "pareto-bytes", "curve-round", "curve-bytes", "curve-virtual_s", "units",
        "partition", "up_bytes_per_device", "down_bytes_per_device", "energy_j_per_device",
        "seconds_to_target",
    }  # fmt: skip
    assert {"values", "datasets", "$schema"}.isdisjoint(json.dumps(task["specs"]).split('"'))


def test_names_are_shown_and_not_obeyed(report, outline):
    assert EVIL not in report.read_text()
    assert "A & <b>" in outline.text
    assert any(EVIL in piece for piece in outline.text)
    assert len(outline.scripts) == 4  # watch, data, library, page
    data = json.loads(outline.scripts[1])
    assert EVIL in {row[1] for row in data["tasks"]["fashion"]["tables"]["accuracy"]["rows"]}


def test_headings_come_in_order(outline):
    levels = [level for level, _ in outline.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert [text for level, text in outline.headings if level == 2] == [
        "Result",
        "Accuracy against cost",
        "Under corruptions",
        "Accuracy on its way",
        "The models",
        "What the training took",
        "The fleet",
    ]


def test_tables_have_headings_and_captions(outline):
    tables = [a for n, a in outline.elements if n == "table"]
    assert len(tables) == [n for n, _ in outline.elements].count("caption") == 6
    scopes = [a.get("scope") for n, a in outline.elements if n == "th"]
    assert set(scopes) == {"col", "row", "rowgroup"}


def test_verdicts_are_signs_and_words(outline):
    text = "".join(outline.text)
    assert "✓ kept" in text
    assert "✗ exceeded" in text
    assert "✗ 1,000,000 (100.0\u00a0% over)" in text
    assert "✓ 5,000 B (90.0\u00a0% left)" in text
    assert "– no model" in text
    assert "phone: at most 500,000 MACs, a file of 50,000 B" in text


def test_global_and_own_accuracy_are_both_there(outline):
    assert "80.0 ± 1.0" in outline.text
    assert "80.5 ± 1.0" in outline.text


def test_every_figure_says_in_words_what_it_shows(outline):
    figures = [a["id"] for n, a in outline.elements if n == "figure"]
    assert len(figures) == 11
    data = json.loads(outline.scripts[1])
    labels = [plot["label"] for plot in data["tasks"]["fashion"]["plots"].values()]
    # Four classes: three kinds of curves, units and partition; two fronts; four kinds of bars.
    assert len(labels) == 4 * 5 + 2 + 4
    assert all(len(label) > 20 for label in labels)
    charts = [a["id"] for n, a in outline.elements if a.get("class") == "chart"]
    assert charts == list(data["tasks"]["fashion"]["plots"])


def test_file_names_of_downloads_are_stable(outline):
    names = {a["download"] for n, a in outline.elements if n == "a"}
    assert names == {
        f"fashion-{table}.csv"
        for table in ("figures", "budgets", "pareto", "accuracy", "units", "spent", "seeds",
                      "partition", "devices", "settings", "robustness")
    }  # fmt: skip


def test_the_same_runs_give_the_same_file_on_the_same_day(report, tmp_path):
    ((task, variants),) = group(find_runs([report.parent]).runs).items()
    for name in ("one", "two"):
        write_page(tmp_path / name, [compare(task, variants)], "A & <b>", date(2026, 2, 3))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert "Written on 2026-02-03 by" in (tmp_path / "one").read_text()


def test_the_page_says_when_by_what_and_with_which_seeds(outline, tmp_path):
    text = "".join(outline.text)
    assert re.search(rf"Written on \d{{4}}-\d\d-\d\d by fleetprune {version('fleetprune')}\.", text)
    assert "nested, exclude, dense and sparse, each with seeds 0 to 2." in text
    assert "fleetprune simulate --task fashion --rounds 4 --method nested,exclude,dense" in text
    assert "a spread is a guess" not in text
    write_fleet(tmp_path, seeds=2, version="0.0.7")
    write_report(tmp_path / "report.html", find_runs([tmp_path]).runs, "x")
    text = "".join(Outline((tmp_path / "report.html").read_text()).text)
    assert f"by fleetprune {version('fleetprune')}; runs made by 0.0.7." in text
    # On top, and at the two tables that have spreads.
    assert text.count("With fewer than 3 seeds, a spread is a guess.") == 3


def test_the_best_rows_have_signs_and_not_only_colours(outline):
    rows = [a.get("class") for n, a in outline.elements if n == "tr" and a.get("class") != "group"]
    assert (rows.count("best"), rows.count("over")) == (5, 4)
    assert (outline.text.count("★ "), outline.text.count("☆ ")) == (5, 4)


def test_settings_are_named_as_in_fleet_toml_and_explained(tmp_path):
    for method, rate in (("fjord", 0.1), ("nested", 0.2)):
        run = Synthetic(method=method, settings={"training": {"learning_rate": rate}})
        run.write(tmp_path / method)
    write_report(tmp_path / "report.html", find_runs([tmp_path]).runs, "x")
    text = Outline((tmp_path / "report.html").read_text()).text
    at = text.index("training.learning_rate")
    assert text[at : at + 4] == [
        "training.learning_rate", "0.1", "0.2", "of the devices, in the first round",
    ]  # fmt: skip
    assert not any(piece.startswith("settings.") for piece in text)


def test_the_heat_map_has_a_scale(outline):
    at = outline.text.index("Share of a device's samples:")
    scale = [piece.replace("\u00a0", " ") for piece in outline.text[at + 1 : at + 6]]
    assert scale == ["0 %", "25 %", "50 %", "75 %", "100 %"]
    (task,) = json.loads(outline.scripts[1])["tasks"].values()
    assert task["specs"]["partition"]["encoding"]["y"]["title"] == "label"
    titles = [task["specs"][f"pareto-{cost}"]["layer"][0]["encoding"]["x"]["title"]
              for cost in ("macs", "bytes")]  # fmt: skip
    assert titles == [
        "MACs of one inference, logarithmic scale", "bytes of the file, logarithmic scale",
    ]  # fmt: skip


def test_tasks_have_articles_and_addresses_of_their_own(tmp_path):
    for i, task in enumerate(("HAR!", "har", "har-2")):
        Synthetic(task=task).write(tmp_path / f"run{i}")
    write_report(tmp_path / "report.html", find_runs([tmp_path]).runs, "Three tasks")
    outline = Outline((tmp_path / "report.html").read_text())
    assert [text for level, text in outline.headings if level == 2] == ["HAR!", "har", "har-2"]
    ids = [a["id"] for _, a in outline.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert list(json.loads(outline.scripts[1])["tasks"]) == ["har", "har-2", "har-2-2"]


def test_a_run_without_anything_to_draw_is_still_a_report(tmp_path):
    models = {"hub": None, "phone": None, "watch": None, "sensor": None}
    run = Synthetic(models=models, devices={"hub": 0, "phone": 0, "watch": 0, "sensor": 0})
    run.write(tmp_path / "run")
    write_report(tmp_path / "report.html", find_runs([tmp_path]).runs, "Nothing")
    text = "".join(Outline((tmp_path / "report.html").read_text()).text)
    assert "leaves hub, phone, watch and sensor without a model" in text
    assert "Nothing to draw." in text


def test_what_cannot_be_written_is_one_error(tmp_path):
    runs = find_runs([Synthetic().write(tmp_path / "run")]).runs
    with pytest.raises(DataError, match=r"/none/report\.html: cannot be written: No such file"):
        write_report(tmp_path / "none" / "report.html", runs, "x")
    with pytest.raises(DataError, match="at least one run"):
        write_report(tmp_path / "report.html", [], "x")


def test_markup_escapes_text_and_attributes():
    assert tag("p", "a<b", tag("b", "&"), None, title='"', hidden=True, id=None) == (
        '<p title="&quot;" hidden>a&lt;b<b>&amp;</b></p>'
    )
    assert json_script("d", "</script>\u2028") == (
        '<script type="application/json" id="d">"\\u003c/script>\\u2028"</script>'
    )
