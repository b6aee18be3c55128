"""One HTML file that holds everything: text, tables, data, charts and what draws them."""

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime
from functools import cache
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from fleetprune.errors import DataError
from fleetprune_sim.report import words
from fleetprune_sim.report.blocks import Figure, Section
from fleetprune_sim.report.command import commands
from fleetprune_sim.report.comparison import Comparison, compare
from fleetprune_sim.report.headline import about, headline, verdict
from fleetprune_sim.report.markup import Markup, joined, json_script, tag
from fleetprune_sim.report.render import render_commands, render_section, tiles
from fleetprune_sim.report.runs import Run
from fleetprune_sim.report.sections import sections
from fleetprune_sim.report.style import CONFIG
from fleetprune_sim.report.table import Table
from fleetprune_sim.report.variants import group

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src blob:"
)
"""Nothing is fetched, whatever the page contains. Vega makes functions of its expressions, hence
`unsafe-eval`."""


def write_report(out: Path, runs: Sequence[Run], title: str) -> None:
    """Write the report on some runs, of one task or of several.

    Args:
        out: The HTML file; its folder must be there.
        runs: At least one.
        title: Of the page.

    Raises:
        DataError: There are no runs, two are the same, or the file cannot be written.
    """
    if not runs:
        raise DataError("a report needs at least one run")
    write_page(out, [compare(task, v) for task, v in group(runs).items()], title)


def write_page(
    out: Path, comparisons: Sequence[Comparison], title: str, on: date | None = None
) -> None:
    """Write the page on comparisons that are made already; see `write_report`.

    Args:
        out: The HTML file.
        comparisons: One per task.
        title: Of the page.
        on: Date that it bears; None: today's.
    """
    content = page(comparisons, title, datetime.now(UTC).date() if on is None else on)
    unfinished = out.with_name(f"{out.name}.part")
    try:
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(out)
    except OSError as e:
        raise DataError(f"{out}: cannot be written: {e.strerror}") from e


def page(comparisons: Sequence[Comparison], title: str, on: date) -> str:
    """The whole file."""
    slugs = _slugs([c.task for c in comparisons])
    tasks = [(slug, c, sections(c)) for slug, c in zip(slugs, comparisons, strict=True)]
    body = joined(_task(slug, c, found, len(tasks) > 1) for slug, c, found in tasks)
    return "<!doctype html>\n" + tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            # It must come before anything that it is to keep from being fetched.
            Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", title),
            _style(),
            _script(_asset("watch.js")),
        ),
        tag(
            "body",
            tag(
                "main",
                tag("header", tag("h1", title), tag("p", _made(comparisons, on), class_="about")),
                tag("noscript", tag("p", _NO_SCRIPT, class_="notice")),
                tag("p", id="trouble", class_="notice", hidden=True, role="alert"),
                body,
            ),
            json_script("data", _data(tasks)),
            _script(_bundle()),
            _script(_asset("page.js")),
        ),
        lang="en",
    ) + "\n"  # fmt: skip


_NO_SCRIPT = "Charts and downloads need JavaScript; the text and the tables are complete without."


def _task(slug: str, c: Comparison, found: Sequence[Section], several: bool) -> Markup:
    return tag(
        "article",
        tag("h2", c.task, class_="task") if several else None,
        tag("p", about(c), class_="about"),
        tag("p", headline(c), class_="headline"),
        tag("p", verdict(c), class_="verdict"),
        tiles(c),
        render_commands(commands(c)),
        joined(render_section(slug, section, 3 if several else 2) for section in found),
    )


def _made(comparisons: Sequence[Comparison], on: date) -> str:
    """When and by what the page and its runs were made."""
    here = version("fleetprune")
    runs = (run for c in comparisons for row in c.rows for run in row.variant.runs)
    others = sorted({run.summary.version for run in runs} - {here, ""})
    of_runs = f"; runs made by {words.joined(others)}" if others else ""
    return f"Written on {on.isoformat()} by fleetprune {here}{of_runs}."


def _data(tasks: Sequence[tuple[str, Comparison, Sequence[Section]]]) -> dict[str, Any]:
    """Tables and specifications of each task, each once, and which chart is made of which."""
    found: dict[str, Any] = {}
    for slug, _, its_sections in tasks:
        tables: dict[str, Table] = {}
        specs: dict[str, Any] = {}
        plots: dict[str, Any] = {}
        for block in (b for section in its_sections for b in section.blocks):
            if block.table is not None:
                tables[block.table.name] = block.table
            if isinstance(block, Figure):
                tables |= {table.name: table for table in block.more}
                specs |= block.specs
                for i, plot in enumerate(block.plots):
                    shown = {"spec": plot.spec, "table": block.table.name, "where": plot.where}
                    plots[f"{slug}-{block.name}-{i}"] = {**shown, "label": plot.label}
        found[slug] = {
            "tables": {n: {"columns": t.columns, "rows": t.rows} for n, t in tables.items()},
            "specs": specs,
            "plots": plots,
        }
    return {"config": CONFIG, "tasks": found}


def _slugs(names: Sequence[str]) -> list[str]:
    """Names as parts of file names and addresses, all different."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "task"
        numbered = (f"{plain}-{i}" for i in count(2))
        found.append(plain if plain not in found else next(s for s in numbered if s not in found))
    return found


def _style() -> Markup:
    return Markup(f"<style>{_asset('page.css')}</style>")


def _script(source: str) -> Markup:
    return Markup(f"<script>{source}</script>")


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script."""
    major, minor, *_ = alt.SCHEMA_VERSION.removeprefix("v").split(".")
    return vl_convert.javascript_bundle(
        "window.vegaEmbed = vegaEmbed;", vl_version=f"{major}.{minor}"
    )


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
