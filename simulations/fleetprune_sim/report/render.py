"""Sections, figures and tables as HTML."""

from collections.abc import Sequence

from fleetprune_sim.report import words
from fleetprune_sim.report.blocks import Figure, Grid, Legend, Mark, Section, Standing
from fleetprune_sim.report.budgets import left_to_devices
from fleetprune_sim.report.command import Command
from fleetprune_sim.report.comparison import Comparison
from fleetprune_sim.report.figures import mean_of
from fleetprune_sim.report.markup import Markup, joined, tag
from fleetprune_sim.report.style import GREY, OUTLINES, PALETTE
from fleetprune_sim.report.table import Table

_SIGNS = {True: ("✓", "good"), False: ("✗", "bad"), None: ("–", "unknown")}

_MORE_WAS_SAID = (
    "The fleet is not the one that comes with the task: what fleet.toml or further options said is "
    "under Settings."
)


def tiles(comparison: Comparison) -> Markup:
    """The few figures that are remembered."""
    best = comparison.best
    mean, shown = best.mean("accuracy"), []
    if mean is not None:
        n = len(comparison.classes)
        some = "" if best.served == n else f" ({best.served} of {n})"
        figure = f"{words.percent_spread(mean)}{words.PER_CENT}"
        shown.append((figure, f"mean accuracy over classes{some}"))
    shares = {
        name: share.mean
        for name, cell in best.cells.items()
        if (share := cell.spread("macs_share")) is not None
    }
    if shares:
        name = min(shares, key=lambda n: shares[n])
        accuracy = best.cells[name].spread("accuracy")
        figure = words.percent(mean_of(accuracy))
        shown.append((figure, f"{name}, at {words.percent(shares[name], 0)} of the dense MACs"))
    if best.up_factor is not None:
        shown.append(_upload(best.up_factor.mean))
    aside = ", latency aside" if left_to_devices(comparison) else ""
    kept = sum(cell.within for cell in best.cells.values())
    shown.append((f"{kept} of {len(comparison.classes)}", f"classes within their budget{aside}"))
    if best.virtual_s is not None:
        shown.append((words.duration(best.virtual_s.mean), "of training by the fleet's clock"))
    return tag(
        "dl",
        *(tag("div", tag("dt", text), tag("dd", figure)) for figure, text in shown),
        class_="tiles",
    )


def _upload(factor: float) -> tuple[str, str]:
    times, what = (factor, "less") if factor >= 1 else (1 / factor, "more")
    return words.times(times), f"{what} upload than dense float32 updates"


def render_commands(commands: Sequence[Command]) -> Markup:
    """How the runs can be made again; folded away where it takes many commands."""
    lines = [
        tag(
            "p",
            tag("code", *(piece for part in command.parts for piece in (tag("span", part), " "))),
        )
        for command in commands
    ]
    if not all(command.complete for command in commands):
        lines.append(tag("p", _MORE_WAS_SAID))
    if len(commands) == 1:
        return tag("div", tag("p", "Made by"), *lines, class_="commands")
    summary = tag("summary", f"Made by {len(commands)} commands")
    return tag("details", summary, *lines, class_="commands")


def render_section(slug: str, section: Section, level: int) -> Markup:
    """A section under its heading; nothing if it is empty.

    Args:
        slug: Of the task, for addresses and file names.
        section: What it holds.
        level: Of its heading.
    """
    if not section.blocks:
        return Markup("")
    blocks = [
        _figure(slug, b, level + 1) if isinstance(b, Figure) else _grid(slug, b, level + 1)
        for b in section.blocks
    ]
    body = tag("div", *blocks, class_="pair") if section.columns > 1 else joined(blocks)
    return tag("section", tag(f"h{level}", section.title, class_="section"), body)


