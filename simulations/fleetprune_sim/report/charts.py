"""Charts as Vega-Lite specifications: no data, only the names of tables.

A page holds each table once and each specification once; a chart is a specification with the rows
of one class, or with all.
"""

from collections.abc import Sequence

import altair as alt

from fleetprune_sim.report.chart_parts import (
    BYTES,
    COUNT,
    Spec,
    color_of,
    cycled,
    finish,
    percent_axis,
    tip,
    unit_of,
)
from fleetprune_sim.report.cost_axis import STEP, logarithmic
from fleetprune_sim.report.style import GREY, SHAPES
from fleetprune_sim.report.tables import SHIPPED

HEIGHT = 220


def curve(
    x: str,
    variants: Sequence[str],
    domain: tuple[float, float],
    *,
    longest: float,
    band: bool,
    few: bool,
) -> Spec:
    """Validation accuracy over rounds, bytes or virtual time.

    Args:
        x: Column: `round`, `bytes` or `virtual_s`.
        variants: In the order of their colours.
        domain: Of the accuracy, the same in every class's chart.
        longest: Seconds of the longest training, which decides the unit of virtual time.
        band: Whether to shade a standard deviation.
        few: Whether single evaluations are marked.
    """
    seconds, unit = unit_of(longest)
    title = {"round": "round", "bytes": "bytes both ways, whole fleet", "virtual_s": unit}[x]
    base = (
        alt.Chart(alt.NamedData("accuracy"))
        .transform_calculate(time=f"datum.virtual_s / {seconds}")
        .encode(
            x=alt.X(
                f"{'time' if x == 'virtual_s' else x}:Q",
                title=title,
                scale=alt.Scale(zero=True),
                axis=alt.Axis(tickCount=4, labelExpr=BYTES if x == "bytes" else alt.Undefined),
            ),
            color=color_of("variant", variants),
        )
    )
    scale = alt.Scale(domain=list(domain), zero=False, nice=False)
    y = alt.Y("accuracy:Q", title=None, scale=scale, axis=percent_axis())
    line = base.mark_line(strokeWidth=2, clip=True).encode(y=y)
    # Points that are not seen still show their figures when they are pointed at.
    dots = base.mark_point(filled=True, clip=True, size=28, opacity=1.0 if few else 0.0).encode(
        y=y,
        tooltip=[
            tip("variant"),
            tip("round", "Q"),
            tip("accuracy", "Q", ".1%"),
            tip("low", "Q", ".1%"),
            tip("high", "Q", ".1%"),
            tip("seeds", "Q"),
            tip("bytes", "Q", ".3s"),
            tip("virtual_s", "Q", ",.0f"),
        ],
    )
    layers = [line, dots]
    if band:
        area = base.mark_area(opacity=0.16, clip=True).encode(
            y=alt.Y("low:Q", title=None, scale=scale), y2="high:Q"
        )
        layers.insert(0, area)
    return finish(alt.layer(*layers), HEIGHT)


def pareto(
    cost: str,
    variants: Sequence[str],
    classes: Sequence[str],
    costs: Sequence[float],
    *,
    whiskers: bool,
    widest: int,
) -> Spec:
    """Accuracy against `macs` or `bytes`: a point per variant and class, and the front.

    Args:
        cost: Column.
        variants: In the order of their colours.
        classes: In the order of their shapes.
        costs: All that are drawn.
        whiskers: Whether to draw standard deviations.
        widest: Most steps that a point stands beside its place.
    """
    title = {"macs": "MACs of one inference", "bytes": "bytes of the file"}[cost]
    padding = 14 + STEP * widest
    scale = alt.Scale(zero=False, nice=False, padding=padding)
    if logarithmic(costs):
        scale = alt.Scale(type="log", nice=False, padding=padding)
        title += ", logarithmic scale"
    x = alt.X(
        f"{cost}:Q",
        title=title,
        scale=scale,
        axis=alt.Axis(
            tickCount=6, labelOverlap=True, labelExpr=BYTES if cost == "bytes" else COUNT
        ),
    )
    y_scale = alt.Scale(zero=False, padding=12)
    y = alt.Y("accuracy:Q", title="accuracy", scale=y_scale, axis=percent_axis())
    beside = alt.ExprRef(f"{STEP} * datum.{cost}_side")
    known = alt.Chart(alt.NamedData("pareto")).transform_filter(f"isValid(datum.{cost})")
    front = (
        known.transform_filter(f"datum.{cost}_front")
        .mark_line(strokeDash=[5, 4], strokeWidth=1.5, color=GREY, interpolate="step-after")
        .encode(x=x, y=y)
    )
    lines = (
        known.transform_filter("datum.high > datum.low")
        .mark_rule(strokeWidth=1.2, opacity=0.55, xOffset=beside)
        .encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=color_of("variant", variants))
    )
    dots = known.mark_point(size=95, strokeWidth=1.8, xOffset=beside).encode(
        x=x,
        y=y,
        color=color_of("variant", variants),
        fill=alt.condition(
            f"datum.counted == '{SHIPPED}'",
            color_of("variant", variants, kind=alt.Fill),
            alt.value("transparent"),
        ),
        shape=alt.Shape(
            "class:N",
            scale=alt.Scale(domain=list(classes), range=cycled(SHAPES, len(classes))),
            legend=None,
        ),
        opacity=alt.condition("datum.within_budget", alt.value(1.0), alt.value(0.4)),
        tooltip=[
            tip("variant"),
            tip("class"),
            tip("accuracy", "Q", ".1%"),
            tip("macs", "Q", ",.0f"),
            tip("bytes", "Q", ",.0f"),
            tip("within_budget"),
            tip("counted"),
            tip("seeds", "Q"),
        ],
    )
    return finish(alt.layer(front, *([lines] if whiskers else []), dots), 330)
