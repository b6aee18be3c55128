"""Bars and heat maps as Vega-Lite specifications; see `charts`."""

from collections.abc import Sequence

import altair as alt

from fleetprune_sim.report.chart_parts import COUNT, Spec, color_of, finish, tip
from fleetprune_sim.report.style import GREY, PALETTE, SHADES


def bars(
    table: str,
    column: str,
    variants: Sequence[str],
    classes: Sequence[str],
    *,
    title: str,
    labels: str = COUNT,
    divisor: float = 1,
    pale: str = "false",
    note: str = "",
) -> Spec:
    """One bar per class and variant.

    Args:
        table: Name of the table.
        column: What the bars show.
        variants: In the order of their colours.
        classes: From top to bottom.
        title: Of the axis.
        labels: Expression for what is written beside the axis.
        divisor: Of the figures, for the axis.
        pale: Condition under which a bar is not to be taken at its word.
        note: Expression for what is written behind a bar, or where there is none; "": nothing.
    """
    placed = alt.Chart(alt.NamedData(table)).encode(
        y=alt.Y(
            "class:N",
            sort=list(classes),
            title=None,
            scale=alt.Scale(domain=list(classes), paddingInner=0.25, paddingOuter=0.1),
        ),
        yOffset=alt.YOffset(
            "variant:N", sort=list(variants), scale=alt.Scale(domain=list(variants))
        ),
    )
    chart = (
        placed.transform_filter(f"isValid(datum.{column})")
        .transform_calculate(shown=f"datum.{column} / {divisor}")
        .mark_bar(cornerRadiusEnd=2)
        .encode(
            x=alt.X("shown:Q", title=title, axis=alt.Axis(tickCount=5, labelExpr=labels)),
            color=color_of("variant", variants),
            opacity=alt.condition(pale, alt.value(0.4), alt.value(1.0)),
            tooltip=[
                tip("variant"),
                tip("class"),
                tip(column, "Q", ",.4~g"),
                tip("seeds", "Q"),
            ],
        )
    )
    bar = max(13 if note else 9, 22 - 2 * len(variants))
    if note:
        written = (
            placed.transform_calculate(
                shown=f"isValid(datum.{column}) ? datum.{column} / {divisor} : 0", note=note
            )
            .mark_text(align="left", dx=4, fontSize=10, color=GREY)
            .encode(x=alt.X("shown:Q"), text="note:N")
        )
        chart = alt.layer(chart, written)
    return finish(chart, round(len(classes) * (len(variants) * bar + 8)))


def keep(groups: Sequence[str], color: str) -> Spec:
    """Units that are kept, before those of the dense model, per group from input to output."""
    base = alt.Chart(alt.NamedData("units")).encode(
        y=alt.Y("group:N", sort=list(groups), title=None, axis=alt.Axis(labelLimit=110)),
        tooltip=[tip("group"), tip("units", "Q", "~r"), tip("dense", "Q")],
    )
    whole = base.mark_bar(color=GREY, opacity=0.25).encode(
        x=alt.X("dense:Q", title="units", axis=alt.Axis(tickCount=4, labelExpr=COUNT))
    )
    kept = base.mark_bar(color=color).encode(x=alt.X("units:Q"))
    return finish(alt.layer(whole, kept), 15 * len(groups))


def heat_map(labels: Sequence[str]) -> Spec:
    """Devices by labels: the darker, the larger the label's share of the device's samples."""
    chart = (
        alt.Chart(alt.NamedData("partition"))
        .mark_rect(color=PALETTE[0])
        .encode(
            x=alt.X(
                "device:N", sort=None, title="devices", axis=alt.Axis(labels=False, ticks=False)
            ),
            y=alt.Y("label:N", sort=list(labels), title="label", axis=alt.Axis(labelLimit=90)),
            opacity=alt.Opacity(
                "share:Q", scale=alt.Scale(domain=[0, 1], range=list(SHADES)), legend=None
            ),
            tooltip=[
                tip("device"),
                tip("label"),
                tip("samples", "Q"),
                tip("share", "Q", ".0%"),
            ],
        )
    )
    return finish(chart, 15 * len(labels))
