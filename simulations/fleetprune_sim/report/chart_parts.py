"""What all charts have in common."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from fleetprune_sim.report.style import PALETTE

Spec = dict[str, Any]

UNITS = (
    (86_400, "virtual days"),
    (3600, "virtual hours"),
    (60, "virtual minutes"),
    (1, "virtual seconds"),
)
COUNT = "datum.value ? format(datum.value, '~s') : '0'"
BYTES = "datum.value ? replace(format(datum.value, '~s'), /([a-zA-Z]?)$/, ' $1B') : '0'"
"""Labels of an axis."""


def unit_of(seconds: float) -> tuple[int, str]:
    """A unit of virtual time in seconds, and its name: one of which there are at least three."""
    return next((unit for unit in UNITS if seconds >= 3 * unit[0]), UNITS[-1])


def finish(chart: Any, height: int) -> Spec:
    """A chart as wide as its place, without what the page says itself."""
    spec: Spec = chart.properties(width="container", height=height).to_dict(
        context={"pre_transform": False}
    )
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    for unwanted in ("$schema", "config"):
        spec.pop(unwanted, None)
    return spec


def percent_axis() -> alt.Axis:
    """Of accuracies."""
    return alt.Axis(format=".3~%", tickCount=5)


def color_of(field: str, domain: Sequence[str], kind: Any = alt.Color) -> Any:
    """Colours of a column's values, the same in every chart; the page has the legend."""
    scale = alt.Scale(domain=list(domain), range=cycled(PALETTE, len(domain)))
    return kind(f"{field}:N", scale=scale, legend=None)


def cycled(values: Sequence[str], n: int) -> list[str]:
    """The first n of the values, which repeat."""
    return [values[i % len(values)] for i in range(n)]


def tip(field: str, kind: str = "N", number: str | None = None) -> alt.Tooltip:
    """A line of a tooltip."""
    title = field.replace("_", " ")
    if number is None:
        return alt.Tooltip(f"{field}:{kind}", title=title)
    return alt.Tooltip(f"{field}:{kind}", title=title, format=number)