def _figure(slug: str, figure: Figure, level: int) -> Markup:
    plots = [
        tag(
            "div",
            # Where it is empty it still keeps the place of the chart's menu.
            tag(f"h{level + 1}", plot.title, class_="plot-title")
            if plot.title
            else tag("div", class_="plot-title"),
            tag("div", id=f"{slug}-{figure.name}-{i}", class_="chart"),
            class_="plot",
        )
        for i, plot in enumerate(figure.plots)
    ]
    shown = tag("div", *plots, class_="plots wide" if figure.wide else "plots")
    return tag(
        "figure",
        tag("figcaption", _heading(figure.title, level), tag("p", figure.says)),
        *(_legend(legend) for legend in figure.legends if figure.plots),
        shown if figure.plots else tag("p", "Nothing to draw.", class_="nothing"),
        _downloads(slug, [figure.table, *figure.more]),
        id=f"{slug}-{figure.name}",
    )


def _grid(slug: str, grid: Grid, level: int) -> Markup:
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in grid.head)))
    bodies = []
    for i, (title, rows) in enumerate(grid.groups):
        heading = tag("th", tag("span", title), colspan=len(grid.head), scope="rowgroup")
        lines = [_row(row, grid.standing.get((i, j))) for j, row in enumerate(rows)]
        bodies.append(tag("tbody", tag("tr", heading, class_="group") if title else None, *lines))
    scroll = tag(
        "div", tag("table", tag("caption", grid.title), head, *bodies), class_="scroll", tabindex=0,
        role="region", aria_label=grid.title,
    )  # fmt: skip
    hint = tag("p", "The table goes on to the right: scroll sideways →", class_="hint")
    kind = "prose" if grid.prose else None
    table = tag("div", tag("div", scroll, class_="table"), hint, class_=kind)
    says = tag("p", grid.says) if grid.says else None
    links = _downloads(slug, [grid.table] if grid.table is not None else [])
    if grid.folded:
        return tag("details", tag("summary", grid.title), says, table, links, class_="folded")
    return tag("div", _heading(grid.title, level), says, table, links, class_="grid")


def _row(row: Sequence[str | Mark], standing: Standing | None) -> Markup:
    sign = None if standing is None else tag("span", f"{standing.value} ", class_="standing")
    return tag(
        "tr",
        tag("th", sign, _text(row[0]), scope="row"),
        *(_cell(cell) for cell in row[1:]),
        class_=None if standing is None else standing.name.lower(),
    )


def _heading(title: str, level: int) -> Markup:
    return tag(f"h{level}", title, class_="block")


def _text(cell: str | Mark) -> str:
    return cell.text if isinstance(cell, Mark) else cell


def _cell(cell: str | Mark) -> Markup:
    if isinstance(cell, str):
        return tag("td", cell)
    sign, kind = _SIGNS[cell.good]
    return tag("td", tag("span", sign, class_=kind), f" {cell.text}")


def _legend(legend: Legend) -> Markup:
    entries = [tag("li", _swatch("circle", color), name) for name, color in legend.colors.items()]
    entries += [tag("li", _swatch(shape, GREY), name) for name, shape in legend.shapes.items()]
    entries += [
        tag("li", _swatch("square", PALETTE[0], strength), name)
        for name, strength in legend.shades.items()
    ]
    said = tag("li", f"{legend.title}:") if legend.shades else None
    return tag("ul", said, *entries, class_="legend", aria_label=legend.title)


def _swatch(shape: str, color: str, strength: float | None = None) -> Markup:
    """One of the marks that charts have; of a shade with an outline, since it may be too pale."""
    shade = "" if strength is None else f' fill-opacity="{strength:.2f}" class="shade"'
    path = Markup(f'<path d="{OUTLINES[shape]}"{shade}/>')
    return tag("svg", path, viewBox="-6 -6 12 12", fill=color, aria_hidden="true")


def _downloads(slug: str, tables: list[Table]) -> Markup:
    """Links that the page's script fills, since they need no room in the file then."""
    links = [
        tag(
            "a",
            f"download CSV: {table.name}",
            download=f"{slug}-{table.name}.csv",
            data_task=slug,
            data_table=table.name,
            hidden=True,
        )
        for table in tables
    ]
    return tag("p", *links, class_="downloads") if links else Markup("")
